"""Tokens as actions: rewards a token, advantages, whitening, both clipped losses, the price of distance that adapts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.methods import policy, ppo
from tests.helpers import close, far
from tests.methods.sampled import (
    NONE,
    actor,
    alone,
    answers,
    args_of,
    gradient,
    laid,
    moved,
    passed,
    prepared,
    step,
)
from tests.mutation import mutation


def double(*numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# ---- rewards ---------------------------------------------------------------------------------------------------------


@mutation("lora/methods/ppo.py", "(-coefficient * kl)", "(coefficient * kl)")
@mutation("lora/methods/ppo.py", ".cumsum(0) - 1", ".cumsum(0) - 2")
def test_golden_values_of_rewards_a_token():
    """torchtune's: three answers of three tokens, β 0.5; and answers of other lengths."""
    logs = double(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.7, 0.8)
    reference = double(0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
    found = ppo.token_rewards(double(1, 2, 3), policy.k1(logs, reference), 0.5, [3, 3, 3])
    assert close(found, double(0.05, 0.05, 1.05, 0.1, 0.1, 2.1, 0.15, 0.15, 3.15), 1e-12)
    found = ppo.token_rewards(double(1, 2, 3), policy.k1(logs, reference), 0.5, [1, 6, 2])
    assert close(found, double(1.05, 0.05, 0.05, 0.1, 0.1, 0.1, 2.15, 0.15, 3.15), 1e-12)


def rewards_of(args, ended: float = 1.0):
    """The first step's R, which with γ = λ = 1 is the reward still to come, of batches of two answers, and those."""
    items = answers([(1.0, 2.0, 0.5, -1.0)], ended=ended)
    model = actor(args)
    batches = prepared(model, laid(model, items, args, 2), args)
    return torch.cat([b.per_token["return"] for b in batches]).split([n for b in batches for n in b.counts]), batches


@mutation("lora/methods/ppo.py", "- args.no_end_penalty * (1 - batch", "- args.no_end_penalty * (0 + batch")
@mutation("lora/methods/ppo.py", "- args.no_end_penalty", "+ args.no_end_penalty")
def test_an_answer_that_did_not_end_has_the_penalty_less():
    """The second and third did not."""
    args = args_of("ppo", kl=0.0, lam=1.0)
    plain, _ = rewards_of(args)
    penalised, _ = rewards_of(args_of("ppo", kl=0.0, lam=1.0, no_end_penalty=0.7), ended=0.0)
    assert [part[0].item() for part in plain] == pytest.approx([1.0, 2.0, 0.5, -1.0], abs=1e-12)
    assert [part[0].item() for part in penalised] == pytest.approx([1.0, 1.3, -0.2, -1.0], abs=1e-12)
    assert all((part == part[0]).all() or close(part, part[0].expand(len(part)), 1e-12) for part in penalised)


@mutation(
    "lora/methods/ppo.py",
    'policy.k1(old, batch.per_token["reference"])',
    'policy.k3(old, batch.per_token["reference"])',
)
@mutation("lora/methods/ppo.py", "if compares(args) else torch.zeros_like(old)", "if False else torch.zeros_like(old)")
def test_each_token_pays_for_its_distance_to_the_reference_when_it_is_sampled():
    found, batches = rewards_of(args_of("ppo", kl=0.2, lam=1.0))
    away = [k for b in batches for k in (b.per_token["old"] - b.per_token["reference"]).split(b.counts)]
    for returns, k1, score in zip(found, away, (1.0, 2.0, 0.5, -1.0), strict=True):
        to_come = [score - 0.2 * k1[t:].sum().item() for t in range(len(k1))]
        assert close(returns, double(*to_come), 1e-12) and far(k1, torch.zeros_like(k1), 1e-4)


# ---- advantages ------------------------------------------------------------------------------------------------------


@mutation("lora/methods/ppo.py", "delta = r + gamma * pad(", "delta = r + pad(")
@mutation("lora/methods/ppo.py", "gamma * lam * found[:, t + 1]", "gamma * found[:, t + 1]")
@mutation("lora/methods/ppo.py", "gamma * lam * found[:, t + 1]", "lam * found[:, t + 1]")
def test_golden_values_of_advantages():
    """torchtune's: values and rewards 0, 0, 0, 1, γ 0.9, λ 0.95."""
    given = double(0, 0, 0, 1)
    advantages = ppo.gae(given, given, [4], 0.9, 0.95)
    assert close(advantages + given, double(0.9**3 * 0.95**2, 0.9**2 * 0.95, 0.9, 1), 1e-12)
    assert close(advantages + given, double(0.657922, 0.7695, 0.9, 1), 1e-6)


COUNTS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@mutation("lora/methods/ppo.py", "[:, 1:] - v", "[:, 1:] + v")
@mutation("lora/methods/ppo.py", "pad_sequence(x.split(counts), batch_first=True)", "x[None]")
@given(counts=COUNTS, gamma=st.floats(0, 1), lam=st.floats(0, 1), seed=st.integers(0, 99))
def test_advantages_are_their_sum_of_errors_within_each_answer(counts, gamma, lam, seed):
    """A_t = Σ_l (γλ)^l δ_(t+l), as the paper defines it; no answer knows of the next."""
    random = np.random.default_rng(seed)
    rewards, values = random.normal(size=(2, sum(counts)))
    expected, at = [], 0
    for n in counts:
        r, v = rewards[at : at + n], [*values[at : at + n], 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        expected += [math.fsum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        at += n
    found = ppo.gae(torch.tensor(rewards), torch.tensor(values), counts, gamma, lam)
    assert close(found, double(*expected), 1e-12)


@given(counts=COUNTS)
def test_with_gamma_and_lambda_1_and_no_values_an_advantage_is_the_reward_still_to_come(counts):
    rewards = torch.randn(sum(counts), generator=torch.Generator().manual_seed(1)).double()
    found = ppo.gae(rewards, torch.zeros_like(rewards), counts, 1.0, 1.0)
    expected = [part.flip(0).cumsum(0).flip(0) for part in rewards.split(counts)]
    assert close(found, torch.cat(expected), 1e-12)


# ---- whitening -------------------------------------------------------------------------------------------------------


def masked(x: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    return ppo.moments([x], [mask])


@mutation("lora/methods/ppo.py", "squares / max(count - 1, 1)", "squares / max(count, 1)")
@mutation("lora/methods/ppo.py", "parts = [part[mask] for part, mask", "parts = [part for part, mask")
def test_golden_values_of_a_masked_mean_and_variance():
    """torchtune's."""
    assert masked(double(1, 2, 3, 4, 5), torch.tensor([True, True, True, False, False])) == (2.0, 1.0)


@mutation("lora/methods/ppo.py", "(x - mean) * (variance + 1e-8) ** -0.5", "(x - mean) * (variance + 1e-8) ** -1")
@mutation("lora/methods/ppo.py", "(mean if keep_mean else 0)", "0")
@mutation("lora/methods/ppo.py", "return (x - mean) * (variance", "return x * (variance")
@pytest.mark.parametrize("half", [False, True])
def test_golden_values_of_whitening(half):
    """torchtune's: of 100 × 100 normal numbers, mean 1, deviation 2; with the moments of a half of them, too."""
    x = torch.normal(1, 2, (100, 100), generator=torch.Generator().manual_seed(3)).double().flatten()
    mask = torch.arange(len(x)) < len(x) // 2 if half else torch.ones(len(x), dtype=torch.bool)
    mean, deviation = x[mask].mean(), x[mask].std()
    expected = (x - mean) / (deviation + 1e-8)
    assert close(ppo.whiten(x, *masked(x, mask)), expected, 1e-7)
    assert close(ppo.whiten(x, *masked(x, mask), keep_mean=True), expected + mean, 1e-7)
    assert masked(ppo.whiten(x, *masked(x, mask)), mask) == pytest.approx((0, 1), abs=1e-7)


@mutation("lora/methods/ppo.py", "advantages = [whiten(part, mean, variance) for part in advantages]", "pass")
@mutation("lora/methods/ppo.py", "if args.whiten_rewards:", "if not args.whiten_rewards:")
@mutation("lora/methods/ppo.py", "whiten(part, mean, variance, keep_mean=True)", "whiten(part, mean, variance)")
@pytest.mark.parametrize("whitened", [False, True])
def test_advantages_are_whitened_over_the_step_and_rewards_where_it_is_asked_for(whitened):
    args = args_of("ppo", kl=0.3, gamma=0.9, whiten_rewards=whitened)
    model, items = actor(args), answers([(1.0, 2.0, 0.5, -1.0)])
    batches = prepared(model, laid(model, items, args, 3), args)
    counts = [n for b in batches for n in b.counts]
    old, reference, values = (torch.cat([b.per_token[n] for b in batches]) for n in ("old", "reference", "values"))
    rewards = -0.3 * (old - reference)
    rewards[torch.tensor(counts).cumsum(0) - 1] += double(1.0, 2.0, 0.5, -1.0)
    if whitened:
        rewards = (rewards - rewards.mean()) / (rewards.var() + 1e-8).sqrt() + rewards.mean()
    raw = ppo.gae(rewards, values, counts, 0.9, 0.95)
    returns = torch.cat([b.per_token["return"] for b in batches])
    assert close(returns, raw + values, 1e-12)
    advantages = torch.cat([b.per_token["advantage"] for b in batches])
    assert close(advantages, (raw - raw.mean()) / (raw.var() + 1e-8).sqrt(), 1e-12)
    explained = 1 - (returns - values).var() / returns.var()
    assert [b.known["explained"][0].item() for b in batches] == pytest.approx([explained.item()] * 2, abs=1e-12)


# ---- losses ----------------------------------------------------------------------------------------------------------


def slow_value_loss(value: float, old: float, target: float, clip: float) -> float:
    near = min(max(value, old - clip), old + clip)
    return 0.5 * max((value - target) ** 2, (near - target) ** 2)


@mutation("lora/methods/ppo.py", "torch.maximum((values", "torch.minimum((values")
@mutation("lora/methods/ppo.py", "(values - old).clamp(-clip, clip)", "(values - old)")
@mutation("lora/methods/ppo.py", "(near - returns).square()) / 2", "(near - returns).square())")
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_the_loss_of_a_value_is_its_formula(value, old, target):
    found = ppo.value_losses(double(value), double(old), double(target), 0.2)
    assert found.item() == pytest.approx(slow_value_loss(value, old, target, 0.2), abs=1e-12)


def test_a_larger_advantage_has_a_lower_loss_and_so_has_a_value_nearer_to_the_return():
    """torchtune's orderings, with other numbers."""
    ratio, args = double(1.1, 0.9, 1.0, 1.3), args_of("ppo")
    assert policy.clipped_loss(ratio, double(2, 2, 2, 2), args).sum() < policy.clipped_loss(ratio, ratio, args).sum()
    far_off, nearer = (ppo.value_losses(double(v), double(v), double(1.0), 0.2) for v in (0.2, 0.6))
    assert nearer < far_off


def slow(model, batch, items, args, old):
    """Both losses, token by token, each completion by itself."""
    advantage, returns, before = (batch.per_token[n].split(batch.counts) for n in ("advantage", "return", "values"))
    policies, values = [], []
    for i, item in enumerate(items):
        [example] = item.examples
        first = example.trained.index(True)
        states = model.trunk(torch.tensor(example.tokens))[first - 1 : -1]
        found = states @ model.v_head.summary.weight[0] + model.v_head.summary.bias
        for t, lp in enumerate(alone(model, item, args)):
            ratio, a, v = torch.exp(lp - old[i][t]), advantage[i][t], found[t]
            near = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
            policies.append(max(-a * ratio, -a * near))
            low, high = before[i][t] - args.value_clip, before[i][t] + args.value_clip
            values.append(0.5 * max((v - returns[i][t]) ** 2, (v.clamp(low, high) - returns[i][t]) ** 2))
    return sum(policies) / len(policies), sum(values) / len(values)


@mutation("lora/methods/ppo.py", "of_policy + args.value_weight * of_values", "of_policy + of_values")
@mutation("lora/methods/ppo.py", 'torch.exp(logs[kept] - known["old"])', 'torch.exp(known["old"] - logs[kept])')
@mutation(
    "lora/methods/ppo.py",
    'known["values"], known["return"], args.value_clip',
    'known["return"], known["values"], args.value_clip',
)
@mutation("lora/methods/ppo.py", 'known["return"], args.value_clip', 'known["return"], args.epsilon')
@mutation(
    "lora/methods/ppo.py", '"policy_loss": (of_policy.detach(), number)', '"policy_loss": (of_values.detach(), number)'
)
@mutation(
    "lora/methods/ppo.py", '"value_loss": (of_values.detach(), number)', '"value_loss": (of_policy.detach(), number)'
)
def test_both_losses_and_their_gradients_are_their_formulas_token_by_token():
    args = args_of("ppo", epsilon=0.1, epsilon_high=0.28, temperature=0.9, value_weight=0.4, value_clip=0.05)
    model, items = actor(args), answers([(1.0, 0.0, 0.5), (0.2, 0.9, -1.0)])
    batches = prepared(model, laid(model, items, args), args)
    old = [alone(model, item, args).detach() for item in items]
    moved(model)
    of_policy, of_values = slow(model, batches[0], items, args, old)
    expected = gradient(model, of_policy + 0.4 * of_values)
    loss, found, figures = passed(model, batches, args)
    assert loss == pytest.approx((of_policy + 0.4 * of_values).item(), abs=1e-12) and close(found, expected, 1e-12)
    assert figures["policy_loss"] == pytest.approx(of_policy.item(), abs=1e-12)
    assert figures["value_loss"] == pytest.approx(of_values.item(), abs=1e-12)
    assert 0.1 < figures["clipped"] < 0.9 and figures.keys() == ppo.FIGURES.keys() - policy.FIGURES.keys()
    assert far(found, torch.zeros_like(found), 1e-6) and model.v_head.summary.weight.requires_grad


def test_while_the_ratio_is_1_the_gradient_is_minus_the_advantage_times_that_of_the_log_probability():
    args = args_of("ppo", value_weight=0.0)
    model, items = actor(args), answers([(1.0, 0.0, 0.5)])
    [batch] = prepared(model, laid(model, items, args), args)
    advantages = batch.per_token["advantage"].split(batch.counts)
    loss = -sum((a * alone(model, i, args)).sum() for a, i in zip(advantages, items, strict=True)) / sum(batch.counts)
    loss = loss + 0 * model.v_head(torch.zeros(1, model.config.hidden_size)).sum()  # so that it has a gradient, of 0
    assert close(passed(model, [batch], args)[1], gradient(model, loss), 1e-12)


@mutation(
    "lora/methods/ppo.py", "(divergence(batch, args)[kept].sum(), number)", "(divergence(batch, args).sum(), number)"
)
@mutation(
    "lora/methods/ppo.py",
    "(policy.is_clipped(ratio, advantage, args).sum(), number)",
    "(policy.is_clipped(ratio, advantage, args).sum(), len(logs))",
)
@mutation(
    "lora/methods/ppo.py",
    'policy.each_token(~batch.known["reward"].isnan(), batch)',
    'policy.each_token(batch.known["ended"] > -1, batch)',
)
def test_an_answer_that_cannot_be_scored_counts_nowhere():
    """A step with it is the step without it: losses, gradients, figures, and what the price of distance becomes."""
    args = args_of("ppo", kl=0.2, kl_target=0.5, kl_horizon=100, whiten_rewards=True, no_end_penalty=1.0)
    model, items = actor(args), answers(((1.0, 0.0, 0.5, NONE), (0.2, NONE, 0.9, -1.0)), ended=0.0)
    rest = [item for item in items if not math.isnan(item.known["reward"][0])]
    found = []
    for some in (items, rest):
        carried = {}
        batches = prepared(model, laid(model, some, args, 3), args, carried=carried)
        found.append((batches, carried, sum(ppo.count(batch, args) for batch in batches)))
    moved(model)
    (loss, gradients, figures), (other_loss, other, others) = (passed(model, batches, args) for batches, *_ in found)
    assert loss == pytest.approx(other_loss, abs=1e-12) and close(gradients, other, 1e-12)
    assert figures == pytest.approx(others, abs=1e-12) and figures["clipped"] > 0
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-12) and found[0][2] == found[1][2]
    assert all(torch.isfinite(b.per_token["advantage"]).all() for b in found[0][0])


# ---- the price of distance -------------------------------------------------------------------------------------------


@mutation("lora/methods/ppo.py", "kl / target - 1, -0.2), 0.2)", "kl / target - 1, -0.2), 0.3)", case="above")
@mutation("lora/methods/ppo.py", "kl / target - 1, -0.2), 0.2)", "kl / target - 1, -0.3), 0.2)", case="below")
@mutation("lora/methods/ppo.py", "kl / target - 1, -0.2)", "target / kl - 1, -0.2)", case="near")
@mutation("lora/methods/ppo.py", "* answers / horizon)", "/ horizon)", case="near")
@pytest.mark.parametrize(
    ("kl", "step"),
    [(60.0, 0.2), (0.0, -0.2), (6.6, 0.1), (6.0, 0.0)],
    ids=["above", "below", "near", "there"],
)
def test_golden_values_of_the_price_that_adapts(kl, step):
    assert ppo.next_coefficient(0.2, kl, 256, 6.0, 10_000) == pytest.approx(0.2 * (1 + step * 256 / 10_000), rel=1e-12)


@mutation("lora/methods/ppo.py", 'carried.get("kl", args.kl)', "args.kl")
@mutation("lora/methods/ppo.py", "if args.kl_target:", "if True:")
@mutation("lora/methods/ppo.py", "kl = nats / max(answers, 1)", "kl = nats")
def test_the_price_of_this_step_is_what_the_last_one_carried_on_and_a_fixed_one_stays():
    fixed, args = args_of("ppo", kl=0.2), args_of("ppo", kl=0.2, kl_target=5.0, kl_horizon=50)
    model, items = actor(args), answers([(1.0, 2.0, 0.5, -1.0)])
    carried = {}
    [first] = prepared(model, laid(model, items, args), args, carried=carried)
    away = first.sums(first.per_token["old"] - first.per_token["reference"]).mean().item()
    assert 4 < away < 6 and away != 5
    expected = 0.2 * (1 + (away / 5 - 1) * 4 / 50)
    assert carried == {"kl": pytest.approx(expected, abs=1e-12)}
    [second] = prepared(model, laid(model, items, args), args, carried=carried)
    assert first.known["kl_coefficient"].tolist() == [0.2] * 4
    assert second.known["kl_coefficient"].tolist() == pytest.approx([expected] * 4, abs=1e-12)
    gone = first.per_token["return"] - second.per_token["return"]
    assert far(gone, torch.zeros_like(gone), 1e-6)
    assert passed(model, [second], args)[2]["kl_coefficient"] == pytest.approx(expected, abs=1e-12)
    carried = {}
    prepared(model, laid(model, items, fixed), fixed, carried=carried)
    assert carried == {}


def test_without_a_price_there_is_no_reference_to_be_near_to():
    args = args_of("ppo", kl=0.0)
    model, items = actor(args), answers([(1.0, 2.0)])
    [batch] = laid(model, items, args)
    del batch.per_token["reference"]
    loss, _, figures = step(model, [batch], args)
    assert np.isfinite(loss) and figures.keys() == ppo.FIGURES.keys() - policy.FIGURES.keys() - {"kl"}
