"""Preference pairs: make the chosen answer likelier than the rejected one, measured against the model of step 0.

Of P pairs, c stands for chosen and r for rejected, lp for Σ log p(token) of an answer and |.| for its tokens:

    l = lp - lp of the reference    Δ = l_c - l_r    with a bar: by token    σ the logistic function

Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; the losses name their own papers.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, sigmoid

from lora.data.batch import Batch
from lora.methods.answers import log_probs
from lora.network.decoder import Model

KIND = "pair"
SETTINGS = ("loss", "beta", "label_smoothing", "sft_weight", "margin")
LABEL, RATE, EPOCHS = "loss a pair", 0.025, 1
FIGURES = {
    "reward_chosen": "reward of the chosen answer: β · (log p - log p of the reference)",
    "reward_rejected": "reward of the rejected answer",
    "reward_margin": "their difference",
    "accuracy": "pairs whose chosen answer has the higher reward",
    "log_prob_chosen": "log p of the chosen answer, nats",
    "log_prob_rejected": "log p of the rejected answer, nats",
    "length_chosen": "tokens of the chosen answer",
    "length_rejected": "tokens of the rejected answer",
}
# β of DPO's paper; SimPO's is that of mean log-probabilities, which are smaller by an answer's length
BETA, BETA_OF = 0.1, {"simpo": 2.0}
MARGIN_OF = {"simpo": 1.0}  # half of its β, where its authors begin to search
SMOOTHING = 0.1  # the share of pairs that cdpo and robust take for swapped


class Sides(NamedTuple):
    """P pairs, (P, 2) each: chosen and rejected."""

    log_probs: Tensor
    reference: Tensor  # log-probabilities under the model of step 0
    lengths: Tensor
    margin: Tensor  # of --margin and of the row

    @property
    def change(self) -> Tensor:
        """l, (P, 2)"""
        return self.log_probs - self.reference

    @property
    def difference(self) -> Tensor:
        """Δ, (P,)"""
        return _minus(self.change)

    @property
    def mean_difference(self) -> Tensor:
        """Δ with means over tokens, (P,)"""
        return _minus(self.change / self.lengths)

    @property
    def means(self) -> Tensor:
        """lp / |answer|, (P, 2)"""
        return self.log_probs / self.lengths

    @property
    def gap(self) -> Tensor:
        """γ, (P,)"""
        return self.margin[:, 0]


def _minus(sides: Tensor) -> Tensor:
    """chosen - rejected: (P, 2) -> (P,)"""
    return sides[:, 0] - sides[:, 1]


def dpo(s: Sides, beta: float, _) -> Tensor:
    """-log σ(βΔ - γ); with γ it is Amini et al. 2024, https://arxiv.org/abs/2402.10571"""
    return -logsigmoid(beta * s.difference - s.gap)


def cdpo(s: Sides, beta: float, smoothing: float) -> Tensor:
    """-(1-ε) log σ(z) - ε log σ(-z), z = βΔ - γ, of pairs of which a share ε is swapped.
    Mitchell 2023, https://ericmitchell.ai/cdpo.pdf"""
    z = beta * s.difference - s.gap
    return -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)


def robust(s: Sides, beta: float, smoothing: float) -> Tensor:
    """[-(1-ε) log σ(z) + ε log σ(-z)] / (1-2ε), z = βΔ - γ: its mean over swapped pairs is that of dpo over right ones,
    so it may be negative. Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409"""
    z = beta * s.difference - s.gap
    return (-(1 - smoothing) * logsigmoid(z) + smoothing * logsigmoid(-z)) / (1 - 2 * smoothing)


def hinge(s: Sides, beta: float, _) -> Tensor:
    """max(0, 1 - βΔ). Zhao et al. 2023, https://arxiv.org/abs/2305.10425; Liu et al. 2024, arXiv:2309.06657"""
    return relu(1 - beta * s.difference)


