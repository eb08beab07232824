"""What grpo, rloo and ppo share: distances, ratios, clipping, groups, any cut of a step, ranks, several updates."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.data.batch import filled, micro_batches
from lora.methods import METHODS, policy
from tests import oracle
from tests.helpers import close, far, tiny_config
from tests.methods.sampled import (
    NONE,
    STEP,
    actor,
    alone,
    answers,
    args_of,
    laid,
    measured,
    moved,
    passed,
    prepared,
    step,
    together,
)
from tests.mutation import mutation

FLOATS = st.floats(-3, 3)


def double(*numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# ---- formulas --------------------------------------------------------------------------------------------------------


@mutation("lora/methods/policy.py", "return logs - reference", "return reference - logs")
@mutation("lora/methods/policy.py", "torch.expm1(-k1(logs, reference))", "torch.expm1(k1(logs, reference))")
@mutation(
    "lora/methods/policy.py",
    "expm1(-k1(logs, reference)) + k1(logs, reference)",
    "expm1(-k1(logs, reference)) - k1(logs, reference)",
)
def test_golden_values_of_k1_and_k3():
    logs, reference = double(-2.0, -1.9, -2.1, -1.0), double(-2.0, -2.0, -2.0, -2.0)
    assert close(policy.k1(logs, reference), double(0.0, 0.1, -0.1, 1.0), 1e-15)
    assert close(policy.k3(logs, reference), double(0, 0.004837, 0.005171, 0.367879), 1e-6)


def test_the_means_of_k1_and_k3_over_samples_are_the_divergence_and_k3_is_never_negative():
    """Exactly, as sums over all of a vocabulary."""
    p, q = (torch.randn(50, generator=torch.Generator().manual_seed(s)).double().log_softmax(0) for s in (1, 2))
    divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    for estimate in (policy.k1, policy.k3):
        assert close((p.exp() * estimate(p, q)).sum(), divergence, 1e-12)
    assert policy.k3(p, q).min() >= 0 > policy.k1(p, q).min()


@mutation("lora/methods/policy.py", "torch.expm1(-k1(logs, reference))", "torch.exp(-k1(logs, reference)) - 1")
def test_k3_of_a_small_distance_is_not_lost_in_float32():
    logs, reference = torch.tensor([0.01]), torch.tensor([0.0])
    assert policy.k3(logs, reference).item() == pytest.approx(math.exp(-0.01) - 1 + 0.01, rel=1e-4)


@mutation("lora/methods/policy.py", "ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)", "ratio", case="e")
@mutation(
    "lora/methods/policy.py",
    "-torch.minimum(ratio * advantage, near * advantage)",
    "-torch.maximum(ratio * advantage, near * advantage)",
    case="1/e",
)
@mutation("lora/methods/policy.py", "-torch.minimum(", "torch.minimum(", case="e^0.1")
@pytest.mark.parametrize(
    ("ratio", "loss"),
    [(math.e, -1.2), (1 / math.e, -0.367879), (math.exp(0.1), -1.105171)],
    ids=["e", "1/e", "e^0.1"],
)  # fmt: skip
def test_golden_values_of_the_clipped_loss(ratio, loss):
    """At an advantage of 1 and ε 0.2. Those of torchtune's test, whose tolerance lets any pass, are wrong in two."""
    assert policy.clipped_loss(double(ratio), double(1.0), args_of("ppo")).item() == pytest.approx(loss, abs=1e-6)


def slow_clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    """The same by cases: beyond a bound, on the side that A draws to, ρ counts as the bound."""
    if advantage > 0:
        return -min(ratio, 1 + high) * advantage
    return -max(ratio, 1 - low) * advantage


