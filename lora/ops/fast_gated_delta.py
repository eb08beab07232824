"""The gated delta rule in chunks: products of matrices where the recurrence has one outer product a token.

In a chunk of C positions let c_i = Σ_{j≤i} g_j, and S the state in front of it. Products take queries and keys as the
layer gives them; that these have length 1 is in factors ρ_i of rows, for a query 1/|q_i|√d and for a key -1/|k_i|. With
columns of weights W_ij = e^{c_i - c_j} β_j/|k_j| for j ≤ i, else 0:

    P = ρ W ∘ Q Kᵀ      L = ρ W ∘ K Kᵀ below the diagonal      (I - L) U = V + ρ eᶜ K S      ω_j = W_Cj
    O = ρ eᶜ Q S + P U      S' = e^{c_C} S + Kᵀ ω U

Yang et al. 2024, https://arxiv.org/abs/2406.06484 section 3, with decays as in https://arxiv.org/abs/2412.06464 section
3.3. Backwards, with the rows of Q above those of K as one matrix [Q; K], and D = [∂O; ∂V]:

    ∂U = Pᵀ ∂O + ω K ∂S'      ∂V = (I - L)⁻ᵀ ∂U      ∂S = e^{c_C} ∂S' + [Q; K]ᵀ ρ eᶜ D
    ∂rows = ρ eᶜ D Sᵀ + M K      ∂columns = Mᵀ [Q; K] + ω U ∂S'ᵀ      M = ρ W ∘ D Uᵀ, as in P and L

Q has the gradient of its rows, K that of its rows and columns. A factor x of rows y has x ∂x = Σ y ∂y: so have ρ, β,
e^c of rows and e^-c of columns, while e^{c_C} of S' has Σ S' ∂S'. Saved are the inputs and U, from which the states are
formed again.

The first chunks of all documents are computed at once, then the second of those that have one: only S goes from one to
the next. A missing position has ρ = β = g = 0 and changes no state. All is in float32 or wider.
"""

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora.ops import plain
from lora.ops.plain import wide

CHUNK = 64


