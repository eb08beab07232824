"""Rows become examples: none is lost or doubled, what is too long is counted, and what will be trained can be seen."""

import gzip
import json
import random
import re
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora import errors
from lora.data import preview
from lora.data.encode import KEPT, ROWS, encode, joined
from lora.data.formats import Conversation, Problem, scan
from lora.data.sources import read_sources
from lora.errors import BadInput, Refused
from lora.pretrained import ModelFolder, load_chat
from lora.run.settings import TrainSettings
from lora.text import sandbox
from lora.text.chat import Chat
from lora.text.template import ChatTemplate
from tests import cli
from tests.mutation import mutation
from tests.scripts.test_commands import ok
from tests.text.test_template import BEGIN, QWEN3, TALK, TEMPLATES, byte_level, chat_of, runs, turns

CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def rows_of(conversations) -> list[Conversation]:
    return [Conversation(messages, f"a.jsonl:{i}") for i, messages in enumerate(conversations, 1)]


def numbered_rows(count: int) -> list[Conversation]:
    return rows_of(turns(f"Question {i}", "Yes. " * (1 + i % 7)) for i in range(count))


# ---- encoding --------------------------------------------------------------------------------------------------------


@mutation(
    "lora/data/encode.py",
    "while (part := list(islice(rows, ROWS))) and len(problems) <= 10 * MOST_LINES:",
    "for part in [list(islice(rows, ROWS))]:",
)
@pytest.mark.parametrize("count", [1, 2, ROWS, ROWS + 1, 2 * ROWS + 3])
def test_examples_are_those_of_the_rows_in_order_however_many(count):
    rows = numbered_rows(count)
    found = encode(iter(rows), chat_of("chatml"), 1000)
    assert len(found) == found.rows == count and found.where == [row.where for row in rows]
    assert found.shapes == {"messages": count} and found.dropped == found.truncated == 0
    for i in {0, count // 2, count - 1, min(ROWS, count - 1)}:
        [tokenized] = chat_of("chatml").tokenize(rows[i].messages)
        assert found[i] == tokenized.example()
    assert found.lengths.tolist() == [len(example.tokens) for example in found]
    with pytest.raises(IndexError):
        found[count]


def test_rows_that_are_split_give_their_examples_in_place():
    found = encode(rows_of([turns("a", "b"), TALK, turns("c", "d")]), chat_of("qwen3"), 1000)
    assert found.rows == 3 and found.where == ["a.jsonl:1", *["a.jsonl:2"] * 3, "a.jsonl:3"]


def test_sources_are_joined_one_behind_the_other():
    parts = [encode(numbered_rows(count), chat_of("chatml"), 1000) for count in (3, 1, 2)]
    whole = joined(parts)
    assert [*whole] == [example for part in parts for example in part] and whole.rows == 6
    assert whole.where == [where for part in parts for where in part.where]


def test_every_bad_row_is_named_and_so_is_a_row_that_the_template_refuses():
    bad = [Problem("a.jsonl:9", "BROKEN", "why. Repair it"), *rows_of([turns("a", "b", system="Be brief.")])]
    with pytest.raises(BadInput) as raised:
        encode([*numbered_rows(3), *bad], chat_of("strict"), 1000)
    broken, refused = raised.value.problems
    assert broken == "broken JSON in a.jsonl:9: why. Repair it"
    assert "in a.jsonl:1: chat template in strict" in refused and "System role not supported" in refused


def test_conversations_that_are_kept_to_show_come_from_all_over_the_file():
    for count in (3, KEPT - 1, KEPT, 1000, 5000):
        kept = [int(row.where.split(":")[1]) for row in encode(numbered_rows(count), chat_of("chatml"), 1000).kept]
        assert len(kept) < KEPT and kept == sorted(set(kept))
        assert kept[0] == 1 and kept[-1] >= 0.95 * count
        assert max(b - a for a, b in pairwise(kept)) <= max(1, 4 * count / KEPT)


def test_memory_does_not_grow_with_rows_beyond_five_bytes_a_token():
    """The rows come from a generator; what stays is 4 bytes a token, 1 for its flag, and the name of its row."""
    many = (Conversation(turns(f"Question {i}", "Yes. " * 40), f"a.jsonl:{i}") for i in range(2000))
    chat = chat_of("chatml")
    chat.tokenize(turns("a", "b"))
    tracemalloc.start()
    found = encode(many, chat, 1000)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = 5 * len(found.tokens)
    assert size > 700_000
    assert after < size + 2000 * 120 + 200_000
    assert peak < 2.5 * size + 2000 * 500 + 1_000_000


# ---- too long --------------------------------------------------------------------------------------------------------

LONG = turns("Count to ten, please, and do not stop before.", "one two three four five six seven eight nine ten")


@mutation("lora/data/encode.py", "self.dropped += not pieces and None in short", "pass")
def test_what_is_too_long_is_dropped_and_counted_or_truncated_or_an_error():
    chat, rows = chat_of("chatml"), [*rows_of([turns("a", "b"), LONG, LONG])]
    length = len(chat.tokenize(LONG)[0].tokens)
    for limit, fits in ((length, 3), (length - 1, 1)):
        found = encode(rows, chat, limit)
        assert len(found) == fits and found.dropped == 3 - fits and found.truncated == 0
        assert found.overlong == (None if fits == 3 else ("a.jsonl:2", length))
    found = encode(rows, chat, length - 10, overlong="truncate")
    assert len(found) == 3 and (found.dropped, found.truncated) == (0, 2) and found.rows == 3
    ((begin, end),) = runs(found[1].trained)
    assert len(found[1].tokens) == end == length - 10 and found[1].tokens[-1] == chat.end_of_turn
    assert LONG[1]["content"].startswith(byte_level().decode(found[1].tokens[begin:end]))
    begin = chat.tokenize(LONG)[0].answers[0][0]
    found = encode(rows, chat, begin + 1, overlong="truncate")  # room for the end of turn alone
    assert (len(found), found.dropped, found.truncated) == (1, 2, 0)
    found = encode(rows, chat, begin + 2, overlong="truncate")
    assert (len(found), found.dropped, found.truncated) == (3, 0, 2) and sum(found[1].trained) == 2
    with pytest.raises(BadInput, match=f"too long in a.jsonl:2: {length} tokens, --max-len is 20. Raise --max-len"):
        encode(rows, chat, 20, overlong="error")


@pytest.mark.parametrize(("limit", "most", "fix"), [
    (20, None, "--max-len is 20. Raise --max-len, or give --overlong drop, truncate or split"),
    (20, 30, "--max-len is 20. Raise --max-len, or give --overlong drop, truncate or split"),
    (20, 20, "the model takes at most 20. Give --overlong drop, truncate or split"),
], ids=["unknown", "more", "no more"])  # fmt: skip
@mutation("lora/data/encode.py", "return most is None or limit < most", "return True", case="no more")
def test_raising_max_len_is_advised_only_where_the_model_takes_more(limit, most, fix):
    with pytest.raises(BadInput) as raised:
        encode(rows_of([LONG]), chat_of("chatml"), limit, overlong="error", most=most)
    assert raised.value.problems[0].endswith(fix)


@mutation("lora/data/encode.py", "if n >= 2 * count else []", "")
@mutation("lora/data/encode.py", "tokens[i * n // count : (i + 1) * n // count]", "tokens[i * limit : (i + 1) * limit]")
@hypothesis_settings(max_examples=60, **CALM)
@given(st.integers(2, 40), st.integers(1, 120))
def test_a_document_split_into_several_keeps_every_token_once_and_ends_once(limit, words):
    chat = chat_of("chatml")
    row = Conversation([{"role": "text", "content": " ".join(f"w{i}" for i in range(words))}], "a.jsonl:1", "text")
    [whole] = chat.tokenize(row.messages)
    found = encode([row], chat, limit, overlong="split")
    n = len(whole.tokens)
    if limit == 2 and n > 2 and n % 2:  # pieces of two tokens would leave one over
        assert (len(found), found.dropped) == (0, 1)
        return
    assert [token for part in found for token in part.tokens] == whole.tokens
    assert all(2 <= len(part.tokens) <= limit and all(part.trained) for part in found)
    assert len(found) == -(-n // limit) and found.where == ["a.jsonl:1"] * len(found)
    assert [chat.end_of_document in part.tokens for part in found] == [False] * (len(found) - 1) + [True]
    assert (found.rows, found.split, found.dropped) == (1, n > limit, 0)
    assert found.overlong == (("a.jsonl:1", n) if n > limit else None)


def test_a_conversation_that_is_too_long_is_dropped_and_counted_where_documents_are_split():
    document = Conversation([{"role": "text", "content": "x " * 100}], "a.jsonl:2", "text")
    found = encode([*rows_of([LONG]), document], chat_of("chatml"), 30, overlong="split")
    assert (found.dropped, found.split, found.truncated) == (1, 1, 0) and set(found.where) == {"a.jsonl:2"}


@hypothesis_settings(max_examples=60, **CALM)
@given(
    st.integers(2, 80), st.sampled_from(["drop", "truncate", "split"]), st.sampled_from(["assistant", "last", "all"])
)
def test_every_example_fits_and_every_row_is_an_example_or_dropped(limit, overlong, train_on):
    rows = rows_of([TALK, LONG, turns("a", "b"), turns("x " * 40, "y")])
    found = encode(rows, chat_of("chatml"), limit, train_on, overlong)
    assert len(found) + found.dropped == found.rows == 4
    assert all(len(e.tokens) <= limit and any(e.trained) for e in found)
    assert found.dropped + found.truncated == sum(
        len(chat_of("chatml").tokenize(r.messages)[0].tokens) > limit for r in rows
    )


# ---- to be seen ------------------------------------------------------------------------------------------------------


@mutation("lora/data/preview.py", "if not found or trained != found[-1][0] or", "if not found or")
@hypothesis_settings(max_examples=80, **CALM)
@given(st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=6))
def test_a_preview_shows_every_token_once_and_marks_exactly_the_trained_ones(texts):
    [tokenized] = chat_of("chatml").tokenize(turns(*texts[: len(texts) // 2 * 2]))
    example = tokenized.example()
    shown = preview.lines(example, byte_level(), False)
    assert all(line[:2] in ("+ ", "  ") and line.isprintable() for line in shown)
    flags = [line[0] == "+" for line in shown for _ in line[2:].split("│")]
    if "│" not in "".join(texts):
        assert flags == example.trained
    coloured = preview.lines(example, byte_level(), True)
    assert [re.sub("\x1b\\[\\d+m", "", line) for line in coloured] == shown
    assert [("\x1b" in line) for line in coloured] == [line[0] == "+" for line in shown]


def test_a_preview_by_hand():
    [tokenized] = chat_of("chatml").tokenize(turns("Hi 日", "one\ntwo <|im_end|>"))
    found = preview.lines(tokenized.example(), byte_level(), False)
    text = ["".join(line[2:].split("│")).replace("…", "") for line in found]
    header, end = "<|im_start|>assistant⏎", "two <|im_end|><|im_end|>"
    assert text == ["<|im_start|>user⏎", "Hi 日<|im_end|>⏎", header, "one⏎", end, "⏎"]
    assert [line[0] for line in found] == [" ", " ", " ", "+", "+", " "]
    assert found[4].endswith("│<|im_end|>") and "<│|│" in found[4]  # the spelled one is several tokens


@mutation(
    "lora/data/preview.py",
    'sides = named(examples[i]) if examples.group > 1 else {"": examples[i]}\n        for name',
    'sides = {"": examples[i]}\n        for name',
)
@mutation("lora/data/preview.py", 'if linked.known["good"][0]', 'if not linked.known["good"][0]')
def test_a_preview_shows_both_sides_of_a_pair_and_what_an_answer_was_judged_by_name(capsys):
    question, better, worse = turns("Q", "one")[0], turns("Q", "one")[1], turns("Q", "two")[1]
    shared = {"where": "a.jsonl:1", "messages": [question, better], "shape": "x"}
    pairs = [Conversation(**shared, rejected=[question, worse], margin=margin) for margin in (0.0, 0.5)]
    judged = [Conversation(**shared, good=good) for good in (True, False)]
    shown = {}
    for kind, rows in (("pair", pairs), ("judged", judged)):
        preview.show(encode(rows, chat_of("chatml"), 1000, kind=kind), 2, byte_level())
        shown[kind] = capsys.readouterr().out.rstrip("\n").split("\n\n")
    heads = [[block.partition(", a.jsonl:1: ")[0] for block in shown[kind]] for kind in shown]
    assert heads[0] == ["example 1 of 2, chosen", "example 1 of 2, rejected",
                        "example 2 of 2, chosen by a margin of 0.5", "example 2 of 2, rejected"]  # fmt: skip
    assert heads[1] == ["example 1 of 2, good", "example 1 of 2, with another row's answer",
                        "example 2 of 2, bad", "example 2 of 2, with another row's answer"]  # fmt: skip
    answers = [re.search(r"\n\+ (\S+)", block)[1].replace("│", "") for block in shown["pair"]]
    assert answers == ["one<|im_end|>", "two<|im_end|>"] * 2


@mutation(
    "lora/data/preview.py", "lengths, trained = examples.document_lengths,", "lengths, trained = examples.lengths,"
)
@mutation("lora/data/preview.py", "if examples.equal else {}", "if False else {}")
def test_the_numbers_of_pairs_are_those_of_each_side_and_count_equal_ones():
    sides = turns("Q", "one"), turns("Q", "one and more")
    rows = [Conversation(side, "a.jsonl:1", "x", sides[0]) for side in (sides[1], sides[1], sides[0])]
    chat = chat_of("chatml")
    found = preview.numbers(encode(rows, chat, 1000, kind="pair"), 1, 1.0)
    short, long = (len(chat.tokenize(side)[0].tokens) for side in sides)
    assert (found["length p50"], found["length max"], found["tokens"]) == (
        str(short),
        str(long),
        str(2 * (short + long)),
    )
    assert (found["rows"], found["equal sides"]) == ("3", "1")


@mutation("lora/data/sources.py", 'if not any(f"{shape}/".startswith(f"{pair}/")', "if not any(shape == pair")
@mutation("lora/data/sources.py", "(args.prompt_key and kind not in BOTH_KEYS)", "False")
@mutation("lora/data/sources.py", "if args.prompt_key and enough else None", "if args.response_key else None")
def test_the_key_of_a_pairs_question_can_be_named_and_that_of_its_good_answer(tmp_path):
    def read(row: dict, *keys: str, method="dpo", kind="pair") -> int:
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        argv = ["--method", method, "--data", str(tmp_path / "a.jsonl"), "--max-len", "100", *keys]
        return len(read_sources(TrainSettings.resolve(argv, ""), chat_of("chatml"), Path, kind=kind).examples)

    named, good = ("--prompt-key", "frage"), ("--response-key", "gut")
    assert read({"frage": "Q", "chosen": "A", "rejected": "B"}, *named) == 1
    assert read({"frage": "Q", "chosen": "A", "rejected": "B"}, *named, "--response-key", "chosen") == 1
    assert read({"frage": "Q", "gut": "A", "rejected": "B"}, *named, *good) == 1
    for keys in (named, (*named, *good)):
        with pytest.raises(BadInput, match="no row has frage"):
            read({"prompt": "Q", "chosen": "A", "rejected": "B"}, *keys)
    for keys, method, kind in ((good, "dpo", "pair"), (named, "sft", "conversation"), (named, "kto", "judged")):
        with pytest.raises(BadInput, match="need each other"):
            read({"frage": "Q", "gut": "A", "rejected": "B"}, *keys, method=method, kind=kind)


NAMES = ["rows", "tokens", "trained tokens", "length p50", "length p95", "length max", "trained share", "dropped",
         "truncated", "tokens per step", "memory"]  # fmt: skip


def numbers(out: str) -> dict[str, str]:
    """The lines after the last example."""
    return dict(line.split(": ") for line in out.rstrip("\n").split("\n\n")[-1].splitlines())


def test_preview_ends_with_the_numbers_and_neither_loads_the_weights_nor_writes(tmp_path):
    base = cli.write_model(tmp_path / "model")
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1000] + b"\xff" * 1000)
    done = cli.call("train", "--model", base, "--data", cli.data_file(), "--preview", 2, *cli.ON_CPU, cwd=tmp_path)
    out = ok(done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    found = numbers(out)
    assert list(found) == NAMES
    assert [found[name] for name in NAMES[:3]] == ["10", "374", "165"] and found["trained share"] == "0.4412"
    assert [found[name] for name in NAMES[3:6]] == ["36", "56", "56"] and found["tokens per step"] == "187"
    assert re.fullmatch(r"\d+\.\d GB", found["memory"]) and found["dropped"] == found["truncated"] == "0"
    assert out.count("example ") == 2 and f"example 2 of 10, {cli.data_file()}:2: " in out and "\x1b" not in out
    none = ok(cli.call("train", "--model", base, "--data", cli.data_file(), "--preview", 0, *cli.ON_CPU, cwd=tmp_path))
    assert none.splitlines() == [f"{name}: {value}" for name, value in found.items()]


def test_preview_counts_what_is_too_long(tmp_path):
    (tmp_path / "a.jsonl").write_text(cli.rows([[("user", "a"), ("assistant", "b " * 300)], *cli.CONVERSATIONS]))
    for how, expected in (("drop", ("11", "1", "0")), ("truncate", ("11", "0", "1"))):
        argv = ("--data", "a.jsonl", "--preview", 0, "--overlong", how, *cli.ON_CPU)
        found = numbers(ok(cli.call("train", "--model", cli.model_folder(), *argv, cwd=tmp_path)))
        assert (found["rows"], found["dropped"], found["truncated"]) == expected


# ---- the way from flags to an adapter and back to a prompt -----------------------------------------------------------


def test_files_are_mixed_and_replayed_as_asked_and_the_plan_says_so(tmp_path):
    for name, count in (("a", 4), ("b", 6), ("c", 3)):
        (tmp_path / f"{name}.jsonl").write_text(
            cli.rows([[("user", name), ("assistant", str(i))] for i in range(count)])
        )
    argv = ("--data", "a.jsonl:3", "b.jsonl", "--replay", "c.jsonl:0.5", "--batch-size", 4, "--max-steps", 5)
    done = cli.train("out", *argv, cwd=tmp_path)
    ok(done)
    assert "data     a.jsonl: 4 rows of messages, weight 3\ndata     b.jsonl: 6 rows of messages\n" in done.err
    assert "replay   c.jsonl: 3 rows of messages, share 0.5: 2 on top of the 4 of a step\n" in done.err
    assert "examples 13, " in done.err
    saved = json.loads((tmp_path / "out/settings.json").read_text())
    assert saved["data"] == ["a.jsonl:3", "b.jsonl"] and saved["replay"] == ["c.jsonl:0.5"]
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["trained_tokens"] for row in rows] == [6 * 2] * 5  # a digit and its end, of 4 + 2 examples
    ok(cli.call("train", "--config", "out/settings.json", "--out", "again", *cli.ON_CPU, cwd=tmp_path))
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_loss_on_data_held_out_is_told_before_and_after_and_changes_nothing(tmp_path):
    (tmp_path / "held.jsonl").write_text(cli.rows(cli.CONVERSATIONS[:4]))
    done = cli.train("out", "--eval-data", "held.jsonl", cwd=tmp_path)
    ok(done)
    losses = dict(re.findall(r"eval     step (\d+): loss ([\d.]+), [\d.]+ nats forgotten", done.err))
    assert list(losses) == ["0", "1", "2"] and 0 < float(losses["2"]) < float(losses["0"])
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (cli.adapter_folder() / weights).read_bytes()


@mutation("lora/inference/session.py", 'system = trained.get("system")', "system = None", case="qa")
@mutation("merge.py", "bar, base), dtype, spoken)", "bar, base), dtype)", case="qa")
@mutation("lora/text/sandbox.py", "today.strftime", "FROZEN_DATE.strftime", case="file")
@mutation(
    "lora/inference/session.py",
    "template or (passport.template_of(adapter) if adapter else None)",
    "template",
    case="qa",
)
@pytest.mark.parametrize("name", ["alpaca", "qa", "plain", "chatml", "file"])
def test_generation_uses_the_template_system_and_date_of_training(tmp_path, name):
    source = "{{ strftime_now('%Y') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (tmp_path / "file.jinja").write_text(source + "{% if add_generation_prompt %}[assistant]{% endif %}")
    given = "file.jinja" if name == "file" else name
    argv = ("--template", given, "--system", "Be kind.", "--date", "2031-02-03", "--max-steps", 1)
    ok(cli.train("out", *argv, cwd=tmp_path))
    shown = ok(cli.call("train", "--model", cli.model_folder(), "--data", cli.data_file(), "--preview", 1, *argv[:-2],
                        *cli.ON_CPU, cwd=tmp_path))  # fmt: skip
    shown = shown.replace("│", "")
    assert "Be kind." in shown and ("2031" in shown or name != "file")
    (tmp_path / "file.jinja").unlink()
    asked = ("--max-new-tokens", 8, "--prompt", "What is 1 and 1?")
    as_trained = cli.ask("--adapter", "out", *asked, cwd=tmp_path)
    assert "system   as in training: Be kind.\n" in as_trained.err
    told = (*asked, "--system", "Be kind.", "--date", "2031-02-03", "--template", "out/chat_template.jinja")
    assert ok(as_trained) == ok(cli.ask("--adapter", "out", *told, cwd=tmp_path))
    done = cli.call("merge", "--adapter", "out", "--out", "merged", cwd=tmp_path)
    ok(done)
    assert "system turn, which a merged model does not remember: Be kind.\n" in done.err
    assert (tmp_path / "merged/chat_template.jinja").read_bytes() == (tmp_path / "out/chat_template.jinja").read_bytes()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.gz"])
def test_prompts_may_be_rows_in_lines_or_a_list_or_packed(tmp_path, name):
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("What is 1 and 1?", "Hello.")]
    data = (json.dumps(rows) if name == "rows.json" else "\n".join(map(json.dumps, rows))).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name == "rows.gz" else data)
    found = ok(cli.ask("--model", cli.model_folder(), "--prompts", name, cwd=tmp_path)).splitlines()
    assert [json.loads(line)["prompt"] for line in found] == ["What is 1 and 1?", "Hello."]


