"""Each loss of pairs is its paper's formula, with its gradients; golden values; and referees that need no code."""

import math

import numpy as np
import pytest
import torch

from lora.data.batch import collate
from lora.methods import dpo
from tests.helpers import close, far, patched, tiny_model
from tests.methods.linked import compared, laid_out, pairs, settings, taken
from tests.mutation import mutation

LOSSES = list(dpo.LOSSES)
TORCHTUNE = (  # its test_dpo_loss.py: policy and reference, (3, 2)
    [[-0.5, -0.1], [-10.0, -30.0], [-1.0, -21.0]],
    [[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]],
)


def nll(z):
    """-log σ(z) in NumPy, which shares nothing with torch's."""
    return np.logaddexp(0.0, -z)


def formula(loss: str, lp, ref, n, beta: float, eps: float | None, gap, sft: float) -> np.ndarray:
    """Log-probabilities, reference and lengths (P, 2) -> (P,), as the papers write it."""
    (c, r), (nc, nr) = lp.T, n.T
    lc, lr = (lp - ref).T
    z, mean = beta * (lc - lr) - gap, lc / nc - lr / nr

    def log_odds(x):
        return x - np.log(1 - np.exp(x))

    value = {
        "sigmoid": lambda: nll(z),
        "cdpo": lambda: (1 - eps) * nll(z) + eps * nll(-z),
        "robust": lambda: ((1 - eps) * nll(z) - eps * nll(-z)) / (1 - 2 * eps),
        "hinge": lambda: np.maximum(0, 1 - beta * (lc - lr)),
        "ipo": lambda: (mean - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": lambda: nll(beta * mean - gap),
        "simpo": lambda: nll(beta * (c / nc - r / nr) - gap),
        "orpo": lambda: -c / nc + beta * nll(log_odds(c / nc) - log_odds(r / nr)),
        "apo_zero": lambda: 1 - 1 / (1 + np.exp(-beta * lc)) + 1 / (1 + np.exp(-beta * lr)),
    }[loss]()
    return value - sft * c / nc


def random_sides(seed: int, count: int = 40):
    """Log-probabilities, reference, lengths, margins of rows: (count, 2) each; the last, (count,)."""
    random = np.random.default_rng(seed)
    n = random.integers(1, 30, (count, 2)).astype(float)
    lp = -random.uniform(0.02, 3, (count, 2)) * n
    return lp, lp + random.normal(0, 4, (count, 2)), n, random.uniform(0, 2, count)


def found(monkeypatch, args, lp, ref=None, n=None, margin=None):
    """`dpo.loss` as the loop calls it, of a model that says these log-probabilities: sum, count, figures, gradient."""
    lp = torch.tensor(lp, dtype=torch.float64).requires_grad_()
    known = {} if ref is None else {"reference": ref}
    known |= {} if margin is None else {"margin": np.stack([margin] * 2, 1)}
    monkeypatch.setattr(dpo, "log_probs", lambda model, batch: lp.flatten())
    total, count, figures = dpo.loss(None, laid_out(torch.ones(len(lp), 2) if n is None else n, **known), args)
    [gradient] = torch.autograd.grad(total, lp)
    return total.detach(), count, figures, gradient


# ---- the formulas ----------------------------------------------------------------------------------------------------


@mutation(
    "lora/methods/dpo.py",
    "return -logsigmoid(beta * s.difference - s.gap)",
    "return -logsigmoid(beta * s.difference + s.gap)",
    case="sigmoid",
)
@mutation(
    "lora/methods/dpo.py",
    "-(1 - smoothing) * logsigmoid(z) - smoothing",
    "-(1 - smoothing) * logsigmoid(z) + smoothing",
    case="cdpo",
)
@mutation("lora/methods/dpo.py", " / (1 - 2 * smoothing)", " / (1 - smoothing)", case="robust")
@mutation(
    "lora/methods/dpo.py", "return relu(1 - beta * s.difference)", "return relu(-beta * s.difference)", case="hinge"
)
@mutation("lora/methods/dpo.py", "(s.mean_difference - 1 / (2 * beta))", "(s.difference - 1 / (2 * beta))", case="ipo")
@mutation(
    "lora/methods/dpo.py",
    "-logsigmoid(beta * s.mean_difference - s.gap)",
    "-logsigmoid(beta * s.mean_difference)",
    case="sigmoid_norm",
)
@mutation(
    "lora/methods/dpo.py",
    "-logsigmoid(beta * _minus(s.means) - s.gap)",
    "-logsigmoid(beta * (_minus(s.means) - s.gap))",
    case="simpo",
)
@mutation(
    "lora/methods/dpo.py",
    "odds = means - torch.log(-torch.expm1(means))",
    "odds = means - torch.log(-means)",
    case="orpo",
)
@mutation("lora/methods/dpo.py", "+ sigmoid(beta * rejected)", "+ sigmoid(rejected)", case="apo_zero")
@mutation(
    "lora/methods/dpo.py",
    "- args.sft_weight * sides.means[:, 0]",
    "- args.sft_weight * sides.log_probs[:, 0]",
    case="hinge",
)
@mutation("lora/methods/dpo.py", "zeros) + (args.margin or 0)", "zeros)", case="cdpo")
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_is_its_formula_and_its_gradient_is_that_of_the_formula(monkeypatch, loss):
    words = ["--loss", loss, "--beta", 0.3, "--sft-weight", 0.7]
    words += ["--margin", 0.4] if loss in dpo.WITH_MARGIN else []
    words += ["--label-smoothing", 0.2] if loss in dpo.WITH_SMOOTHING else []
    args = settings("dpo", *words)
    lp, ref, n, margin = random_sides(LOSSES.index(loss))

    def sums(lp):
        return formula(loss, lp, ref, n, 0.3, 0.2, 0.4 + margin, 0.7).sum()

    total, count, _, gradient = found(monkeypatch, args, lp, ref, n, margin)
    assert close(total, torch.tensor(sums(lp)), 1e-12) and count == len(lp)
    step, expected = 1e-5, np.zeros_like(lp)
    for at in np.ndindex(lp.shape):
        moved = np.zeros_like(lp)
        moved[at] = step
        expected[at] = (sums(lp + moved) - sums(lp - moved)) / (2 * step)
    assert close(gradient, torch.from_numpy(expected), 1e-7) and np.abs(expected).max() > 0.05


GOLDEN = {  # β and ε 0.1, Δ = 0, 10, 20, -10
    "sigmoid": (0.693147, 0.313262, 0.126928, 1.313262),
    "cdpo": (0.693147, 0.413262, 0.326928, 1.213262),
    "robust": (0.693147, 0.188262, -0.123072, 1.438262),
    "hinge": (1, 0, 0, 2),
    "ipo": (25, 25, 225, 225),
}


@mutation("lora/methods/dpo.py", "SMOOTHING = 0.1", "SMOOTHING = 0.2", case="robust")
@mutation("lora/methods/dpo.py", "BETA, BETA_OF = 0.1,", "BETA, BETA_OF = 0.2,", case="sigmoid")
@pytest.mark.parametrize("loss", GOLDEN)
def test_golden_values_at_the_default_beta_and_smoothing(monkeypatch, loss):
    for difference, expected in zip((0.0, 10.0, 20.0, -10.0), GOLDEN[loss], strict=True):
        lp = [[-30.0 + difference, -30.0]]
        total, *_ = found(monkeypatch, settings("dpo", "--loss", loss), lp, [[-30.0, -30.0]])
        assert total.item() == pytest.approx(expected, abs=1e-6)


@mutation("lora/methods/dpo.py", '{"simpo": 2.0}', '{"simpo": 2.5}', case="simpo")
@mutation("lora/methods/dpo.py", 'MARGIN_OF = {"simpo": 1.0}', 'MARGIN_OF = {"simpo": 0.9}', case="simpo")
@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_golden_values_without_a_reference_at_the_default_beta_and_margin(monkeypatch, loss):
    expected, swapped = {"simpo": (0.693147, 2.126928), "orpo": (0.532030, 1.129438)}[loss]
    args = settings("dpo", "--loss", loss)
    for lp, n, value in (([[-2.0, -3.0]], [[4, 3]], expected), ([[-3.0, -2.0]], [[3, 4]], swapped)):  # -0.5 and -1
        assert found(monkeypatch, args, lp, None, n)[0].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", [math.log(2), 0.313262, 0.126928]), ("hinge", [1, 0, 0])])
def test_vector_of_torchtune(loss, expected):
    policy, ref = (torch.tensor(part, dtype=torch.float64) for part in TORCHTUNE)
    sides = dpo.Sides(policy, ref, torch.ones_like(ref), torch.zeros_like(ref))
    assert close(dpo.LOSSES[loss](sides, 0.1, 0.0), torch.tensor(expected), 1e-6)


# ---- referees that need no other code --------------------------------------------------------------------------------


def sides_of(lp, ref, n=None, gap=0.0) -> dpo.Sides:
    lp, ref, n = (torch.as_tensor(x, dtype=torch.float64) for x in (lp, ref, np.ones_like(lp) if n is None else n))
    return dpo.Sides(lp, ref, n, torch.full_like(lp, gap))


@mutation("lora/methods/dpo.py", "return sides[:, 0] - sides[:, 1]", "return sides[:, 1] - sides[:, 0]")
def test_at_step_0_the_gradient_is_minus_half_beta_times_that_of_both_log_probabilities_difference():
    """On a model whose adapter is not zero: the reference is that of the model as it stands."""
    model, args = patched(tiny_model()), settings("dpo", "--beta", 0.3)
    batch = collate(pairs())
    batch.known["reference"] = dpo.log_probs(model, batch).detach()
    total, count, _ = dpo.loss(model, batch, args)
    assert close(total / count, torch.tensor(math.log(2), dtype=torch.float64), 1e-15)
    total.backward()
    ours = taken(model)
    expected = torch.zeros_like(ours)
    for item in pairs():
        for example, sign in zip(item.examples, (1, -1), strict=True):
            tokens, first = torch.tensor(example.tokens), example.trained.index(True)
            scores = model(tokens[:-1]).log_softmax(-1)  # (T, V), all logits at once
            sum_of = scores[torch.arange(first - 1, len(tokens) - 1), tokens[first:]].sum()
            sum_of.backward()
            expected += -0.3 / 2 * sign * taken(model)
    assert close(ours, expected, 1e-12) and far(ours, torch.zeros_like(ours), 1e-4)


@mutation(
    "lora/methods/dpo.py",
    "return self.log_probs - self.reference",
    "return self.log_probs / self.reference",
    case="hinge",
)
@pytest.mark.parametrize("loss", ["sigmoid", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm"])
def test_what_is_added_to_both_references_changes_nothing(loss):
    """With means over tokens: what is added to each of them."""
    lp, ref, n, _ = random_sides(3)
    added = n if loss in ("ipo", "sigmoid_norm") else np.ones_like(n)
    values = [dpo.LOSSES[loss](sides_of(lp, ref + k * added, n), 0.3, 0.2) for k in (0.0, 7.5)]
    assert close(*values, 1e-12)
    assert far(values[0], dpo.LOSSES[loss](sides_of(lp, ref + [7.5, 0] * added, n), 0.3, 0.2), 1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "simpo"])
def test_swapped_sides_have_the_loss_of_the_opposite_difference(loss):
    lp, ref, n, _ = random_sides(4)
    swapped = dpo.LOSSES[loss](sides_of(lp[:, ::-1].copy(), ref[:, ::-1].copy(), n[:, ::-1].copy()), 0.3, 0.2)
    opposite = dpo.LOSSES[loss](sides_of(-lp, -ref, n), 0.3, 0.2)
    assert close(swapped, opposite, 1e-12)
    assert far(swapped, dpo.LOSSES[loss](sides_of(lp, ref, n), 0.3, 0.2), 1e-6)


def test_cdpo_of_swapped_sides_has_the_other_share_and_half_a_share_prefers_no_side():
    lp, ref, _, _ = random_sides(5)
    there, back = sides_of(lp, ref), sides_of(lp[:, ::-1].copy(), ref[:, ::-1].copy())
    assert close(dpo.cdpo(there, 0.3, 0.2), dpo.cdpo(back, 0.3, 0.8), 1e-12)
    assert close(dpo.cdpo(there, 0.3, 0.5), dpo.cdpo(back, 0.3, 0.5), 1e-12)


@mutation(
    "lora/methods/dpo.py",
    "(-(1 - smoothing) * logsigmoid(z) + smoothing",
    "(-(1 - smoothing) * logsigmoid(z) - smoothing",
)
def test_the_mean_of_robust_over_swapped_pairs_is_dpo_on_right_ones():
    lp, ref, _, _ = random_sides(6)
    there, back = sides_of(lp, ref), sides_of(lp[:, ::-1].copy(), ref[:, ::-1].copy())
    assert close(0.8 * dpo.robust(there, 0.3, 0.2) + 0.2 * dpo.robust(back, 0.3, 0.2), dpo.dpo(there, 0.3, 0.0), 1e-12)


@mutation("lora/methods/dpo.py", "return 1 - sigmoid(beta * chosen)", "return 1 + sigmoid(beta * chosen)")
def test_apo_zero_raises_the_chosen_and_lowers_the_rejected_each_by_itself():
    lp, ref, n, _ = random_sides(7)
    given = torch.tensor(lp).requires_grad_()
    [gradient] = torch.autograd.grad(dpo.apo_zero(sides_of(given, ref, n), 0.3, 0).sum(), given)
    assert (gradient[:, 0] < 0).all() and (gradient[:, 1] > 0).all()
    other = torch.tensor(lp * [1, 2]).requires_grad_()
    [moved] = torch.autograd.grad(dpo.apo_zero(sides_of(other, ref, n), 0.3, 0).sum(), other)
    assert torch.equal(moved[:, 0], gradient[:, 0])


@mutation("lora/methods/dpo.py", "s.means.clamp(max=-1e-7)", "s.means.clamp(max=0)", case="dtype0")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_and_their_gradient_are_finite_where_an_answer_is_certain_or_hopeless(dtype):
    lp = torch.tensor([[0.0, -1.0], [-1e-12, 0.0], [0.0, 0.0], [-1e-3, -1e4], [-1e4, -1e-9]], dtype=dtype)
    lp.requires_grad_()
    n = torch.ones_like(lp)
    losses = dpo.orpo(dpo.Sides(lp, torch.zeros_like(lp), n, torch.zeros_like(lp)), 0.1, 0)
    [gradient] = torch.autograd.grad(losses.sum(), lp)
    assert torch.isfinite(losses).all() and torch.isfinite(gradient).all()
    assert losses[2].item() == pytest.approx(0.1 * math.log(2), abs=1e-6)


# ---- margins and figures ---------------------------------------------------------------------------------------------


@mutation("lora/methods/dpo.py", 'known.get("margin", zeros) +', "zeros +")
@pytest.mark.parametrize("loss", dpo.WITH_MARGIN)
def test_the_margin_of_a_row_is_added_to_that_of_the_run(monkeypatch, loss):
    lp, ref, n, margin = random_sides(8)
    of_row, *_ = found(monkeypatch, settings("dpo", "--loss", loss, "--margin", 0), lp, ref, n, margin + 1.5)
    of_both, *_ = found(monkeypatch, settings("dpo", "--loss", loss, "--margin", 1.5), lp, ref, n, margin)
    without, *_ = found(monkeypatch, settings("dpo", "--loss", loss, "--margin", 0), lp, ref, n)
    assert close(of_row, of_both, 1e-12) and of_row > without + 1


def test_a_margin_is_that_of_a_pair_whose_difference_is_so_much_smaller(monkeypatch):
    """-log σ(βΔ - γ) = -log σ(β(Δ - γ/β))"""
    lp, ref, n, _ = random_sides(9)
    with_margin, *_ = found(monkeypatch, settings("dpo", "--beta", 0.5, "--margin", 1.0), lp, ref, n)
    moved, *_ = found(monkeypatch, settings("dpo", "--beta", 0.5), lp - [2.0, 0], ref, n)
    assert close(with_margin, moved, 1e-12)


@mutation("lora/methods/dpo.py", "(sides.change if compares(args) else sides.means)", "sides.change", case="simpo")
@mutation("lora/methods/dpo.py", "int((margins > 0).sum())", "int((margins >= 0).sum())", case="sigmoid")
@mutation("lora/methods/dpo.py", "values = (c, r, c - r,", "values = (r, c, c - r,", case="sigmoid")
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo", "orpo"])
def test_figures_are_both_sides_rewards_and_log_probabilities_margin_accuracy_and_lengths(monkeypatch, loss):
    lp = np.array([[-6.0, -8.0], [-9.0, -4.0], [-5.0, -5.0]])
    ref = np.array([[-8.0, -7.0], [-8.0, -8.0], [-6.0, -6.0]])
    n = np.array([[3, 2], [3, 4], [5, 5]])
    args = settings("dpo", "--loss", loss, "--beta", 0.5)
    with_reference = loss not in ("simpo", "orpo")
    *_, figures, _ = found(monkeypatch, args, lp, ref if with_reference else None, n)
    rewards = 0.5 * ((lp - ref) if with_reference else lp / n)
    c, r = rewards.sum(0)
    expected = {"reward_chosen": c, "reward_rejected": r, "reward_margin": c - r,
                "accuracy": (rewards[:, 0] > rewards[:, 1]).sum(), "log_prob_chosen": -20, "log_prob_rejected": -17,
                "length_chosen": 11, "length_rejected": 11}  # fmt: skip
    assert figures.keys() == dpo.FIGURES.keys() == expected.keys()
    assert {name: value for name, (value, _) in figures.items()} == pytest.approx(expected)
    assert {count for _, count in figures.values()} == {3}
    assert expected["accuracy"] == 1  # equal rewards are not the right way round


@mutation("lora/methods/dpo.py", 'WITHOUT_REFERENCE = ("simpo", "orpo")', 'WITHOUT_REFERENCE = ("simpo",)')
def test_simpo_and_orpo_alone_need_no_reference():
    assert [loss for loss in LOSSES if not dpo.compares(settings("dpo", "--loss", loss))] == ["simpo", "orpo"]


def test_the_reference_of_a_fresh_adapter_is_the_base():
    model = patched(tiny_model())
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B.data.zero_()
    batch = collate(compared(model, pairs()))
    total, count, figures = dpo.loss(model, batch, settings("dpo"))
    assert close(total / count, torch.tensor(math.log(2), dtype=torch.float64), 1e-14)
    assert abs(figures["reward_margin"][0]) < 1e-13
