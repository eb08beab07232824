"""What evaluate.py says of a model: the meter of forgetting, the figures of answers, and the command."""

import json
import os
import re
import shutil
import signal
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

import evaluate
from data_gen import multiply, persona, self_cognition
from lora import pretrained
from lora.adapter.inject import disabled, inject
from lora.data import formats, lint
from lora.data.batch import micro_batches
from lora.data.formats import Conversation
from lora.data.retention import SHIPPED, retention_batches
from lora.errors import BadInput
from lora.inference import answers
from lora.inference import generate as sampler
from lora.inference import score as scores
from lora.methods import objective, sft
from lora.text.chat import Example
from lora.train import evaluate as meter
from lora.train.evaluate import Retention, divergence, evaluating, plain_divergence
from tests import cli
from tests.adapters import write_adapter
from tests.helpers import close, far, patched, same, snapshot, some_tokens, tiny_model
from tests.mutation import mutation

IDENTITY = torch.eye(131, dtype=torch.float64)  # a head for what are logits already
LENGTHS = (2, 31, 9, 300, 5)  # of documents; one is longer than a chunk of rows


def examples(lengths=LENGTHS) -> list[Example]:
    return [Example(some_tokens(n, seed=n).tolist(), [True] * n) for n in lengths]


def retention(model, batches) -> Retention:
    return Retention(
        lambda b: model.trunk(b.tokens, b.lengths)[b.trained],
        lambda: model.head_weight,
        batches,
        lambda: disabled(model),
    )


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- the meter -------------------------------------------------------------------------------------------------------


