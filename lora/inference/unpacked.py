"""A packed base that answers. A token at a time, every product would form its weights anew: where there is room, plain
Linears take the place of packed ones, and an adapter is merged into them. Else all stays as it was trained, packed and
with the adapter beside it: slower, in little memory, and the same answers up to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora.adapter.merge import merge_and_unload, merged, plain_linear
from lora.errors import say
from lora.quant.linear import QuantLinear

SHARE = 2  # plain Linears may take half of the free memory; cache and activations need the rest


def dense_bytes(model: nn.Module) -> int:
    """The bytes of a model's packed Linears as plain ones."""
    packed = (module for module in model.modules() if isinstance(module, QuantLinear))
    return sum(one.in_features * one.out_features * one.dtype.itemsize for one in packed)


def fits(model: nn.Module, free: int | None, copies: int = 1) -> bool:
    """Is there room for all packed Linears as plain ones, `copies` times, where `free` bytes are left? Nothing packed
    needs no room; None is not known, and then little is taken."""
    needed = SHARE * copies * dense_bytes(model)
    return needed == 0 or (free is not None and needed <= free)


def unpack(model: nn.Module, free: int | None, copies: int = 1) -> bool:
    """Merge the adapter on `model`, if it has one, and put plain Linears in place of all; or, where that does not fit,
    change nothing and say so. Returns whether it did."""
    if not fits(model, free, copies):
        say_packed(model)
        return False
    merge_and_unload(model)
    with torch.no_grad():
        for path, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                model.set_submodule(path, plain_linear(module, module.weight))
    return True


def say_packed(model: nn.Module) -> None:
    size = dense_bytes(model) / 1e9
    say(f"note     the base stays packed: {size:.2g} GB more are over half of the free memory; answers come slower")


@contextmanager
def merged_if(dense: bool, model: nn.Module) -> Iterator[None]:
    """`merged`, or nothing."""
    if not dense:
        yield
        return
    with merged(model):
        yield
