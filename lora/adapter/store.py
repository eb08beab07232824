"""An adapter as two files in PEFT's format, and the passport that says which base it belongs to.

    adapter_model.safetensors   base_model.model.<path>.lora_A.weight (r, in), .lora_B.weight (out, r)
    adapter_config.json         r, lora_alpha, target_modules, ...    https://huggingface.co/docs/peft
    passport.json               ours: name and hashes of the base; nothing of ours goes into adapter_config.json

Reading is strict: every tensor is expected, present, of the right shape and finite, or nothing is loaded.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora import files
from lora.adapter.inject import ends, inject, linears, lora_layers
from lora.errors import BadInput, Refused

WEIGHTS, CONFIG, PASSPORT = "adapter_model.safetensors", "adapter_config.json", "passport.json"
PREFIX = "base_model.model."  # PEFT's wrapper round the model
NUMBERS = ("lora_A", "lora_B")

# Fields of adapter_config.json that say nothing about what the adapter computes. Any other field must hold a neutral
# value (null, false, 0, "", [], {}) or the one given here; else it changes the maths and we have not implemented it.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "lora_dropout", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "ensure_weight_tying", "runtime_config",
}  # fmt: skip
NEUTRAL = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class LoRAConfig:
    """What `adapter_config.json` says, as far as we use it."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # dotted suffixes, or none where the config chooses by patterns or layers
    base: str = ""


def target_modules(model: nn.Module) -> list[str] | str:
    """The shortest form from which PEFT chooses exactly the patched Linears: last names, whole paths, or a pattern."""
    patched = set(lora_layers(model))
    unpatched = [path for path in linears(model) if path.removesuffix(".base") not in patched]
    for names in ({path.rsplit(".", 1)[-1] for path in patched}, patched):
        if not any(ends(path, *names) for path in unpatched):
            return sorted(names)
    return "|".join(re.escape(path) for path in sorted(patched))  # where one whole path ends another


def save(model: nn.Module, folder: Path, base: str = "", passport: dict | None = None, task: str | None = None) -> None:
    """Write the adapter of a patched model into `folder`, the weights last: an adapter with weights is whole.
    `task` is PEFT's name for what the model does; with CAUSAL_LM, PEFT expects a model that generates.

    Raises ValueError where the model has no LoRA layers, or not all of one rank, alpha and dropout.
    """
    layers = lora_layers(model)
    kinds = {(layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError("the model has no LoRA layers" if not kinds else f"layers differ in rank or alpha: {kinds}")
    [(rank, alpha, dropout)] = kinds
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
    }
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / CONFIG, config)
    if passport is not None:
        files.write_json(folder / PASSPORT, passport)
    files.write_tensors(folder / WEIGHTS, tensors, metadata={"format": "pt"})


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
            problems.append(f"unsupported adapter in {path}:{key}: {value!r} is not implemented. Use a plain LoRA")
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0)
    for key, value, low, high in (
        ("r", rank, 1, 65536),
        ("lora_alpha", alpha, 1e-9, 1e9),
        ("lora_dropout", dropout, 0, 1 - 1e-9),
    ):
        kinds = (int,) if key == "r" else (int, float)
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
    return LoRAConfig(rank, alpha, dropout, tuple(targets), base if isinstance(base, str) else "")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Tensor name without PEFT's prefix (`<path>.lora_A.weight`) -> tensor. Raises BadInput, Refused for pickles."""
    path = Path(folder) / WEIGHTS
    if not path.exists():
        pickles = [name for name in ("adapter_model.bin", "adapter_model.pt") if (Path(folder) / name).exists()]
        if pickles:
            fix = "Convert it to safetensors"
            raise Refused(f"pickle in {Path(folder) / pickles[0]}: pickled weights are never opened. {fix}")
        raise BadInput(f"missing adapter in {path}: there is no such file. The adapter is incomplete; train it again")
    file, problems, tensors = files.Safetensors(path), [], {}
    for name, (dtype, _) in file.header.items():
        if not name.startswith(PREFIX) or not name.endswith((".lora_A.weight", ".lora_B.weight")):
            problems.append(f"extra tensor in {path}:{name}: it is no part of a plain LoRA. Remove it")
        elif dtype not in files.DTYPES:
            problems.append(f"wrong tensor in {path}:{name}: dtype {dtype} is not supported. Save it as F32 or BF16")
    if problems:
        raise BadInput(*problems)
    for name in file.header:
        tensors[name.removeprefix(PREFIX)] = file.read(name)
        if not torch.isfinite(tensors[name.removeprefix(PREFIX)]).all():
            problems.append(f"wrong tensor in {path}:{name}: values that are not finite. Train the adapter again")
    if problems:
        raise BadInput(*problems)
    return tensors


@torch.no_grad()
def load(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> LoRAConfig:
    """Patch `model` with the adapter in `folder`; its tensors are converted to `dtype`. Nothing is changed on an error.

    The config says which Linears are meant if it lists them by name; if it has patterns, the names of the tensors do.
    Raises BadInput listing every missing, extra or wrong-shape tensor.
    """
    config, tensors = read_config(folder), read_tensors(folder)
    path, meant = Path(folder) / WEIGHTS, {name.rsplit(".", 2)[0] for name in tensors}
    paths = {p for p in linears(model) if (ends(p, *config.targets) if config.targets else p in meant)}
    if not paths:
        there = ", ".join(sorted({p.rsplit(".", 1)[-1] for p in linears(model)}))
        raise BadInput(f"wrong adapter in {folder}: its targets match nothing in this model, which has {there}. "
                       f"Give the base it was trained on: {config.base or 'unknown'}")  # fmt: skip
    expected = {}
    for target in paths:
        out_features, in_features = model.get_submodule(target).weight.shape
        expected[f"{target}.lora_A.weight"] = (config.rank, in_features)
        expected[f"{target}.lora_B.weight"] = (out_features, config.rank)
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
    # whole-path targets, so that exactly the modules the config means are patched
    inject(model, config.rank, config.alpha, config.dropout, [f"re:{re.escape(p)}" for p in sorted(paths)], dtype)
    for target, layer in lora_layers(model).items():
        device = layer.base.weight.device if not layer.base.weight.is_meta else "cpu"  # a base on meta: for merge.py
        for name in NUMBERS:
            setattr(layer, name, nn.Parameter(tensors[f"{target}.{name}.weight"].to(device, dtype)))
    return config


@torch.no_grad()
def restore(model: nn.Module, folder: Path) -> None:
    """Write the adapter in `folder` into the layers of a model that is patched alike. Raises BadInput."""
    layers, tensors = lora_layers(model), read_tensors(folder)
    wanted = {f"{path}.{name}.weight": getattr(layer, name) for path, layer in layers.items() for name in NUMBERS}
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in wanted.items()}:
        raise BadInput(f"wrong adapter in {folder}: its tensors are not those of this run. Give another one")
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name])
