"""Causal attention over documents laid end to end.

Grouped-query attention (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245): query head h reads key/value head
h // (H / KV). No padding exists in training, so there is no mask but the causal one inside each document.

Some layers of some families look back only a `window` of positions, their own included, or bend their scores by a soft
`cap`: s -> cap tanh(s / cap), https://arxiv.org/abs/2408.00118. They go a plain way of their own.
"""

from collections.abc import Iterator
from functools import cache, lru_cache, partial
from inspect import signature
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, window: int | None = None, cap=None
) -> torch.Tensor:
    """Documents end to end: q (T, H, d), k and v (T, KV, d) -> (T, H, d). Nobody sees another document."""
    lengths, starts = documents
    window = window if window and window < max(lengths) else None
    if starts is not None and not cap:
        return causal_varlen(window)(q, k, v, starts, starts, max(lengths), max(lengths))
    if q.device.type in ("cpu", "meta") and not window and not cap:
        return _Causal.apply(q, k, v, lengths)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([one_document(*part, window, cap) for part in parts])


@cache
def causal_varlen(window: int | None = None):
    """PyTorch's `varlen_attn`, each query seeing a window of keys that ends with its own, or all to its left."""
    from torch.nn.attention.varlen import varlen_attn  # there is no need of it on a CPU

    # the kernel has always grouped heads; since 2.12 the function before it wants to be told, 2.11 has no such argument
    grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    return partial(varlen_attn, window_size=(window - 1 if window else -1, 0), **grouped)


def one_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None, cap=None):
    """q (T, H, d) against k, v (S, KV, d) with S >= T: the last query sees all of them, the one before all but one;
    each no more than the `window` before the one after its own."""
    if cap or (window and window < len(k)):
        return by_rows(q, k, v, window or len(k), cap)
    if k.device.type == "cpu" and k.shape[0] <= SHORT:
        return explicit(q, k, v)
    return blocked(q, k, v)


