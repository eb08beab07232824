"""A reward model: the loss of scores, and where a score is read."""

import numpy as np
import pytest
import torch

from lora.adapter import value_head
from lora.data.batch import Linked, collate, filled
from lora.data.encode import encode
from lora.data.formats import Conversation
from lora.methods import reward
from tests.helpers import close, far, patched, tiny_model
from tests.methods.linked import laid_out, pairs, scored, settings
from tests.mutation import mutation
from tests.text.test_template import chat_of, turns


def scorer(**sizes) -> torch.nn.Module:
    """A tiny model with an adapter and a value head, both random, in float64."""
    model = patched(tiny_model(**sizes))
    head = value_head.add(model, model.config.hidden_size).double().summary
    random = torch.Generator().manual_seed(5)
    head.weight.data = torch.randn(head.weight.shape, generator=random, dtype=torch.float64)
    head.bias.data.fill_(0.3)
    return model


def formula(scores, margin, center: float) -> np.ndarray:
    """-log σ(c - r - m) + center (c + r)²"""
    c, r = scores.T
    return np.logaddexp(0, -(c - r - margin)) + center * (c + r) ** 2


@mutation(
    "lora/methods/reward.py", "-logsigmoid(chosen - rejected - margin)", "-logsigmoid(rejected - chosen - margin)"
)
@mutation("lora/methods/reward.py", "chosen - rejected - margin)", "chosen - rejected + margin)")
@mutation("lora/methods/reward.py", "center * (chosen + rejected).square()", "center * (chosen - rejected).square()")
def test_the_loss_is_its_formula_and_so_is_its_gradient():
    random = np.random.default_rng(2)
    scores, margin = random.normal(0, 2, (30, 2)), random.uniform(0, 2, 30)
    given = torch.tensor(scores).requires_grad_()
    losses = reward.losses(given, torch.tensor(margin), 0.05)
    assert close(losses, torch.tensor(formula(scores, margin, 0.05)), 1e-12)
    [gradient] = torch.autograd.grad(losses.sum(), given)
    step, expected = 1e-5, np.zeros_like(scores)
    for side in (0, 1):
        moved = step * np.eye(2)[side]
        expected[:, side] = formula(scores + moved, margin, 0.05) - formula(scores - moved, margin, 0.05)
    assert close(gradient, torch.tensor(expected / (2 * step)), 1e-9)


@pytest.mark.parametrize(("difference", "loss"), [(0, 0.693147), (1, 0.313262), (2, 0.126928), (-1, 1.313262)])
def test_golden_values(difference, loss):
    scores = torch.tensor([[0.7 + difference, 0.7]], dtype=torch.float64)
    assert reward.losses(scores).item() == pytest.approx(loss, abs=1e-6)


@mutation("lora/methods/reward.py", "args.margin + margin, args.center", "margin, args.center")
@mutation("lora/methods/reward.py", 'batch.known["margin"].unflatten(0, (-1, 2))[:, 0] if batch.linked else 0.0', "0.0")
@mutation("lora/methods/reward.py", "margin, args.center)", "margin, 0.0)")
def test_the_margin_of_a_row_is_added_to_that_of_the_run_and_center_counts(monkeypatch):
    scores = torch.tensor([1.0, 0.5, -2.0, 3.0], dtype=torch.float64)
    monkeypatch.setattr(reward, "scores", lambda model, batch: scores)
    batch = laid_out([[1, 1]] * 2, margin=[[0.25, 0.25], [2.0, 2.0]])
    total, count, _ = reward.loss(None, batch, settings("reward", "--margin", 0.5, "--center", 0.02))
    expected = formula(scores.view(2, 2).numpy(), np.array([0.75, 2.5]), 0.02).sum()
    assert total.item() == pytest.approx(expected, abs=1e-12) and count == 2


