"""A causal convolution over few positions as a sum of shifted inputs, over all documents at once.

The first K - 1 positions of a document would see the one before it: they are formed anew, from what is their own.

    y_t = Σ_b w_b x_{t-b}      ∂x_t = Σ_b w_b ∂y_{t+b}      ∂w_b = Σ_t ∂y_t x_{t-b}

with b positions back (w_{K-1-b} of the weights), so that ∂x is the same sum with positions and documents reversed.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora.ops import plain


def short_convolution(x: Tensor, w: Tensor, lengths: list[int], before: Tensor | None = None) -> Tensor:
    """`plain.short_convolution`"""
    if before is None:
        return _Convolution.apply(x, w, tuple(lengths))
    if max(lengths) > 1:
        return plain.short_convolution(x, w, lengths, before)
    return (torch.cat((before, x[:, None]), 1) * w.T).sum(1)  # (B, K, C) -> (B, C)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, lengths):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        ctx.lengths = lengths
        return _sum(x, w, _starts(lengths, w.shape[1], x.device))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        d_w, K = None, w.shape[1]
        if x is not None:
            places = _places(ctx.lengths).to(x.device)
            products = [(gradient[b:] * x[: len(x) - b] * (places[b:] >= b)).sum(0) for b in range(min(K, len(x)))]
            d_w = torch.stack([*[torch.zeros_like(products[0])] * (K - len(products)), *reversed(products)], 1)
        ends = _starts(ctx.lengths[::-1], K, gradient.device)
        return _sum(gradient.flip(0), w, ends).flip(0), d_w, None


def _sum(x: Tensor, w: Tensor, starts: tuple[Tensor, Tensor]) -> Tensor:
    """Σ_b w_b x_{t-b} in each document, (T, C)"""
    w = w.T.contiguous()  # (K, C)
    y = x * w[-1]
    for back in range(1, min(len(w), len(x))):
        y[back:].addcmul_(x[:-back], w[-1 - back])
    rows, there = starts  # (N,), (N, K, 1)
    seen = x[(rows[:, None] - torch.arange(len(w) - 1, -1, -1, device=x.device)).clamp(min=0)]  # (N, K, C)
    return y.index_copy_(0, rows, (seen * there * w).sum(1))


@lru_cache(maxsize=64)
def _starts(lengths: tuple[int, ...], K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first K - 1 positions of every document, (N,), and which of the K up to it are its document's, (N, K, 1)."""
    places = _places(lengths)[:, 0]
    rows = (places < K - 1).nonzero()[:, 0]
    return rows.to(device), (places[rows, None] >= torch.arange(K - 1, -1, -1))[..., None].to(device)


@lru_cache(maxsize=64)
def _places(lengths: tuple[int, ...]) -> Tensor:
    """Where in its document each position is, (T, 1)."""
    return torch.cat([torch.arange(n) for n in lengths])[:, None]
