"""Rewriting questions through a teacher: what is asked, which lines of a reply are kept, and that none disappears."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen import augment, teacher
from data_gen.augment import main, parse, plain, prompt, read_turns
from lora.errors import BadInput
from tests.mutation import mutation
from tests.teacher_server import Say, TeacherServer

ROOT = Path(__file__).resolve().parents[2]


class FakeTeacher:
    """Answers with what `script` says of the row it is shown; `None` as a reply leaves the question unasked."""

    stopped, problem = "--max-requests 1 is reached", ""

    def __init__(self, script):
        self.script, self.shown = script, []

    def ask(self, questions, journal):
        for question in questions:
            row = json.loads(question.messages[-1]["content"].split("\n")[1])
            self.shown.append(row)
            text = self.script(row["question"])
            if text is not None:
                yield teacher.Reply(question.key, text, "stop", 7)

    def account(self):
        return f"{len(self.shown)} asked"


def lines(*questions):
    return "\n".join(json.dumps({"question": question}, ensure_ascii=False) for question in questions)


def written(path, *pairs):
    path.write_text("".join(json.dumps({"q": q, "a": a}, ensure_ascii=False) + "\n" for q, a in pairs), "utf-8")
    return path


def pairs_of(path):
    rows = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
    return sorted(tuple(message["content"] for message in row) for row in rows)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command over rows with a scripted teacher: (exit code, sorted rows or None, stderr)."""

    def run(script, *pairs, flags=("--ways", "3")):
        monkeypatch.setattr(teacher, "from_flags", lambda args: FakeTeacher(script))
        data, out = written(tmp_path / "data.jsonl", *pairs), tmp_path / "out.jsonl"
        code = main(["--data", str(data), "--out", str(out), *flags])
        return code, pairs_of(out) if out.exists() else None, capsys.readouterr().err

    return run


# ---- the prompt ------------------------------------------------------------------------------------------------------

CONSTRAINTS = {
    "en": ("One JSON object per line", "No line breaks inside", "Exactly 7 lines", "question 7 times"),
    "zh": ("每行一个JSON对象", "内部不能换行", "恰好7行", "改写7遍"),
}


@pytest.mark.parametrize("lang", CONSTRAINTS)
def test_the_prompt_has_the_row_in_one_line_and_the_three_constraints(lang):
    text = prompt('你好\n"{x}"?', "好\n{ways}", 7, lang)
    assert {"question": '你好\n"{x}"?', "answer": "好\n{ways}"} in [
        json.loads(line) for line in text.split("\n") if line.startswith("{")
    ]
    assert "你好" in text and all(words in text for words in CONSTRAINTS[lang])


# ---- the reply -------------------------------------------------------------------------------------------------------

REJECTED = {
    "prose": ("Here are the rewrites:", augment.NOT_JSON),
    "a numbered line": ('1. {"question": "c"}', augment.NOT_JSON),
    "a trailing comma": ('{"question": "c"},', augment.NOT_JSON),
    "two on a line": ('{"question": "c"} {"question": "d"}', augment.NOT_JSON),
    "half an object": ('{"question": "c', augment.NOT_JSON),
    "a raw control character": ('{"question": "c\x01"}', augment.NOT_JSON),
    "a list": ('[{"question": "c"}]', augment.NOT_JSON),
    "a list of pairs": ('[["question", "c"]]', augment.NOT_JSON),
    "a string": ('"question"', augment.NOT_JSON),
    "deep nesting": ("[" * 100_000, augment.NOT_JSON),
    "a huge number": ('{"question": ' + "9" * 5000 + "}", augment.NOT_JSON),
    "a fence in the middle": ("```", augment.NOT_JSON),
    "another key": ('{"q": "c"}', augment.WRONG_KEYS),
    "one key more": ('{"question": "c", "answer": "d"}', augment.WRONG_KEYS),
    "the key twice": ('{"question": "c", "question": "d"}', augment.WRONG_KEYS),
    "no key": ("{}", augment.WRONG_KEYS),
    "no text": ('{"question": " \\n"}', augment.EMPTY),
    "a number": ('{"question": 3}', augment.EMPTY),
    "null": ('{"question": null}', augment.EMPTY),
    "an object inside": ('{"question": {"question": "c"}}', augment.EMPTY),
    "half a surrogate pair": ('{"question": "\\ud800"}', augment.BROKEN),
    "the original": ('{"question": "ORIGINAL"}', augment.ORIGINAL),
    "the original with other marks": ('{"question": " original ！"}', augment.ORIGINAL),
    "a repeat": ('{"question": "a"}', augment.REPEAT),
    "a repeat with other marks": ('{"question": "Ａ？"}', augment.REPEAT),
}