@mutation("lora/methods/reward.py", "(pairs[:, 0] > pairs[:, 1])", "(pairs[:, 0] >= pairs[:, 1])")
def test_figures_are_accuracy_both_sides_scores_and_their_difference(monkeypatch):
    scores = torch.tensor([1.0, 0.5, -2.0, 3.0, 4.0, 4.0], dtype=torch.float64)
    monkeypatch.setattr(reward, "scores", lambda model, batch: scores)
    *_, figures = reward.loss(None, laid_out([[1, 1]] * 3, margin=[[0, 0]] * 3), settings("reward"))
    expected = {"accuracy": (1, 3), "score_chosen": (3.0, 3), "score_rejected": (7.5, 3), "score_margin": (-4.5, 3)}
    assert figures == expected and figures.keys() == reward.FIGURES.keys()


def test_a_zero_head_has_a_loss_of_ln_2_and_a_gradient_only_for_itself():
    model = scorer()
    for parameter in model.v_head.parameters():
        parameter.data.zero_()
    batch = collate([scored(item) for item in pairs(margin=[(0, 0)] * 6)])
    total, count, _ = reward.loss(model, batch, settings("reward"))
    assert total.item() / count == pytest.approx(np.log(2), abs=1e-15)
    total.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-12}
    assert moved == {"v_head.summary.weight"}  # of the bias it vanishes: it is in both scores


# ---- where a score is read -------------------------------------------------------------------------------------------

QUESTION, ANSWERS = "Count to three, please.", ("one two three", "No.")


def scored_pair(question=QUESTION, answers=ANSWERS, template="chatml"):
    """The linked examples of a row, as --method reward reads it."""
    chat = chat_of(template)
    row = Conversation(turns(question, answers[0]), "a.jsonl:1", rejected=turns(question, answers[1]))
    return encode([row], chat, 1000, kind="scored")[0], chat


@mutation(
    "lora/methods/reward.py",
    "ends = batch.trained[counts.cumsum(0) - 1] + 1",
    "ends = batch.trained[counts.cumsum(0) - 1]",
)
@pytest.mark.parametrize("template", ["chatml", "llama3", "llama2"])
def test_the_score_is_that_of_the_hidden_state_at_the_end_of_turn(template):
    model = scorer(vocab_size=600)
    item, chat = scored_pair(template=template)
    found = reward.scores(model, collate([item]))
    for score, answer in zip(found, ANSWERS, strict=True):
        [laid] = chat.tokenize(turns(QUESTION, answer))
        tokens = laid.tokens[: laid.answers[-1][1]]
        assert tokens[-1] == chat.end_of_turn
        hidden = model.trunk(torch.tensor(tokens), [len(tokens)])[-1]
        by_hand = (model.v_head.summary.weight[0] * hidden).sum() + 0.3
        assert close(score, by_hand, 1e-12) and far(score, torch.zeros_like(score), 1e-4)


def test_tokens_behind_the_end_of_turn_change_no_score_and_the_prompt_does():
    model = scorer(vocab_size=600)
    item, _ = scored_pair()
    score = reward.scores(model, collate([item]))
    behind = Linked(tuple(e._replace(tokens=[*e.tokens[:-1], 7]) for e in item.examples), item.known)
    assert torch.equal(reward.scores(model, collate([behind])), score)
    assert close(reward.scores(model, collate([item], padding=19)), score, 1e-12)
    assert close(reward.scores(model, filled([item], 300)), score, 1e-12)
    others = [scored(other) for other in pairs(5, margin=[(0, 0)] * 5)]
    beside = collate([*others[:3], item, *others[3:]])
    assert close(reward.scores(model, beside)[6:8], score, 1e-12)
    asked, _ = scored_pair("Count to three, please!")
    assert far(reward.scores(model, collate([asked])), score, 1e-4)


def test_a_batch_of_padding_alone_has_no_score_and_a_loss_of_zero():
    model = scorer()
    total, count, figures = reward.loss(model, filled([], 5), settings("reward"))
    assert (total.item(), count) == (0, 0) and all(number == 0 for _, number in figures.values())
    total.backward()
