"""A product with a packed weight that keeps no numbers of it: they are formed for the forward pass, and again for the
backward pass, which needs ∂x alone, as a frozen weight has no gradient.

    y = x dq(W)ᵀ + b        ∂x = ∂y dq(W)

Where a block is computed again in the backward pass anyway, its weights stay from there until its gradient is done:
`torch.utils.checkpoint` drops what the first pass saves. So they are formed twice, not three times.
"""

from contextlib import contextmanager
from threading import local

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora.ops.plain import Weight, dense

_here = local()


@contextmanager
def recomputing():
    """Inside the block what autograd saves is dropped, and formed again for the backward pass."""
    before, _here.recomputing = is_recomputing(), True
    try:
        yield
    finally:
        _here.recomputing = before


def contexts():
    """For both passes of `torch.utils.checkpoint`."""
    return recomputing(), recomputing()


def is_recomputing() -> bool:
    return getattr(_here, "recomputing", False)


def to_save(W: Weight, numbers: Tensor) -> tuple[Tensor | None, Weight | None]:
    """What the backward pass needs of a weight that stands for these numbers: a tensor to save, or packed blocks."""
    return (None, W) if numbers is not W and not is_recomputing() else (numbers, None)


def linear(x: Tensor, W: Weight, b: Tensor | None) -> Tensor:
    """`plain.linear`"""
    return _Linear.apply(x, W, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b):
        numbers = dense(W, x.dtype)
        tensor, ctx.packed = to_save(W, numbers)
        ctx.save_for_backward(tensor)
        return F.linear(x, numbers, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        [tensor] = ctx.saved_tensors
        return gradient @ dense(ctx.packed if tensor is None else tensor, gradient.dtype), None, None