@mutation("data_gen/augment.py", "if [key for key, _ in pairs] != [KEY]:", "if KEY not in dict(pairs):")
@mutation(
    "data_gen/augment.py",
    'enumerate(text.split("\\n"), 1) if line.strip()]',
    'enumerate(filter(str.strip, text.split("\\n")), 1)]',
)
@pytest.mark.parametrize("case", REJECTED)
def test_a_line_that_is_not_well_formed_is_reported_with_its_number_and_reason(case):
    line, why = REJECTED[case]
    text = f'{{"question": "a"}}\n\n{line}\n{{"question": "b"}}\r\n'
    assert parse(text, 5, "Original?") == (["a", "b"], [(3, why, line)])


@mutation("data_gen/augment.py", "elif not why and len(rewrites) == ways:", "elif not why and number > 2 * ways:")
def test_lines_beyond_those_asked_for_are_reported():
    reply = lines("a", "b", "c", "d")
    assert parse(reply, 2) == (["a", "b"], [(3, augment.SURPLUS, lines("c")), (4, augment.SURPLUS, lines("d"))])


@mutation("data_gen/augment.py", "if lines and FENCE.fullmatch(lines[end][1]):", "if False:")
@pytest.mark.parametrize("start, end", [("```json", "```"), ("```", ""), ("", "```"), ("\n``` ", "\n```\n\n")])
def test_a_fence_round_the_reply_is_no_line_of_it(start, end):
    assert parse(f"{start}\n{lines('a', 'b')}\n{end}", 2) == (["a", "b"], [])


@pytest.mark.parametrize("reply", ["", "\n \n", "```json\n```", "```"])
def test_an_empty_reply_has_nothing(reply):
    assert parse(reply, 3) == ([], [])


@mutation(
    "data_gen/augment.py",
    'enumerate(text.split("\\n"), 1) if line.strip()]',
    "enumerate(text.splitlines(), 1) if line.strip()]",
)
def test_separators_that_are_not_newlines_do_not_cut_a_line():
    assert parse(lines("a\u2028b", "c\x85d"), 2) == (["a\u2028b", "c\x85d"], [])


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8).map(str.strip).filter(str.strip)
JUNK = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n"), max_size=20),
    st.sampled_from([line for line, why in REJECTED.values() if why not in (augment.ORIGINAL, augment.REPEAT)]),
    st.dictionaries(st.sampled_from(["q", "question", "answer"]), st.none() | st.integers() | st.lists(TEXTS)).map(
        json.dumps
    ),
)


def is_row(line):
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and list(value) == ["question"] and isinstance(value["question"], str)


@mutation(
    "data_gen/augment.py",
    "            rejected.append((number, why, line))",
    "            rejected += [(number, why, line)] if why != EMPTY else []",
)
@given(st.lists(TEXTS.map(lambda t: (True, t)) | JUNK.filter(lambda j: not is_row(j)).map(lambda j: (False, j))))
@settings(deadline=None)
def test_exactly_the_well_formed_lines_among_junk_are_kept_and_every_other_is_reported(mixed):
    good, reply = [], []
    for well_formed, text in mixed:
        if not well_formed:
            reply.append(text)
        elif plain(text) not in map(plain, good):
            good.append(text)
            reply.append(json.dumps({"question": text}))
    rewrites, rejected = parse("\n".join(["x", *reply, "x"]), 1000)
    assert rewrites == good
    junk = [(number, line) for number, line in enumerate(["x", *reply, "x"], 1) if line.strip() and not is_row(line)]
    assert [(number, line) for number, _, line in rejected] == junk


@mutation("data_gen/augment.py", "(?<!\\d)[\\s.,:]+|[\\s.,:]+(?!\\d)|", "[\\s.,:]+|")
@pytest.mark.parametrize(
    "one, other, same",
    [
        ("What is 3.5?", "what is  3.5", True),
        ("你吃饭了吗？", "你吃饭了吗", True),
        ("Ｗｈａｔ　ｎｏｗ？！", "what now", True),
        ("What is 3.5?", "What is 35?", False),
        ("3 5", "35", False),
        ("3 + 5", "3 * 5", False),
        ("x²", "x2", False),
        ("?", "!", False),
    ],
)
def test_texts_that_differ_in_marks_width_and_case_ask_the_same(one, other, same):
    assert (plain(one) == plain(other)) == same


# ---- the rows --------------------------------------------------------------------------------------------------------


