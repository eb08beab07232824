"""One optimisation step over micro-batches, and the learning-rate schedules."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from lora.errors import BadNumbers

SCHEDULES = {  # progress after the warm-up, in [0, 1) -> share of the learning rate
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate(step: int, total: int, peak: float, warmup: int = 0, schedule: str = "cosine") -> float:
    """The rate of step `step` (from 0) of `total`: up in equal stairs over `warmup` steps, then by `schedule`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * SCHEDULES[schedule]((step - warmup) / max(1, total - warmup))


class StepResult(NamedTuple):
    """`loss` in nats per trained token, before the update; `grad_norm` before clipping."""

    loss: float
    grad_norm: float
    tokens: int
    trained_tokens: int


def accumulate(objective: Callable, batches: Sequence) -> tuple[float, int]:
    """Add the gradients of a whole step to `.grad`; returns its mean loss and its number of trained tokens.

    `objective(batch)` is the loss summed over trained tokens. Each sum is divided by the trained tokens of the whole
    step, so every token weighs the same however the step is cut.
    """
    trained = sum(int(batch.trained.sum()) for batch in batches)
    loss = 0.0
    for batch in batches:
        part = objective(batch) / trained
        part.backward()
        loss += part.item()
    return loss, trained


def clip(parameters: Iterable[torch.nn.Parameter], limit: float) -> float:
    """Scale all gradients by min(1, limit / norm) and return the norm before that; a limit of 0 is none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit:
        torch.nn.utils.clip_grads_with_norm_([p for p in parameters if p.grad is not None], limit, norm)
    return norm.item()


def train_step(objective: Callable, batches: Sequence, optimizer: torch.optim.Optimizer, lr: float, limit: float = 0.0):
    """Accumulate, clip, update. Raises BadNumbers, the weights not stepped, where loss or gradient is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss, trained = accumulate(objective, batches)
    norm = clip(parameters, limit)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        raise BadNumbers(
            f"training diverged in this step: loss {loss:g}, gradient norm {norm:g}. Lower --lr, or use --dtype float32"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss, norm, sum(len(batch.tokens) for batch in batches), trained)
