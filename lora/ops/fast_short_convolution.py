"""A causal convolution over few positions as a sum of shifted inputs: no document is cut out and laid by itself."""

from functools import lru_cache

import torch
from torch import Tensor

from lora.ops import plain


def short_convolution(x: Tensor, w: Tensor, lengths: list[int], before: Tensor | None = None) -> Tensor:
    """`plain.short_convolution`"""
    if before is not None:
        if max(lengths) > 1:
            return plain.short_convolution(x, w, lengths, before)
        return (torch.cat((before, x[:, None]), 1) * w.T).sum(1)  # (B, K, C) -> (B, C)
    places, K = _places(tuple(lengths)).to(x.device), w.shape[1]  # (T, 1)
    y = x * w[:, -1]
    for back in range(1, min(K, max(lengths))):
        there = places[back:] >= back
        y = torch.cat((y[:back], torch.addcmul(y[back:], x[:-back] * there, w[:, -1 - back])))
    return y


@lru_cache(maxsize=64)
def _places(lengths: tuple[int, ...]) -> Tensor:
    """Where in its document each position is, (T, 1)."""
    return torch.cat([torch.arange(n) for n in lengths])[:, None]