@mutation(
    "lora/methods/policy.py",
    "clamp(1 - args.epsilon, 1 + args.epsilon_high)",
    "clamp(1 - args.epsilon, 1 + args.epsilon)",
)
@mutation(
    "lora/methods/policy.py",
    "clamp(1 - args.epsilon, 1 + args.epsilon_high)",
    "clamp(1 - args.epsilon_high, 1 + args.epsilon_high)",
)
@mutation(
    "lora/methods/policy.py",
    "(advantage > 0) & (ratio > 1 + args.epsilon_high)",
    "(advantage > 0) & (ratio > 1 + args.epsilon)",
)
@mutation("lora/methods/policy.py", "(advantage < 0) & (ratio < 1 - args.epsilon)", "(ratio < 1 - args.epsilon)")
@mutation("lora/methods/policy.py", "((advantage > 0) & (ratio >", "((ratio >")
@given(ratio=st.floats(0.2, 3), advantage=FLOATS)
def test_the_clipped_loss_is_its_formula_and_is_held_back_where_it_has_no_gradient(ratio, advantage):
    args = args_of("grpo", epsilon=0.2, epsilon_high=0.5)
    ratio = double(ratio).requires_grad_()
    loss = policy.clipped_loss(ratio, double(advantage), args)
    assert loss.item() == pytest.approx(slow_clipped(ratio.item(), advantage, 0.2, 0.5), abs=1e-12)
    [slope] = torch.autograd.grad(loss.sum(), ratio)
    held = policy.is_clipped(ratio.detach(), double(advantage), args).item()
    assert slope.item() == (0 if held else pytest.approx(-advantage, abs=1e-12))
    beyond = ratio.item() > 1.5 if advantage > 0 else ratio.item() < 0.8 and advantage < 0
    assert held == beyond


def test_the_upper_bound_is_the_lower_ones_where_nobody_says():
    for method in ("grpo", "rloo", "ppo"):
        assert args_of(method, epsilon=0.3).epsilon_high == 0.3
        assert args_of(method, epsilon=0.3, epsilon_high=0.4).epsilon_high == 0.4


@mutation("lora/methods/policy.py", "if len(rewards[members].unique()) > 1:", "if members.sum() > 1:")
@mutation("lora/methods/policy.py", "(groups == group) & ~rewards.isnan()", "(groups == group)")
@mutation("lora/methods/policy.py", "(groups == group) & ~rewards.isnan()", "~rewards.isnan()")
def test_a_group_is_compared_with_itself_alone_and_one_without_a_signal_is_left_at_0():
    """What cannot be scored is in no mean, and a tenth three times has a mean that is not quite a tenth."""
    rewards = double(1, 0.1, 3, NONE, 0.1, 2, NONE, 0.1, 7, NONE)
    groups = double(0, 1, 0, 0, 1, 0, 2, 1, 2, 3)
    seen = []
    found = policy.by_group(rewards, groups, lambda r: seen.append(r.tolist()) or r - r.mean() + 1e-9)
    assert seen == [[1, 3, 2]]
    assert torch.equal(found, double(-1, 0, 1, 0, 0, 0, 0, 0, 0, 0) + 1e-9 * (double(1, 0, 1, 0, 0, 1, 0, 0, 0, 0)))


@mutation("lora/methods/policy.py", "batch.targets, cap, args.temperature)", "batch.targets, cap)")
def test_log_probabilities_are_of_logits_over_the_temperature():
    """Against the NumPy decoder."""
    args = args_of("grpo", temperature=0.7)
    model, items = actor(args), answers(STEP)
    for p in (p for name, p in model.named_parameters() if "lora_B" in name):
        p.data.zero_()
    weights = {k.replace(".base.", "."): t.numpy() for k, t in model.state_dict().items() if "lora_" not in k}
    [batch] = laid(model, items, args)
    found = policy.log_probs(model, policy.hidden(model, batch), batch, args)
    for part, item in zip(found.split(batch.counts), items, strict=True):
        [example] = item.examples
        scores, first = oracle.logits(tiny_config(), weights, example.tokens), example.trained.index(True)
        expected = [
            math.log(oracle.softmax(scores[t - 1] / 0.7)[example.tokens[t]]) for t in range(first, len(example.tokens))
        ]
        assert close(part, torch.tensor(expected, dtype=torch.float64), 1e-9)
        assert close(part, alone(model, item, args), 1e-12)


# ---- a step, however it is cut ---------------------------------------------------------------------------------------

