"""Answers compared with their group: advantages, how tokens' losses become one, the loss, and what is measured."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.data.batch import Batch, collate
from lora.methods import grpo, policy
from tests.helpers import close, far
from tests.methods.sampled import NONE, STEP, actor, alone, answers, args_of, gradient, laid, moved, passed, prepared
from tests.mutation import mutation


def double(*numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def of_one_group(*rewards, scale: str = "group") -> torch.Tensor:
    """The advantages of a step that has one group."""
    [batch] = grpo.prepare(None, [collate(answers([rewards]))], args_of("grpo", scale=scale), list, {})
    return batch.known["advantage"]


# ---- advantages ------------------------------------------------------------------------------------------------------


@mutation("lora/methods/grpo.py", "centred / (rewards.std() + 1e-4)", "centred / (rewards.std() + 1e-8)")
@mutation("lora/methods/grpo.py", "rewards.std() + 1e-4", "rewards.std(correction=0) + 1e-4")
@mutation("lora/methods/grpo.py", "rewards - rewards.mean()", "rewards")
def test_golden_values_of_advantages():
    assert close(of_one_group(1, 0, 0, 0), double(1.4997, -0.4999, -0.4999, -0.4999), 1e-4)
    assert close(of_one_group(1, 1, 0, 0), double(0.865875, 0.865875, -0.865875, -0.865875), 1e-6)
    for equal in (0.0, 1.0, 0.1, -7.3):
        assert torch.equal(of_one_group(*[equal] * 3), double(0, 0, 0))


@mutation("lora/methods/grpo.py", 'if scale == "group"', 'if scale != "group"')
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_advantages_are_their_formula_and_add_up_to_0(rewards):
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    equal = len(set(rewards)) == 1
    for scale, by in {"group": std + 1e-4, "none": 1.0}.items():
        found = of_one_group(*rewards, scale=scale)
        expected = double(*(0.0 if equal else (r - mean) / by for r in rewards))
        assert close(found, expected, 1e-9) and abs(found.sum()) < 1e-9


def test_what_cannot_be_scored_is_in_no_mean_and_no_deviation():
    """The unbiased deviation of 3 and 5 is √2; of one number alone there is none."""
    part = 1 / (math.sqrt(2) + 1e-4)
    assert close(of_one_group(3, NONE, 5), double(-part, 0, part), 1e-12)
    assert torch.equal(of_one_group(NONE, 4, NONE), double(0, 0, 0))
    assert torch.equal(of_one_group(NONE, NONE), double(0, 0))


# ---- how the losses of tokens become one -----------------------------------------------------------------------------


@mutation(
    "lora/methods/grpo.py", '"dapo": (sum_of_tokens, lambda batch, args: len(batch.targets))',
    '"dapo": (sum_of_tokens, lambda batch, args: batch.linked)', case="dapo",
)  # fmt: skip
@mutation("lora/methods/grpo.py", '"grpo": (sum_of_means,', '"grpo": (sum_of_tokens,', case="grpo")
@mutation(
    "lora/methods/grpo.py", "sum_of_tokens(losses, batch) / len(losses)", "sum_of_tokens(losses, batch)", case="bnpo"
)
@mutation("lora/methods/grpo.py", "batch.linked * args.max_new_tokens", "batch.linked", case="dr_grpo")
@pytest.mark.parametrize(
    ("loss", "value"),
    [("grpo", 2.0), ("bnpo", 2.6), ("dapo", 2.6), ("dr_grpo", 0.8125)],
    ids=["grpo", "bnpo", "dapo", "dr_grpo"],
)
def test_golden_values_of_the_normalisers(loss, value):
    """Answers of 2 and 8 tokens, whose tokens have losses of 1 and 3, and at most 16 tokens."""
    nothing = torch.zeros(10, dtype=torch.long)
    batch = Batch(nothing, [2, 8], nothing, nothing, counts=[2, 8], linked=2)
    args = args_of("grpo", loss=loss, max_new_tokens=16)
    summed, _ = grpo.LOSSES[loss]
    assert summed(double(*[1.0] * 2, *[3.0] * 8), batch).item() / grpo.count(batch, args) == pytest.approx(value)


# ---- the loss --------------------------------------------------------------------------------------------------------


def slow(model, batch, items, args, old) -> torch.Tensor:
    """The loss of a step, token by token, each completion by itself."""
    advantage = batch.known["advantage"].tolist()
    reference = batch.per_token["reference"].split(batch.counts)
    by_answer = []
    for a, item, lps_old, lps_ref in zip(advantage, items, old, reference, strict=True):
        losses = []
        for lp, lp_old, lp_ref in zip(alone(model, item, args), lps_old, lps_ref, strict=True):
            ratio = torch.exp(lp - lp_old)
            k3 = torch.exp(lp_ref - lp) - 1 - (lp_ref - lp)
            held = ratio if 1 - args.epsilon < ratio < 1 + args.epsilon_high else 0 * ratio + (
                1 + args.epsilon_high if ratio > 1 else 1 - args.epsilon
            )  # fmt: skip
            losses.append(-min(ratio * a, held * a) + args.kl * ratio * k3)
        by_answer.append(losses)
    every = [loss for losses in by_answer for loss in losses]
    return {
        "dapo": lambda: sum(every) / len(every),
        "bnpo": lambda: sum(every) / len(every),
        "grpo": lambda: sum(sum(losses) / len(losses) for losses in by_answer) / len(by_answer),
        "dr_grpo": lambda: sum(every) / (len(by_answer) * args.max_new_tokens),
    }[args.loss]()


@mutation("lora/methods/grpo.py", "divergence = ratio * policy.k3(", "divergence = policy.k3(", case="dapo-0.1")
@mutation(
    "lora/methods/grpo.py",
    "losses = losses + args.kl * divergence",
    "losses = losses - args.kl * divergence",
    case="grpo-0.1",
)
@mutation("lora/methods/grpo.py", "losses + args.kl * divergence", "losses + divergence", case="grpo-0.1")
@mutation("lora/methods/grpo.py", "if compares(args):", "if False:", case="dapo-0.1")
@mutation(
    "lora/methods/grpo.py",
    "torch.exp(logs - policy.old_log_probs(",
    "torch.exp(0 * logs - policy.old_log_probs(",
    case="dapo-0.0",
)
@mutation(
    "lora/methods/policy.py",
    "values.repeat_interleave(torch.tensor(batch.counts,",
    "values.repeat_interleave(torch.tensor(batch.counts[::-1],",
    case="dapo-0.0",
)
@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_the_loss_and_its_gradient_are_their_formula_token_by_token(loss, kl):
    args = args_of("grpo", loss=loss, kl=kl, epsilon=0.1, epsilon_high=0.28, temperature=0.9, updates=2)
    model, items = actor(args), answers(STEP)
    batches = prepared(model, laid(model, items, args), args)
    passed(model, batches, args)
    old = [alone(model, item, args).detach() for item in items]
    moved(model)
    expected = slow(model, batches[0], items, args, old)
    expected_gradient = gradient(model, expected)
    found, found_gradient, figures = passed(model, batches, args)
    assert found == pytest.approx(expected.item(), abs=1e-12) and close(found_gradient, expected_gradient, 1e-12)
    assert 0.2 < figures["clipped"] < 0.8 and far(found_gradient, torch.zeros_like(found_gradient), 1e-6)


# ---- referees --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_while_the_ratio_is_1_the_gradient_is_minus_the_advantage_times_that_of_the_log_probability(loss):
    args = args_of("grpo", loss=loss)
    model, items = actor(args), answers(STEP)
    [batch] = prepared(model, laid(model, items, args), args)
    tokens = sum(batch.counts)
    weights = {"grpo": [1 / (8 * n) for n in batch.counts], "dr_grpo": [1 / (8 * args.max_new_tokens)] * 8}.get(
        loss, [1 / tokens] * 8
    )
    terms = zip(batch.known["advantage"], weights, items, strict=True)
    expected = gradient(model, sum(-a * w * alone(model, item, args).sum() for a, w, item in terms))
    assert close(passed(model, [batch], args)[1], expected, 1e-12) and far(expected, torch.zeros_like(expected), 1e-6)


def test_of_two_answers_one_right_the_gradient_is_that_of_half_their_difference():
    """-½ (lp_1 - lp_2), up to the normaliser."""
    args = args_of("grpo", scale="none", loss="dr_grpo", max_new_tokens=1)
    model, items = actor(args), answers([(1.0, 0.0)])
    found = passed(model, prepared(model, laid(model, items, args), args), args)[1]
    one, other = (alone(model, item, args).sum() for item in items)
    assert close(2 * found, gradient(model, -0.5 * (one - other)), 1e-12)


def test_the_loss_is_0_and_its_gradient_is_not():
    """With as many tokens in each answer, or the mean of means: the question most often asked."""
    args = args_of("grpo", loss="grpo")
    model, items = actor(args), answers([(1.0, 0.0, 0.5, 2.0)])
    loss, gradients, _ = passed(model, prepared(model, laid(model, items, args), args), args)
    assert abs(loss) < 1e-12 and gradients.abs().max() > 1e-2


def test_while_the_ratio_is_1_the_price_of_distance_has_the_gradient_of_the_divergence():
    """k1 ∇lp, whose mean over samples is ∇KL(model || reference): without ρ it would be (1 - e^-k1) ∇lp."""
    args = args_of("grpo", kl=0.3)
    model, items = actor(args), answers([(1.0, 1.0, 1.0)])  # no signal but the price
    [batch] = prepared(model, laid(model, items, args), args)
    k1 = (batch.per_token["sampled"] - batch.per_token["reference"]).split(batch.counts)
    terms = zip(k1, items, strict=True)
    expected = gradient(model, 0.3 * sum((k * alone(model, item, args)).sum() for k, item in terms) / sum(batch.counts))
    assert close(passed(model, [batch], args)[1], expected, 1e-12)


# ---- what is measured ------------------------------------------------------------------------------------------------


@mutation("lora/methods/grpo.py", "(divergence.detach().sum(), len(logs))", "(divergence.detach().sum(), batch.linked)")
@mutation(
    "lora/methods/grpo.py",
    "(policy.is_clipped(ratio, advantage, args).sum(), len(logs))",
    "(policy.is_clipped(ratio, advantage, args).sum(), batch.linked)",
)
def test_figures_are_nats_a_token_and_the_share_of_tokens_that_the_clip_holds_back():
    args = args_of("grpo", kl=0.1, updates=2)
    model, items = actor(args), answers(STEP)
    batches = prepared(model, laid(model, items, args), args)
    first = passed(model, batches, args)[2]
    [batch] = batches
    logs, reference = batch.per_token["sampled"], batch.per_token["reference"]
    assert first == pytest.approx({"kl": policy.k3(logs, reference).mean().item(), "clipped": 0.0}, abs=1e-12)
    moved(model)
    second = passed(model, batches, args)[2]
    now = policy.log_probs(model, policy.hidden(model, batch), batch, args).detach()
    ratio, a = torch.exp(now - logs).numpy(), batch.known["advantage"].repeat_interleave(torch.tensor(batch.counts))
    held = np.where(a > 0, ratio > 1.2, (ratio < 0.8) & (a.numpy() < 0))
    assert second["clipped"] == pytest.approx(held.mean(), abs=1e-12) and 0.1 < held.mean() < 0.9
    assert passed(model, batches, args_of("grpo"))[2].keys() == {"clipped"}
    assert second.keys() == grpo.FIGURES.keys() - policy.FIGURES.keys()
