"""Files of conversations become messages or named problems; examples become batches that lose and double nothing."""

import json
import os
import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora import errors
from lora.data import formats
from lora.data.batch import IGNORE, lay_out, micro_batches, order, steps
from lora.data.formats import read
from lora.errors import BadInput
from lora.model.template import Example

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


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": PAIR}, PAIR),
        ({"messages": [SYSTEM, *PAIR]}, [SYSTEM, *PAIR]),
        ({"messages": [*PAIR, *PAIR]}, [*PAIR, *PAIR]),
        ({"messages": [*PAIR, USER]}, [*PAIR, USER]),
        ({"messages": [{**USER, "name": "x"}, {**ANSWER, "tool_calls": None}], "id": 7}, PAIR),
        ({"messages": [{"role": "system", "content": ""}, *PAIR]}, [{"role": "system", "content": ""}, *PAIR]),
        ({"prompt": "Hi", "completion": "Hello."}, PAIR),
        ({"question": "Hi", "answer": "Hello."}, PAIR),
        ({"q": "Hi", "a": "Hello."}, PAIR),
        ({"instruction": "Hi", "output": "Hello."}, PAIR),
        ({"instruction": "Hi", "input": "", "output": "Hello."}, PAIR),
        ({"instruction": "Hi", "input": None, "output": "Hello."}, PAIR),
        ({"instruction": "Add", "input": "1 2", "output": "3"},
         [{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}]),
        ({"messages": PAIR, "prompt": "no", "completion": "no"}, PAIR),
    ],
)  # fmt: skip
def test_every_accepted_shape_becomes_messages(tmp_path, row, messages):
    path = written(tmp_path / "a.jsonl", row)
    assert read([path]) == [(messages, f"{path}:1")]


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
    (b'{"text": "x"}', "its keys are text"),
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
    (b'{"q": "x", "a": 3}', "message 2 has int as content"),
    (b'{"instruction": "x", "input": ["y"], "output": "z"}', "message 1 has list as content"),
    (b'{"messages": [{"role": "' + b"x" * 5000 + b'", "content": "x"}]}', "message 1 has role 'xxx"),
    (b'{"' + b"k" * 5000 + b'": 1}', "its keys are kkk"),
    (b'{"q": "half \\ud800 pair", "a": "x"}', "message 1 has half a surrogate pair"),
    (b'{"q": "x", "a": "\\udc00"}', "message 2 has half a surrogate pair"),
]


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
    monkeypatch.setattr(formats, "LIMIT", 10)
    assert "larger than" in problems_of(large)[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "q", "a", "instruction", "input", "output"]), inner
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
        assert rest == ["user", "assistant"] * (len(rest) // 2) + ["user"] * (len(rest) % 2) and len(rest) >= 2
        assert all(set(message) == {"role", "content"} for message in conversation.messages)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_targets_are_the_tokens_shifted_by_one_where_they_are_trained():
    a = Example([10, 11, 12, 13, 14], [False, False, True, False, True])
    b = Example([20, 21, 22], [True, True, False])
    batch = lay_out([a, b])
    assert batch.tokens.tolist() == [10, 11, 12, 13, 20, 21]
    assert batch.lengths == [4, 2]
    assert batch.targets.tolist() == [IGNORE, 12, IGNORE, 14, 21, IGNORE]
    assert batch.trained.tolist() == [False, True, False, True, True, False]
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64


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
    """(tokens, targets) of every document of a batch."""
    parts = zip(batch.tokens.split(batch.lengths), batch.targets.split(batch.lengths), strict=True)
    return [(tuple(tokens.tolist()), tuple(targets.tolist())) for tokens, targets in parts]


@hypothesis_settings(max_examples=100, **CALM)
@given(EXAMPLES, st.integers(1, 120))
def test_micro_batches_keep_every_example_once_and_the_budget(examples, budget):
    batches = micro_batches(examples, budget)
    expected = Counter(
        (tuple(tokens[:-1]), tuple(t if on else IGNORE for t, on in zip(tokens[1:], trained[1:], strict=True)))
        for tokens, trained in examples
    )
    assert Counter(document for batch in batches for document in documents_of(batch)) == expected
    for batch in batches:
        assert sum(batch.lengths) == len(batch.tokens) == len(batch.targets)
        assert len(batch.tokens) <= budget or len(batch.lengths) == 1  # a longer example is alone
    for first, second in pairwise(batches):
        assert len(first.tokens) + second.lengths[0] > budget  # and no batch is opened without need


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


@pytest.mark.parametrize(("count", "size"), [(10, 4), (8, 4), (3, 8), (1, 1), (7, 1)])
def test_steps_cover_every_epoch_exactly_and_its_last_step_may_be_short(count, size):
    per_epoch = -(-count // size)
    found = list(steps(count, size, seed=9, total=3 * per_epoch))
    assert len(found) == 3 * per_epoch
    for epoch in range(3):
        mine = found[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert [i for step in mine for i in step] == order(count, 9, epoch)
        assert [len(step) for step in mine[:-1]] == [size] * (per_epoch - 1)
        assert len(mine[-1]) == count - size * (per_epoch - 1)


@pytest.mark.parametrize("total", [0, 1, 4, 5, 11])
def test_steps_end_after_their_total_and_a_longer_run_begins_alike(total):
    found = list(steps(10, 3, 0, total))
    assert len(found) == total and found == list(steps(10, 3, 0, 50))[:total]