def test_rewrites_get_the_answer_of_their_row_and_the_originals_stay(run):
    replies = {"Old?": lines("Aged?", "Elderly?", "Not young?"), "New?": lines("Fresh?", "Novel?", "Recent?")}
    code, rows, err = run(replies.get, ("Old?", "yes"), ("New?", "no"))
    assert code == 0
    yes, no = ("Old?", "Aged?", "Elderly?", "Not young?"), ("New?", "Fresh?", "Novel?", "Recent?")
    assert rows == sorted([*((q, "yes") for q in yes), *((q, "no") for q in no)])
    assert "8 rows (2 originals; 6 of 6 rewrites, 0 not kept) in" in err and "2 asked" in err


def test_only_new_leaves_the_originals_out(run):
    _, rows, err = run(lambda q: lines("a", "b", "c"), ("Old?", "yes"), flags=("--ways", "3", "--only-new"))
    assert rows == [("a", "yes"), ("b", "yes"), ("c", "yes")] and "3 rows (0 originals; " in err


def test_what_is_not_kept_is_named_on_stderr_with_row_and_line_and_counted(run):
    _, rows, err = run(lambda q: f"Sure!\n{lines('a', 'Old', 'a')}", ("Old?", "yes"))
    assert rows == [("Old?", "yes"), ("a", "yes")]
    for number, why in ((1, augment.NOT_JSON), (3, augment.ORIGINAL), (4, augment.REPEAT)):
        assert re.search(rf"data\.jsonl:1: line {number} of the reply is not kept, {why}: ", err)
    assert "data.jsonl:1: 1 of 3 rewrites" in err and "3 not kept (" in err and f"{augment.REPEAT}: 1" in err


@mutation("data_gen/augment.py", "        taken.add(turn.asks(rewrite))", "        pass")
@mutation(
    "data_gen/augment.py",
    "taken, found, whys = {turn.asks(turn.question) for turn in turns}, [[] for _ in turns], Counter()",
    "taken, found, whys = set(), [[] for _ in turns], Counter()",
)
def test_no_question_gets_two_answers(run):
    replies = {"A?": lines("B!", "both", "a one"), "B?": lines("Both?", "A", "b one")}
    _, rows, err = run(replies.get, ("A?", "1"), ("B?", "2"))
    assert rows == [("A?", "1"), ("B?", "2"), ("a one", "1"), ("b one", "2"), ("both", "1")]
    assert err.count(augment.OTHER_ROW) == 3 + 1  # each, and their count


def test_what_a_reply_says_cannot_move_the_cursor(run):
    _, _, err = run(lambda q: "\x1b[2J\rgone\n" + lines("a"), ("Old?", "yes"))
    assert "\x1b" not in err and "\r" not in err.replace("\r\n", "") and "\\x1b[2J" in err


@mutation(
    "data_gen/augment.py",
    'return (self.before[0]["content"] if self.before else "", plain(question))',
    'return ("", plain(question))',
)
def test_the_system_turn_goes_with_every_rewrite_and_may_make_two_answers_right(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "from_flags", lambda args: FakeTeacher(lambda q: lines("Who's there?")))
    data, out, rows = tmp_path / "data.jsonl", tmp_path / "out.jsonl", []
    for name in ("Ann", "Bob"):
        turns = [("system", f"You are {name}."), ("user", "Who?"), ("assistant", name)]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    data.write_text("\n".join(map(json.dumps, rows)))
    assert main(["--data", str(data), "--ways", "1", "--only-new", "--out", str(out)]) == 0
    assert pairs_of(out) == [(f"You are {name}.", "Who's there?", name) for name in ("Ann", "Bob")]


def test_a_question_that_was_not_asked_keeps_its_original_and_is_counted(run):
    code, rows, err = run({"A?": lines("a one")}.get, ("A?", "1"), ("B?", "2"))
    assert code == 0 and rows == [("A?", "1"), ("B?", "2"), ("a one", "1")]
    assert "1 of 2 questions were not asked: --max-requests 1 is reached" in err


@mutation("data_gen/augment.py", "place = places.pop(reply.key)", "place = places.pop(next(iter(places)))")
def test_a_reply_belongs_to_its_question_where_one_before_it_has_none(run):
    _, rows, _ = run({"B?": lines("b one")}.get, ("A?", "1"), ("B?", "2"), ("C?", "3"))
    assert rows == [("A?", "1"), ("B?", "2"), ("C?", "3"), ("b one", "2")]


def test_no_usable_line_at_all_is_an_error_and_writes_nothing(run):
    code, rows, err = run(lambda q: "I cannot help with that.", ("A?", "1"))
    assert (code, rows) == (3, None) and "error: no rewrites in" in err and f"{augment.NOT_JSON}: 1" in err


