"""A model on disk: find it, load it strictly, write it again with changed weights.

A checkpoint, folder or GGUF file, offers: `name`, `hub_id` (what others call it), `described`, `config` (the raw
config.json), `header` (tensor name -> dtype name and shape), `read(name)` and `files()` (what is beside the weights).
"""

import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Protocol

import torch

from lora import files
from lora.errors import BadInput, Refused
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from lora.pretrained import fused, hub
from lora.text.chat import Chat
from lora.text.template import BUILT_IN, FROZEN_DATE, ChatTemplate
from lora.text.tokenizer import Tokenizer

SIDECARS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE",
)  # fmt: skip
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "config.json")
TEMPLATE_LIMIT = 2**20  # bytes
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Checkpoint(Protocol):
    name: str
    hub_id: str
    described: str
    config: dict
    header: dict[str, tuple[str, tuple[int, ...]]]

    def read(self, name: str) -> torch.Tensor: ...
    def files(self) -> dict[str, bytes]: ...


class ModelFolder:
    """A hub folder: config.json, safetensors (one file, or shards with an index), tokenizer files.

    Raises BadInput for what is missing or broken, Refused for pickles and for paths that lead out of the folder.
    """

    def __init__(self, path: Path, name: str | None = None, described: str | None = None):
        self.path = Path(path)
        if not (self.path / "config.json").exists():
            raise BadInput(f"no model in {path}: there is no config.json. Give a model folder, hub id or .gguf file")
        self.config = files.read_json(self.path / "config.json")
        source = self.path / "source.json"
        source = files.read_json(source) if source.exists() else {}
        source = {key: value for key, value in source.items() if isinstance(value, str)}  # another program's, perhaps
        self.name = name or source.get("model") or str(self.path.absolute())
        self.described = described or source.get("source") or f"folder {self.path}"
        self.hub_id = source.get("hub_id") or self.name
        self._shards = [files.Safetensors(self.path / shard) for shard in self._shard_names()]
        self._where = {}
        for shard in self._shards:
            for tensor in shard.header:
                if tensor in self._where:
                    raise BadInput(f"broken model in {shard.path}:{tensor}: it is in two files. Download it again")
                self._where[tensor] = shard
        header = {tensor: shard.header[tensor] for tensor, shard in self._where.items()}
        self.header, self._rows = fused.split(self.config, header, f"{self.name}/config.json")

    def _shard_names(self) -> list[str]:
        index = self.path / "model.safetensors.index.json"
        if (self.path / "model.safetensors").exists() or not index.exists():
            if not (self.path / "model.safetensors").exists():
                if any(next(self.path.glob(pattern), None) for pattern in PICKLES):
                    fix = "Convert them to safetensors"
                    raise Refused(f"pickle in {self.path}: pickled weights are never opened. {fix}")
                raise BadInput(f"no weights in {self.path}: there is no model.safetensors. Download the model again")
            return ["model.safetensors"]
        weight_map = files.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise BadInput(f"broken index in {index}:weight_map: not a map of names to files. Download it again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if not re.fullmatch(r"[\w.-]+\.safetensors", name) or name.startswith("."):
                fix = "Download it from a source you trust"
                raise Refused(f"path in {index}:weight_map: {name!r} is not a file of this folder. {fix}")
        missing = [name for name in names if not (self.path / name).exists()]
        if missing:
            raise BadInput(
                *(f"missing weights in {self.path / name}: named in {index}. Download it" for name in missing)
            )
        if not names:
            raise BadInput(f"broken index in {index}:weight_map: it is empty. Download it again")
        return names

    def read(self, name: str) -> torch.Tensor:
        return self.read_rows(name, 0, self.header[name][1][0]) if name in self._rows else self._where[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of a tensor, without reading the others."""
        whole, first = self._rows.get(name, (name, 0))
        return self._where[whole].read_rows(whole, first + start, first + stop)

    def shard_of(self, name: str) -> str:
        """The file a tensor is in."""
        whole, _ = self._rows.get(name, (name, 0))
        return self._where[whole].path.name

    def files(self) -> dict[str, bytes]:
        return {name: files.read_bytes(self.path / name) for name in SIDECARS if files.is_regular(self.path / name)}


def find(model: str) -> Checkpoint:
    """A folder, a `.gguf` file, `smollm2-135m-instruct`, or a hub id `owner/name`; fetched where it is not here yet."""
    path = Path(model)
    if model == hub.DEFAULT:
        return ModelFolder(hub.default_model())
    if path.suffix == ".gguf" or files.is_regular(path):
        from lora.pretrained.gguf import GGUFFile  # its package takes as long to import as a model to load

        return GGUFFile(path)
    if path.is_dir():
        return ModelFolder(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith(("./", "../", "/")):
        folder = hub.hub_model(model)
        return ModelFolder(folder, name=model, described=f"hub {model} at {folder.name[:12]}")
    raise BadInput(f"no model in {model}: no such folder. Give a folder, owner/name, a .gguf file or {hub.DEFAULT}")


def _leftovers(checkpoint: Checkpoint, config: ModelConfig) -> set[str]:
    """Tensors that carry nothing: old rotary buffers, and a head that repeats the tied embedding bit for bit."""
    names = {name for name in checkpoint.header if name.endswith(".rotary_emb.inv_freq")}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and {head, embedding} <= checkpoint.header.keys():
        same = checkpoint.header[head] == checkpoint.header[embedding]
        if not same or not torch.equal(checkpoint.read(head), checkpoint.read(embedding)):
            raise BadInput(
                f"contradiction in {checkpoint.name}:{head}: the config ties it to the embedding, and it differs. "
                "Set tie_word_embeddings to false, or remove it"
            )
        names.add(head)
    return names


def empty_model(checkpoint: Checkpoint) -> Model:
    """The decoder on `meta`, without memory for weights, after every name, shape and dtype has been checked.

    Raises BadInput with all that is missing, extra, of another shape, or of a dtype we do not compute with.
    """
    config = ModelConfig.from_json(checkpoint.config, f"{checkpoint.name}/config.json")
    with torch.device("meta"):
        model = Model(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems, header = [], checkpoint.header
    ignored = _leftovers(checkpoint, config)
    for name in sorted(expected.keys() | header.keys() - ignored):
        if name not in header:
            problems.append(f"missing tensor in {checkpoint.name}:{name}: the config asks for it. Download it again")
        elif name not in expected:
            problems.append(
                f"extra tensor in {checkpoint.name}:{name}: the config has no place for it. Give its config"
            )
        elif header[name][1] != expected[name]:
            shapes = f"shape {header[name][1]}, the config asks for {expected[name]}"
            problems.append(f"wrong tensor in {checkpoint.name}:{name}: {shapes}. Download it again")
        elif header[name][0] not in files.DTYPES:
            problems.append(
                f"wrong tensor in {checkpoint.name}:{name}: dtype {header[name][0]}. Give an unquantised model"
            )
    if problems:
        raise BadInput(*problems)
    return model


def load_model(checkpoint: Checkpoint | str, dtype: torch.dtype = torch.float32, device="cpu") -> Model:
    """The model in `checkpoint` (or found by that name), all of it in `dtype`; in eval mode, nothing trainable.

    Raises BadInput as `empty_model`, and for weights that are not finite.
    """
    checkpoint = find(checkpoint) if isinstance(checkpoint, str) else checkpoint
    model, weights, problems = empty_model(checkpoint), {}, []
    for name in model.state_dict():
        weights[name] = checkpoint.read(name).to(device=device, dtype=dtype)
        if not torch.isfinite(weights[name].sum()) and not torch.isfinite(weights[name]).all():
            problems.append(f"wrong tensor in {checkpoint.name}:{name}: values that are not finite. Download it again")
    if problems:
        raise BadInput(*problems)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _header(tokenizer: Tokenizer, special: dict[str, str]) -> str:
    """What a built-in template needs to be whole wherever it is read: this model's end, and its BOS if it has one."""
    eos, begin = special.get("eos_token", ""), tokenizer.encode_document("a")[:1]
    bos = next((name for name, i in tokenizer.control.items() if [i] == begin), None)
    header = f"{{% set eos_token = {json.dumps(eos, ensure_ascii=False)} %}}"
    if bos is None:
        return header
    special["bos_token"] = bos
    return f"{header}{{% set bos_token = {json.dumps(bos, ensure_ascii=False)} %}}{{{{ bos_token }}}}"


def load_chat(
    checkpoint: Checkpoint, system: str | bool | None = None, template: str | None = None, today: date = FROZEN_DATE
) -> Chat:
    """Tokenizer and chat template of a checkpoint; or the `template` of that name (BUILT_IN) or in that file. `system`
    as in `Chat`, `today` for templates that ask. Raises BadInput for what is missing."""
    beside, name = checkpoint.files(), checkpoint.name
    if "tokenizer.json" not in beside:
        raise BadInput(f"no tokenizer in {name}: there is no tokenizer.json. Convert it with its original library")
    tokenizer = Tokenizer(beside["tokenizer.json"], f"{name}/tokenizer.json")
    config = ModelConfig.from_json(checkpoint.config, f"{name}/config.json")
    if tokenizer.size > config.vocab_size:
        why = f"{tokenizer.size} tokens, the model has {config.vocab_size}"
        raise BadInput(f"wrong tokenizer in {name}/tokenizer.json: {why}. Give the tokenizer of this model")

    def json_file(file: str) -> dict:
        return files.read_json(Path(name) / file, beside[file]) if file in beside else {}

    generation, special = json_file("generation_config.json"), {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the second is believed
        for key, value in json_file(file).items():
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str):
                if any("\ud800" <= c <= "\udfff" for c in value):
                    half = "half a surrogate pair, which is no character. Repair it"
                    raise BadInput(f"wrong text in {name}/{file}:{key}: {half}")
                special[key] = value
    ids = generation.get("eos_token_id")
    eos = [*config.eos_token_ids, *(ids if isinstance(ids, list) else [ids])]
    eos.append(tokenizer.id(special["eos_token"]) if "eos_token" in special else None)
    eos = list(dict.fromkeys(i for i in eos if type(i) is int and 0 <= i < config.vocab_size))

    if template is not None and special.get("eos_token") not in tokenizer.control and eos:
        special["eos_token"] = tokenizer.token(eos[0]) or ""
    if template in BUILT_IN:
        where, source = f"--template {template}", _header(tokenizer, special) + BUILT_IN[template]
        if template == "chatml" and "<|im_end|>" not in tokenizer.control:
            others = ", ".join(other for other in BUILT_IN if other != template)
            raise BadInput(f"wrong {where} in {name}: its tokenizer has no token <|im_end|>. Give {others} or a file")
    elif template is not None:
        if not Path(template).exists() and "." not in template:
            known = ", ".join(BUILT_IN)
            raise BadInput(f"unknown template in the command line: {template}. Give {known} or a file")
        where, source = template, files.read_bytes(Path(template), TEMPLATE_LIMIT).decode("utf-8-sig", "replace")
    elif "chat_template.jinja" in beside:
        where, source = f"{name}/chat_template.jinja", beside["chat_template.jinja"].decode(errors="replace")
    else:
        file = "chat_template.json" if "chat_template.json" in beside else "tokenizer_config.json"
        where, source = f"{name}/{file}", (json_file(file) if file in beside else {}).get("chat_template")
        if isinstance(source, list):  # several by name; "default" is the one for chats
            source = next(
                (t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None
            )
    if not isinstance(source, str):
        fix = f"Give an instruct or chat model, or --template {', '.join(BUILT_IN)} or a file"
        raise BadInput(f"no chat template in {name}: it seems to be a base model. {fix}")
    if any("\ud800" <= c <= "\udfff" for c in source):
        raise BadInput(f"wrong text in {where}: half a surrogate pair, which is no character. Repair it")
    return Chat(tokenizer, ChatTemplate(source, special, where, today), eos, system)


def shards(folder: Path) -> list[str]:
    """The names of the weights' files in a folder of ours, which may lack its index yet."""
    index = folder / "model.safetensors.index.json"
    named = files.read_json(index).get("weight_map") if index.is_file() else None
    named = set(map(str, named.values())) if isinstance(named, dict) else set()
    return sorted(named | {shard.name for shard in folder.glob("model-*-of-*.safetensors")})


def write_model(
    checkpoint: Checkpoint,
    folder: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a plain model folder, tensor by tensor: `change(name, tensor)` gives the tensor to write, in `dtype` (by
    default the tensor's own). Files are cut as the checkpoint's are, and what its family fuses is fused again; config,
    tokenizer and template go along."""
    model = empty_model(checkpoint)
    shard_of = getattr(checkpoint, "shard_of", lambda name: "model.safetensors")
    shards: dict[str, dict] = {}
    layout = fused.stored(model.config, model.state_dict())
    for whole, names in layout.items():
        kind = files.NAMES[dtype] if dtype else checkpoint.header[names[0]][0]
        shapes = [checkpoint.header[name][1] for name in names]
        shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        shards.setdefault(shard_of(names[0]), {})[whole] = (kind, shape)

    def read(whole: str) -> torch.Tensor:
        parts = [change(name, checkpoint.read(name)) for name in layout[whole]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    for shard, header in shards.items():
        converted = lambda name: read(name).to(files.DTYPES[header[name][0]])  # noqa: B023, E731
        files.write_safetensors(folder / shard, header, converted, metadata={"format": "pt"})
    if list(shards) != ["model.safetensors"]:
        sizes = (
            files.DTYPES[kind].itemsize * torch.Size(shape).numel()
            for h in shards.values()
            for kind, shape in h.values()
        )
        weight_map = {name: shard for shard, header in shards.items() for name in header}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        files.write_json(folder / "model.safetensors.index.json", index)
    for name, data in checkpoint.files().items():
        files.write_bytes(folder / name, data)
    config = dict(checkpoint.config)
    if family := model.config.written_as:
        config |= {"model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"]}
        config.pop("auto_map", None)  # to code that computes the family under its other name
    if dtype:
        for key in ("torch_dtype", "dtype"):
            if key in config:
                config[key] = str(dtype).removeprefix("torch.")
    files.write_json(folder / "config.json", config)
