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

ROWS = 256  # 256 × 49,152 logits are 25 MB in bfloat16
AT_ONCE = 16  # of them in float32: 3 MB


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


def _read(z: Tensor, targets: Tensor, cap, temperature: float, errors: bool, by: Tensor | None = None) -> Tensor:
    """log softmax(z / T)[y], (n,), in float32 or wider. With `errors` logits z (n, V) become e, times `by` (n, 1) if
    that is given.

    On a CPU a few rows at a time, whose numbers in float32 stay in its caches.
    """
    found = torch.empty(len(z), dtype=wide(z.dtype), device=z.device)
    few = AT_ONCE if z.device.type == "cpu" else max(1, len(z))
    for start in range(0, len(z), few):
        part = slice(start, start + few)
        some, y = z[part], targets[part, None]
        scores = F.log_softmax(some if temperature == 1 else some / temperature, -1, dtype=found.dtype)  # (few, V)
        found[part] = scores.gather(1, y)[:, 0]
        if not errors:
            continue
        e = scores.exp_().neg_().scatter_add_(1, y, scores.new_ones(y.shape))
        e = e if temperature == 1 else e.div_(temperature)
        e = e if cap is None else e.mul_(1 - (some / cap).square())
        some.copy_(e if by is None else e.mul_(by[part]))
    return found


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, cap, temperature, rows):
        found = torch.empty(len(hidden), dtype=wide(hidden.dtype), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            z = logits(hidden[part], head, cap)  # (rows, V)
            found[part] = _read(z, targets[part], cap, temperature, d_hidden is not None)
            if d_hidden is not None:
                torch.mm(z, head, out=d_hidden[part])
            z = None  # freed before the next rows need as much
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
        _read(z, targets[part], cap, temperature, True, upstream[part, None])
        d_head += z.T @ hidden[part]
        z = None
    return d_head.to(head.dtype)
