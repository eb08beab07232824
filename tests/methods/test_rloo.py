"""Answers compared with the mean of the others: advantages, distance as part of the reward, the ratio of an answer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.data.batch import collate
from lora.methods import policy, rloo
from tests.helpers import close, far
from tests.methods.sampled import NONE, STEP, actor, alone, answers, args_of, gradient, laid, moved, passed, prepared
from tests.mutation import mutation


def double(*numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def of_one_group(*rewards) -> torch.Tensor:
    """The advantages of a step that has one group."""
    [batch] = rloo.prepare(None, [collate(answers([rewards]))], args_of("rloo", kl=0.0), list, {})
    return batch.known["advantage"]


# ---- advantages ------------------------------------------------------------------------------------------------------


@mutation("lora/methods/rloo.py", "return rewards - others", "return others - rewards")
@given(first=st.floats(-10, 10), second=st.floats(-10, 10))
def test_of_two_answers_the_advantages_are_plus_and_minus_their_difference(first, second):
    assert close(of_one_group(first, second), double(first - second, second - first), 1e-12)


@mutation("lora/methods/rloo.py", "(rewards.sum() - rewards) / (len(rewards) - 1)", "rewards.sum() / len(rewards)")
@mutation("lora/methods/rloo.py", "/ (len(rewards) - 1)", "/ len(rewards)")
@given(st.lists(st.one_of(st.floats(-100, 100), st.just(NONE)), min_size=1, max_size=8))
def test_an_advantage_is_the_reward_less_the_mean_of_the_other_answers_that_could_be_scored(rewards):
    known = [i for i, r in enumerate(rewards) if not math.isnan(r)]
    expected = [0.0] * len(rewards)
    for i in known if len(known) > 1 else ():
        others = [rewards[j] for j in known if j != i]
        expected[i] = rewards[i] - math.fsum(others) / len(others)
    assert close(of_one_group(*rewards), double(*expected), 1e-12)


def test_equal_rewards_have_advantages_of_0_exactly():
    assert torch.equal(of_one_group(0.1, 0.1, 0.1), double(0, 0, 0))
    assert torch.equal(of_one_group(NONE, 3.0, NONE), double(0, 0, 0))


@mutation("lora/methods/rloo.py", "- args.kl * divergence(batch) if", "+ args.kl * divergence(batch) if")
@mutation("lora/methods/rloo.py", "- args.kl * divergence(batch) if", "- divergence(batch) if")
@mutation("lora/methods/rloo.py", 'if compares(args) else batch.known["reward"]', 'if False else batch.known["reward"]')
@mutation("lora/methods/rloo.py", 'batch.sums(policy.k1(batch.per_token["sampled"], batch.per_token["reference"]))',
          'batch.sums(policy.k3(batch.per_token["sampled"], batch.per_token["reference"]))')  # fmt: skip
def test_distance_is_part_of_the_reward_before_answers_are_compared_and_asks_no_model():
    """Of the sampler's own log-probabilities, summed over the answer; equal rewards have a signal, then."""
    args = args_of("rloo", kl=0.3)
    model, items = actor(args), answers([(1.0, 1.0, 1.0)])
    batches = laid(model, items, args)
    [batch] = rloo.prepare(None, batches, args, list, {})
    away = [k.sum() for k in (batch.per_token["sampled"] - batch.per_token["reference"]).split(batch.counts)]
    rewards = [1.0 - 0.3 * k for k in away]
    expected = torch.stack([r - (sum(rewards) - r) / 2 for r in rewards])
    assert close(batch.known["advantage"], expected, 1e-12) and far(expected, torch.zeros_like(expected), 1e-4)
    assert torch.equal(batch.known["reward"], double(1, 1, 1))


# ---- the loss --------------------------------------------------------------------------------------------------------


