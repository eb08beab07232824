"""Attention of documents end to end on a CPU, its gradient in closed form. P the weights, g = ∂L/∂out:

    ∂v = Pᵀ g      ∂P = g vᵀ      ∂S = P (∂P - rowsum(P ∂P))      ∂q = ∂S k / √d      ∂k = ∂Sᵀ q / √d

after FlashAttention, https://arxiv.org/abs/2205.14135, appendix B.2. Documents of like lengths are a rectangle, heads
that share a key head lie below each other, and some queries at a time leave out the keys of their common future. One
copy by an index brings the rows of q, k, v (a head's numbers at a position) into the order of these products, and one
brings what was found back. Weights are saved for the backward pass while they are few. Else PyTorch's kernel computes
the outputs, in half the time of these products, and the backward pass forms the weights: its own is no faster.
"""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora.ops import flash_attention

ROWS = 128  # queries at a time
KEPT_BYTES = 8 * 2**20  # of weights to save in each call, which is in each layer


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """`plain.attention` without a window or a cap."""
    return _Causal.apply(q, k, v, lengths)


class _Block(NamedTuple):
    """n queries of every document of a rectangle, and the `seen` keys that the last of them sees: where the rows are,
    how many key heads all documents have, and whether this is the rectangle's first block."""

    queries: slice
    keys: slice
    heads: int
    n: int
    seen: int
    first: bool

    def rows(self, x: Tensor) -> Tensor:
        """Its rows of the queries' (N, d) -> (heads, G·n, d)"""
        return x[self.queries].view(self.heads, -1, x.shape[-1])

    def sees(self, x: Tensor) -> Tensor:
        """What it sees of the keys' (M, d) -> (heads, seen, d), a view"""
        return x[self.keys].view(self.heads, -1, x.shape[-1])[:, : self.seen]


class _Order(NamedTuple):
    """Rows of q (T·H, d) and of k and v (T·KV, d) in the order of the products: which row lies where, and where each
    lies. Documents are filled up to their rectangle by any row, as nobody sees those behind its end."""

    queries: Tensor  # (N,): by rectangle, block, document, key head, its query heads, position
    keys: Tensor  # (M,): by rectangle, document, key head, position
    query_at: Tensor  # (T·H,)
    key_at: Tensor  # (T·KV,)
    filled: Tensor  # places among the N that are filled up
    blocks: list[_Block]  # of every rectangle the last first: it sees all keys

    def __call__(self, queries: Tensor, *keys: Tensor) -> list[Tensor]:
        """(T, H, d), and such as (T, KV, d), in this order: (N, d), (M, d)"""
        rows = [self.queries, *(self.keys for _ in keys)]
        return [x.reshape(-1, x.shape[-1]).index_select(0, at) for x, at in zip((queries, *keys), rows, strict=True)]


