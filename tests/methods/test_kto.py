"""Judged answers without a partner: the formula, its one z for all of a step, and what is measured."""

import numpy as np
import pytest
import torch

from lora.data.batch import collate
from lora.methods import kto
from lora.methods.answers import log_probs
from lora.methods.objective import Objective
from tests.helpers import close, far, patched, tiny_model
from tests.methods.linked import compared, judged, laid_out, settings
from tests.mutation import mutation


def formula(change, z, good, beta: float, weights: tuple[float, float]) -> np.ndarray:
    """Good: w (1 - σ(β(l - z))); bad: w (1 - σ(β(z - l)))"""
    of_good, of_bad = weights
    value = [
        of_good * (1 - 1 / (1 + np.exp(-beta * (change_ - z))))
        if is_good
        else of_bad * (1 - 1 / (1 + np.exp(-beta * (z - change_))))
        for change_, is_good in zip(change, good, strict=True)
    ]
    return np.array(value)


@mutation("lora/methods/kto.py", "change - z, z - change)", "change - z, change - z)", case="0.0")
@mutation(
    "lora/methods/kto.py", "torch.where(good, change - z, z - change)", "torch.where(good, change, -change)", case="0.8"
)
@mutation(
    "lora/methods/kto.py",
    "change.new_tensor(args.good_weight), args.bad_weight)",
    "change.new_tensor(args.bad_weight), args.good_weight)",
    case="0.0",
)
@pytest.mark.parametrize("z", [0.0, 0.8])
def test_the_loss_is_its_formula_and_so_is_its_gradient(z):
    random = np.random.default_rng(1)
    change, good = random.normal(0, 3, 30), random.random(30) < 0.6
    args = settings("kto", "--beta", 0.3, "--good-weight", 1.3, "--bad-weight", 0.7)
    given = torch.tensor(change).requires_grad_()
    losses = kto.losses(given, torch.tensor(z, dtype=torch.float64), torch.tensor(good), args)
    assert close(losses, torch.tensor(formula(change, z, good, 0.3, (1.3, 0.7))), 1e-12)
    [gradient] = torch.autograd.grad(losses.sum(), given)
    step = 1e-5
    there, back = (formula(change + by, z, good, 0.3, (1.3, 0.7)) for by in (step, -step))
    assert close(gradient, torch.tensor((there - back) / (2 * step)), 1e-9)


@pytest.mark.parametrize(
    ("change", "z", "of_good", "of_bad"),
    [(0, 0, 0.5, 0.5), (1, 0, 0.475021, 0.524979), (-1, 0.5, 0.537430, 0.462570)],
)
def test_golden_values_at_the_default_beta_and_weights(change, z, of_good, of_bad):
    change, z = torch.tensor([change, change], dtype=torch.float64), torch.tensor(float(z))
    losses = kto.losses(change, z, torch.tensor([True, False]), settings("kto"))
    assert losses.tolist() == pytest.approx([of_good, of_bad], abs=1e-6)


def test_a_weight_of_zero_leaves_answers_out():
    args = settings("kto", "--bad-weight", 0)
    losses = kto.losses(torch.tensor([1.0, -2.0]), torch.tensor(0.0), torch.tensor([False, True]), args)
    assert losses[0] == 0 and losses[1] > 0.5


# ---- z ---------------------------------------------------------------------------------------------------------------


def known_of(item, name: str) -> torch.Tensor:
    return torch.tensor(item.known[name], dtype=torch.float64)


def with_reference(items, change) -> list:
    """The same, each number of the reference changed."""
    return [i._replace(known={**i.known, "reference": tuple(map(change, i.known["reference"]))}) for i in items]


def all_have(items, **numbers) -> list:
    """The same, both examples of each with these numbers."""
    return [i._replace(known={**i.known, **{name: (x, x) for name, x in numbers.items()}}) for i in items]


def z_of(model, items, cut=1) -> list[float]:
    """z as the batches of a step know it, `cut` items each."""
    batches = [collate(items[i : i + cut]) for i in range(0, len(items), cut)]
    return [z for batch in kto.prepare(model, batches, settings("kto")) for z in batch.known["z"].tolist()]


