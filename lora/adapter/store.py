"""An adapter as two files in PEFT's format, and the passport that says which base it belongs to.

    adapter_model.safetensors   base_model.model.<path>.lora_A.weight (r, in), .lora_B.weight (out, r); of DoRA
                                .lora_magnitude_vector (out,)
    adapter_config.json         r, lora_alpha, target_modules, ...    https://huggingface.co/docs/peft
    passport.json               ours: name and hashes of the base; nothing of ours goes into adapter_config.json

Reading is strict: every tensor is expected, present, of the right shape and finite, or nothing is loaded.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lora import files
from lora.adapter.inject import lora_layers, patch
from lora.adapter.layer import LoRALinear
from lora.adapter.targets import linears, path_endswith
from lora.adapter.variants import KINDS, kind_of
from lora.errors import BadInput, Refused

WEIGHTS, CONFIG, PASSPORT = "adapter_model.safetensors", "adapter_config.json", "passport.json"
PREFIX = "base_model.model."  # PEFT's wrapper round the model
HEAD = f"{PREFIX}lm_head.base_layer.weight"

# Fields of adapter_config.json that say nothing about what the adapter computes. Any other field must hold a neutral
# value (null, false, 0, "", [], {}) or the one given here; else it changes the maths and we have not implemented it.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "lora_dropout", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "ensure_weight_tying", "runtime_config",
}  # fmt: skip
NEUTRAL = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    **{name: (True, False, None) for kind in KINDS for name in kind.fields},
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# Why others are not, and the way out, where there is more to say
CHANGED = "the base was changed when the adapter was made. Convert it to a plain LoRA with PEFT: save_pretrained(..., "
CHANGED += "path_initial_model_for_weight_conversion=...)"
MERGE = "Merge it into its base with PEFT, or train without"
REASONS = {
    "init_lora_weights": CHANGED,
    "bias": f"biases are never trained here. {MERGE}",
    "lora_bias": f"biases are never trained here. {MERGE}",
    "modules_to_save": f"it brings whole layers. {MERGE}",
    "trainable_token_indices": f"it brings rows of the embedding. {MERGE}",
    "target_parameters": f"it adapts what is no Linear. {MERGE}",
}


# A key of rank_pattern or alpha_pattern is a regular expression. Names alone, with nothing to repeat or to choose from,
# are matched in bounded time; others are refused.
NAMES_ALONE, MOST_KEYS = re.compile(r"\^?(\w|[.-]|\\\W)+\$?"), 10_000


@dataclass(frozen=True)
class LoRAConfig:
    """What `adapter_config.json` says, as far as we use it."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # dotted suffixes, or none where the config chooses by patterns or layers
    base: str = ""
    ranks: dict[str, int] = field(default_factory=dict)  # PEFT's rank_pattern: where not `rank`
    alphas: dict[str, float] = field(default_factory=dict)
    kind: type[LoRALinear] = LoRALinear

    def of(self) -> Callable[[str], tuple[int, float]]:
        """path -> rank and alpha there. The first key that matches the end of a path counts, as in PEFT."""
        ranks, alphas = (
            [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]
            for pattern in (self.ranks, self.alphas)
        )

        def first(pattern, path: str, default):
            return next((value for key, value in pattern if key.match(path)), default)

        return lambda path: (first(ranks, path, self.rank), first(alphas, path, self.alpha))


def target_modules(model: nn.Module) -> list[str] | str:
    """The shortest form from which PEFT chooses exactly the patched Linears: last names, whole paths, or a pattern."""
    patched = set(lora_layers(model))
    unpatched = [path for path in linears(model) if path.removesuffix(".base") not in patched]
    for names in ({path.rsplit(".", 1)[-1] for path in patched}, patched):
        if not any(path_endswith(path, *names) for path in unpatched):
            return sorted(names)
    return "|".join(re.escape(path) for path in sorted(patched))  # where one whole path ends another


def save(model: nn.Module, folder: Path, base: str = "", passport: dict | None = None, task: str | None = None) -> None:
    """Write the adapter of a patched model into `folder`, the weights last: an adapter with weights is whole.
    `task` is PEFT's name for what the model does; with CAUSAL_LM, PEFT expects a model that generates.

    Raises ValueError where the model has no LoRA layers, or not all of one kind and dropout.
    """
    layers = lora_layers(model)
    kinds = {(type(layer), layer.dropout) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError("the model has no LoRA layers" if not kinds else f"layers differ in kind or dropout: {kinds}")
    [(kind, dropout)] = kinds
    saved = {path: layer.export_tensors() for path, layer in layers.items()}
    [((rank, alpha), _)] = Counter((rank, alpha) for rank, alpha, _ in saved.values()).most_common(1)
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": target_modules(model),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **dict.fromkeys(kind.fields, True),
    }
    for field_name, differing in (
        ("rank_pattern", {path: its for path, (its, _, _) in saved.items() if its != rank}),
        ("alpha_pattern", {path: its for path, (_, its, _) in saved.items() if its != alpha}),
    ):
        if differing:
            config[field_name] = {_pattern(path, layers): value for path, value in differing.items()}
    tensors = {f"{PREFIX}{path}.{name}": tensor for path, (*_, its) in saved.items() for name, tensor in its.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / CONFIG, config)
    if passport is not None:
        files.write_json(folder / PASSPORT, passport)
    files.write_tensors(folder / WEIGHTS, tensors, metadata={"format": "pt"})