@mutation("lora/errors.py", '"\\n".join(map(one_line, text.split("\\n")))', "text")
def test_what_an_adapter_says_cannot_move_the_cursor(tmp_path):
    ok(cli.train("out", "--max-steps", 1, "--system", "x", cwd=tmp_path))
    path = tmp_path / "out/passport.json"
    papers = json.loads(path.read_text())
    papers["chat"]["system"] = "\x1b]0;gone\x07"
    path.write_text(json.dumps(papers))
    done = cli.ask("--adapter", "out", "--prompt", "Hi", cwd=tmp_path)
    assert "\x1b" not in done.err and "\\x1b]0;gone" in done.err
    for wrong in ("2025-13-45", "today", 7):
        path.write_text(json.dumps(papers | {"chat": {"date": wrong}}))
        done = cli.ask("--adapter", "out", "--prompt", "Hi", cwd=tmp_path)
        assert done.code == 2 and "broken passport in out/passport.json:chat" in done.err


def test_a_broken_template_of_an_adapter_is_not_merged(tmp_path):
    ok(cli.train("out", "--max-steps", 1, "--no-system", cwd=tmp_path))
    (tmp_path / "out/chat_template.jinja").write_text("{% for")
    done = cli.call("merge", "--adapter", "out", "--out", "merged", cwd=tmp_path)
    assert done.code == 2 and "broken chat template in out/chat_template.jinja" in done.err
    assert not (tmp_path / "merged").exists()
    (tmp_path / "out/chat_template.jinja").write_text(cli.CHATML)
    done = cli.call("merge", "--adapter", "out", "--out", "merged", cwd=tmp_path)
    assert done.code == 0 and "trained without a system turn" in done.err


