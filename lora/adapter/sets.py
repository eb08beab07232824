"""Several adapters of one base, of which one is in place: the layers of each stand around the very same Linears.

So a reward model, or what the policy was at step 0, needs no second base. The tensors of the base are never written.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lora.adapter import store, value_head
from lora.adapter.inject import lora_layers
from lora.adapter.layer import LoRALinear
from lora.adapter.value_head import ValueHead


class AdapterSet(NamedTuple):
    """The layers of an adapter by path, and its value head if it has one."""

    layers: dict[str, LoRALinear]
    head: ValueHead | None


def take_out(model: nn.Module) -> AdapterSet:
    """Put the base's own Linears back; returns what was in place. Its head stays until `put_in`."""
    found = AdapterSet(lora_layers(model), value_head.of(model))
    for path, layer in found.layers.items():
        model.set_submodule(path, layer.base)
    return found


def put_in(model: nn.Module, adapter: AdapterSet) -> None:
    """Put the layers of an adapter in place of the base's Linears, and its head in place of any other."""
    for path, layer in adapter.layers.items():
        model.set_submodule(path, layer)
    value_head.place(model, adapter.head)


def read(
    model: nn.Module, folder: str | Path, read_base: store.Read | None = None, dtype: torch.dtype = torch.float32
) -> AdapterSet:
    """The adapter in a folder, frozen, for this model, which is left as it was. Raises BadInput as `store.load`."""
    before, trained = take_out(model), [p for p in model.parameters() if p.requires_grad]
    try:
        store.load(model, folder, dtype, read_base)
    finally:
        found = take_out(model)
        put_in(model, before)
    for module in (*found.layers.values(), *filter(None, [found.head])):
        module.requires_grad_(False).eval()
    for p in trained:  # the base, if it trains, is a part of those layers
        p.requires_grad_()
    return found


@contextmanager
def in_place(model: nn.Module, adapter: AdapterSet) -> Iterator[None]:
    """Inside the block the model computes with this adapter, afterwards with what it had before."""
    before = take_out(model)
    put_in(model, adapter)
    try:
        yield
    finally:
        take_out(model)
        put_in(model, before)