def by_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, cap: float | None) -> torch.Tensor:
    """`explicit` for SHORT queries at a time, against those keys that one of them sees; weights are formed again for
    the backward pass. Shapes as `one_document`."""
    parts, before = [], len(k) - len(q)
    for start in range(0, len(q), SHORT):
        stop = min(start + SHORT, len(q))
        seen = slice(max(0, before + start + 1 - window), before + stop)
        part = (q[start:stop], k[seen], v[seen], window, cap)
        again = torch.is_grad_enabled() and len(q) > SHORT
        parts.append(checkpoint(explicit, *part, use_reentrant=False) if again else explicit(*part))
    return torch.cat(parts)


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None, cap=None) -> torch.Tensor:
    """softmax(q kᵀ / √d) v as written; the softmax in float32 or wider. Arguments as `one_document`."""
    (T, H, d), (S, KV, _) = q.shape, k.shape
    grouped = q.view(T, KV, H // KV, d).permute(1, 2, 0, 3).reshape(KV, -1, d)  # (KV, G·T, d)
    scores = (grouped * d**-0.5) @ k.permute(1, 2, 0)  # (KV, G·T, S)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    unseen = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)  # (T, S)
    if window:
        unseen |= torch.ones_like(unseen).tril(S - T - window)
    scores = scores.view(KV, -1, T, S).masked_fill(unseen, float("-inf"))
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


class _Group(NamedTuple):
    """Documents of like lengths as a rectangle: `index` (B·L,) says which position lies where; T stands for nothing."""

    index: torch.Tensor
    B: int
    L: int


@lru_cache(maxsize=64)
def _groups(lengths: tuple[int, ...]) -> list[_Group]:
    """Each document in a group whose longest one it fills to four fifths. Sizes are multiples of 16: a CPU's products
    are compiled for every size anew."""
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    rows: list[list[tuple[int, int]]] = []
    for length, start in sorted(zip(lengths, starts, strict=True), reverse=True):
        if not rows or length < 0.8 * rows[-1][0][0]:
            rows.append([])
        rows[-1].append((length, start))
    found = []
    for row in rows:
        L = -(-row[0][0] // 16) * 16
        index = torch.full((len(row), L), sum(lengths))
        for i, (length, start) in enumerate(row):
            index[i, :length] = torch.arange(start, start + length)
        found.append(_Group(index.view(-1), len(row), L))
    return found


def _stack(x: torch.Tensor, KV: int) -> torch.Tensor:
    """(B, n, heads, d) -> (B·KV, G·n, d): heads that share a key head lie below each other."""
    return x.unflatten(2, (KV, -1)).permute(0, 2, 3, 1, 4).reshape(len(x) * KV, -1, x.shape[-1])


def _unstack(x: torch.Tensor, B: int, n: int) -> torch.Tensor:
    """(B·KV, G·n, d) -> (B, n, heads, d)"""
    return x.view(B, len(x) // B, -1, n, x.shape[-1]).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _weights(queries: torch.Tensor, keys: torch.Tensor, n: int) -> torch.Tensor:
    """(B·KV, G·n, d) scaled, (B·KV, S, d) -> softmax over what each may see, (B·KV, G·n, S): the last of n queries sees
    all keys, the one before all but one."""
    scores = queries @ keys.mT
    last = scores.unflatten(1, (-1, n))[..., -n:]  # (B·KV, G, n, n), the only ones that may lie in the future
    last.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1)  # of bf16 too it is summed in float32


class _Causal(torch.autograd.Function):
    """`explicit` for documents end to end, and its gradient in closed form; P the weights, g = ∂L/∂out:

        ∂v = Pᵀ g      ∂S = P (g vᵀ - rowsum(g out))      ∂q = ∂S k / √d      ∂k = ∂Sᵀ q / √d

    after FlashAttention, https://arxiv.org/abs/2205.14135, appendix B.2. Some queries at a time leave out the keys of
    their common future. Weights are kept for the backward pass while they are few, else they are formed again.
    """

    ROWS = 128  # queries at a time
    KEPT = 8 * 2**20  # bytes of weights to keep in each call, which is in each layer

    @staticmethod
    def blocks(L: int) -> Iterator[tuple[int, int]]:
        return ((start, min(start + _Causal.ROWS, L)) for start in range(0, L, _Causal.ROWS))

    @staticmethod
    def lay(group: _Group, KV: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Each (T + 1, heads, d) -> (B, L, heads, d), keys and values (those of KV heads) stacked."""
        return [x.index_select(0, group.index).unflatten(0, (group.B, group.L)) for x in tensors]

    @staticmethod
    def forward(ctx, q, k, v, lengths):
        (T, H, d), KV, kept = q.shape, k.shape[1], []
        keep = sum(n * n for n in lengths) * H * q.element_size() <= _Causal.KEPT
        out = q.new_empty(T + 1, H, d)
        nothing = q.new_zeros(1, H, d)
        q_, k_, v_ = (torch.cat((x, nothing[:, : x.shape[1]])) for x in (q * d**-0.5, k, v))
        for group in _groups(tuple(lengths)):
            queries, keys, values = _Causal.lay(group, KV, q_, k_, v_)
            keys, values, result = _stack(keys, KV), _stack(values, KV), torch.empty_like(queries)
            for start, stop in _Causal.blocks(group.L):
                P = _weights(_stack(queries[:, start:stop], KV), keys[:, :stop], stop - start)
                result[:, start:stop] = _unstack(P @ values[:, :stop], group.B, stop - start)
                if keep:
                    kept.append(P)
            out.index_copy_(0, group.index.to(out.device), result.flatten(0, 1))
        ctx.lengths = lengths
        ctx.save_for_backward(q, k, v, out[:T], *kept)
        return out[:T]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, out, *kept = ctx.saved_tensors
        (T, H, d), KV, kept = q.shape, k.shape[1], iter(kept)
        d_q, d_k, d_v = (x.new_empty(T + 1, *x.shape[1:]) for x in (q, k, v))
        nothing = q.new_zeros(1, H, d)
        tensors = (q * d**-0.5, k, v, gradient, (gradient * out).sum(-1, keepdim=True))
        tensors = [torch.cat((x, nothing[:, : x.shape[1], : x.shape[2]])) for x in tensors]
        for group in _groups(tuple(ctx.lengths)):
            queries, keys, values, g, sums = _Causal.lay(group, KV, *tensors)
            keys, values = _stack(keys, KV), _stack(values, KV)
            of_queries, of_keys, of_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
            for start, stop in _Causal.blocks(group.L):
                n = stop - start
                Q, G, D = (_stack(x[:, start:stop], KV) for x in (queries, g, sums))
                P = next(kept, None)
                P = _weights(Q, keys[:, :stop], n) if P is None else P
                of_values[:, :stop] += P.mT @ G
                S = (G @ values[:, :stop].mT).sub_(D).mul_(P)  # ∂S
                of_queries[:, start:stop] = _unstack((S @ keys[:, :stop]).mul_(d**-0.5), group.B, n)
                of_keys[:, :stop] += S.mT @ Q
            d_q.index_copy_(0, group.index, of_queries.flatten(0, 1))
            for x, part in ((d_k, of_keys), (d_v, of_values)):
                x.index_copy_(0, group.index, _unstack(part, group.B, group.L).flatten(0, 1))
        return d_q[:T], d_k[:T], d_v[:T], None
