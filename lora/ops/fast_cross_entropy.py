"""Cross-entropy by chunks, its gradient formed together with it: logits exist for ROWS positions at a time.

    L = -Σ_n log softmax(W h_n)[y_n]    e_n = softmax(W h_n) - onehot(y_n)    ∂L/∂h_n = Wᵀ e_n    ∂L/∂W = Σ_n e_n h_nᵀ

With a soft cap c, z = c tanh(W h / c) stands for W h, and e_n is multiplied by ∂z/∂(W h) = 1 - (z / c)².
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lora.ops.plain import logits, wide

ROWS = 256  # 256 × 49,152 logits are 50 MB in float32


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, cap: float | None = None, rows: int = ROWS) -> Tensor:
    """`plain.cross_entropy`"""
    return _CrossEntropy.apply(hidden, head, targets, cap, rows)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, cap, rows):
        high = wide(hidden.dtype)
        loss = torch.zeros((), dtype=high, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head, dtype=high) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), rows):
            h, y = hidden[start : start + rows], targets[start : start + rows, None]
            z = logits(h, head, cap)  # (rows, V)
            scores = F.log_softmax(z, -1, dtype=high)
            loss -= scores.gather(1, y).sum()
            if any(ctx.needs_input_grad):
                scores.exp_().scatter_add_(1, y, scores.new_full(y.shape, -1.0))  # e = softmax - onehot
                if cap is not None:
                    scores *= 1 - (z / cap).square()
                e = scores.to(head.dtype)
            if d_hidden is not None:
                torch.mm(e, head, out=d_hidden[start : start + rows])
            if d_head is not None:
                d_head += e.T @ h  # (V, D)
            z = scores = e = None  # freed before the next rows need as much
        ctx.save_for_backward(d_hidden, d_head)
        ctx.dtype = head.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream):
        d_hidden, d_head = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * upstream.to(d_hidden.dtype)
        d_head = None if d_head is None else (d_head * upstream).to(ctx.dtype)
        return d_hidden, d_head, None, None, None
