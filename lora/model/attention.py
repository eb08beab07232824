"""Causal attention over documents laid end to end.

Grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245): query head h reads key/value head
h // (H / KV). No padding exists in training, so there is no mask but the causal one inside each document.
"""

import torch
from torch.nn import functional as F

# Up to this length the explicit T × T form is faster on a CPU than the blocked kernel; beyond, its T² memory hurts.
SHORT = 512


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Documents of `lengths` end to end: q (T, H, d), k and v (T, KV, d) -> (T, H, d). Nobody sees another document."""
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([one_document(*part) for part in parts])


def one_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (T, H, d) against k, v (S, KV, d) with S >= T: the last query sees all of them, the one before all but one."""
    if k.device.type == "cpu" and k.shape[0] <= SHORT:
        return explicit(q, k, v)
    return blocked(q, k, v)


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q kᵀ / √d) v as written; the softmax in float32 or wider. Shapes as `one_document`."""
    (T, H, d), (S, KV, _) = q.shape, k.shape
    grouped = q.view(T, KV, H // KV, d).permute(1, 2, 0, 3).reshape(KV, -1, d)  # (KV, G·T, d)
    scores = (grouped * d**-0.5) @ k.permute(1, 2, 0)  # (KV, G·T, S)
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)  # (T, S)
    scores = scores.view(KV, -1, T, S).masked_fill(future, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    out = weights.view(KV, -1, S) @ v.transpose(0, 1)  # (KV, G·T, d)
    return out.view(KV, -1, T, d).permute(2, 0, 1, 3).reshape(T, H, d)


def blocked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch's fused kernel, which never holds T × S weights. Shapes as `one_document`."""
    T, S = q.shape[0], k.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, T, d)
    mask = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1)
