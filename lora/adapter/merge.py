"""Merge an adapter into the weights (one rounding), unmerge (bit for bit), unload (plain Linears again)."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora import ops
from lora.adapter.inject import lora_layers
from lora.adapter.layer import LoRALinear
from lora.errors import BadNumbers


def merged_weight(weight: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """W + ΔW as a new tensor: the sum is formed in float32 or wider and rounded once, to `dtype` or W's own."""
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return (weight.to(wide) + delta).to(dtype or weight.dtype)


FIX = "Use another adapter, or a smaller alpha"


class NotFinite(BadNumbers, ValueError):
    """An adapter, or its sum with the base, has a NaN or an infinity at `place`."""

    def __init__(self, place: str, what: str, fix: str):
        super().__init__(f"not finite in {place}: {what}nothing was changed. {fix}")
        self.place = place


def check_finite(layers: dict[str, LoRALinear]) -> None:
    """Raises NotFinite naming the first adapter tensor with a NaN or an infinity."""
    for path, layer in layers.items():
        for name, tensor in layer.named_parameters(recurse=False):
            if not ops.is_finite(tensor):
                raise NotFinite(f"{path}.{name}", "", "Train the adapter again")


@torch.no_grad()
def changes_a_weight(model: nn.Module) -> bool:
    """Is W' another than W in any layer that is not packed? Of an adapter that was trained the first one says so."""
    layers = [layer for layer in lora_layers(model).values() if type(layer.base) is nn.Linear]
    return any(not torch.equal(merged_weight(x.base.weight, x.delta()), x.base.weight) for x in layers)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Let every LoRALinear compute with W' = W + ΔW. Merging twice is merging once.

    Raises NotFinite, with nothing changed, where an adapter (or a sum with it) is not finite.
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if not layer.merged}
    check_finite(layers)
    sums = {}
    for path, layer in layers.items():
        sums[layer] = merged_weight(layer.base.weight, layer.delta())
        if not ops.is_finite(sums[layer]):
            raise NotFinite(path, "the merged weight; ", FIX)
    for layer, weight in sums.items():
        layer.merged_weight = weight


def unmerge(model: nn.Module) -> None:
    """Drop W' again: the base tensors, which were never written, are what they were, bit for bit.

    Raises ValueError where no layer is merged.
    """
    layers = [layer for layer in lora_layers(model).values() if layer.merged]
    if not layers:
        raise ValueError("no layer is merged")
    for layer in layers:
        layer.merged_weight = None


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is merged. Raises NotFinite."""
    merge(model)
    try:
        yield
    finally:
        if any(layer.merged for layer in lora_layers(model).values()):  # there is none where every weight trains
            unmerge(model)


def shared(model: nn.Module) -> set[int]:
    """Which of a model's parameters, by their id, have more than one name."""
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in names.items() if count > 1}


def put(model: nn.Module, path: str, layer: LoRALinear, weight: torch.Tensor | None, tied: set[int]) -> None:
    """The plain Linear at `path`, with W' in place of `weight` if it has changed. A head whose tensor was also the
    embedding's, so one of those `tied`, no longer is then, and transformers' config has to say so, or its files
    contradict it."""
    if weight is not None and type(layer.base) is not nn.Linear:
        model.set_submodule(path, plain_linear(layer.base, weight))
        return
    if weight is not None:
        if id(layer.base.weight) in tied and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
            model.config.tie_word_embeddings = False
        layer.base.weight = nn.Parameter(weight, requires_grad=False)
    model.set_submodule(path, layer.base)


def plain_linear(base: nn.Module, weight: torch.Tensor) -> nn.Linear:
    """A Linear with this weight, frozen, and the bias of the base itself."""
    linear = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), base.bias
    return linear.train(base.training)


@torch.no_grad()
def unload(model: nn.Module) -> nn.Module:
    """Put plain Linears back, holding W' where a layer was merged and W where it was not; returns the model."""
    tied = shared(model)
    for path, layer in lora_layers(model).items():
        put(model, path, layer, layer.merged_weight, tied)
    return model


@torch.no_grad()
def merge_and_unload(model: nn.Module) -> nn.Module:
    """`merge` then `unload`, layer by layer, so that there are never two copies of the model; returns the model.

    Raises NotFinite, with nothing changed, where an adapter (or a sum with it) is not finite.
    """
    layers, tied = lora_layers(model), shared(model)
    check_finite(layers)
    for path, layer in layers.items():  # formed twice, so that all are seen before the first is kept
        if not ops.is_finite(merged_weight(layer.base.weight, layer.delta())):
            raise NotFinite(path, "the merged weight; ", FIX)
    for path, layer in layers.items():
        put(model, path, layer, merged_weight(layer.base.weight, layer.delta()), tied)
    return model