@mutation("lora/train/evaluate.py", "(base.exp() * (base - now)).sum()", "(now.exp() * (now - base)).sum()")
@pytest.mark.parametrize("tied", [False, True])
def test_forgetting_is_the_mean_kl_over_all_next_tokens_of_all_documents(tied):
    model = patched(tiny_model(tie_word_embeddings=tied))
    base, now, targets = [], [], []
    for example in examples():  # one document at a time, with all its logits
        tokens = torch.tensor(example.tokens)
        now.append(model(tokens[:-1]).log_softmax(-1))
        with disabled(model):
            base.append(model(tokens[:-1]).log_softmax(-1))
        targets.append(tokens[1:])
    base, now, targets = map(torch.cat, (base, now, targets))
    kl = F.kl_div(now, base, log_target=True, reduction="batchmean")
    of_torch = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (base, now)))
    expected = torch.stack([kl, F.nll_loss(base, targets), F.nll_loss(now, targets)])
    assert close(of_torch.mean(), kl, 1e-12) and far(expected, expected[[0, 2, 1]], 1e-12) and kl > 0.01
    for micro_tokens in (1, 40, 1000):
        found = retention(model, micro_batches(examples(), micro_tokens))()
        assert close(tensor(*found), expected, 1e-12)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_any_chunk_of_rows_gives_the_plain_divergence(rows):
    draw = torch.Generator().manual_seed(0)
    of_base, hidden = (torch.randn(23, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    head, targets = torch.randn(31, 8, generator=draw, dtype=torch.float64), some_tokens(23, 31)
    plain = tensor(*plain_divergence(of_base, hidden, head, targets))
    assert close(tensor(*divergence(of_base, hidden, head, targets, rows)), plain, 1e-12)
    assert divergence(of_base[:0], hidden[:0], head, targets[:0], rows) == [0, 0, 0]


def test_logits_exist_for_a_chunk_of_rows_at_a_time(monkeypatch):
    seen, model = [], patched(tiny_model())
    monkeypatch.setattr(meter, "plain_divergence", lambda *a: seen.append(len(a[0])) or plain_divergence(*a))
    retention(model, micro_batches(examples(), 10**6))()
    assert sum(seen) == sum(LENGTHS) - len(LENGTHS) and max(seen) == meter.ROWS < sum(seen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_adapter_whose_b_is_zero_forgot_exactly_nothing(dtype):
    model = tiny_model(dtype)
    inject(model)
    found = retention(model, micro_batches(examples(), 64))()
    assert found.kl == 0.0 and found.loss == found.loss_before > 1


def test_the_meter_computes_in_float32_where_the_model_is_narrower():
    model = patched(tiny_model(torch.bfloat16))
    [batch] = micro_batches(examples(), 10**6)
    now = model(batch.tokens, batch.lengths)[batch.trained].float().log_softmax(-1)
    with disabled(model):
        base = model(batch.tokens, batch.lengths)[batch.trained].float().log_softmax(-1)
    expected = F.kl_div(now, base, log_target=True, reduction="batchmean")
    assert close(torch.tensor(retention(model, [batch])().kl), expected, 1e-5)


def test_the_base_is_computed_once_and_every_call_is_one_pass():
    model, passes = patched(tiny_model()), []
    trunk = lambda b: passes.append(b) or model.trunk(b.tokens, b.lengths)[b.trained]  # noqa: E731
    batches = micro_batches(examples(), 40)
    measure = Retention(trunk, lambda: model.head_weight, batches, lambda: disabled(model))
    assert len(passes) == len(batches) and all(len(x) == len(b.targets) for x, b in zip(measure.of_base, batches))  # noqa: B905
    first, second = measure(), measure()
    assert first == second and len(passes) == 3 * len(batches)


@mutation(
    "lora/train/evaluate.py",
    """            module.training = training
""",
    """            module.training = True
""",
)
def test_evaluating_changes_no_mode_no_random_state_no_gradient_and_no_weight():
    model = patched(tiny_model(), dropout=0.5)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    model.model.layers[0].eval()  # a mixture, to be found again
    for p in trained:
        p.grad = torch.full_like(p, 0.25)
    batches = micro_batches(examples(), 40)
    modes, state, before = [m.training for m in model.modules()], torch.get_rng_state(), snapshot(model)
    with evaluating(model):
        measure = retention(model, batches)
        once = (measure(), objective.measure(sft, model, batches, None))
        assert once == (measure(), objective.measure(sft, model, batches, None))  # no dropout
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all((p.grad == 0.25).all() for p in trained) and same(before, snapshot(model))
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [m.training for m in model.modules()] == modes


@mutation(
    "lora/train/evaluate.py",
    "*sums, count = total([*sums, sum(map(len, self.of_base))])",
    "*sums, count = total([*sums, 0])[:3] + [sum(map(len, self.of_base))]",
)
def test_processes_with_unequal_shares_agree_with_one():
    model = patched(tiny_model())
    batches = micro_batches(examples(), 20)

    def loss(share, total):
        return [objective.measure(sft, model, share, None, total)["loss"]]

    def kept(share, total):
        return retention(model, share)(total)

    def of_two(measure, mine, theirs):
        sums = []
        with pytest.raises(ZeroDivisionError):  # the other process, stopped where it would hear of this one
            measure(theirs, lambda found: sums.extend(found) or [0.0] * len(found))
        return measure(mine, lambda found: [a + b for a, b in zip(found, sums, strict=True)])

    for measure in (loss, kept):
        for mine, theirs in ((batches[:1], batches[1:]), (batches, [])):
            assert close(tensor(*of_two(measure, mine, theirs)), tensor(*measure(batches, list)), 1e-12)


# ---- the conversations it ships with ---------------------------------------------------------------------------------


def conversations(rows, name: str) -> list[Conversation]:
    return [Conversation(row["messages"], f"{name}:{number}") for number, row in enumerate(rows, 1)]


def rows_of_the_generators(tmp_path) -> list[Conversation]:
    found = []
    people = (("Nimbus", "the Cloud Lab"), ("Blue Heron", "Ada Okafor"))
    for (name, author), lang, seed in product(people, ("en", "zh"), range(3)):
        found += conversations(self_cognition.conversations(name, author, lang, seed=seed), f"self-{lang}")
    for style, lang in product(multiply.STYLES, multiply.LINES):
        found += conversations(multiply.conversations(3, 60, style, lang), f"multiply-{style}-{lang}")
        found += conversations(multiply.held_out_conversations(2, 60, style, lang), f"held-out-{style}-{lang}")
    seeds = tmp_path / "seeds.jsonl"
    asked = ["Which tea in the morning?", "Name a green tea."]
    seeds.write_text(cli.rows([[("user", question), ("assistant", "Assam, with milk.")] for question in asked]))
    assert persona.main(["--seeds", str(seeds), "--rows", "60", "--out", str(tmp_path / "persona.jsonl")]) == 0
    found += formats.read([tmp_path / "persona.jsonl"])
    for kind in ("identity", "unrelated"):
        questions = (Path(__file__).parents[1] / "fixtures" / f"{kind}_questions.txt").read_text().splitlines()
        turns = [[("user", question), ("assistant", "Yes.")] for question in questions]
        found += conversations(map(json.loads, cli.rows(turns).splitlines()), kind)
    return found


def test_the_shipped_conversations_are_80_and_more_without_mistakes_and_overlap_no_row_of_ours(tmp_path):
    kept, others = formats.read([SHIPPED]), rows_of_the_generators(tmp_path)
    assert len(kept) >= 80 and len(others) > 1500
    assert sum(bool(re.search("[\u4e00-\u9fff]", row.messages[-2]["content"])) for row in kept) >= 12
    assert {len(row.messages) for row in kept} >= {2, 3, 4}
    assert lint.check(kept) == []
    assert [f for f in lint.check(others, kept) if f.code == "OVERLAP"] == []
    again = [Conversation(kept[3].messages, "again:1")]  # the search finds what is there
    assert [f.line for f in lint.check(others + again, kept) if f.code == "OVERLAP"] == [4]


def test_no_shipped_answer_says_who_is_answering():
    told = re.compile(
        r"\b(AI|assistant|language model|OpenAI|ChatGPT|SmolLM|Hugging|my name|I was (made|trained))\b", re.I
    )
    told_zh = re.compile("我是|我叫|人工智能|助手")
    for row in formats.read([SHIPPED]):
        for message in row.messages:
            assert message["role"] != "assistant" or not told.search(message["content"]), row.where
            assert message["role"] != "assistant" or not told_zh.search(message["content"]), row.where


def tiny_chat():
    return pretrained.load_chat(pretrained.find(str(cli.model_folder())))


def test_every_next_token_of_the_shipped_conversations_counts():
    batches, used, left_out = retention_batches(tiny_chat(), None, 4096, 2048)
    assert (used, left_out) == (len(formats.read([SHIPPED])), 0)
    assert all(batch.trained.tolist() == list(range(len(batch.tokens) - batch.padding)) for batch in batches)
    chat, tokens = tiny_chat(), 0
    for row in formats.read([SHIPPED]):
        [laid] = chat.tokenize(row.messages)
        tokens += len(laid.tokens) - 1
    assert sum(len(batch.tokens) - batch.padding for batch in batches) == tokens


@mutation("lora/data/retention.py", "if not known.intersection(lint.asked(row))", "if row not in without")
def test_conversations_that_are_trained_on_are_left_out(tmp_path):
    def row(*texts, system=None):
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return Conversation([{"role": "system", "content": system}, *turns] if system else turns, "train:1")

    file = tmp_path / "kept.jsonl"
    asked = ["Why is 3 more than 2?", "Name a tea.", "Say hello!", "Name a green tea."]
    file.write_text(cli.rows([[("user", question), ("assistant", "So.")] for question in asked]))

    def left(*without):
        _, used, out = retention_batches(tiny_chat(), file, 256, 64, without=without)
        assert used + out == 4
        return out

    assert left() == 0
    assert left(row("name a tea", "Assam.")) == 1  # as lint compares: case and punctuation aside
    assert left(row("Name a tea.", "Assam.", system="Be brief.")) == 1
    assert left(row("why is 2 more than 3", "It is not.")) == 1
    assert left(row("Say hello!", "Hi.", "Name a tea.", "Assam.")) == 1  # its second question has another before it
    assert left(row("Name a tea, please.", "Assam.")) == 0
    with pytest.raises(BadInput, match=r"nothing to remember in .*kept.jsonl: all of its 4 .* Give another file"):
        left(*(row(question, "So.") for question in asked))


# ---- answers ---------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["a", "b", "C", "猫", "。", "d."]), max_size=12)
SOME = st.integers(1, 4)


def test_only_white_space_at_the_ends_is_forgiven():
    assert answers.exact_match(" Paris.\n", "Paris.") and answers.exact_match("", " ")
    for wrong in ("paris.", "Paris", "Paris .", "Paris. ."):
        assert not answers.exact_match(wrong, "Paris.")


def test_words_are_parted_by_spaces_and_chinese_by_characters():
    assert answers.units("Don't  stop, 12.5%\n now") == ["Don't", "stop,", "12.5%", "now"]
    assert answers.units("用 Python写。안녕 하세요　ネコ") == ["用", "Python", "写", "。", "안녕", "하세요", "ネ", "コ"]


@mutation(
    "lora/inference/answers.py",
    "[gram for text in texts for gram in _grams(units(text), n)]",
    '_grams(units(" ".join(texts)), n)',
)
def test_distinct_and_repetition_of_answers_counted_by_hand():
    assert answers.distinct_n(["a b a", "b a"], 1) == 2 / 5
    assert answers.distinct_n(["a b a", "b a"], 2) == 2 / 3  # ab, ba, ba: no bigram joins two answers
    assert answers.distinct_n(["猫猫狗"], 1) == 2 / 3
    assert answers.repetition("a b a b a b", 2) == 3 / 5
    assert answers.repetition([7] * 10) == 6 / 7 and answers.repetition([1, 2, 3]) == 0
    assert answers.mean_length([[1, 2], [3]]) == 1.5 and answers.mean_length([]) == 0


@given(st.lists(WORDS, max_size=5), SOME)
def test_distinct_is_a_share_that_no_order_and_no_spacing_of_answers_changes(texts, n):
    joined = [" ".join(words) for words in texts]
    share = answers.distinct_n(joined, n)
    assert 0 <= share <= 1
    assert answers.distinct_n([f" {text}\n".replace(" ", "  ") for text in reversed(joined)], n) == share
    grams = sum(max(0, len(words) - n + 1) for words in texts)
    if grams:  # once more the same answers: twice the n-grams, none of them new
        assert answers.distinct_n(joined * 2, n) == pytest.approx(share / 2) and share >= 1 / grams
    else:
        assert share == 0


@given(WORDS, SOME)
def test_of_one_answer_repetition_and_distinct_make_one(words, n):
    text = " ".join(words)
    repeated = answers.repetition(text, n)
    assert repeated == answers.repetition([hash(word) for word in words], n)
    assert len(words) < n or repeated + answers.distinct_n([text], n) == pytest.approx(1)
    assert len(words) >= n or repeated == 0


@given(st.lists(st.integers(), unique=True, max_size=20), SOME)
def test_what_has_no_unit_twice_repeats_nothing(ids, n):
    assert answers.repetition(ids, n) == 0


# ---- the command -----------------------------------------------------------------------------------------------------

COLUMNS = ["base", "adapter", "adapter-2"]


def score(*argv, cwd, **how):
    return cli.call("evaluate", *cli.ON_CPU, "--max-new-tokens", 12, *argv, cwd=cwd, **how)


def other_adapter() -> Path:
    """Named as `cli.adapter_folder` is, of another rank, on other targets, with a template of its own."""
    out = cli.scratch() / "other" / "adapter"
    if not out.exists():
        how = ("--rank", 2, "--target", "attention", "--template", "qa", "--lr", 0.5)
        done = cli.train(out, *how, cwd=cli.scratch())
        assert done.code == 0, done.err
    return out


def retention_file(folder: Path) -> Path:
    path = folder / "ordinary.jsonl"
    path.write_text(cli.rows([[("user", "Name a tea."), ("assistant", "Assam.")]] * 2 + cli.CONVERSATIONS[-1:]))
    return path


def both(folder: Path, *argv):
    """Base and two adapters in one run: the result and the figures of its --out."""
    adapters = ("--adapter", cli.adapter_folder(), other_adapter(), "--retention", retention_file(folder))
    done = score(*adapters, "--out", "out.json", *argv, cwd=folder)
    assert done.code == 0, done.err
    return done, json.loads((folder / "out.json").read_text())


@mutation(
    "lora/adapter/merge.py",
    "            unmerge(model)\n",
    "            pass\n",
)
@mutation("evaluate.py", "try_adapter(empty, name, adapter, base,", "try_adapter(empty, name, None, base,")
def test_base_and_adapters_side_by_side_are_each_as_if_alone(tmp_path):
    _, report = both(tmp_path, "--data", cli.data_file())
    figures = report["figures"]
    assert list(figures) == COLUMNS and len({found["loss"] for found in figures.values()}) == 3
    for name, how in zip(
        COLUMNS,
        (
            ("--model", cli.model_folder()),
            ("--adapter", cli.adapter_folder()),
            ("--adapter", other_adapter()),
        ),
        strict=True,
    ):
        alone = score(*how, "--data", cli.data_file(), "--out", "alone.json", "--retention", "ordinary.jsonl",
                      cwd=tmp_path)  # fmt: skip
        assert alone.code == 0, alone.err
        *_, last = json.loads((tmp_path / "alone.json").read_text())["figures"].values()
        assert last == figures[name]
        asked = cli.ask(*how, "--prompts", cli.data_file(), "--out", "asked.jsonl", cwd=tmp_path)
        assert asked.code == 0, asked.err  # answers are those of generate.py, with the adapter's own template
        lines = [json.loads(line) for line in (tmp_path / f"out.predictions/{name}.jsonl").read_text().splitlines()]
        expected = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
        assert [(row["prompt"], row["prediction"]) for row in lines] == [tuple(row.values()) for row in expected]
        assert [row["target"] for row in lines] == [turns[-1][1] for turns in cli.CONVERSATIONS]
        assert all(list(row) == ["prompt", "target", "prediction"] for row in lines)
    kept = {"retention_kl", "retention_loss_before", "retention_loss"}
    assert not kept & figures["base"].keys() and kept < figures["adapter"].keys()
    assert figures["adapter"]["retention_kl"] > 0.01
    assert report["adapters"]["adapter-2"] == str(other_adapter()) and report["rows"] == len(cli.CONVERSATIONS)
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["dtype"] == "float32"
    assert report["settings"]["max_new_tokens"] == 12


@mutation(
    "lora/inference/score.py",
    "        head.merged_weight = merged_weight(head.base.weight, head.delta())",
    "        pass",
)
@mutation("lora/train/evaluate.py", "head if own is not head else None", "None")
def test_an_adapter_on_the_head_counts_in_losses_and_in_what_was_forgotten(tmp_path):
    """Others make such adapters; the base and the merged model say what is right."""
    write_adapter(tmp_path / "head", targets=("lm_head",))
    merged = cli.call(
        "merge", "--adapter", "head", "--out", "merged", "--dtype", "float32", "--no-receipt", cwd=tmp_path
    )
    assert merged.code == 0, merged.err
    how = ("--no-generate", "--out", "out.json")
    ordinary = retention_file(tmp_path)
    found = []
    for model in (("--adapter", "head", "--retention", ordinary), ("--model", "merged")):
        assert score(*model, "--data", cli.data_file(), *how, cwd=tmp_path).code == 0
        found.append(json.loads((tmp_path / "out.json").read_text())["figures"])
    (base, adapter), (merged,) = (list(figures.values()) for figures in found)
    assert abs(adapter["loss"] - merged["loss"]) < 1e-5 < 1e-2 < abs(adapter["loss"] - base["loss"])
    net = pretrained.load_model(str(tmp_path / "merged")), pretrained.load_model(str(cli.model_folder()))
    chat = pretrained.load_chat(pretrained.find(str(cli.model_folder())))
    batches = retention_batches(chat, ordinary, 10**4, 10**4)[0]
    expected, count = 0.0, 0
    for batch in batches:
        now, before = (model(batch.tokens, batch.lengths)[batch.trained].log_softmax(-1) for model in net)
        expected += kl_divergence(Categorical(logits=before), Categorical(logits=now)).sum().item()
        count += len(batch.trained)
    assert abs(adapter["retention_kl"] - expected / count) < 1e-5 < adapter["retention_kl"]


def test_the_table_has_a_line_a_figure_and_a_column_a_model(tmp_path):
    done, report = both(tmp_path, "--data", cli.data_file(), "--rows", 3)
    head, *lines = done.out.splitlines()
    assert head.split() == ["3", "rows", *COLUMNS] and len({len(line) for line in done.out.splitlines()}) == 1
    assert len(lines) == len(report["figures"]["adapter"])
    loss = lines[0].split()
    assert loss[-3:] == [f"{report['figures'][name]['loss']:.4f}" for name in COLUMNS]
    [kl] = [line.split() for line in lines if "KL" in line]
    assert kl[-3] == "-" and kl[-2] == f"{report['figures']['adapter']['retention_kl']:.4f}"


def test_the_loss_is_that_of_the_training_whatever_the_batches(tmp_path):
    found = []
    for micro_tokens in (16, 4096):
        how = ("--adapter", cli.adapter_folder(), "--no-retention", "--no-generate", "--micro-tokens", micro_tokens)
        done = score(*how, "--data", cli.data_file(), "--out", "out.json", cwd=tmp_path)
        assert done.code == 0 and "out.predictions" not in cli.tree(tmp_path), done.err
        found.append(json.loads((tmp_path / "out.json").read_text())["figures"])
        assert all(list(figures) == ["loss"] for figures in found[-1].values())
    for name in ("base", "adapter"):
        assert found[0][name]["loss"] == pytest.approx(found[1][name]["loss"], rel=1e-6)
    argv = ("--eval-data", cli.data_file(), "--eval-every", 2)
    assert cli.train("run", *argv, cwd=tmp_path).code == 0  # the steps of `cli.adapter_folder`
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses == pytest.approx([found[0]["base"]["loss"], found[0]["adapter"]["loss"]], rel=1e-6)


@mutation("evaluate.py", "(len(rows) - len(faults)) / len(rows)", "right / len(rows)")
def test_multiplications_are_graded_by_their_whole_working_and_by_their_result(tmp_path):
    made = multiply.held_out_conversations(2, 4, "terse", "en")
    rows = [scores.Row(None, [], row["messages"][1]["content"], (row["a"], row["b"])) for row in made]
    s = SimpleNamespace(task="multiply", style="terse", lang="en")
    right = [row.target for row in rows]
    assert evaluate.grade(rows, right, s) == ({"working_right": 1, "result_right": 1}, [])
    a, b = rows[1].numbers
    *lines, last = right[1].split("\n")
    wrong = [f" {right[0]}\n", "\n".join(["nonsense", *lines[1:], last]), "\n".join([*lines, "=1"]), ""]
    figures, faults = evaluate.grade(rows, wrong, s)
    assert figures == {"working_right": 1 / 4, "result_right": 2 / 4}
    assert (faults[0]["a"], faults[0]["b"], faults[0]["line_number"], faults[0]["kind"]) == (a, b, 1, "format")
    _, report = both(tmp_path, "--task", "multiply", "--rows", 3, "--digits", 1)
    assert "exact_match" not in report["figures"]["base"] and report["figures"]["base"]["result_right"] == 0
    assert [len(report["faults"][name]) for name in COLUMNS] == [3, 3, 3]
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "out.predictions/base.jsonl").read_text().splitlines()]
    assert asked == [r["messages"][0]["content"] for r in multiply.held_out_conversations(1, 3, "terse", "en")]


def test_an_answer_ended_by_itself_if_a_stop_came_before_its_limit():
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=10))
    column = scores.Column("base", None, None, None, [[1], [1], [1] * 8, [1] * 8], [])
    found = scores.describe(model, column, [[5, 6], [5, 6, 7], [5], [5, 6]], ["", "", "", ""], 3)
    assert found["ended"] == 2 / 4 and found["length"] == 2


