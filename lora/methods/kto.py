"""Judged answers without a partner: a good one shall become likelier than its reference, a bad one less likely.

Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306. Of an answer, l = log p - log p of the reference:

    good: w (1 - σ(β(l - z)))    bad: w (1 - σ(β(z - l)))    z = max(0, mean l of answers to other questions)

z says how far the model has moved as a whole. It has no gradient, and is one number for all of a step.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora.data.batch import Batch
from lora.methods.answers import log_probs
from lora.network.decoder import Model
from lora.train.evaluate import Total, evaluating

KIND = "judged"
SETTINGS = ("beta", "good_weight", "bad_weight")
LABEL, RATE, EPOCHS = "loss an answer", 0.025, 1
FIGURES = {
    "reward_good": "reward of a good answer: β · (log p - log p of the reference)",
    "reward_bad": "reward of a bad answer",
    "accuracy": "answers that moved, compared with z, the way they are judged",
    "kl": "z: how much likelier answers to other questions became, nats",
    "log_prob_good": "log p of a good answer, nats",
    "log_prob_bad": "log p of a bad answer, nats",
    "length": "tokens of an answer",
}


def compares(args) -> bool:
    return True


def defaults(args) -> dict:
    return {"beta": 0.1}


def losses(change: Tensor, z: Tensor, good: Tensor, args) -> Tensor:
    """l (R,), z, and whether each is good (R,) -> (R,)"""
    away = torch.where(good, change - z, z - change)
    weight = torch.where(good, change.new_tensor(args.good_weight), args.bad_weight)
    return weight * (1 - torch.sigmoid(args.beta * away))


@torch.no_grad()
def prepare(model: Model, batches: Sequence[Batch], args, total: Total = list, _=None) -> list[Batch]:
    """z of the whole step; then the judged answers alone, which know it."""
    answers, others = ([batch.every(2, start) for batch in batches] for start in (0, 1))
    with evaluating(model):
        logs = [log_probs(model, batch) for batch in others]  # of padding, too: all ranks gather a sharded base
    changes = [log - batch.known["reference"] for log, batch in zip(logs, others, strict=True) if batch.linked]
    changed, count = total([sum(float(part.sum()) for part in changes), sum(map(len, changes))])
    z = max(0.0, changed / count)
    return [replace(b, known={**b.known, "z": torch.full_like(b.known["good"], z)}) if b.linked else b for b in answers]


def loss(model: Model, batch: Batch, args) -> tuple[Tensor, int, dict]:
    """The loss summed over the batch's R answers, and R."""
    logs = log_probs(model, batch)  # (R,)
    if not batch.linked:
        return logs.sum(), 0, {}
    change, good, z = logs - batch.known["reference"], batch.known["good"] > 0, batch.known["z"]
    return losses(change, z, good, args).sum(), len(logs), _figures(logs, change, good, z, batch, args)


@torch.no_grad()
def _figures(logs, change, good, z, batch: Batch, args) -> dict[str, tuple]:
    right = (change > z) == good
    sides = {"good": good, "bad": ~good}
    found = {f"reward_{name}": (args.beta * change[side].sum(), side.sum()) for name, side in sides.items()}
    found |= {f"log_prob_{name}": (logs[side].sum(), side.sum()) for name, side in sides.items()}
    found |= {"accuracy": (right.sum(), len(logs)), "kl": (z.sum(), len(logs))}
    return found | {"length": (sum(batch.counts), len(logs))}
