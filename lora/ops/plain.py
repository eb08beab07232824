"""Every formula of the core path as its paper writes it. Nothing here is fast: `fast_*.py` are, and equal these.

T positions of documents end to end, D the model's width, H query and KV key/value heads of d numbers, V the vocabulary.
Norms, softmax and losses are formed in float32 or wider, whatever the dtype of their input.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


def is_finite(x: Tensor) -> bool:
    """Are all its numbers finite? The sum says so in one pass over them, unless it is itself too large."""
    return bool(torch.isfinite(x.sum()) or torch.isfinite(x).all())


def is_autocast(x: Tensor) -> bool:
    """Does `torch.autocast`, of a user's own loop, choose the dtype of every product?"""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Inside the block products are computed in the dtype of their factors."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


class Packed(Protocol):
    """A weight in few bits, of `lora.quant`."""

    def dequantise(self, dtype: torch.dtype) -> Tensor: ...


Weight = Tensor | Packed  # (out, in)


def dense(W: Weight, dtype: torch.dtype) -> Tensor:
    """The weight itself, or the numbers that a packed one stands for: (out, in), those in `dtype`."""
    return W if isinstance(W, Tensor) else W.dequantise(dtype)


def linear(x: Tensor, W: Weight, b: Tensor | None) -> Tensor:
    """y = W x + b, x (..., in) -> (..., out)"""
    return F.linear(x, dense(W, x.dtype), b)


def lora_linear(x: Tensor, W: Weight, b: Tensor | None, A: Tensor, B: Tensor, s: float, dropout: float = 0.0) -> Tensor:
    """y = W x + b + s B A x, dropout on the input of A alone. Hu et al. 2021, https://arxiv.org/abs/2106.09685

    x (..., in), W (out, in), b (out,), A (r, in), B (out, r) -> (..., out), computed in the dtype of x.
    """
    return linear(x, W, b) + branch(F.dropout(x, dropout), A, B, s)


