"""The gated delta rule in chunks: products of matrices where the recurrence has one outer product a token.

Of a chunk with states S before it, c_i = Σ_{j≤i} g_j and D_ij = exp(c_i - c_j) for j ≤ i, else 0:

    (I + L) U = β V      (I + L) W = β eᶜ K      with L_ij = β_i k_i·k_j D_ij for j < i
    E = U - W S          O = (eᶜ Q) S + (Q Kᵀ ∘ D) E          S ← e^{c_C} S + (e^{c_C - c} K)ᵀ E

Yang et al. 2024, https://arxiv.org/abs/2406.06484 section 3, with decays as in https://arxiv.org/abs/2412.06464 section
3.3. Chunks of all documents lie side by side, the first of each, then the second of each that has one: only E, O and S
go from one to the next, for all documents at once. What is missing of a last chunk is zeros, which change no state.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lora.ops import plain

CHUNK = 64


def gated_delta(q, k, v, g, beta, lengths: list[int], states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`plain.gated_delta`"""
    if max(lengths) == 1:
        return _one_each(q, k, v, g, beta, states)
    dtype, heads = v.dtype, v.shape[1]
    q, k = plain.unit_heads(q, k, heads)
    order, counts, index = _chunks(tuple(lengths), CHUNK)
    index = index.to(v.device)  # (N·C,)
    q, k, v, g, beta = (_laid(x.to(q.dtype), index) for x in (q, k, v, g, beta))  # (N, H, C, d), (N, H, C)
    c = g.cumsum(-1)
    D = (c[..., :, None] - c[..., None, :]).masked_fill(_future(v.device), float("-inf")).exp()  # (N, H, C, C)
    right = torch.cat((v, k * c.exp()[..., None]), -1) * beta[..., None]
    system = (k * beta[..., None]) @ k.mT * D  # its diagonal is taken to be 1
    U, W = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        (v.shape[-1], k.shape[-1]), -1
    )
    within, from_before = (q @ k.mT) * D, q * c.exp()[..., None]
    to_after, fade = (k * (c[..., -1:] - c).exp()[..., None]).mT, c[..., -1].exp()[..., None, None]
    S = v.new_zeros(len(lengths), heads, k.shape[-1], v.shape[-1]) if states is None else states.to(v)[order]
    outputs, ended, start = [], [], 0
    for count in counts:  # the documents that have such a chunk
        ended, S, here = [S[count:], *ended], S[:count], slice(start, start + count)
        E = U[here] - W[here] @ S
        outputs.append(from_before[here] @ S + within[here] @ E)
        S, start = fade[here] * S + to_after[here] @ E, start + count
    S = torch.cat((S, *ended))  # in the order of the chunks' documents
    out = torch.cat(outputs).transpose(1, 2).flatten(0, 1)  # (N·C, H, d)
    place = torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))
    inverse = torch.empty(len(order), dtype=torch.long).scatter_(0, order, torch.arange(len(order)))
    return out[place[: sum(lengths)]].to(dtype), S[inverse]


def _one_each(q, k, v, g, beta, states) -> tuple[Tensor, Tensor]:
    """One token of each document: the recurrence for all of them at once."""
    dtype, heads = v.dtype, v.shape[1]
    q, k = plain.unit_heads(q, k, heads)
    v, g, beta = (x.to(q.dtype) for x in (v, g, beta))
    S = v.new_zeros(*k.shape, v.shape[-1]) if states is None else states.to(v)
    S = S * g.exp()[..., None, None]
    error = beta[..., None] * (v - (k[..., None, :] @ S)[..., 0, :])
    S = S + k[..., None] * error[..., None, :]
    return (q[..., None, :] @ S)[..., 0, :].to(dtype), S


@lru_cache(maxsize=64)
def _chunks(lengths: tuple[int, ...], size: int) -> tuple[Tensor, list[int], Tensor]:
    """The documents, those of most chunks first; how many of them have a first chunk, a second …; and which position
    lies where in these chunks, the number of positions meaning none."""
    total, starts = sum(lengths), torch.tensor((0, *lengths)).cumsum(0).tolist()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    counts, index = [], []
    for first in range(0, max(lengths), size):
        here = [i for i in order if lengths[i] > first]
        counts.append(len(here))
        for i in here:
            its = torch.arange(first, first + size)
            index.append(torch.where(its < lengths[i], its + starts[i], total))
    return torch.tensor(order), counts, torch.cat(index)


def _laid(x: Tensor, index: Tensor) -> Tensor:
    """(T, H, …) -> (N, H, C, …), zeros where there is no position."""
    x = torch.cat((x, x.new_zeros(1, *x.shape[1:])))[index]
    return x.unflatten(0, (-1, CHUNK)).transpose(1, 2).contiguous()


@lru_cache(maxsize=4)
def _future(device) -> Tensor:
    return torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=device).triu(1)
