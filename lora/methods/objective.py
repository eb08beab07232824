"""A method's loss, as the training loop and evaluations call it."""

from collections.abc import Iterable
from types import ModuleType

import torch

from lora.device import widest
from lora.train import memory
from lora.train.evaluate import Total, means


class Objective:
    """A method's loss as the training loop calls it: batch -> sum. What it measures besides adds up until `figures`.
    `carried` are numbers that a method hands from step to step, as an adaptive coefficient."""

    def __init__(self, method: ModuleType, model, args, carried: dict[str, float] | None = None):
        self.method, self.model, self.args = method, model, args
        self.carried = {} if carried is None else carried
        self.loss, self.count, self.sums = 0.0, 0, {name: (0.0, 0.0) for name in method.FIGURES}

    def prepare(self, batches: Iterable, total: Total = list) -> Iterable:
        """The batches of a step, of which `total` adds numbers over all processes."""
        self.loss, self.count, self.sums = 0.0, 0, {name: (0.0, 0.0) for name in self.method.FIGURES}
        if not hasattr(self.method, "prepare"):
            return batches
        return self.method.prepare(self.model, list(batches), self.args, total, self.carried)

    def count_in(self, batches: Iterable, total: Total = list) -> int:
        """What the sum of a whole step is divided by."""
        count = getattr(self.method, "count", lambda batch, args: batch.count)
        [found] = total([sum(count(batch, self.args) for batch in batches)])
        return max(1, int(found))

    def __call__(self, batch) -> torch.Tensor:
        """An example far longer than --micro-tokens cannot be cut, so its activations are computed again in the
        backward pass."""
        self.model.checkpoint_activations = memory.recomputes(len(batch.tokens), self.args)
        return self.add(batch)

    def add(self, batch) -> torch.Tensor:
        loss, count, figures = self.method.loss(self.model, batch, self.args)
        self.loss = self.loss + loss.detach().to(widest(loss.device))  # not read here: a GPU would be waited for
        self.count += count
        for name, (value, number) in figures.items():
            self.sums[name] = self.sums[name][0] + float(value), self.sums[name][1] + float(number)
        return loss

    def figures(self, total: Total = list) -> dict[str, float]:
        """Means since `prepare`; of what did not occur there is none."""
        return means(self.sums, total)


@torch.no_grad()
def measure(method: ModuleType, model, batches: Iterable, args, total: Total = list) -> dict[str, float]:
    """`loss`, the mean over all batches however they are cut, and the figures."""
    objective = Objective(method, model, args)
    for batch in objective.prepare(batches, total):
        objective.add(batch)
    loss, count = total([float(objective.loss), objective.count])
    return {"loss": loss / count, **objective.figures(total)}