def _pattern(path: str, paths) -> str:
    """A key of rank_pattern that matches this path and no other."""
    alone = NAMES_ALONE.fullmatch(path) and not any(other.endswith("." + path) for other in paths)
    return path if alone else f"^{re.escape(path)}"


def read_config(folder: Path) -> LoRAConfig:
    """Raises BadInput for a file that is not a LoRA's, and naming every field whose maths is not implemented."""
    folder = Path(folder)
    path = folder / CONFIG
    if not folder.is_dir() or not path.exists():
        inner = sorted(p.parent for pattern in ("*/", "checkpoints/*/") for p in folder.glob(pattern + CONFIG))
        hint = f"Did you mean {inner[-1]}?" if inner else "Give a folder that train.py or PEFT wrote"
        if (folder / "config.json").exists():
            hint = "It is a whole model, with nothing to merge: give it as --model"
        raise BadInput(f"missing adapter in {folder}: there is no {CONFIG}. {hint}")
    raw, problems = files.read_json(path), []
    for key, value in raw.items():
        neutral = NEUTRAL.get(key, (None, False, 0, "", [], {}))
        if key not in HARMLESS and not any(value == n and type(value) is type(n) for n in neutral):
            why = f": {REASONS[key]}" if key in REASONS else ". Use a plain LoRA"
            problems.append(f"unsupported adapter in {path}:{key}: {value!r} is not implemented{why}")
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0)
    RANK, ALPHA = ((int,), 1, 65536), ((int, float), 1e-9, 1e9)
    ranges = [("r", rank, RANK), ("lora_alpha", alpha, ALPHA), ("lora_dropout", dropout, ((int, float), 0, 1 - 1e-9))]
    patterns = {}
    for name, range_ in (("rank_pattern", RANK), ("alpha_pattern", ALPHA)):
        patterns[name] = raw.get(name) or {}
        if not isinstance(patterns[name], dict) or len(patterns[name]) > MOST_KEYS:
            problems.append(f"wrong adapter in {path}:{name}: not up to {MOST_KEYS} names with values. Train it again")
            continue
        for key, value in patterns[name].items():
            ranges.append((f"{name}.{key}", value, range_))
            if not NAMES_ALONE.fullmatch(key):
                why = "a regular expression is not implemented here"
                problems.append(f"unsupported adapter in {path}:{name}.{key}: {why}. Write out the names it means")
    for key, value, (kinds, low, high) in ranges:
        if type(value) not in kinds or not low <= value <= high:
            problems.append(f"wrong adapter in {path}:{key}: {value!r} is out of range. Train it again")
    if "peft_type" not in raw:
        problems.append(f"wrong adapter in {path}:peft_type: it is missing. Give a LoRA adapter")
    targets, base = raw.get("target_modules"), raw.get("base_model_name_or_path")
    if isinstance(targets, str) and targets:  # a pattern: never run, it could take for ever
        try:
            re.compile(targets)
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"wrong adapter in {path}:target_modules: no regular expression: {error}. Give names")
        targets = []
    elif not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        problems.append(f"wrong adapter in {path}:target_modules: {targets!r} names nothing. Train it again")
    elif any(raw.get(key) not in (None, [], "") for key in ("exclude_modules", "layers_to_transform")):
        targets = []
    if problems:
        raise BadInput(*problems)
    base = base if isinstance(base, str) else ""
    return LoRAConfig(rank, alpha, dropout, tuple(targets), base, *patterns.values(), kind_of(raw))


