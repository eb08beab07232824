"""What a checkpoint holds, and how it is saved and loaded.

    adapter_model.safetensors   base_model.model.<path>.lora_A.weight (r, in)
                                base_model.model.<path>.lora_B.weight (out, r)
                                base_model.model.<path>.lora_magnitude_vector (out,)    of DoRA alone
    adapter_config.json         r, lora_alpha, target_modules, ...: `peft_config`
    passport.json               name and hashes of the base, the tokenizer, the data: `passport`
    value_head.safetensors      of a reward model: `value_head`

PEFT reads the first two; nothing of ours goes into them. train.py lays the chat template beside them, and while it runs
what it needs to go on: `lora.train.run_state`.

Loading is strict: every tensor is expected, present, of the right shape and finite, or nothing is loaded.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from lora import files
from lora.adapter import value_head
from lora.adapter.inject import lora_layers, patch
from lora.adapter.peft_config import CONFIG, LoRAConfig, config_of, read_config
from lora.adapter.peft_tensors import MERGE, PREFIX, WEIGHTS, Read, extra, fused, read_tensors
from lora.adapter.targets import linears, path_endswith
from lora.errors import BadInput

PASSPORT = "passport.json"


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
    value_head.save(model, folder)
    files.write_tensors(folder / WEIGHTS, tensors, metadata={"format": "pt"})


@torch.no_grad()
def load(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32, read: Read | None = None) -> LoRAConfig:
    """Patch `model` with the adapter in `folder`; its tensors are converted to `dtype`. Nothing is changed on an error.

    The config says which Linears are meant if it lists them by name; if it has patterns, the names of the tensors do.
    `read` gives the base's tensors as they are on disk, for what the file repeats of them. The value head in `folder`
    becomes the model's; without one it has none. Raises BadInput listing every missing, extra or wrong-shape tensor.
    """
    config = read_config(folder)
    names = config.kind.shapes(1, 1, 1)
    tensors = read_tensors(folder, names, model, read)
    meant = {name.removesuffix(f".{end}") for name in tensors for end in names if name.endswith(f".{end}")}
    known = {path: (path,) for path in linears(model)}  # by its own path, and by that of the Linear it is a part of
    known |= {part: (part, whole) for whole, parts in fused(model) for part in parts}
    if config.targets:
        meant = {path for path, called in known.items() if any(path_endswith(p, *config.targets) for p in called)}
    paths = meant & known.keys()
    if not paths and not any("lm_head." in name for name in tensors):
        there = ", ".join(sorted({p.rsplit(".", 1)[-1] for p in linears(model)}))
        raise BadInput(f"wrong adapter in {folder}: its targets match nothing in this model, which has {there}. "
                       f"Give the base it was trained on: {config.base or 'unknown'}")  # fmt: skip
    expected = {}
    for path in paths:
        linear = model.get_submodule(path)
        shapes = config.kind.shapes(config.at(*known[path])[0], linear.out_features, linear.in_features)
        expected |= {f"{path}.{name}": shape for name, shape in shapes.items()}
    trained = {"none": (), "lora_only": paths, "all": known}[config.bias]  # whose biases were
    if any(model.get_submodule(path).bias is not None for path in trained):
        why = f"{config.bias!r} is not implemented: biases are never trained here. {MERGE}"
        raise BadInput(f"unsupported adapter in {Path(folder) / CONFIG}:bias: {why}")
    if problems := [*_differences(expected, tensors, Path(folder) / WEIGHTS, model)]:
        raise BadInput(*problems)
    head = value_head.read(folder, model)
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already; unload them first")
    sizes = {path: config.at(*known[path]) for path in sorted(paths)}
    layers = {p: config.kind(model.get_submodule(p), *its, config.dropout, dtype, None) for p, its in sizes.items()}
    patch(model, layers)
    for path, layer in layers.items():
        device = "cpu" if layer.lora_A.is_meta else layer.lora_A.device  # a base on meta: for merge.py
        for name in names:
            attribute = name.removesuffix(".weight")
            value = tensors[f"{path}.{name}"].to(device, getattr(layer, attribute).dtype)
            setattr(layer, attribute, nn.Parameter(value))
    value_head.place(model, head)  # this adapter's, or none: what a base or another adapter scores is not its work
    return config


def _differences(
    expected: dict[str, tuple], tensors: dict[str, torch.Tensor], file: Path, model: nn.Module
) -> Iterator[str]:
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            yield f"missing tensor in {file}:{PREFIX}{name}: its target is named. Train the adapter again"
        elif name not in expected:
            yield f"extra tensor in {file}:{PREFIX}{name}: {extra(name, model)}"
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
    value_head.restore(model, folder)