def _rectangles(lengths: tuple[int, ...]) -> list[Tensor]:
    """The positions of documents of like lengths, (B, L), -1 where there is none. Each document fills at least four
    fifths of its row; L is a multiple of 16, as a CPU's products are compiled anew for every size."""
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    groups: list[list[tuple[int, int]]] = []
    for length, start in sorted(zip(lengths, starts, strict=True), reverse=True):
        if not groups or length < 0.8 * groups[-1][0][0]:
            groups.append([])
        groups[-1].append((length, start))
    found = []
    for group in groups:
        rectangle = torch.full((len(group), -(-group[0][0] // 16) * 16), -1)
        for row, (length, start) in zip(rectangle, group, strict=True):
            row[:length] = torch.arange(start, start + length)
        found.append(rectangle)
    return found


@lru_cache(maxsize=4)  # the layers of a micro-batch share one; it has as many numbers as q has rows
def _order(lengths: tuple[int, ...], H: int, KV: int, at_once: int) -> _Order:
    queries, keys, blocks, N, M = [], [], [], 0, 0
    for rectangle in _rectangles(lengths):
        B, L = rectangle.shape
        rows = _rows(rectangle[:, None], KV)  # (B, KV, L)
        keys.append(rows.flatten())
        of_keys, M = slice(M, M + rows.numel()), M + rows.numel()
        rows = _rows(rectangle[:, None], H).unflatten(1, (KV, -1))  # (B, KV, G, L)
        for start in reversed(range(0, L, at_once)):
            part = rows[..., start : start + at_once]
            queries.append(part.flatten())
            seen = min(start + at_once, L)
            blocks.append(_Block(slice(N, N + part.numel()), of_keys, B * KV, part.shape[-1], seen, seen == L))
            N += part.numel()
    queries, keys, T = torch.cat(queries), torch.cat(keys), sum(lengths)
    at = [_inverse(rows, T * heads) for rows, heads in ((queries, H), (keys, KV))]
    filled = (queries < 0).nonzero()[:, 0]
    return _Order(queries.clamp(0), keys.clamp(0), *at, filled, blocks)


def _rows(positions: Tensor, heads: int) -> Tensor:
    """(B, 1, L) -> (B, heads, L): where the rows of every head are in a tensor (T·heads, d)."""
    return torch.where(positions < 0, -1, positions * heads + torch.arange(heads)[:, None])


def _inverse(rows: Tensor, count: int) -> Tensor:
    """Where each of `count` rows lies."""
    places = torch.empty(count, dtype=torch.long)
    there = rows >= 0
    places[rows[there]] = there.nonzero()[:, 0]
    return places


@lru_cache(maxsize=64)
def _future(n: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores (n, n): -∞ where a key lies in a query's future."""
    return torch.full((n, n), float("-inf"), dtype=dtype).triu(1)


def _product(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None, add: bool = False) -> Tensor:
    """scale a b in every batch, written to `out` or added to it"""
    out = a.new_empty(len(a), a.shape[1], b.shape[2]) if out is None else out
    return torch.baddbmm(out, a, b, beta=int(add), alpha=scale, out=out)


def _weights(queries: Tensor, keys: Tensor, n: int) -> Tensor:
    """(heads, G·n, d), (heads, S, d) -> softmax over what each may see, (heads, G·n, S): the last of n queries sees all
    keys, the one before all but one."""
    scores = _product(queries, keys.mT, queries.shape[-1] ** -0.5)
    last = scores.unflatten(1, (-1, n))[..., -n:]  # (heads, G, n, n), the only ones that may lie in the future
    last += _future(n, scores.dtype).to(scores.device)
    return scores.softmax(-1)  # of bf16 too it is summed in float32


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths):
        ctx.order = order = _order(tuple(lengths), q.shape[1], k.shape[1], ROWS)
        if sum(n * n for n in lengths) * q.shape[1] * q.element_size() > KEPT_BYTES:
            ctx.save_for_backward(q, k, v)
            documents = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
            return torch.cat([flash_attention.attend(*document) for document in documents])
        Q, K, V = order(q, k, v)
        found, kept = torch.empty_like(Q), []
        for block in order.blocks:
            kept.append(_weights(block.rows(Q), block.sees(K), block.n))
            torch.bmm(kept[-1], block.sees(V), out=block.rows(found))
        ctx.save_for_backward(q, k, v, *kept)
        return found.index_select(0, order.query_at).view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, *kept = ctx.saved_tensors
        order, kept, scale = ctx.order, iter(kept), q.shape[-1] ** -0.5
        Q, K, V = order(q, k, v)
        (G,) = order(gradient)
        G.index_fill_(0, order.filled, 0)
        d_Q, d_K, d_V = torch.empty_like(Q), torch.empty_like(K), torch.empty_like(V)
        for block in order.blocks:
            queries, g = block.rows(Q), block.rows(G)
            keys, values = (block.sees(x).contiguous() for x in (K, V))  # a product would copy both, and transposed
            P = next(kept, None)
            P = _weights(queries, keys, block.n) if P is None else P
            _product(P.mT, g, 1.0, block.sees(d_V), not block.first)
            S = torch._softmax_backward_data(torch.bmm(g, values.mT), P, -1, P.dtype)  # ∂S
            _product(S, keys, scale, block.rows(d_Q))
            _product(S.mT, queries, scale, block.sees(d_K), not block.first)
        d_k, d_v = (x.index_select(0, order.key_at).view(k.shape) for x in (d_K, d_V))
        return d_Q.index_select(0, order.query_at).view(q.shape), d_k, d_v, None
