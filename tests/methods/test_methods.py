"""What holds for every method: what an answer's log-probability is, any cut of a step, ranks, and the first loss."""

import json
import math

import numpy as np
import pytest
import torch

from lora.adapter import value_head
from lora.data.batch import collate, filled, micro_batches
from lora.data.encode import encode
from lora.data.formats import Conversation
from lora.methods import METHODS, dpo, kto
from lora.methods.answers import log_probs
from lora.methods.objective import Objective, measure
from lora.run.evaluator import fingerprint
from lora.train.step import accumulate
from tests import cli, oracle
from tests.helpers import as_written, close, far, patched, tiny_config, tiny_model
from tests.methods.linked import compared, data_of, gradients, judged, pairs, scored, settings, taken
from tests.mutation import mutation
from tests.text.test_template import chat_of, turns

# ---- an answer's log-probability -------------------------------------------------------------------------------------


@mutation("lora/data/batch.py", "for part in values.split(self.counts)", "for part in values.split(self.counts[::-1])")
@mutation("lora/methods/answers.py", "return batch.sums(ops", "return -batch.sums(ops")
def test_a_log_probability_is_the_sum_over_the_answers_tokens_and_its_end_of_turn():
    """Against the NumPy decoder, on the rows of a pair; its prompt is what generation would see."""
    chat, question = chat_of("chatml"), turns("a", "b", "Count, please.")
    question[1]["train"] = False
    sides = [[*question, {"role": "assistant", "content": text}] for text in ("one two three", "No.")]
    item = encode([Conversation(sides[0], "a.jsonl:1", rejected=sides[1])], chat, 1000, kind="pair")[0]
    model = tiny_model(vocab_size=600)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for found, side, content in zip(log_probs(model, collate([item])), sides, ("one two three", "No."), strict=True):
        answer = [*chat.tokenizer.encode(content), chat.end_of_turn]
        prompt = chat.prompt(side[:-1])
        scores = oracle.logits(tiny_config(vocab_size=600), weights, prompt + answer)
        rows = scores[len(prompt) - 1 : -1]
        expected = sum(math.log(oracle.softmax(row)[token]) for row, token in zip(rows, answer, strict=True))
        assert found.item() == pytest.approx(expected, abs=1e-9)


def test_documents_end_to_end_have_the_log_probabilities_that_each_has_alone():
    model, items = patched(tiny_model()), pairs()
    together, padded = log_probs(model, collate(items)), log_probs(model, filled(items, 1000))
    alone = [log_probs(model, collate([type(i)((e,), {})])) for i in items for e in i.examples]
    assert close(together, torch.cat(alone), 1e-12) and close(padded, torch.cat(alone), 1e-12)


def test_log_probabilities_are_added_up_in_float64():
    """Ten thousand numbers of a third: in float32 their sum would be 3e-4 off."""
    batch = collate(pairs(1))
    batch.counts = [10_000]
    third = torch.full((10_000,), -1 / 3, dtype=torch.float32)
    assert batch.sums(third).dtype == torch.float64
    assert batch.sums(third).item() == pytest.approx(10_000 * float(np.float32(-1 / 3)), rel=1e-12)


# ---- a step, however it is cut ---------------------------------------------------------------------------------------

CASES = [
    *(("dpo", "--loss", loss, "--sft-weight", 0.2) for loss in dpo.LOSSES),
    ("kto", "--good-weight", 1.3),
    ("reward", "--center", 0.1, "--margin", 0.2),
]
EACH = pytest.mark.parametrize("words", CASES, ids=[" ".join(map(str, case[:3:2])) for case in CASES])


def case_of(words):
    """A method, its settings, a model in float64 and the examples of a step."""
    args, model = settings(*words), patched(tiny_model())
    if args.method == "reward":
        head = value_head.add(model, model.config.hidden_size).double().summary
        head.weight.data = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(5)).double()
        return METHODS["reward"], args, model, [scored(item) for item in pairs(margin=[(i, i) for i in range(6)])]
    if args.method == "kto":
        items = compared(model, judged())
        items = [i._replace(known={**i.known, "reference": tuple(x - 40 for x in i.known["reference"])}) for i in items]
        return kto, args, model, items  # else z is 0
    return dpo, args, model, compared(model, pairs(margin=[(i / 9, i / 9) for i in range(6)]))


@mutation(
    "lora/methods/kto.py",
    "changed, count = total([sum(float(part.sum()) for part in changes), sum(map(len, changes))])",
    "changed, count = float(changes[0].sum()), len(changes[0])",
    case="kto 1.3",
)
@EACH
def test_any_cut_of_a_step_into_micro_batches_gives_the_same_gradients(words):
    method, args, model, items = case_of(words)
    cuts = [[collate(items)], [collate([item]) for item in items], *(micro_batches(items, n) for n in (30, 100, 150))]
    assert len({len(batches) for batches in cuts}) > 3
    found = []
    for batches in cuts:
        objective = Objective(method, model, args)
        loss, count = accumulate(objective, objective.prepare(batches))
        found.append((torch.tensor(loss), taken(model), objective.figures()))
        assert count == 6
    for loss, gradient, figures in found[1:]:
        assert close(loss, found[0][0], 1e-6) and close(gradient, found[0][1], 1e-12)
        assert figures == pytest.approx(found[0][2], abs=1e-9)
    assert far(found[0][1], torch.zeros_like(found[0][1]), 1e-7)