def test_the_seed_gives_the_order_and_the_same_seed_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        teacher, "from_flags", lambda args: FakeTeacher(lambda q: lines(*(f"{q} {c}" for c in "abcdef")))
    )
    data = written(tmp_path / "data.jsonl", ("Old?", "yes"), ("New?", "no"))
    outs = []
    for seed in ("1", "1", "2"):
        out = tmp_path / "out.jsonl"
        assert main(["--data", str(data), "--ways", "6", "--seed", seed, "--out", str(out)]) == 0
        outs.append(out.read_bytes())
    assert outs[0] == outs[1] != outs[2] and sorted(outs[0].split(b"\n")) == sorted(outs[2].split(b"\n"))


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("roles", ["uaua", "sua ua", "text"])
def test_rows_that_are_not_of_one_turn_are_named(tmp_path, roles):
    names = {"u": "user", "a": "assistant", "s": "system"}
    messages = [
        {"role": names[role], "content": f"{n}"} for n, role in enumerate(roles.replace(" ", "")) if role in names
    ]
    row = {"text": "words"} if roles == "text" else {"messages": messages}
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"q": "x", "a": "y"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(BadInput, match=r"data\.jsonl:2: expected one question and one answer"):
        read_turns(data)


@mutation("data_gen/augment.py", "if first.answer != turn.answer:", "if False:")
def test_two_answers_to_one_question_are_refused_and_an_exact_repeat_is_read_once(tmp_path):
    same = written(tmp_path / "same.jsonl", ("A?", "1"), ("A?", "1"), ("B?", "1"))
    assert [turn.question for turn in read_turns(same)] == ["A?", "B?"]
    with pytest.raises(BadInput, match=r"conflict in .*:2: .*:1 has another answer"):
        read_turns(written(tmp_path / "two.jsonl", ("A?", "1"), ("A?", "2")))


BAD = {
    "no ways": ("--ways", "0"),
    "too many ways": ("--ways", "101"),
    "ways in words": ("--ways", "ten"),
    "language": ("--lang", "fr"),
    "missing folder": ("--out", "no/such/out.jsonl"),
    "out is a folder": ("--out", "."),
    "out is the data": ("--out", "data.jsonl"),
    "missing data": ("--data", "no.jsonl"),
    "no teacher": ("", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_exit_2_with_one_line_and_write_nothing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = written(Path("data.jsonl"), ("A?", "1")).read_bytes()
    if case != "no teacher":
        monkeypatch.setattr(teacher, "from_flags", lambda args: FakeTeacher(lambda q: lines("x")))
    flags = {"--data": "data.jsonl", "--ways": "2", "--out": "out.jsonl"} | {BAD[case][0]: BAD[case][1]}
    assert main([word for pair in flags.items() for word in pair if word]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err) and BAD[case][1] in err
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"] and Path("data.jsonl").read_bytes() == before


# ---- the command with a real endpoint --------------------------------------------------------------------------------


def test_script_and_module_ask_an_endpoint_once_and_give_the_same_file(tmp_path):
    """The second run of a command takes the replies from the journal beside --out."""
    pytest.importorskip("openai")
    data = written(tmp_path / "data.jsonl", ("你吃饭了吗？", "吃即未吃。"))
    reply = "```json\n" + lines("吃过饭没有？", "饭吃了吗，施主？") + "\n```"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OPENAI_API_KEY": "k"}
    outs = []
    with TeacherServer(lambda prompt, attempt: Say(reply)) as server:
        flags = ["--data", str(data), "--ways", "2", "--lang", "zh", "--base-url", server.url, "--teacher", "t"]
        for spelling, folder in (([str(ROOT / "data_gen/augment.py")], tmp_path), (["-m", "data_gen.augment"], ROOT)):
            command = [sys.executable, *spelling, *flags, "--out", str(tmp_path / "out.jsonl")]
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stdout) == (0, ""), done.stderr
            assert "3 rows (1 originals; 2 of 2 rewrites, 0 not kept) in" in done.stderr
            outs.append((tmp_path / "out.jsonl").read_bytes())
        assert [prompt("你吃饭了吗？", "吃即未吃。", 2, "zh")] == server.prompts()
    assert outs[0] == outs[1] and outs[0].decode().count("吃即未吃。") == 3


def test_help_names_every_flag_and_exits_0(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--data", "--ways", "--lang", "--only-new", "--seed", "--base-url", "--out"))
    assert "None" not in text and "SUPPRESS" not in text
