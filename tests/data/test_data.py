"""Files of conversations become messages or named problems; examples become batches that lose and double nothing."""

import gzip
import json
import os
import random
from bisect import bisect_right
from collections import Counter
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora import errors
from lora.data import formats, jsonl
from lora.data.batch import collate, micro_batches
from lora.data.formats import Conversation, read
from lora.data.order import order, steps, tokens_per_step
from lora.data.sources import numbered
from lora.errors import BadInput
from lora.text.chat import Example
from tests.mutation import mutation

CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # other work may share the machine
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = [USER, ANSWER]


def written(path, *rows, raw: bytes | None = None):
    """A file of rows, or of these bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode() if raw is None else raw)
    return path


def problems_of(path) -> tuple[str, ...]:
    with pytest.raises(BadInput) as raised:
        read([path])
    assert all("\n" not in problem for problem in raised.value.problems)
    return raised.value.problems


# ---- accepted --------------------------------------------------------------------------------------------------------


ADD = [{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}]
EARLIER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
UNTRAINED = [USER, {**ANSWER, "train": False}, USER, ANSWER]
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


@mutation("lora/data/formats.py", "texts[:0] = [", "texts[len(texts) :] = [")
@mutation("lora/data/formats.py", "and trained is False else {}", 'and message.get("train") is False else {}')
@mutation("lora/data/formats.py", "for text in sorted(texts)),", "for text in ()),")
@pytest.mark.parametrize(
    ("row", "messages", "shape"),
    [
        ({"messages": PAIR}, PAIR, "messages"),
        ({"messages": [SYSTEM, *PAIR]}, [SYSTEM, *PAIR], "messages"),
        ({"messages": [{**SYSTEM, "role": "developer"}, *PAIR]}, [SYSTEM, *PAIR], "messages"),
        ({"messages": [*PAIR, *PAIR]}, [*PAIR, *PAIR], "messages"),
        ({"messages": [*PAIR, USER]}, [*PAIR, USER], "messages"),
        ({"messages": [{**USER, "name": "x"}, {**ANSWER, "tool_calls": None}], "id": 7}, PAIR, "messages"),
        ({"messages": [{"role": "system", "content": ""}, *PAIR]}, [{"role": "system", "content": ""}, *PAIR],
         "messages"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, ANSWER]},
         PAIR, "messages"),
        ({"messages": [USER, {**ANSWER, "train": False}, USER, {**ANSWER, "train": True}]}, UNTRAINED, "messages"),
        ({"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]}, UNTRAINED, "messages"),
        ({"messages": [{**USER, "train": False}, ANSWER]}, PAIR, "messages"),
        ({"messages": PAIR, "system": "Be brief."}, [SYSTEM, *PAIR], "messages"),
        ({"instruction": "Add", "context": "1 2", "output": "3"}, ADD, "instruction/output"),
        ({"conversations": SAID}, PAIR, "conversations"),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *SAID]}, [SYSTEM, *PAIR], "conversations"),
        ({"system": "Be brief.", "conversations": SAID}, [SYSTEM, *PAIR], "conversations"),
        ({"conversations": PAIR}, PAIR, "conversations"),
        ({"prompt": "Hi", "completion": "Hello."}, PAIR, "prompt/completion"),
        ({"prompt": [USER], "completion": [ANSWER]}, PAIR, "prompt/completion"),
        ({"prompt": [USER], "completion": [ANSWER], "system": "Be brief."}, [SYSTEM, *PAIR], "prompt/completion"),
        ({"question": "Hi", "answer": "Hello."}, PAIR, "question/answer"),
        ({"q": "Hi", "a": "Hello."}, PAIR, "q/a"),
        ({"instruction": "Hi", "output": "Hello."}, PAIR, "instruction/output"),
        ({"instruction": "Hi", "input": "", "output": "Hello."}, PAIR, "instruction/output"),
        ({"instruction": "Hi", "input": None, "output": "Hello."}, PAIR, "instruction/output"),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, ADD, "instruction/output"),
        ({"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"]]}, [*EARLIER, *ADD],
         "instruction/output"),
        ({"instruction": "Hi", "output": "Hello.", "history": []}, PAIR, "instruction/output"),
        ({"instruction": "Hi", "output": "Hello.", "history": None, "system": "Be brief."}, [SYSTEM, *PAIR],
         "instruction/output"),
        ({"q": "Hi", "a": "Hello.", "history": [["a", "b"], ["a", "b"]]}, [*EARLIER, *EARLIER, *PAIR], "q/a"),
        ({"text": "Hi"}, [{"role": "text", "content": "Hi"}], "text"),
        ({"messages": PAIR, "prompt": "no", "completion": "no", "text": "no"}, PAIR, "messages"),
        ({"q": "Hi", "a": "Hello.", "text": "no"}, PAIR, "q/a"),
    ],
)  # fmt: skip
def test_every_accepted_shape_becomes_messages(tmp_path, row, messages, shape):
    path = written(tmp_path / "a.jsonl", row)
    assert read([path]) == [Conversation(messages, f"{path}:1", shape)]


@mutation(
    "lora/data/formats.py", "if key not in used and not foreign_fields.says_nothing(value.get(key)):", "if False:"
)
@pytest.mark.parametrize("row", [{"messages": PAIR}, {"prompt": [USER], "completion": [ANSWER]}], ids=["one", "two"])
@pytest.mark.parametrize("more", [{"history": [["a", "b"]]}, {"input": "x"}, {"context": "x"}], ids=str)
def test_what_would_be_lost_beside_messages_is_refused(tmp_path, row, more):
    with pytest.raises(BadInput, match=f"its {next(iter(more))} would not be learned beside messages"):
        read([written(tmp_path / "a.jsonl", row | more)])


def test_history_and_messages_are_one_form(tmp_path):
    """A reader of the third article asks whether both can be in one data set."""
    row = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]}
    same = {"messages": [*EARLIER, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    first, second = read([written(tmp_path / "a.jsonl", row, same)])
    assert first.messages == second.messages


@mutation(
    "lora/data/formats.py",
    "if keys and all(key in row for key in keys if key)",
    "if keys and all(key in row for key in keys if key) and not any(a in row for a, _ in PAIRS)",
)
def test_any_pair_of_keys_can_be_named(tmp_path):
    path = written(
        tmp_path / "a.jsonl", {"问题": "Hi", "回答": "Hello.", "q": "x", "a": "y"}, {"q": "Hi", "a": "Hello."}
    )
    found = read([path], keys=("问题", "回答"))
    assert [(c.messages, c.shape) for c in found] == [(PAIR, "问题/回答"), (PAIR, "q/a")]
    row = {"prompt": "Hi", "chosen": "Hello.", "rejected": "x", "messages": [*PAIR, *PAIR]}
    [found] = read([written(tmp_path / "b.jsonl", row)], keys=("prompt", "chosen"))
    assert found.messages == PAIR


# ---- files -----------------------------------------------------------------------------------------------------------


TWO = [{"q": "Hi \u2028 there", "a": "1"}, {"messages": [SYSTEM, *PAIR]}]
LINES = [json.dumps(row, ensure_ascii=False) for row in TWO]


@mutation("lora/data/jsonl.py", 'line = line.removeprefix(b"\\xef\\xbb\\xbf")', "pass")
@mutation("lora/data/jsonl.py", 'if start.startswith(b"\\x1f\\x8b") else raw', 'if path.suffix == ".gz" else raw')
@mutation("lora/data/jsonl.py", 'number += text.count("\\n", counted, place)', "pass")
@pytest.mark.parametrize(
    ("raw", "numbers"),
    [
        ("\n".join(LINES), [1, 2]),
        (" ".join(LINES), [1, 1]),
        ("".join(LINES) + "\n\n", [1, 1]),
        ("\r\n".join(["", *LINES, ""]), [2, 3]),
        ("\ufeff" + "\n".join(LINES), [1, 2]),
        (json.dumps(TWO), [1, 1]),
        ("[\n" + ",\n".join(LINES) + "\n]\n", [2, 3]),
        ("\ufeff\r\n [" + LINES[0] + "\r\n,\r\n" + LINES[1] + "]", [2, 4]),
        (json.dumps(TWO, indent=1), [2, 6]),
        ("\n".join(json.dumps(row, indent=1) for row in TWO), [1, 5]),
    ],
    ids=["lines", "one line", "touching", "crlf", "bom", "list", "list of lines", "odd list", "indented list",
         "indented objects"],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_lines_and_lists_are_read_whatever_the_name_says(tmp_path, raw, numbers, packed):
    data = raw.encode()
    path = written(tmp_path / "data.parquet.txt", raw=gzip.compress(data) if packed else data)
    found = read([path])
    assert [c.messages for c in found] == [[{**USER, "content": "Hi \u2028 there"}, {**ANSWER, "content": "1"}],
                                           [SYSTEM, *PAIR]]  # fmt: skip
    assert [c.where for c in found] == [f"{path}:{number}" for number in numbers]


@mutation("lora/data/jsonl.py", "while place < len(text) and not", "if place < len(text) and not")
def test_the_articles_line_with_two_objects_is_two_rows(tmp_path):
    """As the fourth article prints its example: one line, a blank between two objects."""
    row = {"messages": [{"role": "system", "content": "道言"}, {"role": "user", "content": "如何面对挫折?"}]}
    first = {"messages": [*row["messages"], {"role": "assistant", "content": "上善若水"}]}
    second = {"messages": [*row["messages"], {"role": "assistant", "content": "柔韧"}]}
    text = json.dumps(first, ensure_ascii=False) + " " + json.dumps(second, ensure_ascii=False)
    found = read([written(tmp_path / "a.jsonl", raw=text.encode())])
    assert [c.messages[-1]["content"] for c in found] == ["上善若水", "柔韧"]


@pytest.mark.parametrize(
    ("raw", "line", "why"),
    [
        (b"PAR1\x15\x04", None, "a parquet file"),
        (b"PK\x03\x04rest", None, "a zip archive"),
        ("{}".encode("utf-16"), None, "UTF-16"),
        (gzip.compress(b'{"q": "x", "a": "y"}\n' * 500)[:-30], None, "damaged gzip"),
        (b"\x1f\x8b" + b"junk" * 5, None, "damaged gzip"),
        (b'[{"q": "x", "a": "y"}', 1, "the list does not end"),
        (b'[{"q": "x", "a": "y"}\n{"q": "x", "a": "y"}]', 2, "expected a comma"),
        (b'[{"q": "x", "a": "y"},\n {"q": "x" "a": "y"}]', 2, "delimiter"),
        (b'[{"q": "x", "a": "y"},]', 1, "broken JSON"),
        (b'[{"q": "x", "a": "y"}]\n[]', 2, "more after the list"),
        (b'[\n{"q": "caf\xe9"}]', 2, "not UTF-8"),
        (b'[\n{"q": NaN}]', 2, "NaN is no JSON"),
        (b"[]", None, "no examples"),
        (b'{"q": "x", "a": "y"} {"q": "x"', 1, "broken JSON"),
    ],
)
def test_a_file_that_is_something_else_is_named_and_so_is_what_to_do(tmp_path, raw, line, why):
    path = written(tmp_path / "a.jsonl", raw=raw)
    (problem,) = problems_of(path)
    assert why in problem and f" in {path}{f':{line}' if line else ''}: " in problem and problem.count(". ") >= 1


@mutation("lora/data/jsonl.py", "or unpacked > LIMIT:", "or False:")
def test_an_endless_line_and_a_gzip_bomb_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LINE_LIMIT", 1000)
    monkeypatch.setattr(jsonl, "LIMIT", 5000)
    for rows in (b" " * 2000, b'{"q": "x", "a": "y"}\n' * 400):
        (problem,) = problems_of(written(tmp_path / "a.jsonl", raw=gzip.compress(rows)))
        assert "can't be what it claims to be" in problem
    monkeypatch.setattr(jsonl, "LIST_LIMIT", 100)
    (problem,) = problems_of(written(tmp_path / "b.json", raw=b"[" + b" " * 200 + b"]"))
    assert "read as a whole" in problem


def test_progress_hears_of_every_byte_once(tmp_path):
    path, heard = written(tmp_path / "a.jsonl", *TWO * 50), []
    assert len(list(formats.scan([path], progress=heard.append))) == 100
    assert sum(heard) == path.stat().st_size and len(heard) == 100


@mutation("lora/data/sources.py", 'name.rpartition(":")', 'name.partition(":")')
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jsonl", ("a.jsonl", None)),
        ("a.jsonl:3", ("a.jsonl", 3.0)),
        ("a.jsonl:0.5", ("a.jsonl", 0.5)),
        ("a.jsonl:1e3", ("a.jsonl", 1000.0)),
        ("a.jsonl:-1", ("a.jsonl", -1.0)),
        ("a.jsonl:nan", ("a.jsonl:nan", None)),
        ("a.jsonl:", ("a.jsonl:", None)),
        ("a.jsonl:1_0", ("a.jsonl:1_0", None)),
        ("a.jsonl:٣", ("a.jsonl:٣", None)),
        (":3", (":3", None)),
        ("a:b.jsonl", ("a:b.jsonl", None)),
        ("a:2:b.jsonl:2", ("a:2:b.jsonl", 2.0)),
        ("hub:owner/name/a.jsonl", ("hub:owner/name/a.jsonl", None)),
        ("hub:owner/name/a.jsonl:2", ("hub:owner/name/a.jsonl", 2.0)),
    ],
)
def test_what_follows_the_last_colon_is_a_number_or_belongs_to_the_name(name, parts):
    assert numbered(name) == parts


@mutation(
    "lora/data/jsonl.py",
    'values = list(_parse(line.rstrip(b" \\t\\r\\n"), path, number))',
    "values = [v for part in line.decode().splitlines() for v in _parse(part.encode(), path, number)]",
)
def test_text_is_kept_to_the_byte(tmp_path):
    texts = [
        " a\n\n b ",
        "tab\tand \\n",
        "naïve 日本語 👩‍🚀",
        "\u2028 and \u2029 and \x85 and \x0b",
        "<|im_end|>",
        "\0x",
    ]
    rows = [{"prompt": text, "completion": text + "!"} for text in texts]
    found = read([written(tmp_path / "a.jsonl", *rows)])
    assert [[m["content"] for m in c.messages] for c in found] == [[text, text + "!"] for text in texts]


def test_byte_order_mark_crlf_blank_lines_and_a_missing_last_newline_change_nothing(tmp_path):
    line = json.dumps({"messages": PAIR}).encode()
    plain = read([written(tmp_path / "plain.jsonl", raw=line + b"\n" + line + b"\n")])
    path = written(tmp_path / "odd.jsonl", raw=b"\xef\xbb\xbf\r\n" + line + b"\r\n \t\r\n\r\n" + line)
    odd = read([path])
    assert [c.messages for c in odd] == [c.messages for c in plain] == [PAIR, PAIR]
    assert [c.where for c in odd] == [f"{path}:2", f"{path}:5"]


def test_several_files_are_read_in_order(tmp_path):
    paths = [written(tmp_path / name, {"q": name, "a": "1"}, {"q": name, "a": "2"}) for name in ("b", "a", "c")]
    found = read(paths)
    assert [(c.messages[0]["content"], c.messages[1]["content"]) for c in found] == [
        (name, answer) for name in ("b", "a", "c") for answer in ("1", "2")
    ]


def test_conversations_to_be_answered_need_no_answer(tmp_path):
    path = written(tmp_path / "a.jsonl", {"messages": [USER]}, {"messages": [SYSTEM, USER]}, {"messages": PAIR})
    found = [conversation.messages for conversation in read([path], answered=False)]
    assert found == [[USER], [SYSTEM, USER], PAIR]
    assert len(problems_of(path)) == 2


def test_prompts_may_be_rows_without_answers(tmp_path):
    rows = [{"prompt": "Hi"}, {"question": "Hi"}, {"q": "Hi"}, {"instruction": "Hi"}]
    path = written(tmp_path / "a.jsonl", *rows)
    assert [c.messages for c in read([path], answered=False)] == [[USER]] * 4
    assert len(problems_of(path)) == 4


# ---- refused ---------------------------------------------------------------------------------------------------------

DEEP = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD = [
    # bytes of the line, what the problem must say
    (b"{", "broken JSON"),
    (b'{"messages": [] ', "broken JSON"),
    (b"not json", "broken JSON"),
    (b'{"q": NaN, "a": "x"}', "NaN is no JSON"),
    (b'{"q": "x", "a": "y", "weight": Infinity}', "Infinity is no JSON"),
    (b'{"q": 1, "a": ' + b"9" * 5000 + b"}", "broken JSON"),
    (DEEP, "broken JSON"),
    (b'{"q": "caf\xe9", "a": "x"}', "not UTF-8 at byte 10"),
    (b"[]", "expected an object, found list"),
    (b'"text"', "expected an object, found str"),
    (b"3", "expected an object, found int"),
    (b"null", "expected an object, found NoneType"),
    (b"{}", "its keys are none"),
    (b'{"Text": "x"}', "its keys are Text"),
    (b'{"text": " "}', "message 1 of text is empty"),
    (b'{"text": 3}', "its text is a number, expected text"),
    (b'{"prompt": "x", "chosen": "y", "rejected": "z"}', "a preference row"),
    (b'{"messages": [{"role": "tool", "content": "x"}]}', "message 1 has role 'tool'"),
    (b'{"messages": [{"role": "user", "content": null, "tool_calls": [1]}]}', "calls of tools are not trained here"),
    (json.dumps({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}).encode(), "message 2 has tool_calls"),
    (json.dumps({"messages": PAIR, "tools": [{}]}).encode(), "it has tools"),
    (json.dumps({"messages": [SYSTEM, *PAIR], "system": "x"}).encode(), "message 2 is a system turn"),
    (b'{"question": "x", "context": "y", "answer": "z"}', "its context would not be learned"),
    (b'{"conversations": []}', "messages is not a list of messages"),
    (b'{"conversations": ["x"]}', "message 1 is no object"),
    (b'{"conversations": [{"from": "observation", "value": "x"}]}', "message 1 has role 'observation'"),
    (b'{"q": "x", "a": "y", "history": "z"}', "history is not a list of"),
    (b'{"q": "x", "a": "y", "history": [["z"]]}', "history is not a list of"),
    (b'{"q": "x", "a": "y", "history": [["z", 3]]}', "its history is a number, expected text"),
    (b'{"q": "x", "a": "y", "system": 3}', "its system is a number, expected text"),
    (json.dumps({"messages": [USER, {**ANSWER, "train": False}]}).encode(), "there is no assistant turn to learn"),
    (json.dumps({"messages": [USER, {**ANSWER, "train": "no"}]}).encode(), "message 2 has 'no' as train"),
    (json.dumps({"messages": [USER, {**ANSWER, "weight": 2}]}).encode(), "message 2 has 2 as weight"),
    (json.dumps({"messages": [{**USER, "train": True}, ANSWER]}).encode(), "only answers are learned"),
    (b'{"prompt": "x", "answer": "y"}', "its keys are prompt, answer"),
    (b'{"messages": []}', "messages is not a list of messages"),
    (b'{"messages": {"role": "user"}}', "messages is not a list of messages"),
    (b'{"messages": null}', "messages is not a list of messages"),
    (b'{"messages": ["Hi", "Hello"]}', "message 1 is no object"),
    (b'{"messages": [{"role": "human", "content": "x"}]}', "message 1 has role 'human'"),
    (b'{"messages": [{"role": ["user"], "content": "x"}]}', "message 1 has role"),
    (b'{"messages": [{"content": "x"}]}', "message 1 has role None"),
    (b'{"messages": [{"role": "user", "content": null}]}', "message 1 has NoneType as content"),
    (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "message 1 has list as content"),
    (json.dumps({"messages": [*PAIR, SYSTEM]}).encode(), "message 3 is a system turn"),
    (json.dumps({"messages": [SYSTEM, SYSTEM, *PAIR]}).encode(), "message 2 is a system turn"),
    (json.dumps({"messages": [ANSWER]}).encode(), "message 1 is a turn of assistant, expected user"),
    (json.dumps({"messages": [SYSTEM, ANSWER]}).encode(), "message 2 is a turn of assistant, expected user"),
    (json.dumps({"messages": [USER, USER, ANSWER]}).encode(), "message 2 is a turn of user, expected assistant"),
    (json.dumps({"messages": [*PAIR, ANSWER]}).encode(), "message 3 is a turn of assistant, expected user"),
    (json.dumps({"messages": [USER]}).encode(), "there is no assistant turn"),
    (json.dumps({"messages": [SYSTEM]}).encode(), "there is no assistant turn"),
    (b'{"q": "", "a": "x"}', "message 1 of user is empty"),
    (b'{"q": "x", "a": " \\n\\t"}', "message 2 of assistant is empty"),
    (b'{"q": "x", "a": 3}', "its a is a number, expected text"),
    (b'{"instruction": "x", "input": ["y"], "output": "z"}', "its input is a list, expected text"),
    (b'{"messages": [{"role": "' + b"x" * 5000 + b'", "content": "x"}]}', "message 1 has role 'xxx"),
    (b'{"' + b"k" * 5000 + b'": 1}', "its keys are kkk"),
    (b'{"q": "half \\ud800 pair", "a": "x"}', "message 1 has half a surrogate pair"),
    (b'{"q": "x", "a": "\\udc00"}', "message 2 has half a surrogate pair"),
]
NO_PARTS = [None, 0, 0.0, False, "", [], {}, 1, "a", {"type": "text"}, {"type": "text", "text": None}, {"text": "a"}]


@mutation(
    "lora/data/formats.py",
    "if others := [part for part in content if not _is_text(part)]:",
    "if others := [part for part in content if part and not _is_text(part)]:",
    case="None",
)
@pytest.mark.parametrize("part", NO_PARTS, ids=str)
def test_what_is_no_part_of_text_is_refused_whatever_it_is(tmp_path, part):
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}, ANSWER]}
    (problem,) = problems_of(written(tmp_path / "a.jsonl", raw=json.dumps(row).encode()))
    assert "message 1 has list as content" in problem


@mutation("lora/data/formats.py", "if why := foreign_fields.refused_in_row(value, used):", "if False:")
@mutation("lora/data/foreign_fields.py", '"functions", "tool_calls", "function_call"', '"functions"')
@pytest.mark.parametrize(("line", "why"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_a_bad_line_is_named_by_file_and_line_and_says_why(tmp_path, line, why):
    good = json.dumps({"messages": PAIR}).encode()
    path = written(tmp_path / "a.jsonl", raw=good + b"\n\n" + line + b"\n")
    (problem,) = problems_of(path)
    assert f" in {path}:3: " in problem and why in problem
    assert problem.count(". ") >= 1 and len(problem) < 1000  # a fix, and no whole line quoted


def test_all_bad_lines_are_named_at_once_over_all_files(tmp_path):
    one = written(tmp_path / "1.jsonl", raw=b'{"q": 1, "a": "x"}\n{"q": "x", "a": "y"}\n[]\n')
    two = written(tmp_path / "2.jsonl", raw=b"oops\n")
    with pytest.raises(BadInput) as raised:
        read([one, two])
    assert [problem.split(" in ")[1].split(": ")[0] for problem in raised.value.problems] == [
        f"{one}:1", f"{one}:3", f"{two}:1",
    ]  # fmt: skip


@mutation("lora/errors.py", "if len(problems) > MOST_LINES:", "if False:")
def test_twenty_problems_are_printed_and_the_rest_counted(capsys):
    def story(argv):
        raise BadInput(*(f"problem {i}" for i in range(57)))

    assert errors.run(story) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [*(f"error: problem {i}" for i in range(20)), "error: and 37 more"]


def test_twenty_problems_need_no_count_and_control_characters_are_escaped(capsys):
    errors.report([f"bad \x1b[31m{i}\nerror: forged" for i in range(20)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20 and lines[3] == "error: bad \\x1b[31m3\\nerror: forged"


@pytest.mark.parametrize("raw", [b"", b"\n\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_examples_is_refused(tmp_path, raw):
    (problem,) = problems_of(written(tmp_path / "empty.jsonl", raw=raw))
    assert "no examples" in problem and "empty.jsonl" in problem


def test_an_empty_file_is_named_beside_bad_lines_of_another(tmp_path):
    bad, empty = written(tmp_path / "bad.jsonl", raw=b"[]\n"), written(tmp_path / "empty.jsonl", raw=b"")
    with pytest.raises(BadInput) as raised:
        read([bad, empty])
    assert len(raised.value.problems) == 2


def test_a_file_that_is_missing_a_folder_a_pipe_or_too_large_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none.jsonl", tmp_path, tmp_path / "pipe"):
        (problem,) = problems_of(path)
        assert str(path) in problem
    large = written(tmp_path / "large.jsonl", {"q": "x", "a": "y"})
    monkeypatch.setattr(jsonl, "LIMIT", 10)
    assert "larger than" in problems_of(large)[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "role", "content", "q", "a", "instruction", "input", "output", "text", "history", "train"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@hypothesis_settings(max_examples=150, **CALM)
@given(rows=st.lists(st.one_of(JSON.map(json.dumps), st.text(max_size=20), st.just(json.dumps({"messages": PAIR})))))
def test_any_file_gives_conversations_or_bad_input(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
    try:
        found = read([path])
    except BadInput as error:
        assert error.problems
        return
    for conversation in found:
        roles = [message["role"] for message in conversation.messages]
        rest = roles[1:] if roles[0] == "system" else roles
        if roles == ["text"]:
            continue
        assert rest == ["user", "assistant"] * (len(rest) // 2) + ["user"] * (len(rest) % 2) and len(rest) >= 2
        assert all(
            {"role", "content"} <= set(message) <= {"role", "content", "train"} for message in conversation.messages
        )


# ---- batches ---------------------------------------------------------------------------------------------------------


@mutation(
    "lora/data/batch.py",
    "targets += [example.tokens[t + 1] for t in predicting]",
    "targets += [example.tokens[t] for t in predicting]",
)
@mutation(
    "lora/data/batch.py",
    "targets += [example.tokens[t + 1] for t in predicting]",
    "targets += [[*example.tokens, 0][t + 2] for t in predicting]",
)
def test_targets_are_the_tokens_shifted_by_one_where_they_are_trained():
    a = Example([10, 11, 12, 13, 14], [False, False, True, False, True])
    b = Example([20, 21, 22], [True, True, False])
    batch = collate([a, b])
    assert batch.tokens.tolist() == [10, 11, 12, 13, 20, 21]
    assert batch.lengths == [4, 2]
    assert batch.trained.tolist() == [1, 3, 4]
    assert batch.targets.tolist() == [12, 14, 21]
    assert batch.tokens.dtype == batch.trained.dtype == batch.targets.dtype == torch.int64


EXAMPLES = st.lists(
    st.integers(2, 40).flatmap(
        lambda n: st.builds(
            Example,
            st.lists(st.integers(0, 999), min_size=n, max_size=n),
            st.lists(st.booleans(), min_size=n, max_size=n),
        )
    ),
    min_size=1,
    max_size=12,
)


def documents_of(batch) -> list[tuple]:
    """(tokens, targets) of every document of a batch, a target -1 where nothing is trained."""
    targets = torch.full_like(batch.tokens, -1).index_copy(0, batch.trained, batch.targets)
    lengths = [*batch.lengths[:-1], batch.lengths[-1] - batch.padding, batch.padding]
    *parts, dead = zip(batch.tokens.split(lengths), targets.split(lengths), strict=True)
    assert (dead[1] == -1).all()
    return [(tuple(tokens.tolist()), tuple(targets.tolist())) for tokens, targets in parts]


@mutation("lora/data/batch.py", "if size > room or not batches:", "if room < 1 or not batches:")
@mutation("lora/data/batch.py", "-size_of(batch) % ROUND", "0")
@hypothesis_settings(max_examples=100, **CALM)
@given(EXAMPLES, st.integers(1, 120))
def test_micro_batches_keep_every_example_once_and_the_budget(examples, budget):
    batches = micro_batches(examples, budget)
    expected = Counter(
        (tuple(tokens[:-1]), tuple(t if on else -1 for t, on in zip(tokens[1:], trained[1:], strict=True)))
        for tokens, trained in examples
    )
    assert Counter(document for batch in batches for document in documents_of(batch)) == expected
    for batch in batches:
        assert sum(batch.lengths) == len(batch.tokens) and len(batch.trained) == len(batch.targets)
        assert len(batch.tokens) % 32 == 0 and batch.padding < 32
        assert len(batch.tokens) - batch.padding <= budget or len(batch.lengths) == 1  # a longer example is alone
    for first, second in pairwise(batches):
        assert len(first.tokens) + second.lengths[0] > budget  # and no batch is opened without need


@mutation("lora/data/order.py", 'f"{seed}/{epoch}/{index}"', 'f"{seed}/{index}"')
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_order_is_a_permutation_and_a_pure_function_of_seed_and_epoch(count):
    state = random.getstate()
    found = order(count, 3, 5)
    assert sorted(found) == list(range(count)) and found == order(count, 3, 5)
    assert random.getstate() == state
    if count == 1000:
        others = [order(count, 3, 6), order(count, 4, 5), order(count, 5, 3), list(range(count))]
        for other in others:
            assert sum(a == b for a, b in zip(found, other, strict=True)) < 10  # 1 on average by chance


def test_order_is_the_same_on_every_machine_and_version():
    assert order(10, 0, 0) == [7, 0, 9, 1, 5, 3, 4, 8, 2, 6]
    assert order(5, 2**62, 10**6) == [1, 0, 4, 2, 3]


@mutation(
    "lora/data/order.py",
    "for start in range(0, count, batch_size)",
    "for start in range(0, count - batch_size + 1, batch_size)",
    case="10-4",
)
@pytest.mark.parametrize(("count", "size"), [(10, 4), (8, 4), (3, 8), (1, 1), (7, 1)])
def test_steps_cover_every_epoch_exactly_and_its_last_step_may_be_short(count, size):
    per_epoch = -(-count // size)
    found = list(steps([count], size, seed=9, total=3 * per_epoch))
    assert len(found) == 3 * per_epoch
    for epoch in range(3):
        mine = found[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert [i for step in mine for i in step] == order(count, 9, epoch)
        assert [len(step) for step in mine[:-1]] == [size] * (per_epoch - 1)
        assert len(mine[-1]) == count - size * (per_epoch - 1)


@pytest.mark.parametrize("total", [0, 1, 4, 5, 11])
def test_steps_end_after_their_total_and_a_longer_run_begins_alike(total):
    found = list(steps([10], 3, 0, total))
    assert len(found) == total and found == list(steps([10], 3, 0, 50))[:total]


# ---- mixing ----------------------------------------------------------------------------------------------------------


def sources_of(indices, sizes) -> list[int]:
    """Which source each index belongs to."""
    ends = list(accumulate(sizes))
    return [bisect_right(ends, index) for index in indices]


@mutation(
    "lora/data/order.py",
    "itertools.accumulate(weight / sum(weights) for weight in weights)",
    "itertools.accumulate(1 / len(weights) for weight in weights)",
)
@pytest.mark.parametrize("weights", [[3.0, 0.5], [1.0, 1.0], [0.1, 0.2, 0.7], [5.0]])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weights_are_the_probabilities_of_a_rows_source(weights, seed):
    sizes = [7, 400, 30][: len(weights)]
    drawn = [i for step in steps(sizes, 8, seed, 1250, weights) for i in step]
    assert len(drawn) == 10_000
    found = Counter(sources_of(drawn, sizes))
    for i, weight in enumerate(weights):
        assert abs(found[i] / 10_000 - weight / sum(weights)) < 0.02


@hypothesis_settings(max_examples=50, **CALM)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 9)), min_size=1, max_size=4), st.integers(0, 99))
def test_inside_a_source_nothing_is_repeated_until_all_was_drawn(sources, seed):
    sizes, weights = map(list, zip(*sources, strict=True))
    drawn = [i for step in steps(sizes, 5, seed, 40, weights) for i in step]
    for source, size in enumerate(sizes):
        mine = [i for i in drawn if sources_of([i], sizes) == [source]]
        for start in range(0, len(mine) - size + 1, size):
            assert sorted(mine[start : start + size]) == list(range(sum(sizes[:source]), sum(sizes[: source + 1])))


@mutation("lora/data/order.py", '_endless(size, f"{seed}/source {i}")', '_endless(size, f"{seed}/source")')
def test_sources_of_one_size_are_not_drawn_in_one_order():
    drawn = [i for step in steps([50, 50], 10, 0, 40, [1.0, 1.0]) for i in step]
    first, second = ([i - start for i in drawn if start <= i < start + 50][:50] for start in (0, 50))
    assert first != second
    again = [i for i in drawn if i < 50][50:]
    assert again[:20] != first[:20]  # nor is a second pass as the first


def test_the_mixture_is_a_pure_function_of_the_seed():
    how = ([9, 4], 4, 5, 60, [2.0, 1.0], [(6, 0.3)])
    assert list(steps(*how)) == list(steps(*how))
    assert list(steps(*how)) != list(steps([9, 4], 4, 6, 60, [2.0, 1.0], [(6, 0.3)]))
    assert list(steps([9, 4], 4, 5, 20, [2.0, 1.0], [(6, 0.3)])) == list(steps(*how))[:20]


def test_without_weights_files_are_one_behind_the_other():
    assert list(steps([4, 6], 3, 0, 9)) == list(steps([10], 3, 0, 9))


@mutation("lora/data/order.py", "count = floor(rate * (step + 1)) - floor(rate * step)", "count = floor(rate)")
@mutation("lora/data/order.py", "extras, start = [], sum(sizes)", "extras, start = [], 0")
@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
@pytest.mark.parametrize("share", [0.05, 0.25, 0.3, 1.0, 2.5])
def test_replay_comes_on_top_of_every_step_and_changes_nothing_else(weights, share):
    sizes, batch_size, total = [20, 12], 8, 200
    plain = list(steps(sizes, batch_size, 3, total, weights))
    more = list(steps(sizes, batch_size, 3, total, weights, [(11, share), (5, 0.5)]))
    replayed = []
    for before, after in zip(plain, more, strict=True):
        assert after[: len(before)] == before
        first = [i for i in after[len(before) :] if i < 32 + 11]
        replayed += first
        assert int(share * batch_size) <= len(first) <= int(share * batch_size) + 1
        assert sum(i >= 43 for i in after) == 4
    assert len(replayed) == int(share * batch_size * total + 1e-6)
    assert all(32 <= i < 43 for i in replayed)
    for start in range(0, len(replayed) - 10, 11):
        assert sorted(replayed[start : start + 11]) == list(range(32, 43))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
def test_tokens_per_step_are_what_the_steps_have_on_average(weights):
    lengths, replay = [[10, 20, 30], [100] * 9], [7, 9]
    flat = [n for source in lengths for n in source] + replay
    drawn = list(steps([3, 9], 4, 0, 3000, weights, [(2, 0.5)]))
    mean = sum(flat[i] for step in drawn for i in step) / 3000
    assert abs(tokens_per_step(lengths, 4, weights, [(replay, 0.5)]) - mean) < 0.02 * mean
