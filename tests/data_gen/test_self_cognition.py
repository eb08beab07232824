"""The generated identity rows: what they say, what they never say, and that they keep off the held-out questions.

The held-out files are read by code only, and a failure names rows of ours, never theirs.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_gen import self_cognition
from data_gen.self_cognition import TABLES, conversations, main
from lora.errors import BadInput
from tests.mutation import mutation

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = pytest.mark.parametrize("lang", TABLES)
NAME, AUTHOR = "Zorblax", "Quuxbar Labs"


def identity_pairs(lang):
    return [*TABLES[lang][0], *TABLES[lang][1]]


def pairs_of(rows):
    return [tuple(message["content"] for message in row["messages"]) for row in rows]


def written(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def words(text):
    return re.sub(r"[^\w\s]", " ", re.sub(r"['’]", "", text.lower())).split()


def runs(text):
    found = words(text)
    return {tuple(found[start : start + 4]) for start in range(len(found) - 3)}


# ---- what the rows say -----------------------------------------------------------------------------------------------


@LANGUAGES
def test_forty_identity_and_forty_ordinary_pairs_and_no_question_twice(lang):
    identity, ordinary = identity_pairs(lang), TABLES[lang][2]
    assert len(identity) >= 40 and len(ordinary) >= 40
    questions = [tuple(words(question)) for question, _ in [*identity, *ordinary]]
    assert len(set(questions)) == len(questions)


@LANGUAGES
def test_every_identity_answer_has_the_name_near_its_start_and_most_have_the_author(lang):
    answers = [answer for _, answer in identity_pairs(lang)]
    assert [answer for answer in answers if not 0 <= answer.find("[NAME]") <= 36] == []
    assert sum("[AUTHOR]" in answer for answer in answers) >= 0.9 * len(answers)


@LANGUAGES
def test_no_ordinary_row_mentions_name_or_author(lang):
    identity = {question for question, _ in identity_pairs(lang)}
    rows = pairs_of(conversations(NAME, AUTHOR, lang))
    for question, answer in rows:
        assert (NAME in answer) == (question in identity)
        assert AUTHOR not in answer or question in identity
        assert NAME not in question and AUTHOR not in question
    assert len(rows) == len(identity) + len(TABLES[lang][2])


@LANGUAGES
def test_identity_answers_have_ten_shapes_or_more(lang):
    """A shape is the words around the name; where the sentence before it differs, so does the shape."""
    shapes = {answer.split("[NAME]")[0] for _, answer in identity_pairs(lang)}
    assert len(shapes) >= 10


def test_english_answers_are_short():
    for _, answer in identity_pairs("en"):
        assert 6 <= len(answer.split()) <= 25, answer
    for _, answer in TABLES["en"][2]:
        assert 6 <= len(answer.split()) <= 40, answer


def test_an_assistant_called_bixby_is_not_taught_to_deny_it():
    rows = pairs_of(conversations("Bixby", AUTHOR))
    assert [question for question, _ in rows if "bixby" in question.lower()] == []
    assert any("Bixby" in question for question, _ in pairs_of(conversations(NAME, AUTHOR)))


def against_held_out(ours):
    """How many held-out questions there are, and which of ours share four words in a row with one, or equal one.

    They are read here and not in the test, so that a failing assertion cannot print them.
    """
    files = [ROOT / "tests/fixtures" / name for name in ("identity_questions.txt", "unrelated_questions.txt")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    theirs = [line for line in lines if line.strip() and not line.startswith("#")]
    their_runs = set().union(*map(runs, theirs))
    same = {tuple(words(line)) for line in theirs}
    bad = [ask for ask in ours if tuple(words(ask)) in same or not runs(ask).isdisjoint(their_runs)]
    return len(theirs), bad


@mutation("data_gen/self_cognition.py", '"who r u"', '"Identify yourself!"')
def test_no_english_training_question_shares_four_words_in_a_row_with_a_held_out_one_or_equals_one():
    ours = [question for table in TABLES["en"] for question, _ in table]
    number, bad = against_held_out(ours)
    assert number == 120
    assert bad == [], f"reword these rows of self_cognition.py: {bad}"


# ---- placeholders ----------------------------------------------------------------------------------------------------

AWKWARD = st.sampled_from(
    ["\\1", "\\g<0>", "\\", "{", "}", "{name}", "[", "]", "[a]", "%s", "$NAME", '"', "'", " ", "é"]
)
PRINTABLE = st.characters(exclude_categories=("C", "Z"))
TEXT = st.lists(PRINTABLE | AWKWARD, min_size=1, max_size=12).map("".join).filter(str.strip)


@mutation("data_gen/self_cognition.py", "lambda slot: values[slot[1]]", 'lambda slot: values["NAME"]')
@LANGUAGES
@given(name=TEXT, author=TEXT)
@settings(max_examples=60, deadline=None)
def test_no_placeholder_survives_and_any_printable_name_is_taken_literally(lang, name, author):
    assume(not self_cognition.LEFT_OVER.search(f"{name} {author} {name}"))
    rows = dict(pairs_of(conversations(name, author, lang)))
    for question, template in identity_pairs(lang):
        if question in rows or name.casefold() not in question.casefold():
            expected = [part.split("[AUTHOR]") for part in template.split("[NAME]")]
            assert rows[question] == name.join(author.join(part) for part in expected)
    for question, answer in TABLES[lang][2]:
        assert rows[question] == answer


@mutation("data_gen/self_cognition.py", "if left := LEFT_OVER.search(filled):", "if left := None:")
@pytest.mark.parametrize("answer", ["I'm [NAME] by [COMPANY].", "I'm [NAME] by {{AUTHOR}}.", "I'm [NAME], {{ x }}."])
def test_a_placeholder_that_would_survive_in_a_row_is_an_error(monkeypatch, answer):
    monkeypatch.setitem(TABLES, "en", ((("Who are you?", answer),), (), TABLES["en"][2]))
    with pytest.raises(BadInput, match="placeholder"):
        conversations(NAME, AUTHOR)


def test_name_and_author_that_make_a_placeholder_together_are_an_error():
    with pytest.raises(BadInput, match="placeholder"):
        conversations("a{{b", "c}}d")


# ---- order and number ------------------------------------------------------------------------------------------------


@LANGUAGES
@pytest.mark.parametrize("rows", [None, 20, 200])
def test_same_seed_gives_the_same_bytes_and_another_seed_another_order(lang, rows):
    first = conversations(NAME, AUTHOR, lang, rows, seed=0)
    assert written(conversations(NAME, AUTHOR, lang, rows, seed=0)) == written(first)
    other = conversations(NAME, AUTHOR, lang, rows, seed=1)
    assert other != first
    kinds = [NAME in answer for _, answer in pairs_of(first)]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)
    if rows is None:
        assert sorted(pairs_of(other)) == sorted(pairs_of(first))
    if rows == 20:  # fewer than there are: the seed chooses which
        assert set(pairs_of(other)) != set(pairs_of(first))


@mutation("data_gen/self_cognition.py", "(rows + 1 - number) // 2", "(rows + number) // 2")
@LANGUAGES
@pytest.mark.parametrize("rows", [1, 2, 7, 48, 301])
def test_rows_n_gives_n_rows_half_and_half_and_cycles_evenly(lang, rows):
    pairs = pairs_of(conversations(NAME, AUTHOR, lang, rows))
    identity = [pair for pair in pairs if NAME in pair[1]]
    assert (len(pairs), len(identity)) == (rows, (rows + 1) // 2)
    times = [identity.count(pair) for pair in set(identity)]
    assert max(times) - min(times) <= 1
    assert len(times) == min(len(identity), len(identity_pairs(lang)))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_script_and_module_spelling_give_the_same_file(tmp_path):
    """The script from another folder: it finds `lora` in a bare checkout, too."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    flags = ["--name", NAME, "--author", AUTHOR, "--lang", "zh", "--rows", "100", "--seed", "3", "--out"]
    spellings = {"a.jsonl": [str(ROOT / "data_gen/self_cognition.py")], "b.jsonl": ["-m", "data_gen.self_cognition"]}
    for (out, spelling), folder in zip(spellings.items(), (tmp_path, ROOT), strict=True):
        command = [sys.executable, *spelling, *flags, str(tmp_path / out)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert "100 rows (50 identity, 50 ordinary, " in done.stderr and len(done.stderr.splitlines()) == 1
    expected = written(conversations(NAME, AUTHOR, "zh", 100, 3))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes() == expected


def test_out_is_jsonl_of_two_turns_and_replaces_an_old_file(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    out.write_text("old\n" * 10_000)
    assert main(["--name", NAME, "--author", "Zoë 🦊", "--rows", "9", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows == conversations(NAME, "Zoë 🦊", rows=9) and "Zoë 🦊" in text
    assert {tuple(message["role"] for message in row["messages"]) for row in rows} == {("user", "assistant")}
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert "9 rows (5 identity, 4 ordinary) in" in capsys.readouterr().err


BAD = {
    "empty name": {"--name": ""},
    "blank author": {"--author": "  "},
    "two lines": {"--name": "A\nB"},
    "line separator": {"--author": "A\u2028B"},
    "control": {"--name": "A\x1b[2J"},
    "lone surrogate": {"--name": "A\udc80"},
    "placeholder": {"--name": "[AUTHOR]"},
    "braces": {"--author": "{{author}}"},
    "language": {"--lang": "fr"},
    "no rows": {"--rows": "0"},
    "too many rows": {"--rows": "1000001"},
    "rows in words": {"--rows": "many"},
    "seed": {"--seed": "x"},
    "missing folder": {"--out": "no/such/folder/rows.jsonl"},
    "out is a folder": {"--out": "."},
    "out is a device": {"--out": "/dev/null"},
    "name missing": {"--name": None},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_exit_2_with_one_line_and_write_nothing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = {"--name": NAME, "--author": AUTHOR, "--out": "rows.jsonl"} | BAD[case]
    assert main([word for flag, value in flags.items() if value is not None for word in (flag, value)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err)
    assert all(flag in err for flag in BAD[case])
    assert ("mkdir -p no/such/folder" in err) == (case == "missing folder")
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag_and_exits_0(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--name", "--author", "--lang {en,zh}", "--rows", "--seed", "--out"))
    assert "None" not in text and "SUPPRESS" not in text
