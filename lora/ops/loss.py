"""Cross-entropy summed over trained tokens, in nats; the caller divides once by their number.

L = Σ_t -log softmax(W h_t)[y_t]    e_t = softmax(W h_t) - onehot(y_t)    ∂L/∂h_t = Wᵀ e_t    ∂L/∂W = Σ_t e_t h_tᵀ

With a soft cap c of the logits, z = c tanh(W h / c) stands for W h, and e_t is multiplied by ∂z/∂(W h) = 1 - (z / c)².
"""

import torch
from torch.nn import functional as F

ROWS = 256  # logits exist for this many positions at a time: 256 × 49,152 of them are 50 MB in float32


def logits_of(hidden: torch.Tensor, head: torch.Tensor, cap: float | None = None) -> torch.Tensor:
    """hidden (N, D), head (V, D) -> (N, V), softly capped where there is a cap."""
    logits = hidden @ head.T
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, cap: float | None = None):
    """hidden (N, D), head (V, D), targets (N,) -> the sum, in float32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.cross_entropy(logits_of(hidden, head, cap).to(wide), targets, reduction="sum")


def summed_loss(hidden, head, targets, rows: int = ROWS, cap: float | None = None) -> torch.Tensor:
    """`plain_loss` without ever holding all logits. Only pass positions that are trained."""
    return _ChunkedLoss.apply(hidden, head, targets, rows, cap)


class _ChunkedLoss(torch.autograd.Function):
    """The gradients are formed together with the loss, chunk by chunk, so no logits are kept for later. That of the
    head adds up in float32 or wider."""

    @staticmethod
    def forward(ctx, hidden, head, targets, rows, cap):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_head = torch.zeros_like(head, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), rows):
            part, answers = hidden[start : start + rows], targets[start : start + rows, None]
            logits = logits_of(part, head, cap)
            scores = F.log_softmax(logits, -1, dtype=wide)  # (rows, V)
            loss -= scores.gather(1, answers).sum()
            if any(ctx.needs_input_grad):
                scores.exp_().scatter_add_(1, answers, scores.new_full(answers.shape, -1.0))  # softmax - onehot
                if cap is not None:
                    scores *= 1 - (logits / cap).square()
                errors = scores.to(head.dtype)
            if of_hidden is not None:
                torch.mm(errors, head, out=of_hidden[start : start + rows])
            if of_head is not None:
                of_head += errors.T @ part  # (V, D)
        ctx.save_for_backward(of_hidden, of_head)
        ctx.dtype = head.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream):
        of_hidden, of_head = ctx.saved_tensors
        of_hidden = None if of_hidden is None else of_hidden * upstream.to(of_hidden.dtype)
        of_head = None if of_head is None else (of_head * upstream).to(ctx.dtype)
        return of_hidden, of_head, None, None, None