@EACH
def test_formulas_as_written_and_fast_versions_have_the_same_gradients(words):
    method, args, model, items = case_of(words)
    fast = gradients(model, method, args, [collate(items)])
    with as_written():
        assert close(gradients(model, method, args, [collate(items)]), fast, 1e-10)


@mutation("lora/methods/kto.py", "changed, count = total([", "changed, count = list([", case="kto 1.3")
@mutation("lora/train/evaluate.py", "added = iter(total(", "added = iter(list(", case="dpo sigmoid")
@EACH
def test_a_step_that_two_ranks_share_has_the_gradients_and_figures_of_one(words):
    """Each rank is asked twice: for its numbers, and what it does once it knows those of both."""
    method, args, model, items = case_of(words)
    whole = Objective(method, model, args)
    accumulate(whole, whole.prepare([collate(items)]))
    expected = taken(model)
    shares = [micro_batches(items[:2], 60), micro_batches(items[2:], 60)]

    def of_both(ask):
        """`ask(rank, total)` of each rank, where `total` adds over both."""
        said = []
        for rank in (0, 1):
            ask(rank, lambda numbers: said.append(numbers) or numbers)
        sums = [sum(column) for column in zip(*said, strict=True)]
        return [ask(rank, lambda _: sums) for rank in (0, 1)]

    ranks = [Objective(method, model, args) for _ in shares]
    prepared = of_both(lambda rank, total: ranks[rank].prepare(shares[rank], total))
    for objective, batches in zip(ranks, prepared, strict=True):
        accumulate(objective, batches, count=6)
    assert close(taken(model), expected, 1e-12)
    for figures in of_both(lambda rank, total: ranks[rank].figures(total)):
        assert figures == pytest.approx(whole.figures(), abs=1e-9)


@EACH
def test_a_rank_without_examples_takes_part_and_adds_nothing(words):
    """With a sharded base it computes padding, as often as the others compute their batches."""
    method, args, model, items = case_of(words)
    alone = gradients(model, method, args, [collate(items)])
    assert torch.equal(gradients(model, method, args, [collate(items), filled([], 1)]), alone)


@mutation(
    "lora/methods/kto.py",
    "logs = [log_probs(model, batch) for batch in others]",
    "logs = [log_probs(model, batch) for batch in others if batch.linked]",
)
def test_every_rank_makes_as_many_passes_for_z_as_it_has_batches_padding_included():
    """A sharded base is gathered by all of them together: who left one out would keep the others waiting."""
    method, args, model, items = case_of(("kto",))
    calls, trunk = [], model.trunk
    model.trunk = lambda *given: calls.append(given) or trunk(*given)
    method.prepare(model, [collate(items), filled([], 1), filled([], 1)], args)
    assert len(calls) == 3


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_a_measurement_is_the_mean_over_all_batches_however_they_are_cut_without_gradients():
    for words in CASES[::5]:
        method, args, model, items = case_of(words)
        whole = measure(method, model, [collate(items)], args)
        parts = measure(method, model, micro_batches(items, 60), args)
        assert whole.keys() == {"loss", *method.FIGURES} and whole == pytest.approx(parts, abs=1e-9)
        assert all(p.grad is None for p in model.parameters())
        objective = Objective(method, model, args)
        assert accumulate(objective, objective.prepare([collate(items)]))[0] == pytest.approx(whole["loss"], abs=1e-9)


@mutation("lora/run/evaluator.py", 'for name in sorted(b.known.keys() - {"reference"}):', "for name in ():")
@mutation("lora/run/evaluator.py", 'sorted(b.known.keys() - {"reference"})', "sorted(b.known)")
def test_other_verdicts_are_other_rows_to_evaluate_on_and_another_reference_is_not():
    model, items = patched(tiny_model()), judged()
    of = fingerprint([collate(items)])
    assert of == fingerprint([collate(items)]) == fingerprint([collate(compared(model, items))])
    other = [items[0]._replace(known={"good": tuple(1 - x for x in items[0].known["good"])}), *items[1:]]
    assert fingerprint([collate(other)]) != of


@mutation("lora/methods/objective.py", "{name: (0.0, 0.0) for name in self.method.FIGURES}", "self.sums")
def test_figures_are_those_of_the_step_alone():
    method, args, model, items = case_of(CASES[0])
    objective = Objective(method, model, args)
    for part in (items, items[:1]):
        for batch in objective.prepare([collate(part)]):
            objective(batch)
    assert objective.count == 1
    assert objective.figures()["length_chosen"] == sum(items[0].examples[0].trained)


