"""Causal attention over documents laid end to end, and over a cache of keys and values.

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


class Cache:
    """Keys and values of a batch: per layer (B, KV, room, d), row b holding `lengths[b]` positions."""

    def __init__(self, layers: int, rows: int, kv_heads: int, room: int, head_dim: int, dtype, device):
        shape = (layers, rows, kv_heads, room, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * rows

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, new: list[int]) -> torch.Tensor:
        """Append k, v (T, KV, d), `new[b]` positions for row b, end to end, and attend. Returns (T, H, d).

        `advance` moves the lengths once per forward pass, after the last layer.
        """
        keys, values = self.keys[layer], self.values[layer]
        if max(new) == 1 == min(new):
            return self._attend_one(keys, values, q, k, v)
        outputs = []
        for row, (q1, k1, v1) in enumerate(zip(*(x.split(new) for x in (q, k, v)), strict=True)):
            start, end = self.lengths[row], self.lengths[row] + new[row]
            keys[row, :, start:end], values[row, :, start:end] = k1.transpose(0, 1), v1.transpose(0, 1)
            outputs.append(one_document(q1, keys[row, :, :end].transpose(0, 1), values[row, :, :end].transpose(0, 1)))
        return torch.cat(outputs)

    def _attend_one(self, keys, values, q, k, v):
        """One new position in every row, all rows at once; what lies beyond a row's length is masked."""
        (B, H, d), KV = q.shape, k.shape[1]
        rows, ends = torch.arange(B, device=q.device), torch.tensor(self.lengths, device=q.device)
        keys[rows, :, ends], values[rows, :, ends] = k, v
        room = max(self.lengths) + 1
        scores = (q.view(B, KV, H // KV, d) * d**-0.5) @ keys[:, :, :room].transpose(2, 3)  # (B, KV, G, room)
        beyond = torch.arange(room, device=q.device) > ends[:, None]  # (B, room)
        scores = scores.masked_fill(beyond[:, None, None], float("-inf"))
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return (weights @ values[:, :, :room]).view(B, H, d)

    def advance(self, new: list[int]) -> None:
        self.lengths = [length + n for length, n in zip(self.lengths, new, strict=True)]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = [self.lengths[row] for row in rows]
