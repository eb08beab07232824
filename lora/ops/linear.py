"""The seam through which several Linears of one input may run as one."""

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F


def together(x: torch.Tensor, linears: list[nn.Module]) -> tuple[torch.Tensor, ...]:
    """The outputs of several linear maps of x (..., in), each (..., out_i).

    By default a loop. Modules of one class may bring their own way: a static method of the same name (`LoRALinear` has
    one), so that neither part of the library imports the other. While they are `prepared`, one product.
    """
    first = linears[0]
    if "prepared" in vars(first):
        return first.prepared(x)
    kind = type(first)
    if hasattr(kind, "together") and all(type(linear) is kind for linear in linears):
        return kind.together(x, linears)
    return tuple(linear(x) for linear in linears)


class Joined:
    """Linear maps of one input as one product: x (..., in) -> the outputs, each (..., out_i).

    `weights` (out_i, in) are laid into one tensor first, of which each is a view from then on: there is no second copy.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]):
        self.sizes = [len(weight) for weight in weights]
        self.weight = one_tensor(weights)  # (Σ out, in)
        self.bias = None
        if any(bias is not None for bias in biases):
            zeros = (w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True))
            self.bias = torch.cat(list(zeros))  # (Σ out,)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.whole(x).split(self.sizes, -1)


def one_tensor(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of several matrices (n_i, in) as one tensor (Σ n, in), whose views they are made, if they are not yet.

    Copies of them, as `.to` and `deepcopy` make, are tensors of their own again.
    """
    first, sizes = parts[0], [len(part) for part in parts]
    home, starts = first.untyped_storage().data_ptr(), accumulate((p.numel() for p in parts), initial=0)
    if all(
        part.untyped_storage().data_ptr() == home
        and part.storage_offset() == first.storage_offset() + start
        and part.is_contiguous()
        for part, start in zip(parts, starts, strict=False)  # the last start is the end
    ):
        return first.detach().as_strided((sum(sizes), first.shape[1]), first.stride())
    whole = torch.cat([part.detach() for part in parts])
    for part, rows in zip(parts, whole.split(sizes), strict=True):
        part.data = rows
    return whole


@torch.inference_mode(False)  # weights made in it could not be trained with
@torch.no_grad()
def prepare(linears: list[nn.Module]):
    """The way in which these Linears of one input run while no weight changes; None where there is no better one.

    A class may bring its own by a static method `prepared_way(linears, Joined)`.
    """
    kind = type(linears[0])
    sharded = any(type(parameter) is not nn.Parameter for linear in linears for parameter in linear.parameters())
    if sharded or any(type(linear) is not kind for linear in linears):
        return None
    if hasattr(kind, "prepared_way"):
        return kind.prepared_way(linears, Joined)
    plain = kind is nn.Linear and len(linears) > 1
    return Joined([linear.weight for linear in linears], [linear.bias for linear in linears]) if plain else None


@contextmanager
def prepared(groups: Iterable[list[nn.Module]]):
    """Inside the block, in which no weight may change, `together` runs each group as one product where it can."""
    changed = []
    try:
        for linears in groups:
            way = prepare(linears)
            if way is not None:
                changed.append(linears[0])
                linears[0].prepared = way
        yield
    finally:
        for linear in changed:
            vars(linear).pop("prepared", None)
