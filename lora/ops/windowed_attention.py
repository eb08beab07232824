"""Attention with a window or a soft cap, for some queries at a time: no T × S weights for long documents."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora.ops import plain

QUERIES = 512


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, cap: float | None = None) -> Tensor:
    """`plain.attend` for QUERIES queries at a time, against the keys that one of them sees; weights of a long document
    are formed again for the backward pass."""
    parts, before, window = [], len(k) - len(q), window or len(k)
    for start in range(0, len(q), QUERIES):
        stop = min(start + QUERIES, len(q))
        seen = slice(max(0, before + start + 1 - window), before + stop)
        part = q[start:stop], k[seen], v[seen], window, cap
        recompute = torch.is_grad_enabled() and len(q) > QUERIES
        parts.append(checkpoint(plain.attend, *part, use_reentrant=False) if recompute else plain.attend(*part))
    return torch.cat(parts)
