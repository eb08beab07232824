"""What a model is trained for. A method is a module that says three things; the loop, checkpoints, evaluation and ranks
do not know which one runs.

    KIND                        how rows become examples: one of `lora.data.encode.KINDS`
    loss(model, batch, args)    a batch's loss as (sum, count, figures); the sum is divided once, by the step's count
    FIGURES                     what is measured besides: name -> in words; `figures` are (sum, count) of each, by name

A method whose loss compares with the model of step 0 says so: `compares(args)`. One that needs to know all batches of a
step before the first gradient has `prepare(model, batches, args, total)`, which returns those that are trained.
"""

from collections.abc import Iterable
from types import ModuleType

import torch

from lora.methods import dpo, kto, reward, sft
from lora.train import memory
from lora.train.evaluate import Total

METHODS = {"sft": sft, "dpo": dpo, "kto": kto, "reward": reward}
EPOCHS = {"sft": 3, "dpo": 1, "kto": 1, "reward": 1}  # at least, where nobody says
LOSS = {"sft": "loss (nats per trained token)", "dpo": "loss a pair", "kto": "loss an answer",
        "reward": "loss a pair"}  # fmt: skip
LR = {"sft": 1.0, "dpo": 0.1, "kto": 0.1, "reward": 0.25}  # of that of sft: measured, docs/alignment.md


def compares(method: ModuleType, args) -> bool:
    """Does the loss compare with what the model of step 0 says?"""
    return hasattr(method, "compares") and method.compares(args)


FLAGS = {  # that are not for every method
    "loss": ("dpo",),
    "beta": ("dpo", "kto"),
    "label_smoothing": ("dpo",),
    "sft_weight": ("dpo",),
    "margin": ("dpo", "reward"),
    "good_weight": ("kto",),
    "bad_weight": ("kto",),
    "center": ("reward",),
}


def used(settings: dict) -> dict:
    """The settings of a run that took part in it: not those that are off, nor those of another method."""
    method = settings.get("method", "sft")
    its = {name: value for name, value in settings.items() if method in FLAGS.get(name, (method,))}
    return {name: value for name, value in its.items() if value is not None and value is not False}


def fill(args) -> None:
    """Write into `args` what the settings of a method left open."""
    if args.method in ("dpo", "kto") and args.beta is None:
        args.beta = dpo.BETA_OF.get(args.loss, dpo.BETA)
    if args.method == "dpo" and args.loss in dpo.WITH_SMOOTHING and args.label_smoothing is None:
        args.label_smoothing = dpo.SMOOTHING
    if args.margin is None and (args.method == "reward" or (args.method == "dpo" and args.loss in dpo.WITH_MARGIN)):
        args.margin = dpo.MARGIN_OF.get(args.loss, 0.0)


def describe(args) -> str:
    """The method and its settings in a line; "" for sft."""
    names = {"dpo": ("beta", "label_smoothing", "sft_weight", "margin"), "kto": ("beta", "good_weight", "bad_weight"),
             "reward": ("margin", "center"), "sft": ()}[args.method]  # fmt: skip
    told = [f"{name.replace('_', ' ')} {getattr(args, name):g}" for name in names if getattr(args, name)]
    return ", ".join([f"dpo, {args.loss}" if args.method == "dpo" else args.method, *told]) if names else ""


class Objective:
    """A method's loss as the training loop calls it: batch -> sum. What it measures besides adds up until `figures`."""

    def __init__(self, method: ModuleType, model, args):
        self.method, self.model, self.args = method, model, args
        self.loss, self.count, self.sums = 0.0, 0, {name: (0.0, 0.0) for name in method.FIGURES}

    def prepare(self, batches: Iterable, total: Total = list) -> Iterable:
        """The batches of a step, of which `total` adds numbers over all processes."""
        self.loss, self.count, self.sums = 0.0, 0, {name: (0.0, 0.0) for name in self.method.FIGURES}
        if not hasattr(self.method, "prepare"):
            return batches
        return self.method.prepare(self.model, list(batches), self.args, total)

    def __call__(self, batch) -> torch.Tensor:
        """An example far longer than --micro-tokens cannot be cut, so its activations are computed again in the
        backward pass."""
        self.model.checkpoint_activations = memory.recomputes(len(batch.tokens), self.args)
        return self.add(batch)

    def add(self, batch) -> torch.Tensor:
        loss, count, figures = self.method.loss(self.model, batch, self.args)
        self.loss, self.count = self.loss + loss.item(), self.count + count
        for name, (value, number) in figures.items():
            self.sums[name] = self.sums[name][0] + float(value), self.sums[name][1] + float(number)
        return loss

    def figures(self, total: Total = list) -> dict[str, float]:
        """Means since `prepare`; of what did not occur there is none."""
        if not self.sums:
            return {}
        sums = iter(total([number for pair in self.sums.values() for number in pair]))
        means = {name: (value, count) for name, value, count in zip(self.sums, sums, sums, strict=True)}
        return {name: value / count for name, (value, count) in means.items() if count}


@torch.no_grad()
def measure(method: ModuleType, model, batches: Iterable, args, total: Total = list) -> dict[str, float]:
    """`loss`, the mean over all batches however they are cut, and the figures."""
    objective = Objective(method, model, args)
    for batch in objective.prepare(batches, total):
        objective.add(batch)
    loss, count = total([objective.loss, objective.count])
    return {"loss": loss / count, **objective.figures(total)}
