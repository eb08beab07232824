"""A causal convolution over few positions, as one of PyTorch's over all documents at once.

The first K - 1 positions of a document see the one before it: they are formed anew, from what is their own.

    y_t = Σ_b w_b x_{t-b}      ∂x_t = Σ_b w_b ∂y_{t+b}      ∂w_b = Σ_t ∂y_t x_{t-b}

with b positions back (w_{K-1-b} of the weights), so that ∂x is the same sum with positions and documents reversed.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora.ops import plain


def short_convolution(x: Tensor, w: Tensor, lengths: list[int], before: Tensor | None = None) -> Tensor:
    """`plain.short_convolution`"""
    if before is None:
        return _Convolution.apply(x, w, tuple(lengths))
    if max(lengths) > 1:
        return plain.short_convolution(x, w, lengths, before)
    return (torch.cat((before, x[:, None]), 1) * w.T).sum(1)  # (B, K, C) -> (B, C)


def last_inputs(x: Tensor, lengths: list[int], count: int, before: Tensor | None = None) -> Tensor:
    """`plain.last_inputs`"""
    if before is None or max(lengths) > 1:
        return plain.last_inputs(x, lengths, count, before)
    return torch.cat((before[:, 1:], x[:, None]), 1)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, lengths):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        ctx.lengths = lengths
        return _sum(x, w, _edges(lengths, w.shape[1], False, x.device))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        d_w, K = None, w.shape[1]
        if x is not None:
            places = _places(ctx.lengths).to(x.device)
            products = [(gradient[b:] * x[: len(x) - b] * (places[b:] >= b)).sum(0) for b in range(min(K, len(x)))]
            d_w = torch.stack([*[torch.zeros_like(products[0])] * (K - len(products)), *reversed(products)], 1)
        return _sum(gradient, w, _edges(ctx.lengths, K, True, gradient.device), True), d_w, None


def _sum(x: Tensor, w: Tensor, edges: tuple[Tensor, Tensor, Tensor], backwards: bool = False) -> Tensor:
    """Σ_b w_b x_{t-b} in each document, or x_{t+b} backwards, (T, C)"""
    (T, C), K = x.shape, w.shape[1]
    image = x.reshape(1, 1, T, C).permute(0, 3, 1, 2)  # one row of T points with C channels, "channels last"
    kernel = (w.flip(1) if backwards else w)[:, None, None].contiguous(memory_format=torch.channels_last)
    y = F.conv2d(image, kernel, groups=C, padding=(0, K - 1))[0, :, 0].T  # (T + K - 1, C)
    rows, seen, own = edges
    y = y[K - 1 :] if backwards else y[:T]
    return y.index_copy_(0, rows, (x[seen] * own * w.T.flip(0)).sum(1))


@lru_cache(maxsize=64)
def _edges(lengths: tuple[int, ...], K: int, backwards: bool, device: torch.device) -> tuple[Tensor, ...]:
    """The first K - 1 positions of every document, the last backwards, (N,); the K that each sees, itself first,
    (N, K); and which of these are in its document, (N, K, 1)."""
    places, back = _places(lengths)[:, 0], torch.arange(K)
    before = torch.cat([torch.arange(n - 1, -1, -1) for n in lengths]) if backwards else places
    rows = (before < K - 1).nonzero()  # (N, 1)
    seen = (rows + back if backwards else rows - back).clamp(0, len(places) - 1)
    return rows[:, 0].to(device), seen.to(device), (before[rows] >= back)[..., None].to(device)


@lru_cache(maxsize=64)
def _places(lengths: tuple[int, ...]) -> Tensor:
    """Where in its document each position is, (T, 1)."""
    return torch.cat([torch.arange(n) for n in lengths])[:, None]