def gated_delta(q, k, v, g, beta, lengths: list[int], states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`plain.gated_delta`, differentiable where β > 0."""
    if max(lengths) == 1:
        return _one_each(q, k, v, g, beta, states)
    return _Chunked.apply(q, k, v, g, beta, states, tuple(lengths))


def _one_each(q, k, v, g, beta, states) -> tuple[Tensor, Tensor]:
    """One token of each document: the recurrence for all of them at once."""
    dtype, heads = v.dtype, v.shape[1]
    q, k = plain.unit_heads(q, k, heads)
    v, g, beta = (x.to(q.dtype) for x in (v, g, beta))
    S = v.new_zeros(*k.shape, v.shape[-1]) if states is None else states.to(v)
    S = S * g.exp()[..., None, None]
    error = beta[..., None] * (v - (k[..., None, :] @ S)[..., 0, :])
    S = torch.addcmul(S, k[..., None], error[..., None, :])  # one pass over the states
    return (q[..., None, :] @ S)[..., 0, :].to(dtype), S


# ---- where positions lie ---------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """The chunks of documents, N of them: the first ones, then the second ones …"""

    order: Tensor  # the documents, those of most chunks first
    counts: list[int]  # how many of them have a first chunk, a second …
    positions: Tensor  # (N, C) in each chunk, as many as there are positions meaning none
    places: Tensor  # (T,) where in these N·C each position is


@lru_cache(maxsize=64)
def _layout(lengths: tuple[int, ...], device: torch.device) -> _Layout:
    total, starts = sum(lengths), list(accumulate(lengths, initial=0))
    order, counts, positions = sorted(range(len(lengths)), key=lambda i: -lengths[i]), [], []
    for first in range(0, max(lengths), CHUNK):
        here, its = [i for i in order if lengths[i] > first], torch.arange(first, first + CHUNK)
        counts.append(len(here))
        positions += [torch.where(its < lengths[i], its + starts[i], total) for i in here]
    positions = torch.stack(positions)
    places = torch.empty(total + 1, dtype=torch.long).scatter_(0, positions.view(-1), torch.arange(positions.numel()))
    return _Layout(torch.tensor(order, device=device), counts, positions.to(device), places[:total].to(device))


def _laid(x: Tensor, positions: Tensor, heads: int) -> Tensor:
    """(T, parts, KH, d) -> (N·H, parts·C, d), any numbers where there is no position."""
    T, parts, KH, d = x.shape
    part, head = torch.arange(parts, device=x.device)[:, None], torch.arange(heads, device=x.device)[:, None, None]
    rows = positions.clamp(max=T - 1)[:, None, None] * parts + part
    rows = rows * KH + head // (heads // KH)  # (N, H, parts, C)
    return x.reshape(-1, d).index_select(0, rows.view(-1)).view(-1, parts * CHUNK, d)


def _taken(x: Tensor, places: Tensor, heads: int, part: int = 0) -> Tensor:
    """One part of (N·H, parts·C, d) -> (T, H, d)"""
    rows = (places // CHUNK)[:, None] * heads + torch.arange(heads, device=x.device)
    rows = rows * x.shape[1] + (part * CHUNK + places % CHUNK)[:, None]
    return x.reshape(-1, x.shape[-1]).index_select(0, rows.view(-1)).view(-1, heads, x.shape[-1])


def _of_groups(x: Tensor, KH: int) -> Tensor:
    """Sums over the value heads of each key head, (T, H, d) -> (T, KH, d)"""
    return x if x.shape[1] == KH else x.unflatten(1, (KH, -1)).sum(2)


def _of_heads(x: Tensor, positions: Tensor) -> Tensor:
    """(T, parts, H) -> (parts, N·H, C), zeros where there is no position."""
    x = torch.cat((x, x.new_zeros(1, *x.shape[1:])))[positions]  # (N, C, parts, H)
    return x.permute(2, 0, 3, 1).flatten(1, 2)


def _exp(x: Tensor) -> Tensor:
    """e^x, but 0 below e^-60, which changes no sum. A CPU takes a hundred times as long for numbers below e^-87."""
    return F.threshold(x, -60.0, float("-inf")).exp_()


# ---- chunks ----------------------------------------------------------------------------------------------------------


class _Chunks:
    """Chunks laid out, B = N·H of them: [Q; K] (B, 2C, d), V (B, C, d'), and the numbers of their rows."""

    def __init__(self, q, k, v, g, beta, lengths: tuple[int, ...]):
        self.heads, self.dtype, self.layout = v.shape[1], wide(v.dtype), _layout(lengths, v.device)
        positions, both = self.layout.positions, torch.stack((q, k), 1)  # (T, 2, KH, d)
        norms = torch.rsqrt(torch.linalg.vector_norm(both, dim=-1, dtype=self.dtype).square_() + 1e-6)
        norms = norms.repeat_interleave(self.heads // q.shape[1], -1)  # (T, 2, H)
        numbers = torch.cat((norms, g[:, None].to(self.dtype), beta[:, None].to(self.dtype)), 1)
        norm_q, norm_k, g, self.beta = _of_heads(numbers, positions)  # (B, C) each
        self.QK, self.V = (_laid(x, positions, self.heads).to(self.dtype) for x in (both, v[:, None]))
        self.K, self.c = self.QK[:, CHUNK:], g.cumsum(-1)
        self.norms = torch.cat((norm_q, norm_k), -1)  # (B, 2C)
        self.rho = torch.cat((norm_q * q.shape[-1] ** -0.5, -norm_k), -1)
        self.rows = (self.rho * _exp(self.c).repeat(1, 2))[..., None]  # ρ eᶜ, (B, 2C, 1)
        self.columns = self.beta * norm_k
        self.omega = (_exp(self.c[:, -1:] - self.c) * self.columns)[..., None]  # (B, C, 1)
        self.fade = _exp(self.c[:, -1:, None])  # (B, 1, 1)
        ends = [self.heads * end for end in accumulate(self.layout.counts, initial=0)]
        self.steps = [slice(start, end) for start, end in pairwise(ends)]  # the first chunks, the second …

    def products(self, here: slice) -> tuple[Tensor, Tensor, Tensor]:
        """P and (I - L)⁻¹ (b, C, C), and ρ W of both, (b, 2C, C)."""
        c = self.c[here]
        W = _exp(c[:, :, None] - c[:, None, :]).tril_()  # of the future it may be infinite
        W.mul_(self.columns[here][:, None])
        weights = self.rho[here].unflatten(-1, (2, CHUNK))[..., None] * W[:, None]  # (b, 2, C, C)
        weights[:, 1].diagonal(dim1=-2, dim2=-1).zero_()
        weights = weights.flatten(1, 2)
        PL = (self.QK[here] @ self.K[here].mT).mul_(weights)
        one = torch.eye(CHUNK, dtype=c.dtype, device=c.device).expand(len(c), -1, -1)
        inverse = torch.linalg.solve_triangular(-PL[:, CHUNK:], one, upper=False, unitriangular=True)
        return PL[:, :CHUNK], inverse, weights

    def by_documents(self, states: Tensor | None) -> Tensor | None:
        """(documents, H, d, d') -> (documents·H, d, d'), those of most chunks first."""
        return None if states is None else states[self.layout.order].flatten(0, 1).to(self.dtype)

    def after(self, here: slice, S: Tensor | None, U: Tensor) -> Tensor:
        """S', from S or zeros."""
        learned = self.K[here].mT @ (U[here] * self.omega[here])
        return learned if S is None else learned.addcmul_(S, self.fade[here])


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, states, lengths):
        chunks = _Chunks(q, k, v, g, beta, lengths)
        S, ended = chunks.by_documents(states), []
        out, U = torch.empty_like(chunks.V), torch.empty_like(chunks.V)
        for here in chunks.steps:
            P, inverse, _ = chunks.products(here)
            if S is None:
                torch.bmm(inverse, chunks.V[here], out=U[here])
                torch.bmm(P, U[here], out=out[here])
            else:
                ended, S = [S[len(P) :], *ended], S[: len(P)]
                X = (chunks.QK[here] @ S).mul_(chunks.rows[here])  # (b, 2C, d')
                torch.bmm(inverse, X[:, CHUNK:].add_(chunks.V[here]), out=U[here])
                torch.baddbmm(X[:, :CHUNK], P, U[here], out=out[here])
            S = chunks.after(here, S, U)
        last = torch.empty(len(lengths), chunks.heads, *S.shape[1:], dtype=S.dtype, device=S.device)
        last[chunks.layout.order] = torch.cat((S, *ended)).view_as(last)
        ctx.save_for_backward(q, k, v, g, beta, states, U.to(v.dtype))
        ctx.lengths = lengths
        ctx.set_materialize_grads(False)
        return _taken(out.to(v.dtype), chunks.layout.places, chunks.heads), last

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_last):
        q, k, v, g, beta, states, U = ctx.saved_tensors
        chunks = _Chunks(q, k, v, g, beta, ctx.lengths)
        U, heads, (order, _, positions, places) = U.to(chunks.dtype), chunks.heads, chunks.layout
        after, before = [], []  # states
        for here in chunks.steps:
            S = after[-1] if after else chunks.by_documents(states)
            before.append(S if S is None else S[: here.stop - here.start])
            after.append(chunks.after(here, before[-1], U))
        D = U.new_zeros(len(U), 2 * CHUNK, U.shape[-1])  # [∂O; ∂V]
        if d_out is not None:
            D[:, :CHUNK] = _laid(d_out[:, None], positions, heads)
        d_last, dS = chunks.by_documents(d_last), None
        dQK, dc, dbeta = (torch.empty_like(x) for x in (chunks.QK, chunks.c, chunks.c))
        for here, S, S_after in reversed(list(zip(chunks.steps, before, after, strict=True))):
            QK, K = chunks.QK[here], chunks.K[here]
            if d_last is not None:
                dS = d_last[: len(K)] if dS is None else torch.cat((dS, d_last[len(dS) : len(K)]))
            P, inverse, weights = chunks.products(here)
            dU = P.mT @ D[here, :CHUNK]
            if dS is not None:  # of the documents that go on
                n, go = len(dS), slice(here.start, here.start + len(dS))
                dU[:n].addcmul_(chunks.K[go] @ dS, chunks.omega[go])
            D[here, CHUNK:] = inverse.mT @ dU
            M = (D[here] @ U[here].mT).mul_(weights)
            d_rows, d_columns = M @ K, M.mT @ QK  # (b, 2C, d), (b, C, d)
            if dS is not None:
                d_columns[:n].addcmul_(U[go] @ dS.mT, chunks.omega[go])
            if S is not None:
                G = D[here] * chunks.rows[here]
                d_rows.baddbmm_(G, S.mT)
            of_rows, of_columns = (d_rows * QK).sum(-1), (d_columns * K).sum(-1)  # (b, 2C), (b, C)
            dc[here] = of_rows[:, :CHUNK] + of_rows[:, CHUNK:] - of_columns
            dbeta[here] = of_columns / chunks.beta[here]
            of_rows[:, CHUNK:] += of_columns
            d_rows[:, CHUNK:] += d_columns
            torch.addcmul(d_rows, QK, (of_rows * chunks.norms[here].square())[..., None], value=-1, out=dQK[here])
            if dS is not None:
                dc[go, -1] += (dS * S_after[:n]).sum((1, 2))
                dS = dS * chunks.fade[go]
            if S is not None:
                d_before = QK.mT @ G
                if dS is not None:
                    d_before[:n] += dS
                dS = d_before
        dg = dc.flip(-1).cumsum(-1).flip(-1)
        dg, dbeta = (_taken(x[..., None], places, heads)[..., 0] for x in (dg, dbeta))
        dQK = dQK.to(q.dtype) if heads == q.shape[1] else dQK  # before they are laid back, there are fewer bytes
        dq, dk = (_of_groups(_taken(dQK, places, heads, part), q.shape[1]) for part in (0, 1))
        gradients = [dq, dk, _taken(D[:, CHUNK:].to(v.dtype), places, heads), dg, dbeta]
        if states is not None:
            gradients.append(torch.empty_like(states))
            gradients[-1][order] = dS.view_as(states).to(states.dtype)
        inputs = (q, k, v, g, beta, states)[: len(gradients)]
        gradients = [d.to(x.dtype) for d, x in zip(gradients, inputs, strict=True)]
        return *gradients, *[None] * (7 - len(gradients))
