"""One optimisation step over micro-batches: accumulate, reduce, clip, update."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from lora.device import widest
from lora.errors import BadNumbers


class StepResult(NamedTuple):
    """`loss` a trained token (of linked examples, a pair or an answer), before the update; `grad_norm` before clipping;
    `unchanged` is the share of numbers that the update left as they were: it was rounded away, or zero."""

    loss: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    unchanged: float


class NotFinite(BadNumbers):
    """Loss or gradient is not finite; the weights were not stepped."""

    fix = "Lower --lr, or use --dtype float32"

    def __init__(self, loss: float, norm: float):
        self.why = f"loss {loss:g}, gradient norm {norm:g}"
        super().__init__(f"training diverged in this step: {self.why}. {self.fix}")


def accumulate(objective: Callable, batches: Sequence, count: int | None = None) -> tuple[float, int]:
    """Add the gradients of a whole step to `.grad`; returns its mean loss and what that is a mean of.

    `objective(batch)` is a sum over `batch.count` trained tokens. Each sum is divided by the count of the whole step,
    so every token weighs the same however the step is cut. Where these batches are only a part of the step, `count` is
    that of all of it, and the loss is their part of the mean.
    """
    count = sum(batch.count for batch in batches) if count is None else count
    loss = 0.0
    for batch in batches:
        part = objective(batch) / count
        part.backward()
        loss = loss + part.detach().to(widest(part.device))  # read once a step: a GPU is waited for
    return float(loss), count


def clip(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scale all gradients by min(1, max_norm / norm) and return the norm before that; a max_norm of 0 is no limit."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_([p for p in parameters if p.grad is not None], max_norm, norm)
    return norm.item()


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A copy of all their numbers in one row, (N,)."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def no_reduce(parameters: Sequence, numbers: list[float]) -> list[float]:
    """`reduce` of a single process, which has nothing to add up."""
    return numbers


def train_step(
    objective: Callable,
    batches: Sequence,
    optimizer: torch.optim.Optimizer,
    lr: float,
    max_norm: float = 0.0,
    count: int | None = None,
    reduce: Callable[[Sequence, list[float]], list[float]] = no_reduce,
) -> StepResult:
    """Accumulate, reduce, clip, update; a parameter group may have an `lr_ratio`. With several processes `batches` are
    this one's, `count` is that of all, and `reduce(parameters, numbers)` sums over them. Raises NotFinite, the weights
    not stepped, and whatever `reduce` raises."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss, _ = accumulate(objective, batches, count)
    tokens = sum(len(batch.tokens) - batch.padding for batch in batches)
    trained = sum(len(batch.targets) for batch in batches)
    loss, tokens, trained = reduce(parameters, [loss, tokens, trained])
    norm = clip(parameters, max_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        raise NotFinite(loss, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    before = flat(parameters)
    optimizer.step()
    optimizer.zero_grad()
    unchanged = int(torch.count_nonzero(flat(parameters) == before)) / len(before)  # a sum would be formed in int64
    return StepResult(loss, norm, int(tokens), int(trained), unchanged)
