"""Attention of documents end to end on a CPU, its gradient in closed form. P the weights, g = ∂L/∂out:

    ∂v = Pᵀ g      ∂S = P (g vᵀ - rowsum(g out))      ∂q = ∂S k / √d      ∂k = ∂Sᵀ q / √d

after FlashAttention, https://arxiv.org/abs/2205.14135, appendix B.2. Documents of like lengths lie as a rectangle,
heads that share a key head lie below each other, and some queries at a time leave out the keys of their common future.
Weights are saved for the backward pass while they are few, else they are formed again.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """`plain.attention` without a window or a cap."""
    return _Causal.apply(q, k, v, lengths)


class _Group(NamedTuple):
    """Documents of like lengths as a rectangle: `index` (B·L,) says which position lies where; T stands for none."""

    index: Tensor
    B: int
    L: int


@lru_cache(maxsize=64)
def _groups(lengths: tuple[int, ...]) -> list[_Group]:
    """Each document is in a group whose longest one it fills to four fifths. Sizes are multiples of 16: a CPU's
    products are compiled anew for every size."""
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


def _stack(x: Tensor, KV: int) -> Tensor:
    """(B, n, heads, d) -> (B·KV, G·n, d): heads that share a key head lie below each other."""
    return x.unflatten(2, (KV, -1)).permute(0, 2, 3, 1, 4).reshape(len(x) * KV, -1, x.shape[-1])


def _unstack(x: Tensor, B: int, n: int) -> Tensor:
    """(B·KV, G·n, d) -> (B, n, heads, d)"""
    return x.view(B, len(x) // B, -1, n, x.shape[-1]).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _weights(queries: Tensor, keys: Tensor, n: int) -> Tensor:
    """(B·KV, G·n, d) scaled, (B·KV, S, d) -> softmax over what each may see, (B·KV, G·n, S): the last of n queries sees
    all keys, the one before all but one."""
    scores = queries @ keys.mT
    last = scores.unflatten(1, (-1, n))[..., -n:]  # (B·KV, G, n, n), the only ones that may lie in the future
    last.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1)  # of bf16 too it is summed in float32


class _Causal(torch.autograd.Function):
    ROWS = 128  # queries at a time
    KEPT_BYTES = 8 * 2**20  # of weights to save in each call, which is in each layer

    @staticmethod
    def blocks(L: int) -> Iterator[tuple[int, int]]:
        return ((start, min(start + _Causal.ROWS, L)) for start in range(0, L, _Causal.ROWS))

    @staticmethod
    def rectangles(group: _Group, *tensors: Tensor) -> list[Tensor]:
        """Each (T + 1, heads, d) -> (B, L, heads, d)."""
        return [x.index_select(0, group.index).unflatten(0, (group.B, group.L)) for x in tensors]

    @staticmethod
    def forward(ctx, q, k, v, lengths):
        (T, H, d), KV, kept = q.shape, k.shape[1], []
        keep = sum(n * n for n in lengths) * H * q.element_size() <= _Causal.KEPT_BYTES
        out = q.new_empty(T + 1, H, d)
        zero = q.new_zeros(1, H, d)
        q_, k_, v_ = (torch.cat((x, zero[:, : x.shape[1]])) for x in (q * d**-0.5, k, v))
        for group in _groups(tuple(lengths)):
            queries, keys, values = _Causal.rectangles(group, q_, k_, v_)
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
        zero = q.new_zeros(1, H, d)
        tensors = (q * d**-0.5, k, v, gradient, (gradient * out).sum(-1, keepdim=True))
        tensors = [torch.cat((x, zero[:, : x.shape[1], : x.shape[2]])) for x in tensors]
        for group in _groups(tuple(ctx.lengths)):
            queries, keys, values, g, sums = _Causal.rectangles(group, *tensors)
            keys, values = _stack(keys, KV), _stack(values, KV)
            d_queries, d_keys, d_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
            for start, stop in _Causal.blocks(group.L):
                n = stop - start
                Q, G, D = (_stack(x[:, start:stop], KV) for x in (queries, g, sums))
                P = next(kept, None)
                P = _weights(Q, keys[:, :stop], n) if P is None else P
                d_values[:, :stop] += P.mT @ G
                S = (G @ values[:, :stop].mT).sub_(D).mul_(P)  # ∂S
                d_queries[:, start:stop] = _unstack((S @ keys[:, :stop]).mul_(d**-0.5), group.B, n)
                d_keys[:, :stop] += S.mT @ Q
            d_q.index_copy_(0, group.index, d_queries.flatten(0, 1))
            for x, part in ((d_k, d_keys), (d_v, d_values)):
                x.index_copy_(0, group.index, _unstack(part, group.B, group.L).flatten(0, 1))
        return d_q[:T], d_k[:T], d_v[:T], None