def test_sft_measures_nothing_besides_its_loss():
    model, args = patched(tiny_model()), settings("sft")
    objective = Objective(METHODS["sft"], model, args)
    objective(collate([pairs()[0].examples[0]]))
    assert objective.figures() == {}


def test_a_method_is_a_kind_a_loss_and_figures_in_words():
    assert list(METHODS) == ["sft", "dpo", "kto", "reward", "grpo", "rloo", "ppo"]
    for method in METHODS.values():
        assert method.KIND and callable(method.loss)
        assert all(len(words) > 3 and words.isprintable() for words in method.FIGURES.values())


@mutation("lora/methods/__init__.py", "if getattr(args, name) is None:", "if True:")
def test_what_is_left_open_is_the_papers_and_what_is_given_stays():
    def of(*words):
        args = settings(*words)
        return args.beta, args.label_smoothing, args.margin

    assert of("dpo") == (0.1, None, 0.0) and of("kto") == (0.1, None, None) and of("sft") == (None, None, None)
    assert of("dpo", "--loss", "cdpo") == of("dpo", "--loss", "robust") == (0.1, 0.1, 0.0)
    assert of("dpo", "--loss", "simpo") == (2.0, None, 1.0) and of("dpo", "--loss", "ipo") == (0.1, None, None)
    assert of("reward") == (None, None, 0.0)
    assert of("dpo", "--loss", "simpo", "--beta", 3, "--margin", 0.5) == (3.0, None, 0.5)
    assert of("dpo", "--loss", "cdpo", "--label-smoothing", 0) == (0.1, 0.0, 0.0)


# ---- the first loss --------------------------------------------------------------------------------------------------


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def first_loss(tmp_path, method, *words, name="out") -> float:
    given = ("--method", method, "--data", data_of(method), "--batch-size", 5, "--micro-tokens", 90, *words)
    inputs = ("--model", cli.model_folder(), "--max-steps", 2, "--lr", 0.01, *cli.ON_CPU, "--out", name)
    done = cli.call("train", *inputs, *given, cwd=tmp_path)
    assert done.code == 0, done.err
    return next(row["loss"] for row in rows(tmp_path / name) if "loss" in row)


STARTS = {"a fresh adapter": (), "an adapter": ("--init-adapter", "first"), "every weight": ("--full",)}


@mutation(
    "lora/run/reference.py",
    "            trainable.restore(Path(args.init_adapter))",
    "            pass",
    case="an adapter",
)
@pytest.mark.parametrize("start", STARTS)
def test_the_first_loss_of_dpo_is_ln_2_wherever_it_starts(tmp_path, start):
    if start == "an adapter":
        first_loss(tmp_path, "sft", "--rank", 4, "--lr", 0.05, name="first")
    assert first_loss(tmp_path, "dpo", *STARTS[start]) == pytest.approx(math.log(2), abs=1e-6)
    row = rows(tmp_path / "out")[0]
    assert abs(row["reward_margin"]) < 1e-5 and row.keys() > dpo.FIGURES.keys()
    assert rows(tmp_path / "out")[1]["loss"] != pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("words", [("--loss", "robust"), ("--loss", "sigmoid_norm"), ("--dropout", 0.3), ("--rslora",)])
def test_the_first_loss_is_ln_2_with_other_losses_and_adapters(tmp_path, words):
    assert first_loss(tmp_path, "dpo", *words) == pytest.approx(math.log(2), abs=1e-6)


def test_the_first_loss_of_a_reward_model_is_ln_2_exactly(tmp_path):
    assert first_loss(tmp_path, "reward") == pytest.approx(math.log(2), abs=1e-12)
    assert (tmp_path / "out" / value_head.FILE).exists()
    head = value_head.read(tmp_path / "out")
    assert head.summary.weight.abs().max() > 0


def test_the_first_loss_of_kto_is_half_of_the_weights(tmp_path):
    assert first_loss(tmp_path, "kto") == pytest.approx(0.5, abs=1e-6)
    assert rows(tmp_path / "out")[0]["kl"] == pytest.approx(0, abs=1e-4)


def test_a_reward_model_begins_with_the_head_of_the_adapter_it_starts_from_or_with_zero(tmp_path):
    first_loss(tmp_path, "sft", "--rank", 4, name="talks")
    assert first_loss(tmp_path, "reward", "--init-adapter", "talks", name="a") == pytest.approx(math.log(2), abs=1e-12)
    evaluated = ("--eval-data", data_of("reward"), "--eval-every", 2, "--retention", cli.data_file())
    first_loss(tmp_path, "reward", "--rank", 4, *evaluated, name="scores")
    first_loss(tmp_path, "reward", "--init-adapter", "scores", *evaluated, name="b")
    last, next_first = rows(tmp_path / "scores")[-1], rows(tmp_path / "b")[0]
    assert last["eval_loss"] == next_first["eval_loss"] != pytest.approx(math.log(2), abs=1e-4)
    assert last["eval_accuracy"] == next_first["eval_accuracy"]
