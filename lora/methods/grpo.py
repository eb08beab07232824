"""Several answers to one prompt, each compared with its group: better than the others becomes likelier.

Shao et al. 2024, https://arxiv.org/abs/2402.03300. Of a group of G answers with rewards r, and a token of one of them:

    A = (r - mean) / (std + 1e-4)    loss = -min(ρ A, clip(ρ, 1 - ε, 1 + ε_high) A) + β ρ k3

`lora.methods.policy` has ρ and k3. While ρ is 1 the loss is a mean of -A, whatever the model: about 0, as the
advantages of a group add up to 0. Its gradient, -A ∇lp, is not 0: watch the rewards. The division makes groups count
most that are almost all right or all wrong; `--scale none` leaves it out: Liu et al. 2025, arXiv:2503.20783.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lora.data.batch import Batch
from lora.methods import policy
from lora.network.decoder import Model
from lora.train.evaluate import Total

KIND = "prompt"
SETTINGS = (*policy.SETTINGS, "loss", "scale")
LABEL, RATE, EPOCHS, NOTE = "loss", 0.025, 1, policy.NOTE
FIGURES = policy.FIGURES | {
    "kl": "nats a token from the reference: ρ k3",
    "clipped": "tokens that the clip holds back",
}
SCALES = ("group", "none")


compares = policy.compares


def defaults(args) -> dict:
    return policy.defaults(args, loss="dapo", scale="group", group=8, kl=0.0, updates=1)


def advantages(rewards: Tensor, scale: str) -> Tensor:
    """(r - mean) / (std + 1e-4), or r - mean: (G,) -> (G,)"""
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + 1e-4) if scale == "group" else centred


# ---- how the losses of tokens become one -----------------------------------------------------------------------------


def sum_of_tokens(losses: Tensor, batch: Batch) -> Tensor:
    return batch.sums(losses).sum()


def sum_of_means(losses: Tensor, batch: Batch) -> Tensor:
    """Each completion's mean."""
    return (batch.sums(losses) / torch.tensor(batch.counts, device=losses.device)).sum()


LOSSES = {  # a batch's sum, and what it counts: the sums of a step are divided by its counts
    # Σ / tokens of the step: a token is a token. Yu et al. 2025, https://arxiv.org/abs/2503.14476
    "dapo": (sum_of_tokens, lambda batch, args: len(batch.targets)),
    # the mean over completions of their means: a token of a long one counts less. The first paper
    "grpo": (sum_of_means, lambda batch, args: batch.linked),
    # Σ / tokens of the micro-batch, and the mean over those: the one that depends on how a step is cut
    "bnpo": (lambda losses, batch: sum_of_tokens(losses, batch) / len(losses), lambda batch, args: batch.linked > 0),
    # Σ / (completions · --max-new-tokens): a constant, so length changes nothing. Liu et al. 2025
    "dr_grpo": (sum_of_tokens, lambda batch, args: batch.linked * args.max_new_tokens),
}


# ---- a step ----------------------------------------------------------------------------------------------------------


def prepare(model: Model, batches: Sequence[Batch], args, total: Total, carried: dict) -> list[Batch]:
    return policy.with_advantages(batches, lambda b: b.known["reward"], partial(advantages, scale=args.scale))


def count(batch: Batch, args) -> int:
    _, counted = LOSSES[args.loss]
    return int(counted(batch, args))


def loss(model: Model, batch: Batch, args) -> tuple[Tensor, int, dict]:
    logs = policy.log_probs(model, policy.hidden(model, batch), batch, args)  # (N,)
    if not batch.linked:
        return logs.sum(), 0, {}
    ratio = torch.exp(logs - policy.old_log_probs(logs, batch, args))
    advantage = policy.each_token(batch.known["advantage"], batch)
    losses = policy.clipped_loss(ratio, advantage, args)
    figures = {"clipped": (policy.is_clipped(ratio, advantage, args).sum(), len(logs))}
    if compares(args):
        # ρ, which is 1 at first, changes the gradient: ∇(ρ k3) = k1 ∇lp is that of KL(model || reference), ∇k3 is not.
        # DeepSeek-AI 2025, https://arxiv.org/abs/2512.02556
        divergence = ratio * policy.k3(logs, batch.per_token["reference"])
        losses = losses + args.kl * divergence
        figures["kl"] = (divergence.detach().sum(), len(logs))
    summed, _ = LOSSES[args.loss]
    return summed(losses, batch), count(batch, args), figures
