"""A model by its name: find its files, check every tensor against the config, load it strictly."""

import re
from pathlib import Path

import torch
from tqdm import tqdm

from lora import files, ops
from lora.adapter import value_head
from lora.errors import BadInput
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from lora.network.families import quantised
from lora.pretrained import default_model, hub
from lora.pretrained.folder import ModelFiles, ModelFolder
from lora.pretrained.quantised import BITS_4, KEEP, Quantised
from lora.quant.linear import QuantLinear

# tensors that only quantised weights have, left over where `prequantised` does not read them: GPTQ's and AWQ's, MLX's
PACKED = (".qweight", ".qzeros", ".scales", ".weight_scale", ".weight_scale_inv",
          ".weight_packed")  # fmt: skip


def find(model: str, quant: str | None = None) -> ModelFiles:
    """The files of a model by its name, their Linears packed on reading where a mode of `Quantised` is given."""
    found = _find(model)
    return Quantised(found, quant) if quant else found


def smallest(base: ModelFiles) -> Quantised:
    """A model in four bits, as its own files have it or packed on reading."""
    kept = any(base.block_type(name) in BITS_4 for name in base.header)
    return Quantised(base, KEEP if kept else "nf4")


def _find(model: str) -> ModelFiles:
    """A folder, a `.gguf` file, `smollm2-135m-instruct`, or a hub id `owner/name`; fetched where it is not here yet."""
    path = Path(model)
    if model == default_model.NAME:
        return ModelFolder(default_model.folder())
    if path.suffix == ".gguf" or files.is_regular(path):
        from lora.pretrained.gguf import GGUFFile  # its package takes as long to import as a model to load

        return GGUFFile(path)
    if path.is_dir():
        return ModelFolder(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith(("./", "../", "/")):
        folder = hub.hub_model(model)
        return ModelFolder(folder, name=model, described=f"hub {model} at {folder.name[:12]}")
    raise BadInput(
        f"no model in {model}: no such folder. Give a folder, owner/name, a .gguf file or {default_model.NAME}"
    )


def empty_model(base: ModelFiles) -> Model:
    """The decoder on `meta`, without memory for weights, after every name, shape and dtype has been checked.

    Raises BadInput with all that is missing, extra, of another shape, or of a dtype we do not compute with.
    """
    config = ModelConfig.from_json(base.config, f"{base.name}/config.json")
    with torch.device("meta"):
        model = Model(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems, header = [], base.header
    if packed := next((name for name in header if name.endswith(PACKED)), None):
        why, fix = quantised(base.config, base.name)
        raise BadInput(f"unsupported model in {base.name}:{packed}: {why}. {fix}")
    for name in sorted(expected.keys() | header.keys() - _leftovers(base, config)):
        if name not in header:
            problems.append(f"missing tensor in {base.name}:{name}: the config asks for it. Download it again")
        elif name not in expected:
            problems.append(f"extra tensor in {base.name}:{name}: the config has no place for it. Give its config")
        elif header[name][1] != expected[name]:
            shapes = f"shape {header[name][1]}, the config asks for {expected[name]}"
            problems.append(f"wrong tensor in {base.name}:{name}: {shapes}. Download it again")
        elif header[name][0] not in files.DTYPES:
            problems.append(f"wrong tensor in {base.name}:{name}: dtype {header[name][0]}. Give an unquantised model")
    if problems:
        raise BadInput(*problems)
    return model


def _leftovers(base: ModelFiles, config: ModelConfig) -> set[str]:
    """Tensors that are nothing of the decoder: old rotary buffers, a head that repeats the tied embedding bit for bit,
    and a value head."""
    names = {name for name in base.header if name.endswith(".rotary_emb.inv_freq")}
    if value_head.SHAPES.keys() <= base.header.keys():
        names.update(value_head.SHAPES)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and {head, embedding} <= base.header.keys():
        same = base.header[head] == base.header[embedding]
        if not same or not torch.equal(base.read(head), base.read(embedding)):
            why = "the config ties it to the embedding, and it differs. Set tie_word_embeddings to false, or remove it"
            raise BadInput(f"contradiction in {base.name}:{head}: {why}")
        names.add(head)
    return names


def load_model(base: ModelFiles | str, dtype: torch.dtype = torch.float32, device="cpu") -> Model:
    """The model in `base` (or found by that name), all of it in `dtype` but for what is packed; in eval mode, nothing
    trainable.

    Raises BadInput as `empty_model`, and for weights that are not finite.
    """
    base = find(base) if isinstance(base, str) else base
    model, problems = empty_model(base), []
    if base.quant:
        _place_packed(model, base, dtype, device, problems)
    weights = {}
    for name in model.state_dict():
        weights[name] = base.read(name, dtype).to(device)
        if not ops.is_finite(weights[name]):
            problems.append(_not_finite(base, name))
    if problems:
        raise BadInput(*problems)
    model.load_state_dict(weights, strict=True, assign=True)
    value_head.place(model, value_head.of_base(base, model))
    return model.requires_grad_(False).eval()


def _place_packed(model: Model, base: ModelFiles, dtype: torch.dtype, device, problems: list[str]) -> None:
    """A `QuantLinear` in the place of each Linear that is packed; its bias is still to be loaded."""
    names = [name for name in model.state_dict() if base.nbytes(name)]
    for name in tqdm(names, desc="packing", unit="tensor", leave=False, disable=None, delay=2):
        packed, path = base.packed(name).to(device), name.removesuffix(".weight")
        if not packed.is_finite():
            problems.append(_not_finite(base, name))
        model.set_submodule(path, QuantLinear(packed, model.get_submodule(path).bias, dtype))


def _not_finite(base: ModelFiles, name: str) -> str:
    return f"wrong tensor in {base.name}:{name}: values that are not finite. Download it again"
