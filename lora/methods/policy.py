"""What grpo, rloo and ppo share. Answers are sampled, rewarded, and made likelier where their reward is above others'.

Of one sampled token, lp is log p under the model that trains, lp_old under the model that sampled, lp_ref under that of
step 0; A is the advantage, how much better the token was than expected:

    k1 = lp - lp_ref    k3 = e^-k1 - 1 + k1            both have KL(model || reference) as their mean over samples
    ρ = e^(lp - lp_old)                                1 until the weights are stepped
    L = -min(ρ A, clip(ρ, 1 - ε, 1 + ε_high) A)        no gain from going further than ε at once

k1 and k3: Schulman 2020, http://joschu.net/blog/kl-approx.html; k3 is never negative and varies less. L: Schulman et
al. 2017, https://arxiv.org/abs/1707.06347; ε_high: Yu et al. 2025, https://arxiv.org/abs/2503.14476.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora import ops
from lora.data.batch import Batch
from lora.network.decoder import Model

SETTINGS = (
    "reward", "reward_timeout", "group", "temperature", "max_new_tokens", "kl", "epsilon", "epsilon_high", "updates",
)  # fmt: skip
FIGURES = {  # of the sampled answers, as `lora.run.rollouts` measures them; and those of every --reward
    "reward": "reward",
    "no_signal": "groups without a signal: all rewards are equal",
    "entropy": "entropy of a token's distribution, nats",
    "length": "tokens of an answer",
    "ended": "answers that end",
}
NOTE = (
    "The loss says nothing about success: with one update from each step's answers it is a mean of advantages, which "
    "are about 0 on average, while its gradient is not 0. Watch the reward."
)


# ---- formulas --------------------------------------------------------------------------------------------------------


def k1(logs: Tensor, reference: Tensor) -> Tensor:
    return logs - reference


def k3(logs: Tensor, reference: Tensor) -> Tensor:
    """e^-k1 - 1 + k1"""
    return torch.expm1(-k1(logs, reference)) + k1(logs, reference)


def clipped_loss(ratio: Tensor, advantage: Tensor, args) -> Tensor:
    """-min(ρ A, clip(ρ, 1 - ε, 1 + ε_high) A)"""
    near = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
    return -torch.minimum(ratio * advantage, near * advantage)


def is_clipped(ratio: Tensor, advantage: Tensor, args) -> Tensor:
    """Where the clip holds ρ back: it is already beyond the bound that A draws it to, and has no gradient."""
    return ((advantage > 0) & (ratio > 1 + args.epsilon_high)) | ((advantage < 0) & (ratio < 1 - args.epsilon))


def by_group(rewards: Tensor, groups: Tensor, advantages: Callable[[Tensor], Tensor]) -> Tensor:
    """Rewards (R,), each completion's group (R,) -> advantages (R,): `advantages` of each group's rewards (G,).

    A reward of NaN is that of a completion that cannot be scored: it is none of its group, and has an advantage of 0.
    So have all of a group whose rewards are equal, exactly: there is no signal in it.
    """
    found = torch.zeros_like(rewards)
    for group in groups.unique():
        members = (groups == group) & ~rewards.isnan()
        if len(rewards[members].unique()) > 1:
            found[members] = advantages(rewards[members])
    return found


# ---- batches ---------------------------------------------------------------------------------------------------------


def with_advantages(batches: Sequence[Batch], rewards: Callable[[Batch], Tensor], advantages) -> list[Batch]:
    """The batches of a step, each completion's advantage known. A group is on one process, in any of its batches."""
    sampled = [batch for batch in batches if batch.linked]  # the others are padding
    if not sampled:
        return list(batches)
    groups = torch.cat([batch.known["group"] for batch in sampled])
    found = by_group(torch.cat([rewards(batch) for batch in sampled]), groups, advantages)
    parts = iter(found.split([batch.linked for batch in sampled]))
    return [replace(b, known={**b.known, "advantage": next(parts)}) if b.linked else b for b in batches]


def hidden(model: Model, batch: Batch) -> Tensor:
    """Hidden states of the positions that predict the sampled tokens, (N, D)."""
    return model.trunk(batch.tokens, batch.lengths)[batch.trained]


def log_probs(model: Model, hidden: Tensor, batch: Batch, args) -> Tensor:
    """log p of each sampled token, (N,), at the temperature it was sampled at."""
    cap = model.config.final_logit_softcapping
    return ops.log_probs(hidden, model.head_weight, batch.targets, cap, args.temperature)


def old_log_probs(logs: Tensor, batch: Batch, args) -> Tensor:
    """log p before the weights are stepped, (N,). With one update a step that is now; with more, it is what the first
    pass over the batch stored."""
    return logs.detach() if args.updates == 1 else batch.per_token.setdefault("old", logs.detach())


def each_token(values: Tensor, batch: Batch) -> Tensor:
    """A number of each completion (R,) -> of each of its tokens (N,)"""
    return values.repeat_interleave(torch.tensor(batch.counts, device=values.device))


# ---- settings --------------------------------------------------------------------------------------------------------


def compares(args) -> bool:
    return args.kl > 0


def defaults(args, **own) -> dict:
    """`own` are those of the method."""
    return {"epsilon_high": args.epsilon, **own}
