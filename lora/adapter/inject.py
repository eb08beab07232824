"""Freeze a model, choose Linears by their paths, and put a `LoRALinear` in the place of each.

What trains follows from construction: everything is frozen first, and only new lora_A and lora_B require gradients.
"""

import re
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lora.adapter.layer import LoRALinear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
GROUPS = {"all": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Path -> Linear, for every Linear that could be a target. Subclasses are left alone: their owners use them in
    other ways than calling them (`nn.MultiheadAttention` reads the weight of its output projection)."""
    return {path: module for path, module in model.named_modules() if type(module) is nn.Linear}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Path -> LoRALinear, in the order of the model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def matches(path: str, target: str) -> bool:
    """Does a target name this path? `all`, `attention`, `mlp`; `re:PATTERN` for the whole path; else a suffix that
    begins on a dot: `o_proj` matches `layers.0.o_proj`, never `layers.0.foo_proj`."""
    if target.startswith("re:"):
        return re.fullmatch(target[3:], path) is not None
    return ends(path, *GROUPS.get(target, (target,)))


def ends(path: str, *suffixes: str) -> bool:
    """Does the path end in one of these, whole names only?"""
    return any(path == suffix or path.endswith("." + suffix) for suffix in suffixes)


def choose(model: nn.Module, targets: Sequence[str] = ("all",)) -> list[str]:
    """The paths of all Linears that some target names, in the order of the model.

    Raises ValueError for no target, and naming every target that matches nothing, with what there is.
    """
    paths = list(linears(model))
    problems = [] if targets else ["no target is given"]
    for target in targets:
        try:
            if not any(matches(path, target) for path in paths):
                names = sorted({path.rsplit(".", 1)[-1] for path in paths})
                problems.append(f"target {target!r} matches no Linear; there are: {', '.join(names) or 'none'}")
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"target {target!r} is no regular expression: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return [path for path in paths if any(matches(path, target) for target in targets)]


def inject(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: Sequence[str] = ("all",),
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Freeze `model` and patch its target Linears in place; returns their paths. Nothing is changed on an error.

    Raises ValueError: a target that matches nothing, a model that is patched already.
    """
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already; unload them first")
    paths = choose(model, targets)
    patch(model, {path: LoRALinear(model.get_submodule(path), rank, alpha, dropout, dtype) for path in paths})
    return paths


def patch(model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    """Freeze `model` and put each of `layers` in the place of its path; then only what they bring can train."""
    model.requires_grad_(False)
    for path, layer in layers.items():
        model.set_submodule(path, layer.train(model.training))


@contextmanager
def disabled(model: nn.Module):
    """Inside the block the model computes what the base computes, merged or not."""
    before = {layer: layer.enabled for layer in lora_layers(model).values()}
    try:
        for layer in before:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled
