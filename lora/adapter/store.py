"""An adapter as two files in PEFT's format, and the passport that says which base it belongs to.

    adapter_model.safetensors   base_model.model.<path>.lora_A.weight (r, in), .lora_B.weight (out, r)
    adapter_config.json         r, lora_alpha, target_modules, ...    https://huggingface.co/docs/peft
    passport.json               ours: name and hashes of the base; nothing of ours goes into adapter_config.json

Reading is strict: every tensor is expected, present, of the right shape and finite, or nothing is loaded.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lora import files
from lora.adapter.inject import inject, linears, lora_layers
from lora.errors import BadInput, Refused

WEIGHTS, CONFIG, PASSPORT = "adapter_model.safetensors", "adapter_config.json", "passport.json"
PREFIX = "base_model.model."  # PEFT's wrapper round the model

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
    targets: tuple[str, ...] = ()  # dotted suffixes
    base: str = ""
    pattern: str | None = None  # PEFT: target_modules as a string is a regular expression for the whole path
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] = field(default=())

    def paths(self, model: nn.Module) -> set[str]:
        """The Linears of `model` that PEFT would patch for this config."""

        def ends(path, suffixes):
            return any(path == suffix or path.endswith("." + suffix) for suffix in suffixes)

        chosen = set()
        for path in linears(model):
            named = re.fullmatch(self.pattern, path) if self.pattern else ends(path, self.targets)
            in_layers = not self.layers or any(int(n) in self.layers for n in re.findall(r"\.(\d+)\.", path))
            if named and in_layers and not ends(path, self.exclude):
                chosen.add(path)
        return chosen


def target_modules(model: nn.Module) -> list[str]:
    """The shortest list of names from which PEFT chooses exactly the patched Linears: last names, or whole paths."""
    patched = set(lora_layers(model))
    names = sorted({path.rsplit(".", 1)[-1] for path in patched})
    unpatched = {path.rsplit(".", 1)[-1] for path in linears(model) if not path.endswith(".base")}
    return sorted(patched) if unpatched & set(names) else names


def save(model: nn.Module, folder: Path, base: str = "", passport: dict | None = None) -> None:
    """Write the adapter of a patched model into `folder`, the weights last: an adapter with weights is whole.

    Raises ValueError where the model has no LoRA layers, or not all of one rank, alpha and dropout.
    """
    layers = lora_layers(model)
    kinds = {(layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError("the model has no LoRA layers" if not kinds else f"layers differ in rank or alpha: {kinds}")
    [(rank, alpha, dropout)] = kinds
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
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
    header = {name: (files.NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    files.write_safetensors(folder / WEIGHTS, header, tensors.get, metadata={"format": "pt"})


def read_config(folder: Path) -> LoRAConfig:
    """Raises BadInput for a file that is not a LoRA's, and naming every field whose maths is not implemented."""
    folder = Path(folder)
    path = folder / CONFIG
    if not folder.is_dir() or not path.exists():
        inner = sorted(p.parent for pattern in ("*/", "checkpoints/*/") for p in folder.glob(pattern + CONFIG))
        hint = f"Did you mean {inner[-1]}?" if inner else "Give a folder that train.py or PEFT wrote"
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
    targets, pattern = raw.get("target_modules"), None
    if isinstance(targets, str):
        targets, pattern = [], r".*\.\w+" if targets == "all-linear" else targets
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"wrong adapter in {path}:target_modules: no regular expression: {error}. Give names")
    lists = {}
    for key, value, kind in (
        ("target_modules", targets, str),
        ("exclude_modules", raw.get("exclude_modules"), str),
        ("layers_to_transform", raw.get("layers_to_transform"), int),
    ):
        value = [value] if isinstance(value, kind) else value or []
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            problems.append(f"wrong adapter in {path}:{key}: {value!r} is not a list of {kind.__name__}. Repair it")
        lists[key] = value
    if not pattern and not lists["target_modules"]:
        problems.append(f"wrong adapter in {path}:target_modules: it names nothing. Train it again")
    if problems:
        raise BadInput(*problems)
    base = raw.get("base_model_name_or_path")
    return LoRAConfig(
        rank, alpha, float(dropout), tuple(lists["target_modules"]), base if isinstance(base, str) else "",
        pattern, tuple(lists["exclude_modules"]), tuple(lists["layers_to_transform"]),
    )  # fmt: skip


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

    Raises BadInput listing every missing, extra or wrong-shape tensor.
    """
    config, tensors = read_config(folder), read_tensors(folder)
    path, paths = Path(folder) / WEIGHTS, config.paths(model)
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
        for name in ("lora_A", "lora_B"):
            setattr(layer, name, nn.Parameter(tensors[f"{target}.{name}.weight"].to(device, dtype)))
    return config