def read_tensors(folder: Path, known: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensor name without PEFT's prefix (`<path>.lora_A.weight`) -> tensor. Raises BadInput, Refused for pickles.

    `known` are the names that end one; without them, those of a plain LoRA.
    """
    known = tuple(f".{name}" for name in known or LoRALinear.shapes(1, 1, 1))
    path = Path(folder) / WEIGHTS
    if not path.exists():
        pickles = [name for name in ("adapter_model.bin", "adapter_model.pt") if (Path(folder) / name).exists()]
        if pickles:
            fix = "Convert it to safetensors"
            raise Refused(f"pickle in {Path(folder) / pickles[0]}: pickled weights are never opened. {fix}")
        raise BadInput(f"missing adapter in {path}: there is no such file. The adapter is incomplete; train it again")
    file, problems, tensors = files.Safetensors(path), [], {}
    for name, (dtype, _) in file.header.items():
        if name == HEAD:
            continue  # see _check_head
        if not name.startswith(PREFIX) or not name.endswith(known):
            what = "it adapts an embedding, which is not implemented. " + MERGE
            plain = "it is no part of a plain LoRA. Remove it"
            problems.append(f"extra tensor in {path}:{name}: {what if '.lora_embedding_' in name else plain}")
        elif dtype not in files.DTYPES:
            problems.append(f"wrong tensor in {path}:{name}: dtype {dtype} is not supported. Save it as F32 or BF16")
    if problems:
        raise BadInput(*problems)
    for name in (name for name in file.header if name != HEAD):
        tensors[name.removeprefix(PREFIX)] = file.read(name)
        if not torch.isfinite(tensors[name.removeprefix(PREFIX)]).all():
            problems.append(f"wrong tensor in {path}:{name}: values that are not finite. Train the adapter again")
    if problems:
        raise BadInput(*problems)
    return tensors


def _check_head(model: nn.Module, folder: Path) -> None:
    """PEFT saves the base's head beside an adapter on it. Raises BadInput where the model's is another; of a model on
    `meta` only the shape is known."""
    file = files.Safetensors(Path(folder) / WEIGHTS)
    if HEAD not in file.header:
        return
    head, kept = linears(model)["lm_head"].weight.detach(), file.read(HEAD)
    same = head.shape == kept.shape
    if same and not head.is_meta:
        narrow = min(head.dtype, kept.dtype, key=lambda dtype: dtype.itemsize)
        same = torch.equal(head.cpu().to(narrow), kept.to(narrow))
    if not same:
        raise BadInput(f"another head in {file.path}:{HEAD}: not this base's. Give the base it was trained on")


@torch.no_grad()
def load(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> LoRAConfig:
    """Patch `model` with the adapter in `folder`; its tensors are converted to `dtype`. Nothing is changed on an error.

    The config says which Linears are meant if it lists them by name; if it has patterns, the names of the tensors do.
    Raises BadInput listing every missing, extra or wrong-shape tensor.
    """
    config = read_config(folder)
    names = config.kind.shapes(1, 1, 1)
    tensors, path = read_tensors(folder, names), Path(folder) / WEIGHTS
    meant = {name.removesuffix(f".{end}") for name in tensors for end in names if name.endswith(f".{end}")}
    paths = {p for p in linears(model) if (path_endswith(p, *config.targets) if config.targets else p in meant)}
    if not paths:
        there = ", ".join(sorted({p.rsplit(".", 1)[-1] for p in linears(model)}))
        raise BadInput(f"wrong adapter in {folder}: its targets match nothing in this model, which has {there}. "
                       f"Give the base it was trained on: {config.base or 'unknown'}")  # fmt: skip
    expected, of = {}, config.of()
    for target in paths:
        shapes = config.kind.shapes(of(target)[0], *model.get_submodule(target).weight.shape)
        expected |= {f"{target}.{name}": shape for name, shape in shapes.items()}
    problems = []
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            problems.append(f"missing tensor in {path}:{PREFIX}{name}: its target is named. Train the adapter again")
        elif name not in expected:
            problems.append(f"extra tensor in {path}:{PREFIX}{name}: no target of this base. Give the right base")
        elif tuple(tensors[name].shape) != expected[name]:
            shapes = f"shape {tuple(tensors[name].shape)}, expected {expected[name]}"
            problems.append(f"wrong tensor in {path}:{PREFIX}{name}: {shapes}. Give the base it was trained on")
    if problems:
        raise BadInput(*problems)
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already; unload them first")
    _check_head(model, folder)
    layers = {p: config.kind(model.get_submodule(p), *of(p), config.dropout, dtype, None) for p in sorted(paths)}
    patch(model, layers)
    for target, layer in layers.items():
        device = layer.base.weight.device if not layer.base.weight.is_meta else "cpu"  # a base on meta: for merge.py
        for name in names:
            attribute = name.removesuffix(".weight")
            value = tensors[f"{target}.{name}"].to(device, getattr(layer, attribute).dtype)
            setattr(layer, attribute, nn.Parameter(value))
    return config


@torch.no_grad()
def restore(model: nn.Module, folder: Path) -> None:
    """Write the adapter in `folder` into the layers of a model that is patched alike. Raises BadInput."""
    saved = {path: layer.export_tensors()[-1] for path, layer in lora_layers(model).items()}
    tensors = read_tensors(folder, {name for its in saved.values() for name in its})
    wanted = {f"{path}.{name}": tensor.shape for path, its in saved.items() for name, tensor in its.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        raise BadInput(f"wrong adapter in {folder}: its tensors are not those of this run. Give another one")
    for path, layer in lora_layers(model).items():
        layer.load_tensors({name: tensors[f"{path}.{name}"] for name in saved[path]})