def branch(x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """s B A x, x (..., in) -> (..., out)"""
    return (s * (x @ A.to(x.dtype).T)) @ B.to(x.dtype).T


def linears(x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Several linear maps of one input x (..., in): q, k, v or gate, up. Each result is (..., out_i)."""
    return tuple(module(x) for module in modules)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x / √(mean(x²) + ε) over the last axis, x (..., D), w (D,). Zhang & Sennrich 2019, arXiv:1910.07467

    The quotient is rounded to the dtype of w before it meets w, as the reference models do.
    """
    y = x.to(wide(x.dtype))
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * y.to(weight.dtype)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """RoPE: pairs of numbers of x (T, heads, d) turned by the angles of their position, cos and sin (T, d' <= d).

    Su et al. 2021, https://arxiv.org/abs/2104.09864. The pairs are (i, i + d'/2), or (2i, 2i + 1) where interleaved;
    numbers beyond d' stay.
    """
    x, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    if interleaved:
        partner = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    turned = x * cos[:, None] + partner * sin[:, None]
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def soft_cap(scores: Tensor, cap: float | None) -> Tensor:
    """cap tanh(score / cap), where there is a cap. Gemma 2, https://arxiv.org/abs/2408.00118"""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, cap: float | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v of one document, where no query sees the future. Vaswani et al. 2017, arXiv:1706.03762

    q (T, H, d) are the last T positions of k, v (S, KV, d) -> (T, H, d). Query head h reads key head h // (H / KV)
    (Ainslie et al. 2023, arXiv:2305.13245). A `window` of positions, the query's own included, is all that it sees; a
    soft cap bends the scores.
    """
    (T, H, d), (S, KV, _) = q.shape, k.shape
    q = q.view(T, KV, H // KV, d).permute(1, 2, 0, 3).reshape(KV, -1, d)  # (KV, G·T, d)
    scores = soft_cap((q * d**-0.5) @ k.permute(1, 2, 0), cap)  # (KV, G·T, S)
    unseen = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)  # (T, S)
    if window:
        unseen |= torch.ones_like(unseen).tril(S - T - window)
    scores = scores.view(KV, -1, T, S).masked_fill(unseen, float("-inf"))
    weights = scores.softmax(-1, dtype=wide(q.dtype)).to(q.dtype)
    out = weights.view(KV, -1, S) @ v.transpose(0, 1)  # (KV, G·T, d)
    return out.view(KV, -1, T, d).permute(2, 0, 1, 3).reshape(T, H, d)


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None = None, cap=None) -> Tensor:
    """`attend` in each of the documents that lie end to end: q (T, H, d), k, v (T, KV, d) -> (T, H, d)."""
    documents = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*document, window, cap) for document in documents])


def short_convolution(x: Tensor, w: Tensor, lengths: list[int], before: Tensor | None = None) -> Tensor:
    """y_t = Σ_j w_j x_{t-K+1+j} in each document, channel by channel: x (T, C), w (C, K) -> (T, C).

    `before` (documents, K - 1, C) are the inputs in front of each; without it, zeros.
    """
    outputs = []
    for i, document in enumerate(x.split(lengths)):
        earlier = x.new_zeros(w.shape[1] - 1, x.shape[1]) if before is None else before[i]
        windows = torch.cat((earlier, document)).unfold(0, w.shape[1], 1)  # (t, C, K)
        outputs.append((windows * w).sum(-1))
    return torch.cat(outputs)


def last_inputs(x: Tensor, lengths: list[int], count: int, before: Tensor | None = None) -> Tensor:
    """The last `count` inputs of each document, (documents, count, C), as `short_convolution` takes them."""
    before = x.new_zeros(len(lengths), count, x.shape[1]) if before is None else before
    return torch.stack([torch.cat(both)[-count:] for both in zip(before, x.split(lengths), strict=True)])


def unit_heads(q: Tensor, k: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Queries and keys (T, KH, d) of length 1, one of each for every value head, (T, H, d); queries over √d. In float32
    or wider."""
    q, k = (x.to(wide(x.dtype)).repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    q, k = (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    return q * q.shape[-1] ** -0.5, k


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lengths: list[int], states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = e^{g_t} S_{t-1} + k_t β_t (v_t - e^{g_t} S_{t-1}ᵀ k_t)ᵀ and o_t = S_tᵀ q_t / √d in each document, keys and
    queries of length 1. Yang et al. 2024, https://arxiv.org/abs/2412.06464

    q, k (T, KH, d), v (T, H, d'), g <= 0 and β (T, H) -> o (T, H, d') and the last states (documents, H, d, d');
    `states` are those in front of each document, zeros without it.
    """
    dtype, heads = v.dtype, v.shape[1]
    q, k = unit_heads(q, k, heads)
    v, g, beta = (x.to(q.dtype) for x in (v, g, beta))
    outputs, last = [], []
    for i, document in enumerate(zip(*(x.split(lengths) for x in (q, k, v, g, beta)), strict=True)):
        S = v.new_zeros(heads, k.shape[-1], v.shape[-1]) if states is None else states[i].to(v)
        for q_t, k_t, v_t, g_t, beta_t in zip(*document, strict=True):
            S = g_t.exp()[:, None, None] * S
            error = beta_t[:, None] * (v_t - (S * k_t[..., None]).sum(1))  # (H, d')
            S = S + k_t[..., None] * error[:, None]
            outputs.append((S * q_t[..., None]).sum(1))
        last.append(S)
    return torch.stack(outputs).to(dtype), torch.stack(last)


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """silu(gate) * up, both (T, I). Shazeer 2020, https://arxiv.org/abs/2002.05202; with GELU it is his GEGLU."""
    return ACTIVATIONS[activation](gate) * up


def gated_linear(gate: Tensor, up: Tensor, activation: str, module: nn.Module) -> Tensor:
    """A linear map of SwiGLU, (T, I) both -> (T, out)."""
    return module(swiglu(gate, up, activation))


def logits(hidden: Tensor, head: Tensor, cap: float | None = None) -> Tensor:
    """hidden (N, D), head (V, D) -> (N, V)"""
    return soft_cap(hidden @ head.T, cap)


def log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, cap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """log softmax(logits_n / temperature)[y_n] in nats, (N,), for hidden (N, D), head (V, D), targets y (N,)."""
    z = logits(hidden, head, cap) / temperature
    return F.log_softmax(z, -1, dtype=wide(z.dtype)).gather(1, targets[:, None])[:, 0]


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """-Σ_n log softmax(logits_n)[y_n] in nats, over N trained positions: hidden (N, D), head (V, D), targets y (N,)."""
    return -log_probs(hidden, head, targets, cap).sum()