def test_a_base_model_without_a_template_trains_with_a_named_one_and_is_refused_without(tmp_path):
    base = cli.write_model(tmp_path / "model")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    argv = ("--model", "model", "--data", cli.data_file(), "--max-steps", 1, "--out", "out", *cli.ON_CPU)
    refused = cli.call("train", *argv, cwd=tmp_path)
    assert refused.code == 2 and "or --template chatml, alpaca, qa, plain or a file" in refused.err
    ok(cli.call("train", *argv, "--template", "qa", cwd=tmp_path))
    assert ok(cli.ask("--adapter", "out", "--prompt", "Hi", cwd=tmp_path)) is not None
    del settings["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    ok(cli.call("train", *argv[:-6], "--out", "again", *cli.ON_CPU, "--template", "qa", cwd=tmp_path))
    assert ok(cli.ask("--adapter", "again", "--prompt", "Hi", cwd=tmp_path)) is not None


@mutation(
    "lora/pretrained/chat.py",
    """    if bos is None:
        return header
""",
    """    return header
""",
)
def test_a_built_in_template_begins_as_the_tokenizer_begins_texts(tmp_path):
    base = cli.write_model(tmp_path / "model")
    raw = json.loads((base / "tokenizer.json").read_text())
    raw["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    (base / "tokenizer.json").write_text(json.dumps(raw))
    for name, system in (("qa", None), ("alpaca", None), ("alpaca", False)):
        chat = load_chat(ModelFolder(base), system, name)
        ids = chat.prompt(turns("Hi"))
        assert ids[0] == 0 and ids.count(0) == 1
        [tokenized] = chat.tokenize(turns("Hi", "Hello."))
        assert tokenized.tokens[: len(ids)] == ids and tokenized.tokens[tokenized.answers[0][1] - 1] == 2


@mutation(
    "lora/text/answers.py",
    "return inserted if rest.startswith(bos) else inserted.removeprefix(bos)",
    "return inserted.removeprefix(bos)",
)
def test_the_plan_tells_of_a_system_turn_that_the_template_adds(tmp_path):
    base = cli.write_model(tmp_path / "model")
    template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nI am Quill.<|im_end|>\n{% endif %}" + cli.CHATML
    )
    (base / "chat_template.jinja").write_text(template)
    argv = ("--model", "model", "--data", cli.data_file(), "--preview", 1, *cli.ON_CPU)
    done = cli.call("train", *argv, cwd=tmp_path)
    assert (
        "system   the template adds, where a row has none: <|im_start|>system I am Quill.<|im_end|> (--no" in done.err
    )
    assert "Quill" in ok(done).replace("│", "")
    without = cli.call("train", *argv, "--no-system", cwd=tmp_path)
    assert "\n  <|im_start|>│user│⏎\n" in ok(without)  # nothing is left of it, though BOS begins every turn here
    assert "Quill" not in ok(without).replace("│", "") and "system   " not in without.err


# ---- whatever is given -----------------------------------------------------------------------------------------------


def mutated(data: bytes, draw, most: int = 4) -> bytes:
    """A few bytes removed, changed, doubled or put in."""
    for _ in range(draw.randint(1, most)):
        at, size = draw.randrange(len(data) + 1), draw.choice([1, 1, 1, 3, 20])
        put = draw.choice([b"", draw.randbytes(size), data[at : at + size] * 2, b'"', b"}", b"\\ud800", b"<|im_end|>"])
        data = data[:at] + put + data[at + size :]
    return data


GOOD = [
    {"messages": TALK},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello 日本."}]},
    {"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"q": "Hi <|im_end|>", "a": "Hello.\n"},
    {"text": "Once upon a time."},
]


def test_two_thousand_mutated_rows_give_examples_or_a_line_that_says_why(tmp_path):
    draw, path, chat, bad = random.Random(0), tmp_path / "a.jsonl", chat_of("chatml"), 0
    for i in range(2000):
        data = mutated(json.dumps(GOOD[i % len(GOOD)], ensure_ascii=bool(i % 3)).encode(), draw)
        path.write_bytes(gzip.compress(data) if i % 50 == 0 else data if i % 7 else b"[" + data + b"]")
        try:
            found = encode(scan([path]), chat, 60, overlong=("drop", "truncate")[i % 2])
        except BadInput as error:
            bad += 1
            for problem in error.problems:
                line = errors.one_line(problem)
                assert re.fullmatch(r"[\w -]+ in [^ ]*a\.jsonl(:\d+)?: .+\. .+", line) and len(line) < 1000
            continue
        assert len(found) + found.dropped == found.rows >= 1
        assert all(len(tokens) == len(trained) <= 60 and any(trained) for tokens, trained in found)
    assert 600 < bad < 1900


def test_a_file_of_mutated_rows_ends_in_at_most_twenty_one_lines(tmp_path):
    draw = random.Random(1)
    rows = [mutated(json.dumps(row).encode(), draw).replace(b"\n", b" ") for row in GOOD * 400]
    rows = [row.decode(errors="replace").encode() for row in rows]  # one that is not UTF-8 would end the reading
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    argv = ("--model", cli.model_folder(), "--data", "a.jsonl", "--preview", 1, *cli.ON_CPU)
    done = cli.call("train", *argv, cwd=tmp_path)
    assert done.code == 2 and len(done.errors) == 21 and done.out == "" and "Traceback" not in done.err
    assert all(line.startswith("error: ") for line in done.errors)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_hundred_mutated_templates_work_or_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    draw, worked = random.Random(2), 0
    sources = [source for source, *_ in TEMPLATES.values()] + [QWEN3]
    for i in range(200):
        source = mutated(sources[i % len(sources)].encode(), draw, 2).decode(errors="replace")
        try:
            chat = Chat(byte_level(), ChatTemplate(source, BEGIN, "here"), [0])
            found = chat.tokenize(TALK[1:])
            assert all(part.answers and part.tokens[part.answers[-1][1] - 1] == chat.end_of_turn for part in found)
            worked += 1
        except (BadInput, Refused) as error:
            assert error.code == (2 if isinstance(error, BadInput) else 5)
            [problem] = error.problems
            line = errors.one_line(problem)
            assert re.match(r"(broken )?chat template in here: .+\. .+|wrong text in ", line) and len(line) < 600
    assert 20 < worked < 180


# ---- what is held out ------------------------------------------------------------------------------------------------


def questions_of(part, chat) -> set[str]:
    """The first question of every example, as text."""
    return {re.search(r"Question \d+", chat.tokenizer.decode(part[i].tokens))[0] for i in range(len(part))}


@mutation(
    "lora/data/sources.py", "rows = (row for row in rows if group(row) not in without) if without else rows", "pass"
)
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.9])
def test_what_is_held_out_has_no_question_in_common_with_what_is_trained_or_replayed(tmp_path, fraction):
    """Rows in two files and in a file to replay, many of them with one question and other answers."""
    random.seed(1)
    talks = [turns(f"Question {random.randrange(40)}", f"Answer {i}.") for i in range(120)]
    for name, part in (("a", talks[:50]), ("b", talks[50:90]), ("r", talks[90:])):
        rows = ({"messages": messages} for messages in part)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b, r = (str(tmp_path / f"{name}.jsonl") for name in "abr")
    argv = ["--data", a, b, "--replay", f"{r}:0.5", "--eval-fraction", str(fraction), "--max-len", "500"]
    chat, s = chat_of("smollm2"), TrainSettings.resolve(argv, "")
    found = read_sources(s, chat, Path)
    trained = set().union(*(questions_of(part, chat) for part in [*found.data, found.replays[0][0]]))
    held_out = questions_of(found.held_out, chat)
    there = {messages[0]["content"] for messages in talks[:90]}
    assert held_out and trained and not held_out & trained
    assert len(held_out) == max(1, round(fraction * len(there))) and held_out <= there
    again = read_sources(s, chat, Path)
    assert again.fingerprint() == found.fingerprint() and questions_of(again.held_out, chat) == held_out
    argv[2], argv[1] = argv[1], argv[2]  # in another order the same questions are held out
    other = read_sources(TrainSettings.resolve(argv, ""), chat, Path)
    assert questions_of(other.held_out, chat) == held_out and other.fingerprint() != found.fingerprint()