CASES = {
    "dapo": {"method": "grpo", "kl": 0.1},
    "grpo": {"method": "grpo", "loss": "grpo", "kl": 0.1, "scale": "none"},
    "dr_grpo": {"method": "grpo", "loss": "dr_grpo", "temperature": 0.8},
    "rloo": {"method": "rloo", "kl": 0.1},
    "ppo": {"method": "ppo", "whiten_rewards": True, "kl_target": 1.0, "no_end_penalty": 1.0},
}
EACH = pytest.mark.parametrize("name", CASES)


def case_of(name: str, **more):
    """Settings, a model and the completions of a step, some of which did not end."""
    args = args_of(**{**CASES[name], **more})
    return args, actor(args), answers(STEP, ended=0.0)


def two_passes(name: str, cut) -> list[tuple]:
    """Both passes over a step that `cut(model, items, args)` lays into batches, the weights moved between them."""
    args, model, items = case_of(name, updates=2)
    batches = prepared(model, [measured(model, batch, args) for batch in cut(items)], args)
    first = passed(model, batches, args)
    moved(model)
    return [first, passed(model, batches, args)]


@EACH
def test_any_cut_of_a_step_into_micro_batches_gives_the_same_gradients_and_figures(name):
    found = []
    for tokens in (1000, 1, 40, 60):
        batches = micro_batches(answers(STEP), tokens)
        found.append((len(batches), two_passes(name, lambda items, n=tokens: micro_batches(items, n))))
    assert len({count for count, _ in found}) == 4
    (_, expected), *others = found
    for _, passes in others:
        for (loss, gradients, figures), (other_loss, other, other_figures) in zip(passes, expected, strict=True):
            assert loss == pytest.approx(other_loss, abs=1e-12) and close(gradients, other, 1e-12)
            assert figures == pytest.approx(other_figures, abs=1e-12)
    assert far(expected[0][1], expected[1][1], 1e-6) and expected[1][2]["clipped"] > 0


def test_bnpo_alone_depends_on_how_a_step_is_cut():
    args = args_of("grpo", loss="bnpo")
    model, items = actor(args), answers(STEP)
    whole, parts = (step(model, laid(model, items, args, cut), args) for cut in (None, 1))
    assert far(whole[1], parts[1], 1e-4)
    by_tokens = step(model, laid(model, items, args), args_of("grpo"))
    assert close(whole[1], by_tokens[1], 1e-12)  # of one batch it is dapo
    by_answers = step(model, laid(model, items, args), args_of("grpo", loss="grpo"))
    assert close(parts[1], by_answers[1], 1e-12)  # of one completion each it is grpo


@mutation("lora/methods/ppo.py", "count, summed = total([", "count, summed = list([", case="ppo")
@mutation("lora/methods/ppo.py", "[squares] = total([", "[squares] = list([", case="ppo")
@mutation("lora/methods/ppo.py", "nats, answers = total([", "nats, answers = list([", case="ppo")
@EACH
def test_a_step_that_two_ranks_share_has_the_gradients_and_figures_of_one(name):
    args, model, items = case_of(name)
    carried = [{}, {}, {}]
    whole = prepared(model, laid(model, items, args), args, carried=carried[2])
    count = sum(METHODS[args.method].count(batch, args) for batch in whole)
    loss, gradients, _ = passed(model, whole, args)
    shares = [laid(model, items[:4], args, 2), laid(model, items[4:], args)]  # a group stays on one rank
    asks = [lambda total, r=r: prepared(model, shares[r], args, total, carried[r]) for r in (0, 1)]
    parts = [passed(model, batches, args, count) for batches in together(asks)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-12)
    assert close(parts[0][1] + parts[1][1], gradients, 1e-12)
    assert carried[0] == carried[1] == pytest.approx(carried[2], abs=1e-12) and len(carried[0]) == (name == "ppo")


@EACH
def test_a_rank_without_completions_takes_part_and_adds_nothing(name):
    args, model, items = case_of(name)
    expected = step(model, laid(model, items, args), args)
    padding = filled([], 5)
    with_padding = step(model, [*laid(model, items, args), padding], args)
    assert with_padding[0] == expected[0] and torch.equal(with_padding[1], expected[1])
    asks = [lambda total, b=b: prepared(model, b, args, total) for b in (laid(model, items, args), [padding])]
    batches, [nothing] = together(asks)
    assert close(passed(model, batches, args)[1], expected[1], 1e-15)
    assert METHODS[args.method].count(nothing, args) == 0
    assert not passed(model, [nothing], args, 1)[1].any()