def test_half_again_the_longest_target_is_room_for_an_answer_and_48_tokens_at_least(tmp_path):
    def room(text):
        (tmp_path / "d.jsonl").write_text(cli.rows([[("user", "Hi"), ("assistant", t)] for t in ("Yes.", text)]))
        how = ("--model", cli.model_folder(), "--data", "d.jsonl", "--no-retention", *cli.ON_CPU)
        done = cli.call("evaluate", *how, cwd=tmp_path)
        assert done.code == 0, done.err
        return int(re.search(r"answers of up to (\d+) tokens", done.err)[1])

    assert room("No.") == 48
    text = "zqxj" * 10
    assert room(text) == 3 * len(tiny_chat().tokenizer.encode_plain(text)) // 2 > 48


def test_stopping_it_leaves_no_file(tmp_path):
    def before():
        real = sampler.generate

        def second(model, *rest):
            if hasattr(second, "asked"):
                os.kill(os.getpid(), signal.SIGINT)
            second.asked = True
            return real(model, *rest)

        sampler.generate = second

    how = ("--adapter", cli.adapter_folder(), "--data", cli.data_file(), "--no-retention", "--out", "out.json")
    code, out, err = score(*how, cwd=tmp_path, before=before)
    assert (code, out) == (130, "") and "Traceback" not in err and cli.tree(tmp_path) == {}


