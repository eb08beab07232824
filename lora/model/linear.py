"""The seam through which several Linears of one input may run as one."""

import torch
from torch import nn


def together(x: torch.Tensor, linears: list[nn.Module]) -> tuple[torch.Tensor, ...]:
    """The outputs of several linear maps of x (..., in), each (..., out_i).

    By default a loop. Modules of one class may bring their own way: a static method of the same name (`LoRALinear` has
    one), so that neither part of the library imports the other.
    """
    kind = type(linears[0])
    if hasattr(kind, "together") and all(type(linear) is kind for linear in linears):
        return kind.together(x, linears)
    return tuple(linear(x) for linear in linears)
