"""Each token is an action, its advantage told by a value head: the way of the first RLHF articles.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347, as Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, and
Ouyang et al. 2022 apply it; its details: Huang et al. 2024, https://arxiv.org/abs/2403.17031. Of token t of an answer,
V_t is the value of the hidden state that predicts it; behind the last token V and A are 0:

    r_t = -β k1_t, and the answer's score more at its last token
    δ_t = r_t + γ V_(t+1) - V_t    A_t = δ_t + γ λ A_(t+1)    R_t = A_t + V_t
    loss = -min(ρ Â, clip(ρ, 1 - ε, 1 + ε_high) Â) + value_weight · ½ max((V - R)², (clip(V, V_old ± c) - R)²)

with Â whitened over the step: mean 0, variance 1. A_t is generalised advantage estimation, Schulman et al. 2015,
https://arxiv.org/abs/1506.02438. `old`, `values` and `reference` were measured when the answers had been sampled.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence, unpad_sequence

from lora.data.batch import Batch
from lora.methods import policy
from lora.network.decoder import Model
from lora.train.evaluate import Total

KIND, VALUE_HEAD = "prompt", True
SETTINGS = (
    *policy.SETTINGS, "gamma", "lam", "value_weight", "value_clip", "whiten_rewards", "kl_target", "kl_horizon",
    "no_end_penalty",
)  # fmt: skip
LABEL, RATE, EPOCHS, NOTE = "loss", 0.025, 1, policy.NOTE
FIGURES = policy.FIGURES | {
    "kl": "nats a token from the reference: k1",
    "clipped": "tokens that the clip holds back",
    "policy_loss": "loss of the policy",
    "value_loss": "loss of the value head",
    "explained": "explained variance: 1 - Var(R - V) / Var(R), 1 where the value head foresees every return",
    "kl_coefficient": "what a nat from the reference costs: β",
}


compares = policy.compares


def defaults(args) -> dict:
    return policy.defaults(args, group=1, kl=0.05, updates=4)


# ---- formulas --------------------------------------------------------------------------------------------------------


def token_rewards(scores: Tensor, kl: Tensor, coefficient: float, counts: list[int]) -> Tensor:
    """-β k1 of each token (N,), the score of each answer (R,) added at its last token -> (N,)"""
    ends = torch.tensor(counts, device=scores.device).cumsum(0) - 1
    return (-coefficient * kl).to(scores.dtype).index_add(0, ends, scores)


def gae(rewards: Tensor, values: Tensor, counts: list[int], gamma: float, lam: float) -> Tensor:
    """A_t = δ_t + γ λ A_(t+1), δ_t = r_t + γ V_(t+1) - V_t, within each of R answers end to end: (N,), (N,) -> (N,)"""
    r, v = (pad_sequence(x.split(counts), batch_first=True) for x in (rewards, values))  # (R, T), 0 behind each end
    delta = r + gamma * pad(v, (0, 1))[:, 1:] - v
    found = torch.zeros(len(counts), delta.shape[1] + 1, dtype=delta.dtype, device=delta.device)
    for t in reversed(range(delta.shape[1])):
        found[:, t] = delta[:, t] + gamma * lam * found[:, t + 1]
    return torch.cat(unpad_sequence(found, torch.tensor(counts), batch_first=True))


def moments(parts: Sequence[Tensor], kept: Sequence[Tensor], total: Total = list) -> tuple[float, float]:
    """Mean and unbiased variance of the numbers that are kept, (N,) each, of all processes."""
    parts = [part[mask] for part, mask in zip(parts, kept, strict=True)]
    count, summed = total([sum(map(len, parts)), sum(float(part.sum()) for part in parts)])
    mean = summed / max(count, 1)
    [squares] = total([sum(float((part - mean).square().sum()) for part in parts)])
    return mean, squares / max(count - 1, 1)


def whiten(x: Tensor, mean: float, variance: float, keep_mean: bool = False) -> Tensor:
    """(x - mean) / √(variance + 1e-8), and the mean again where it is kept"""
    return (x - mean) * (variance + 1e-8) ** -0.5 + (mean if keep_mean else 0)


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((V - R)², (clip(V, V_old ± c) - R)²), (N,)"""
    near = old + (values - old).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def next_coefficient(coefficient: float, kl: float, answers: int, target: float, horizon: float) -> float:
    """β (1 + clip(kl / target - 1, ±0.2) · answers / horizon), kl in nats an answer. Ziegler et al. 2019, 2.2"""
    return coefficient * (1 + min(max(kl / target - 1, -0.2), 0.2) * answers / horizon)


