"""What a checkpoint holds, and how it is saved and loaded.

    adapter_model.safetensors   base_model.model.<path>.lora_A.weight (r, in)
                                base_model.model.<path>.lora_B.weight (out, r)
                                base_model.model.<path>.lora_magnitude_vector (out,)    of DoRA alone
    adapter_config.json         r, lora_alpha, target_modules, ...: `peft_config`
    passport.json               name and hashes of the base, the tokenizer, the data: `passport`

PEFT reads the first two; nothing of ours goes into them. train.py lays the chat template beside them, and while it runs
what it needs to go on: `lora.train.run_state`.

Loading is strict: every tensor is expected, present, of the right shape and finite, or nothing is loaded.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from lora import files
from lora.adapter.inject import lora_layers, patch
from lora.adapter.layer import LoRALinear
from lora.adapter.peft_config import CONFIG, MERGE, LoRAConfig, config_of, read_config
from lora.adapter.targets import linears, path_endswith
from lora.errors import BadInput, Refused

WEIGHTS, PASSPORT = "adapter_model.safetensors", "passport.json"
PREFIX = "base_model.model."  # PEFT's wrapper round the model
HEAD = f"{PREFIX}lm_head.base_layer.weight"  # the base's own, which PEFT saves beside an adapter on it


def save(model: nn.Module, folder: Path, base: str = "", passport: dict | None = None, task: str | None = None) -> None:
    """Write the adapter of a patched model into `folder`, the weights last: an adapter with weights is whole.
    `task` is PEFT's name for what the model does; with CAUSAL_LM, PEFT expects a model that generates.

    Raises ValueError where the model has no LoRA layers, or not all of one kind and dropout.
    """
    exported = {path: layer.export_tensors() for path, layer in lora_layers(model).items()}
    sizes = {path: (rank, alpha) for path, (rank, alpha, _) in exported.items()}
    tensors = {f"{PREFIX}{path}.{name}": tensor for path, (*_, its) in exported.items() for name, tensor in its.items()}
    config, folder = config_of(model, sizes, base, task), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / CONFIG, config)
    if passport is not None:
        files.write_json(folder / PASSPORT, passport)
    files.write_tensors(folder / WEIGHTS, tensors, metadata={"format": "pt"})


@torch.no_grad()
def load(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> LoRAConfig:
    """Patch `model` with the adapter in `folder`; its tensors are converted to `dtype`. Nothing is changed on an error.

    The config says which Linears are meant if it lists them by name; if it has patterns, the names of the tensors do.
    Raises BadInput listing every missing, extra or wrong-shape tensor.
    """
    config = read_config(folder)
    names = config.kind.shapes(1, 1, 1)
    tensors = read_tensors(folder, names)
    meant = {name.removesuffix(f".{end}") for name in tensors for end in names if name.endswith(f".{end}")}
    paths = {p for p in linears(model) if (path_endswith(p, *config.targets) if config.targets else p in meant)}
    if not paths:
        there = ", ".join(sorted({p.rsplit(".", 1)[-1] for p in linears(model)}))
        raise BadInput(f"wrong adapter in {folder}: its targets match nothing in this model, which has {there}. "
                       f"Give the base it was trained on: {config.base or 'unknown'}")  # fmt: skip
    expected = {}
    for path in paths:
        shapes = config.kind.shapes(config.at(path)[0], *model.get_submodule(path).weight.shape)
        expected |= {f"{path}.{name}": shape for name, shape in shapes.items()}
    if problems := [*_differences(expected, tensors, Path(folder) / WEIGHTS)]:
        raise BadInput(*problems)
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already; unload them first")
    _check_head(model, folder)
    layers = {p: config.kind(model.get_submodule(p), *config.at(p), config.dropout, dtype, None) for p in sorted(paths)}
    patch(model, layers)
    for path, layer in layers.items():
        device = layer.base.weight.device if not layer.base.weight.is_meta else "cpu"  # a base on meta: for merge.py
        for name in names:
            attribute = name.removesuffix(".weight")
            value = tensors[f"{path}.{name}"].to(device, getattr(layer, attribute).dtype)
            setattr(layer, attribute, nn.Parameter(value))
    return config


def _differences(expected: dict[str, tuple], tensors: dict[str, torch.Tensor], file: Path) -> Iterator[str]:
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            yield f"missing tensor in {file}:{PREFIX}{name}: its target is named. Train the adapter again"
        elif name not in expected:
            yield f"extra tensor in {file}:{PREFIX}{name}: no target of this base. Give the right base"
        elif tuple(tensors[name].shape) != expected[name]:
            shapes = f"shape {tuple(tensors[name].shape)}, expected {expected[name]}"
            yield f"wrong tensor in {file}:{PREFIX}{name}: {shapes}. Give the base it was trained on"


@torch.no_grad()
def restore(model: nn.Module, folder: Path) -> None:
    """Write the adapter in `folder` into the layers of a model that is patched alike. Raises BadInput."""
    exported = {path: layer.export_tensors()[-1] for path, layer in lora_layers(model).items()}
    tensors = read_tensors(folder, {name for its in exported.values() for name in its})
    wanted = {f"{path}.{name}": tensor.shape for path, its in exported.items() for name, tensor in its.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        raise BadInput(f"wrong adapter in {folder}: its tensors are not those of this run. Give another one")
    for path, layer in lora_layers(model).items():
        layer.load_tensors({name: tensors[f"{path}.{name}"] for name in exported[path]})


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
    names = [name for name in file.header if name != HEAD]
    for name in names:
        if not name.startswith(PREFIX) or not name.endswith(known):
            what = "it adapts an embedding, which is not implemented. " + MERGE
            plain = "it is no part of a plain LoRA. Remove it"
            problems.append(f"extra tensor in {path}:{name}: {what if '.lora_embedding_' in name else plain}")
        elif (dtype := file.header[name][0]) not in files.DTYPES:
            problems.append(f"wrong tensor in {path}:{name}: dtype {dtype} is not supported. Save it as F32 or BF16")
    for name in names if not problems else ():
        tensor = tensors[name.removeprefix(PREFIX)] = file.read(name)
        if not torch.isfinite(tensor).all():
            problems.append(f"wrong tensor in {path}:{name}: values that are not finite. Train the adapter again")
    if problems:
        raise BadInput(*problems)
    return tensors


def _check_head(model: nn.Module, folder: Path) -> None:
    """Raises BadInput where the file has a head and the model's is another; of a model on `meta` only the shape is
    known."""
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
