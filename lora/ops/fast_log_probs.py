"""Log-probabilities by chunks, their gradient formed together with them: logits exist for ROWS positions at a time.

    l_n = log softmax(W h_n)[y_n]    e_n = onehot(y_n) - softmax(W h_n)    ∂l_n/∂h_n = Wᵀ e_n    ∂l_n/∂W = e_n h_nᵀ

What follows multiplies each row by its g_n = ∂L/∂l_n, so Wᵀ e_n is kept and the logits are not: (N, D) in place of
(N, V). Only where W trains are they formed again, as its gradient Σ_n g_n e_n h_nᵀ needs every g_n. With a soft cap c,
z = c tanh(W h / c) stands for W h, and e_n is multiplied by ∂z/∂(W h) = 1 - (z / c)². At a temperature T the softmax is
that of z / T, and e_n is divided by T.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lora.ops.plain import logits, wide

ROWS = 256  # 256 × 49,152 logits are 50 MB in float32


def log_probs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    cap: float | None = None,
    temperature: float = 1.0,
    rows: int = ROWS,
) -> Tensor:
    """`plain.log_probs`"""
    return _LogProbs.apply(hidden, head, targets, cap, temperature, rows)


def _scores(z: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """log softmax(z / T), (n, V)"""
    return F.log_softmax(z if temperature == 1 else z / temperature, -1, dtype=dtype)


def _error(z: Tensor, scores: Tensor, y: Tensor, cap: float | None, temperature: float) -> Tensor:
    """e (n, V) in the place of its scores: logits z, scores (n, V), targets y (n, 1)."""
    e = scores.exp_().neg_().scatter_add_(1, y, scores.new_ones(y.shape))
    e = e if temperature == 1 else e.div_(temperature)
    return e if cap is None else e.mul_(1 - (z / cap).square())


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, cap, temperature, rows):
        found = torch.empty(len(hidden), dtype=wide(hidden.dtype), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            y = targets[part, None]
            z = logits(hidden[part], head, cap)  # (rows, V)
            scores = _scores(z, temperature, found.dtype)
            found[part] = scores.gather(1, y)[:, 0]
            if d_hidden is not None:
                torch.mm(_error(z, scores, y, cap, temperature).to(head.dtype), head, out=d_hidden[part])
            z = scores = None  # freed before the next rows need as much
        ctx.save_for_backward(d_hidden, *((hidden, head, targets) if ctx.needs_input_grad[1] else ()))
        ctx.how = cap, temperature, rows
        return found

    @staticmethod
    def backward(ctx, upstream):
        d_hidden, *others = ctx.saved_tensors
        d_head = _head_gradient(*others, upstream, *ctx.how) if others else None
        d_hidden = None if d_hidden is None else (d_hidden * upstream[:, None]).to(d_hidden.dtype)
        return d_hidden, d_head, None, None, None, None


def _head_gradient(hidden, head, targets, upstream, cap, temperature, rows) -> Tensor:
    """Σ_n g_n e_n h_nᵀ, (V, D), added up in float32 or wider."""
    d_head = torch.zeros_like(head, dtype=upstream.dtype)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        z = logits(hidden[part], head, cap)
        e = _error(z, _scores(z, temperature, upstream.dtype), targets[part, None], cap, temperature)
        d_head += (e * upstream[part, None]).to(head.dtype).T @ hidden[part]
        z = e = None
    return d_head.to(head.dtype)