# ---- several updates -------------------------------------------------------------------------------------------------


@mutation("lora/methods/policy.py", 'batch.per_token.setdefault("old", logs.detach())', "logs.detach()", case="rloo")
@mutation("lora/methods/policy.py", "return logs.detach() if args.updates == 1 else", "return", case="dapo")
@mutation("lora/methods/policy.py", "logs.detach() if args.updates == 1", "logs if args.updates == 1", case="dapo")
@pytest.mark.parametrize("name", ["dapo", "rloo"])
def test_with_one_update_the_ratio_is_1_with_more_it_is_to_the_model_of_the_first_pass(name):
    """And one update makes no pass for the old log-probabilities, nor keeps any."""
    args, model, items = case_of(name, kl=0.0)
    [batch] = prepared(model, laid(model, items, args), args)
    before = policy.log_probs(model, policy.hidden(model, batch), batch, args).detach()
    first = passed(model, [batch], args)
    moved(model, 0.1)
    again = passed(model, [batch], args)
    assert "old" not in batch.per_token
    assert again[0] == pytest.approx(first[0], abs=1e-12) and far(again[1], first[1], 1e-4)
    several = args_of(**{**CASES[name], "kl": 0.0, "updates": 2})
    assert passed(model, [batch], several)[0] == pytest.approx(first[0], abs=1e-12)
    batch.per_token["old"] = before
    assert abs(passed(model, [batch], several)[0] - first[0]) > 1e-3
    assert torch.equal(batch.per_token["old"], before)


def test_a_step_asks_the_model_once_for_each_batch():
    for name in CASES:
        args, model, items = case_of(name)
        batches, calls, trunk = laid(model, items, args, 3), [], model.trunk
        model.trunk = lambda *given, trunk=trunk, calls=calls: calls.append(given) or trunk(*given)
        step(model, batches, args)
        assert len(calls) == len(batches) == 3


# ---- answers that cannot be scored -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dapo", "grpo", "dr_grpo", "rloo"])
def test_an_answer_that_cannot_be_scored_moves_nothing_and_is_counted(name):
    args, model, items = case_of(name, kl=0.0)
    loss, gradients, _ = step(model, laid(model, items, args), args)
    rest = [item for item in items if not math.isnan(item.known["reward"][0])]
    other_loss, other, _ = step(model, laid(model, rest, args), args)
    counted, of_rest = (sum(METHODS[args.method].count(b, args) for b in laid(model, i, args)) for i in (items, rest))
    assert counted > of_rest
    assert loss * counted == pytest.approx(other_loss * of_rest, abs=1e-12)
    assert close(gradients * counted, other * of_rest, 1e-11) and np.isfinite(loss)


def test_a_step_in_which_nothing_can_be_scored_has_no_gradient_and_no_nan():
    for name in CASES:
        args, model, _ = case_of(name, kl=0.0)
        items = answers([(NONE, NONE), (NONE, 1.0), (2.0, 2.0)] if name != "ppo" else [(NONE, NONE)])
        loss, gradients, _ = passed(model, prepared(model, laid(model, items, args), args), args, 7)
        assert loss == 0 and not gradients.any()


def test_what_the_three_need_of_a_reference_is_a_price_for_leaving_it():
    for name in ("grpo", "rloo", "ppo"):
        method = METHODS[name]
        assert method.KIND == "prompt" and method.compares(args_of(name, kl=0.1))
        assert not method.compares(args_of(name, kl=0.0))
        assert method.compares(args_of(name)) == (name != "grpo")
    assert [args_of(name).group for name in ("grpo", "rloo", "ppo")] == [8, 8, 1]
    assert [args_of(name).kl for name in ("grpo", "rloo", "ppo")] == [0.0, 0.05, 0.05]
    assert [args_of(name).updates for name in ("grpo", "rloo", "ppo")] == [1, 1, 4]
