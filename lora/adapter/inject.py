"""Freeze a model, choose Linears by their paths, and put a `LoRALinear` in the place of each.

What trains follows from construction: everything is frozen first, and only new lora_A and lora_B require gradients.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from lora.adapter.layer import LoRALinear
from lora.adapter.targets import find_targets, first_match


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Path -> LoRALinear, in the order of the model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def inject(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: Sequence[str] = ("all",),
    dtype: torch.dtype = torch.float32,
    kind: type[LoRALinear] = LoRALinear,
    init: str | None = "kaiming",
    layers: str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> list[str]:
    """Freeze `model` and patch its target Linears in place; returns their paths. Nothing is changed on an error.

    `kind` is a class of `lora.adapter.variants`; `init` says how it starts: kaiming, gaussian or, for PiSSA, pissa, and
    None where values are about to be restored. `layers`, as `0-7,20-`, leaves others out. Patterns map a target to the
    rank or alpha there; the first that matches counts.

    Raises ValueError: what matches nothing, a model that is patched already, a rank that is too high for PiSSA.
    """
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already; unload them first")
    paths = find_targets(model, targets, layers, rank_pattern, alpha_pattern)
    made, trained = {}, {p: p.requires_grad for p in model.parameters()}
    for path in tqdm(paths, desc="adapter", unit="layer", leave=False, disable=None, delay=2):  # the SVDs of PiSSA
        here = first_match(path, rank_pattern, rank), first_match(path, alpha_pattern, alpha)
        try:
            made[path] = kind(model.get_submodule(path), *here, dropout, dtype, init)
        except ValueError as error:
            for p, before in trained.items():
                p.requires_grad_(before)
            raise ValueError(f"{path}: {error}") from None
    patch(model, made)
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