def slow(model, batch, items, args, old) -> torch.Tensor:
    """The loss of a step, answer by answer."""
    losses = []
    for a, item, lps_old in zip(batch.known["advantage"].tolist(), items, old, strict=True):
        ratio = torch.exp(alone(model, item, args).sum() - lps_old.sum())
        if a > 0:
            losses.append(-a * (ratio if ratio < 1 + args.epsilon_high else 1 + args.epsilon_high + 0 * ratio))
        else:
            losses.append(-a * (ratio if ratio > 1 - args.epsilon else 1 - args.epsilon + 0 * ratio))
    return sum(losses) / len(losses)


@mutation("lora/methods/rloo.py", "torch.exp(batch.sums(logs - policy", "torch.exp(-batch.sums(logs - policy")
@mutation("lora/methods/rloo.py", "policy.clipped_loss(ratio, advantage, args).sum(), count",
          "policy.clipped_loss(ratio, advantage, args).mean(), count")  # fmt: skip
def test_the_loss_and_its_gradient_are_their_formula_answer_by_answer():
    args = args_of("rloo", epsilon=0.3, epsilon_high=0.5, temperature=0.9, updates=2)
    model, items = actor(args), answers(STEP)
    batches = prepared(model, laid(model, items, args, 3), args)
    passed(model, batches, args)
    old = [alone(model, item, args).detach() for item in items]
    moved(model, 0.01)
    [whole] = prepared(model, laid(model, items, args), args)
    whole.known["advantage"] = torch.cat([batch.known["advantage"] for batch in batches])
    expected = slow(model, whole, items, args, old)
    expected_gradient = gradient(model, expected)
    found, found_gradient, figures = passed(model, batches, args)
    assert found == pytest.approx(expected.item(), abs=1e-12) and close(found_gradient, expected_gradient, 1e-11)
    assert 0 < figures["clipped"] < 1 and far(found_gradient, torch.zeros_like(found_gradient), 1e-6)


@mutation("lora/methods/rloo.py", "return batch.linked", "return len(batch.targets)")
def test_while_the_ratio_is_1_the_gradient_is_minus_the_advantage_times_that_of_the_answers_log_probability():
    args = args_of("rloo")
    model, items = actor(args), answers(STEP)
    [batch] = prepared(model, laid(model, items, args), args)
    loss, found, _ = passed(model, [batch], args)
    terms = zip(batch.known["advantage"], items, strict=True)
    expected = gradient(model, sum(-a * alone(model, item, args).sum() for a, item in terms) / len(items))
    assert close(found, expected, 1e-12) and far(expected, torch.zeros_like(expected), 1e-6)
    assert abs(loss) < 1e-12  # the advantages of each group add up to 0


@mutation("lora/methods/rloo.py", "(divergence(batch).sum(), len(logs))", "(divergence(batch).sum(), len(ratio))")
@mutation("lora/methods/rloo.py", "(policy.is_clipped(ratio, advantage, args).sum(), len(ratio))",
          "(policy.is_clipped(ratio, advantage, args).sum(), len(logs))")  # fmt: skip
def test_figures_are_nats_a_token_and_the_share_of_answers_that_the_clip_holds_back():
    args = args_of("rloo", updates=2)
    model, items = actor(args), answers(STEP)
    [batch] = prepared(model, laid(model, items, args), args)
    passed(model, [batch], args)
    moved(model)
    figures = passed(model, [batch], args)[2]
    away = batch.per_token["sampled"] - batch.per_token["reference"]
    assert figures["kl"] == pytest.approx(away.mean().item(), abs=1e-12)
    old = batch.per_token["old"].split(batch.counts)
    ratios = [torch.exp((alone(model, i, args) - o).sum()).item() for i, o in zip(items, old, strict=True)]
    held = [r > 1.2 if a > 0 else r < 0.8 and a < 0 for r, a in zip(ratios, batch.known["advantage"], strict=True)]
    assert figures["clipped"] == sum(held) / 8 and 0 < sum(held) < 8
    assert figures.keys() == rloo.FIGURES.keys() - policy.FIGURES.keys()
    assert passed(model, [batch], args_of("rloo", kl=0.0))[2].keys() == {"clipped"}
