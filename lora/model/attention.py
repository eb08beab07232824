"""Causal attention over documents laid end to end, and over a cache of keys and values.

Grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245): query head h reads key/value head
h // (H / KV). No padding exists in training, so there is no mask but the causal one inside each document.
"""

from functools import cache, partial
from inspect import signature
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lora.device import upload

# Up to this length the explicit T × T form is faster on a CPU than the blocked kernel; beyond, its T² memory hurts.
SHORT = 512


class Documents(NamedTuple):
    """How documents lie end to end. `starts` (N + 1,) int32 says where each begins and the last one ends, on a device
    whose kernel takes all of them at once; None where they are taken one after another."""

    lengths: list[int]
    starts: torch.Tensor | None = None

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, dtype: torch.dtype, head_dim: int) -> "Documents":
        """Made once for all layers."""
        if not at_once(device, dtype, head_dim):
            return cls(lengths)
        return cls(lengths, upload([0, *accumulate(lengths)], device, torch.int32))


def at_once(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Can FlashAttention's kernel (Dao 2023, https://arxiv.org/abs/2307.08691) be used? It wants an Ampere GPU."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    return device.type == "cuda" and fits and torch.cuda.get_device_capability(device) >= (8, 0)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Documents end to end: q (T, H, d), k and v (T, KV, d) -> (T, H, d). Nobody sees another document."""
    lengths, starts = documents
    if starts is not None:
        return causal_varlen()(q, k, v, starts, starts, max(lengths), max(lengths))
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([one_document(*part) for part in parts])


@cache
def causal_varlen():
    """PyTorch's `varlen_attn`, each query seeing any number of keys to its left and none to its right."""
    from torch.nn.attention.varlen import varlen_attn  # there is no need of it on a CPU

    # the kernel has always grouped heads; since 2.12 the function before it wants to be told, 2.11 has no such argument
    grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    return partial(varlen_attn, window_size=(-1, 0), **grouped)


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
