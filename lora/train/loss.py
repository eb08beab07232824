"""Cross-entropy summed over trained tokens, in nats; the caller divides once by their number.

L = Σ_t -log softmax(W h_t)[y_t]            ∂L/∂h_t = Wᵀ (softmax(W h_t) - onehot(y_t))
"""

import torch
from torch.nn import functional as F

ROWS = 256  # logits exist for this many positions at a time: 256 × 49,152 of them are 50 MB in float32


def plain_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """hidden (N, D), head (V, D), targets (N,) -> the sum, in float32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.cross_entropy((hidden @ head.T).to(wide), targets, reduction="sum")


def summed_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, rows: int = ROWS) -> torch.Tensor:
    """`plain_loss` for a frozen head, without ever holding all logits. Only pass positions that are trained."""
    if head.requires_grad:
        return plain_loss(hidden, head, targets)
    return _ChunkedLoss.apply(hidden, head, targets, rows)


class _ChunkedLoss(torch.autograd.Function):
    """The gradient of `hidden` is formed together with the loss, chunk by chunk, so no logits are kept for later."""

    @staticmethod
    def forward(ctx, hidden, head, targets, rows):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part, answers = hidden[start : start + rows], targets[start : start + rows, None]
            scores = F.log_softmax(part @ head.T, -1, dtype=wide)  # (rows, V)
            loss -= scores.gather(1, answers).sum()
            if gradient is not None:
                scores.exp_().scatter_add_(1, answers, scores.new_full(answers.shape, -1.0))  # softmax - onehot
                torch.mm(scores.to(head.dtype), head, out=gradient[start : start + rows])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None