# ---- a step ----------------------------------------------------------------------------------------------------------


def scored(batch: Batch) -> Tensor:
    """Which tokens (N,) are of an answer that could be scored: others count nowhere."""
    return policy.each_token(~batch.known["reward"].isnan(), batch)


def divergence(batch: Batch, args) -> Tensor:
    """k1 of each token, (N,), under the model that sampled."""
    old = batch.per_token["old"]
    return policy.k1(old, batch.per_token["reference"]) if compares(args) else torch.zeros_like(old)


def scores(batch: Batch, args) -> Tensor:
    """The reward of each answer, less where it did not end, (R,)"""
    return batch.known["reward"].nan_to_num(0) - args.no_end_penalty * (1 - batch.known["ended"])


def prepare(model: Model, batches: Sequence[Batch], args, total: Total, carried: dict[str, float]) -> list[Batch]:
    """Advantages and returns of all tokens of a step; `carried` has β for the next step, where it adapts."""
    coefficient = carried.get("kl", args.kl)
    sampled = [batch for batch in batches if batch.linked]  # the others are padding
    kept = [scored(batch) for batch in sampled]
    values = [batch.per_token["values"] for batch in sampled]
    away = [divergence(batch, args) for batch in sampled]

    rewards = [token_rewards(scores(b, args), k, coefficient, b.counts) for b, k in zip(sampled, away, strict=True)]
    if args.whiten_rewards:
        mean, variance = moments(rewards, kept, total)
        rewards = [whiten(part, mean, variance, keep_mean=True) for part in rewards]
    found = zip(rewards, values, sampled, strict=True)
    advantages = [gae(r, v, batch.counts, args.gamma, args.lam) for r, v, batch in found]
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    mean, variance = moments(advantages, kept, total)  # an advantage is R - V
    _, of_returns = moments(returns, kept, total)
    explained = 1 - variance / of_returns if of_returns else 0.0
    advantages = [whiten(part, mean, variance) for part in advantages]

    if args.kl_target:
        nats = sum(float(part[mask].sum()) for part, mask in zip(away, kept, strict=True))
        nats, answers = total([nats, sum(int((~b.known["reward"].isnan()).sum()) for b in sampled)])
        kl = nats / max(answers, 1)
        carried["kl"] = next_coefficient(coefficient, kl, answers, args.kl_target, args.kl_horizon)

    each = iter(zip(advantages, returns, strict=True))
    return [_with(batch, *next(each), coefficient, explained) if batch.linked else batch for batch in batches]


def _with(batch: Batch, advantage: Tensor, returns: Tensor, coefficient: float, explained: float) -> Batch:
    numbers = {"kl_coefficient": coefficient, "explained": explained}  # of the step, so every completion's the same
    known = {name: torch.full_like(batch.known["reward"], number) for name, number in numbers.items()}
    per_token = {**batch.per_token, "advantage": advantage, "return": returns}
    return replace(batch, known={**batch.known, **known}, per_token=per_token)


def count(batch: Batch, args) -> int:
    return int(scored(batch).sum()) if batch.linked else 0


def loss(model: Model, batch: Batch, args) -> tuple[Tensor, int, dict]:
    hidden = policy.hidden(model, batch)
    logs, values = policy.log_probs(model, hidden, batch, args), model.v_head(hidden)  # (N,) each
    if not batch.linked:
        return logs.sum() + values.sum(), 0, {}
    kept = scored(batch)
    known = {name: numbers[kept] for name, numbers in batch.per_token.items()}
    ratio, advantage = torch.exp(logs[kept] - known["old"]), known["advantage"]
    of_policy = policy.clipped_loss(ratio, advantage, args).sum()
    of_values = value_losses(values[kept], known["values"], known["return"], args.value_clip).sum()
    number = count(batch, args)
    figures = {
        "clipped": (policy.is_clipped(ratio, advantage, args).sum(), number),
        "policy_loss": (of_policy.detach(), number),
        "value_loss": (of_values.detach(), number),
        **{name: (batch.known[name].sum(), batch.linked) for name in ("explained", "kl_coefficient")},
    }
    if compares(args):
        figures["kl"] = (divergence(batch, args)[kept].sum(), number)
    return of_policy + args.value_weight * of_values, number, figures