def ipo(s: Sides, beta: float, _) -> Tensor:
    """(Δ̄ - 1/(2β))²: the difference shall be 1/(2β) nats a token, and no more.
    Azar et al. 2023, https://arxiv.org/abs/2310.12036, with means over tokens as its authors confirmed to TRL."""
    return (s.mean_difference - 1 / (2 * beta)).square()


def sigmoid_norm(s: Sides, beta: float, _) -> Tensor:
    """-log σ(βΔ̄ - γ). Lambert et al. 2024, https://arxiv.org/abs/2411.15124, section 5.1.2"""
    return -logsigmoid(beta * s.mean_difference - s.gap)


def simpo(s: Sides, beta: float, _) -> Tensor:
    """-log σ(β(lp̄_c - lp̄_r) - γ), without a reference. Meng et al. 2024, https://arxiv.org/abs/2405.14734"""
    return -logsigmoid(beta * _minus(s.means) - s.gap)


def orpo(s: Sides, beta: float, _) -> Tensor:
    """-lp̄_c - β log σ(log odds_c - log odds_r), odds = p̄ / (1 - p̄), without a reference; β is the paper's λ.
    Hong et al. 2024, https://arxiv.org/abs/2403.07691"""
    means = s.means.clamp(max=-1e-7)  # a mean of 0 would have odds of infinity
    odds = means - torch.log(-torch.expm1(means))
    return -s.means[:, 0] - beta * logsigmoid(_minus(odds))


def apo_zero(s: Sides, beta: float, _) -> Tensor:
    """1 - σ(β l_c) + σ(β l_r): the chosen answer up, the rejected one down, each by itself.
    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266"""
    chosen, rejected = s.change.unbind(1)
    return 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)


LOSSES = {
    "sigmoid": dpo,
    "ipo": ipo,
    "hinge": hinge,
    "cdpo": cdpo,
    "robust": robust,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
    "orpo": orpo,
    "apo_zero": apo_zero,
}
WITH_SMOOTHING = ("cdpo", "robust")
WITH_MARGIN = ("sigmoid", "cdpo", "robust", "sigmoid_norm", "simpo")
WITHOUT_REFERENCE = ("simpo", "orpo")


def compares(args) -> bool:
    return args.loss not in WITHOUT_REFERENCE


def defaults(args) -> dict:
    loss = args.loss or "sigmoid"
    smoothing = SMOOTHING if loss in WITH_SMOOTHING else None
    margin = MARGIN_OF.get(loss, 0.0) if loss in WITH_MARGIN else None
    return {"loss": loss, "beta": BETA_OF.get(loss, BETA), "label_smoothing": smoothing, "margin": margin}


def loss(model: Model, batch: Batch, args) -> tuple[Tensor, int, dict]:
    """The loss summed over the batch's P pairs, and P."""

    def pairs(column: Tensor) -> Tensor:
        return column.unflatten(0, (-1, 2))  # (P, 2)

    logs = pairs(log_probs(model, batch))
    known = {name: pairs(column) for name, column in batch.known.items()}
    lengths = torch.as_tensor(batch.counts, dtype=logs.dtype, device=logs.device)
    zeros = torch.zeros_like(logs)
    margin = known.get("margin", zeros) + (args.margin or 0)
    sides = Sides(logs, known.get("reference", zeros), pairs(lengths), margin)
    losses = LOSSES[args.loss](sides, args.beta, args.label_smoothing) - args.sft_weight * sides.means[:, 0]
    return losses.sum(), len(losses), figures(sides, args)


@torch.no_grad()
def figures(sides: Sides, args) -> dict[str, tuple]:
    """The sum over P pairs of every one of FIGURES, and P."""
    rewards = args.beta * (sides.change if compares(args) else sides.means)
    margins = _minus(rewards)
    both = torch.stack([rewards, sides.log_probs, sides.lengths]).sum(1)  # (3, 2)
    (c, r), (log_c, log_r), (len_c, len_r) = both.tolist()
    values = (c, r, c - r, int((margins > 0).sum()), log_c, log_r, len_c, len_r)
    return {name: (value, len(margins)) for name, value in zip(FIGURES, values, strict=True)}