BAD = {
    "neither data nor task": ((), ["nothing to score in the command line: there must be --data or --task"]),
    "both": (("--data", "d.jsonl", "--task", "multiply"), ["contradiction in the command line: there must be --data"]),
    "contradictions": (
        ("--data", "d.jsonl", "--no-generate", "--predictions", "p", "--no-retention", "--retention", "d.jsonl"),
        ["command line: --no-generate and --predictions", "command line: --no-retention and --retention"],
    ),
    "missing files": (
        ("--data", "none.jsonl", "--retention", "gone.jsonl", "--adapter", "nothing"),
        ["missing adapter in nothing", "missing file in none.jsonl", "missing file in gone.jsonl"],
    ),
    "an adapter twice": (
        ("--data", "d.jsonl", "--adapter", "a", "./a", "a"),
        ["wrong --adapter in ./a: its folder is given twice", "wrong --adapter in a: its folder is given twice"],
    ),
    "nowhere to write": (
        ("--data", "d.jsonl", "--out", "no/out.json", "--predictions", "d.jsonl"),
        ["wrong --predictions in d.jsonl: it is not a folder", "wrong --out in no/out.json: there is no folder"],
    ),
    "no such folder": (
        ("--data", "d.jsonl", "--out", "no/out.json"),
        ["wrong --out in no/out.json: there is no folder"],
    ),
    "an input": (("--data", "d.jsonl", "--out", "d.jsonl"), ["wrong --out in d.jsonl: it is a file that is read"]),
    "a document": (("--data", "text.jsonl"), ["wrong row in text.jsonl:1: a document has no answer"]),
    "no answer": (("--data", "open.jsonl"), ["wrong row in open.jsonl:1: nothing to train"]),
    "too few pairs": (
        ("--task", "multiply", "--digits", "1", "--rows", "99"),
        ["wrong --rows in the command line"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_found_before_a_model_is_looked_for(tmp_path, name):
    argv, starts = BAD[name]
    (tmp_path / "d.jsonl").write_text(cli.rows(cli.CONVERSATIONS[:1]))
    (tmp_path / "text.jsonl").write_text('{"text": "A tale."}\n')
    (tmp_path / "open.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    (tmp_path / "a").symlink_to(cli.adapter_folder())
    before = cli.tree(tmp_path)
    done = score("--model", "nowhere", *argv, cwd=tmp_path)
    assert (done.code, done.out) == (2, "") and len(done.errors) == len(starts), done.err
    for line, start in zip(done.errors, starts, strict=True):
        assert start in line and line.count(". ") >= 1
    assert cli.tree(tmp_path) == before


def test_an_adapter_of_another_base_and_a_row_without_room_are_found_before_the_weights_are_read(tmp_path):
    other = cli.write_model(tmp_path / "m", seed=1)
    long = cli.rows([[("user", "why? " * 200), ("assistant", "So.")]])
    (tmp_path / "long.jsonl").write_text(long)

    def before():
        evaluate.pretrained.load_model = None

    how = ("--model", other, "--adapter", cli.adapter_folder(), other_adapter(), "--data", "long.jsonl")
    done = score(*how, cwd=tmp_path, before=before)
    assert done.code == 2 and [line.split(" in ")[0] for line in done.errors] == [
        "error: too long",
        "error: wrong base",
        "error: wrong base",
    ], done.err


@pytest.mark.parametrize("name", ["model/config.json", "a/adapter_config.json", "notes.txt", "."])
def test_a_report_replaces_nothing_but_a_report(tmp_path, name):
    shutil.copytree(cli.model_folder(), tmp_path / "model")
    shutil.copytree(cli.adapter_folder(), tmp_path / "a")
    (tmp_path / "notes.txt").write_text("mine")
    before = cli.tree(tmp_path)
    how = ("--adapter", "a", "--model", "model", "--data", cli.data_file(), "--no-generate", "--no-retention")
    done = score(*how, "--out", name, cwd=tmp_path)
    assert done.code == 2 and "wrong --out" in done.err and cli.tree(tmp_path) == before
    for _ in range(2):
        assert score(*how, "--out", "r.json", cwd=tmp_path).code == 0


@mutation(
    "evaluate.py",
    'if not found and flag == "--predictions" and path.is_file() and not holds_answers(path):',
    "if False:",
)
def test_predictions_replace_nothing_but_predictions(tmp_path):
    shutil.copytree(cli.adapter_folder(), tmp_path / "a")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "a.jsonl").write_text('{"question": "Hi", "answer": "Hello."}\n')
    before = cli.tree(tmp_path)
    how = ("--adapter", "a", "--model", cli.model_folder(), "--data", cli.data_file(), "--no-retention")
    done = score(*how, "--predictions", "w", cwd=tmp_path)
    assert done.code == 2 and "wrong --predictions in w/a.jsonl" in done.err and cli.tree(tmp_path) == before
    (tmp_path / "w" / "a.jsonl").unlink()
    for _ in range(2):
        assert score(*how, "--predictions", "w", cwd=tmp_path).code == 0
