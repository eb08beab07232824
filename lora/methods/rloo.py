"""Several answers to one prompt, each compared with the mean of the others: an answer as a whole is one action.

Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740. Of an answer with reward r, one of G to its prompt:

    r' = r - β Σ k1    A = r' - mean of the other G - 1    loss = -min(ρ A, clip(ρ, 1 - ε, 1 + ε_high) A)

ρ = e^(Σ lp - Σ lp_old), sums over the answer's tokens. Distance to the reference is part of the reward, before anything
is compared, so it has no gradient of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora.data.batch import Batch
from lora.methods import policy
from lora.network.decoder import Model
from lora.train.evaluate import Total

KIND = "prompt"
SETTINGS = policy.SETTINGS
LABEL, RATE, EPOCHS, NOTE = "loss", 0.025, 1, policy.NOTE
FIGURES = policy.FIGURES | {
    "kl": "nats a token from the reference: k1",
    "clipped": "answers that the clip holds back",
}


compares = policy.compares


def defaults(args) -> dict:
    return policy.defaults(args, group=8, kl=0.05, updates=1)


def advantages(rewards: Tensor) -> Tensor:
    """r - mean of the others: (G,) -> (G,)"""
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    return rewards - others


def divergence(batch: Batch) -> Tensor:
    """Σ k1 of each completion, (R,), under the model that sampled."""
    return batch.sums(policy.k1(batch.per_token["sampled"], batch.per_token["reference"]))


def prepare(model: Model, batches: Sequence[Batch], args, total: Total, carried: dict) -> list[Batch]:
    def reward(batch: Batch) -> Tensor:
        return batch.known["reward"] - args.kl * divergence(batch) if compares(args) else batch.known["reward"]

    return policy.with_advantages(batches, reward, advantages)


def count(batch: Batch, args) -> int:
    return batch.linked


def loss(model: Model, batch: Batch, args) -> tuple[Tensor, int, dict]:
    logs = policy.log_probs(model, policy.hidden(model, batch), batch, args)  # (N,)
    if not batch.linked:
        return logs.sum(), 0, {}
    ratio = torch.exp(batch.sums(logs - policy.old_log_probs(logs, batch, args)))  # (R,)
    advantage = batch.known["advantage"]
    figures = {"clipped": (policy.is_clipped(ratio, advantage, args).sum(), len(ratio))}
    if compares(args):
        figures["kl"] = (divergence(batch).sum(), len(logs))
    return policy.clipped_loss(ratio, advantage, args).sum(), count(batch, args), figures
