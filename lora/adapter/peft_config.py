"""`adapter_config.json`, PEFT's description of an adapter: what is written, honoured, refused.

    r, lora_alpha, lora_dropout      numbers, and by path where they differ: rank_pattern, alpha_pattern
    target_modules                   which Linears are patched: ends of paths, or a pattern
    use_rslora, use_dora             the variant, a class of `lora.adapter.variants`

A field that says anything else about the maths is refused by name. https://huggingface.co/docs/peft
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from torch import nn

from lora import files
from lora.adapter.inject import lora_layers
from lora.adapter.layer import LoRALinear
from lora.adapter.peft_tensors import MERGE, WEIGHTS
from lora.adapter.targets import linears, path_endswith
from lora.adapter.variants import KINDS, kind_of
from lora.errors import BadInput

CONFIG = "adapter_config.json"

# Fields that say nothing about what the adapter computes, or that are read below. Any other field must hold a neutral
# value (null, false, 0, "", [], {}) or one given here; else it changes the maths and we have not implemented it.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "lora_dropout", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "ensure_weight_tying", "runtime_config",
}  # fmt: skip
NEUTRAL = {
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only", None),  # `load` knows whether there is one
    **{name: (True, False, None) for kind in KINDS for name in kind.fields},
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# Why others are not, and the way out, where there is more to say
CHANGED = "the base was changed when the adapter was made. Convert it to a plain LoRA with PEFT: save_pretrained(..., "
CHANGED += "path_initial_model_for_weight_conversion=...)"
REASONS = {
    "init_lora_weights": CHANGED,
    "lora_bias": f"biases are never trained here. {MERGE}",
    "modules_to_save": f"it brings whole layers. {MERGE}",
    "trainable_token_indices": f"it brings rows of the embedding. {MERGE}",
    "target_parameters": f"it adapts what is no Linear. {MERGE}",
}
RANK, ALPHA, DROPOUT = ((int,), 1, 65536), ((int, float), 1e-9, 1e9), ((int, float), 0, 1 - 1e-9)  # types, least, most

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
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    kind: type[LoRALinear] = LoRALinear
    bias: str = "none"

    def at(self, *paths: str) -> tuple[int, float]:
        """Rank and alpha of the layer at these paths. The first key that matches the end of one counts, as in PEFT."""
        return _first(self.rank_pattern, paths, self.rank), _first(self.alpha_pattern, paths, self.alpha)


def _first(pattern: Mapping[str, float], paths: Iterable[str], usual: float) -> float:
    return next((value for key, value in pattern.items() if any(map(_at_end(key).match, paths))), usual)


@cache
def _at_end(key: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({key})$")


def config_of(model: nn.Module, sizes: Mapping[str, tuple[int, float]], base: str, task: str | None) -> dict:
    """The fields for a patched model; `sizes` are rank and alpha of the layer at each path.

    Raises ValueError where the model has no LoRA layers, or not all of one kind and dropout.
    """
    kinds = {(type(layer), layer.dropout) for layer in lora_layers(model).values()}
    if len(kinds) != 1:
        raise ValueError("the model has no LoRA layers" if not kinds else f"layers differ in kind or dropout: {kinds}")
    [(kind, dropout)] = kinds
    [((rank, alpha), _)] = Counter(sizes.values()).most_common(1)
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
    others = ("rank_pattern", rank, 0), ("alpha_pattern", alpha, 1)
    for name, usual, i in others:
        if pattern := {_pattern(path, sizes): its[i] for path, its in sizes.items() if its[i] != usual}:
            config[name] = pattern
    return config


def target_modules(model: nn.Module) -> list[str] | str:
    """The shortest form from which PEFT chooses exactly the patched Linears: last names, whole paths, or a pattern."""
    patched = set(lora_layers(model))
    unpatched = [path for path in linears(model) if path.removesuffix(".base") not in patched]
    for names in ({path.rsplit(".", 1)[-1] for path in patched}, patched):
        if not any(path_endswith(path, *names) for path in unpatched):
            return sorted(names)
    return "|".join(re.escape(path) for path in sorted(patched))  # where one whole path ends another


def _pattern(path: str, paths) -> str:
    """A key of rank_pattern that matches this path and no other."""
    alone = NAMES_ALONE.fullmatch(path) and not any(other.endswith("." + path) for other in paths)
    return path if alone else f"^{re.escape(path)}"


def read_config(folder: Path) -> LoRAConfig:
    """Raises BadInput for a file that is not a LoRA's, and naming every field whose maths is not implemented."""
    path = Path(folder) / CONFIG
    if not path.exists():
        inner = sorted(p.parent for pattern in ("*/", "checkpoints/*/") for p in Path(folder).glob(pattern + CONFIG))
        hint = f"Did you mean {inner[-1]}?" if inner else "Give a folder that train.py or PEFT wrote"
        if path.with_name("config.json").exists():
            hint = "It is a whole model, with nothing to merge: give it as --model"
        raise BadInput(f"missing adapter in {folder}: there is no {CONFIG}. {hint}")
    raw = files.read_json(path)
    if "peft_type" not in raw and raw.keys() & {"fine_tune_type", "lora_parameters"}:
        fix = "Fuse it there (mlx_lm.fuse) and give the model, or convert it to PEFT's form"
        raise BadInput(f"unsupported adapter in {path}: it is MLX's, which holds A and B the other way round. {fix}")
    if problems := [f"{what} adapter in {path}:{key}: {why}" for what, key, why in _problems(raw, folder)]:
        raise BadInput(*problems)
    targets, base = raw["target_modules"], raw.get("base_model_name_or_path")
    others = any(raw.get(key) not in (None, [], "") for key in ("exclude_modules", "layers_to_transform"))
    targets = () if others or isinstance(targets, str) else tuple(targets)  # a pattern is never run: it may take long
    patterns = (raw.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    dropout, base = raw.get("lora_dropout", 0.0), base if isinstance(base, str) else ""
    bias, kind = raw.get("bias") or "none", kind_of(raw)
    return LoRAConfig(raw["r"], raw["lora_alpha"], dropout, targets, base, *patterns, kind, bias)


def has_copies(modules, folder: Path) -> bool:
    """Is a tensor of each of these in the file? Then it is known there whether it was trained or is the base's own."""
    names = files.Safetensors(path).header if (path := Path(folder) / WEIGHTS).exists() else ()
    return isinstance(modules, list) and all(any(f".{module}." in f".{name}" for name in names) for module in modules)


def _problems(raw: dict, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Kind, field, and why with what to do, of all that is not as it should be."""
    for key, value in raw.items():
        neutral = NEUTRAL.get(key, (None, False, 0, "", [], {}))
        if key == "modules_to_save" and value and has_copies(value, folder):
            continue
        if key not in HARMLESS and not any(value == n and type(value) is type(n) for n in neutral):
            why = f": {REASONS[key]}" if key in REASONS else ". Use a plain LoRA"
            yield "unsupported", key, f"{value!r} is not implemented{why}"
    values = [("r", raw.get("r"), RANK), ("lora_alpha", raw.get("lora_alpha"), ALPHA)]
    values.append(("lora_dropout", raw.get("lora_dropout", 0.0), DROPOUT))
    for name, allowed in (("rank_pattern", RANK), ("alpha_pattern", ALPHA)):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict) or len(pattern) > MOST_KEYS:
            yield "wrong", name, f"not up to {MOST_KEYS} names with values. Train it again"
            continue
        for key, value in pattern.items():
            values.append((f"{name}.{key}", value, allowed))
            if not NAMES_ALONE.fullmatch(key):
                why = "a regular expression is not implemented here. Write out the names it means"
                yield "unsupported", f"{name}.{key}", why
    for key, value, (types, least, most) in values:
        if type(value) not in types or not least <= value <= most:
            yield "wrong", key, f"{value!r} is out of range. Train it again"
    if "peft_type" not in raw:
        yield "wrong", "peft_type", "it is missing. Give a LoRA adapter"
    targets = raw.get("target_modules")
    if isinstance(targets, str) and targets:
        try:
            re.compile(targets)
        except (re.error, OverflowError, RecursionError) as error:
            yield "wrong", "target_modules", f"no regular expression: {error}. Give names"
    elif not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        yield "wrong", "target_modules", f"{targets!r} names nothing. Train it again"