@mutation("lora/methods/kto.py", "for start in (0, 1))", "for start in (0, 0))")
@mutation("lora/methods/kto.py", "changed / count)", "changed)")
def test_z_is_the_mean_of_the_whole_step_over_each_question_with_an_answer_to_another():
    model = patched(tiny_model())
    items = compared(model, judged())
    changes = torch.cat([log_probs(model, collate([i])) - known_of(i, "reference") for i in items])
    items = with_reference(items, lambda x: x - 40)  # else the random adapter makes everything less likely
    expected = changes[1::2].mean() + 40
    assert expected > 5 and abs(expected - changes[::2].mean() - 40) > 0.1
    for cut in (1, 2, 4, 6):
        found = z_of(model, items, cut)
        assert len(found) == 6 and close(torch.tensor(found, dtype=torch.float64), expected.detach().expand(6), 1e-12)


@mutation("lora/methods/kto.py", "z = max(0.0, changed / count)", "z = changed / count")
def test_z_is_never_below_zero():
    model = patched(tiny_model())
    items = all_have(judged(), reference=0.0)  # lp itself: far below
    assert z_of(model, items) == [0.0] * 6


def test_z_has_no_gradient():
    """The gradient is that of the loss with z as a number."""
    model, args = patched(tiny_model()), settings("kto")
    items = all_have(judged(), reference=-200.0)
    [batch] = kto.prepare(model, [collate(items)], args)
    z = batch.known["z"]
    assert not z.requires_grad and z[0] > 1
    total, count, _ = kto.loss(model, batch, args)
    total.backward()
    with_z = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    for item in items:  # by hand
        [change, _] = log_probs(model, collate([item])) + 200
        sign = 1 if item.known["good"][0] else -1
        (1 - torch.sigmoid(args.beta * sign * (change - z[0].item()))).backward()
    by_hand = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert count == 6 and close(with_z, by_hand, 1e-12) and far(with_z, 0 * with_z, 1e-8)


@mutation("lora/methods/kto.py", "    with evaluating(model):", "    if True:")
def test_z_is_measured_without_dropout_and_the_mode_is_as_before():
    model = patched(tiny_model(), dropout=0.5)
    items = all_have(judged(), reference=-200.0)
    calm = z_of(model.eval(), items)
    assert z_of(model.train(), items) == calm and model.training


def test_what_another_questions_answer_says_is_not_trained():
    """Only z knows the second example of a row: with the same z, another one changes no gradient."""
    model, args, found = patched(tiny_model()), settings("kto"), []
    for others in (judged(), judged()[::-1]):
        rows = zip(all_have(judged(), reference=0.0), others, strict=True)
        items = [row._replace(examples=(row.examples[0], other.examples[1])) for row, other in rows]
        [batch] = kto.prepare(model, [collate(items)], args)
        assert len(batch.counts) == 6 and batch.known["z"].eq(0).all()
        kto.loss(model, batch, args)[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    assert torch.equal(*found)


# ---- figures ---------------------------------------------------------------------------------------------------------


@mutation("lora/methods/kto.py", "right = (change > z) == good", "right = (change > 0) == good")
@mutation("lora/methods/kto.py", 'sides = {"good": good, "bad": ~good}', 'sides = {"good": ~good, "bad": good}')
def test_figures_are_rewards_and_log_probabilities_by_verdict_accuracy_kl_and_length(monkeypatch):
    logs = torch.tensor([-6.0, -8.0, -3.0], dtype=torch.float64)
    batch = laid_out([[3], [4], [8]], reference=[[-8.0], [-9.0], [-6.0]], good=[[1], [0], [1]], z=[[1.5]] * 3)
    monkeypatch.setattr(kto, "log_probs", lambda model, batch: logs)
    args = settings("kto", "--beta", 0.5)
    *_, figures = kto.loss(None, batch, args)
    assert figures.keys() == kto.FIGURES.keys()
    means = {name: float(value) / float(count) for name, (value, count) in figures.items()}
    assert means == pytest.approx({
        "reward_good": 0.5 * (2 + 3) / 2, "reward_bad": 0.5 * 1, "accuracy": 1.0, "kl": 1.5, "log_prob_good": -4.5,
        "log_prob_bad": -8.0, "length": 5.0,
    })  # fmt: skip


@mutation("lora/train/evaluate.py", "strict=True) if count}", "strict=True)}")
def test_where_no_answer_is_bad_nothing_is_said_of_bad_ones():
    model, args = patched(tiny_model()), settings("kto")
    items = all_have(compared(model, judged()), good=1.0)
    objective = Objective(kto, model, args)
    for batch in objective.prepare([collate(items)]):
        objective(batch)
    assert objective.figures().keys() == kto.FIGURES.keys() - {"reward_bad", "log_prob_bad"}
