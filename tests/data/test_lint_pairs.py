"""What `--check` finds in preference pairs and in judged answers, and what it leaves alone."""

import random

import pytest

from lora.data.formats import Conversation
from lora.data.lint import CODES, check
from lora.data.pairs import cut
from tests.data.test_lint import row
from tests.mutation import mutation

WORDS = ["river", "stone", "lamp", "window", "garden", "paper", "silver", "morning", "bread", "harbour", "candle"]


def pair(question, chosen, rejected, line=1, file="p.jsonl", other=None):
    """A pair of one turn each; `other` is what the rejected side is asked."""
    sides = cut(row(question, chosen).messages, row(other or question, rejected).messages)
    return Conversation(sides[0], f"{file}:{line}", "prompt/chosen/rejected", sides[1])


def judged(question, answer, good, line=1):
    return row(question, answer, where=f"k.jsonl:{line}")._replace(good=good)


def found(*train, evaluation=(), noticed=()):
    findings = check(train, evaluation, noticed)
    assert {f.code for f in findings} <= set(CODES) and all(str(f).isprintable() for f in findings)
    return [(f.line, f.code) for f in findings]


def said(*train):
    [finding] = check(train)
    return finding.message


# ---- one pair --------------------------------------------------------------------------------------------------------


@mutation("lora/data/lint_pairs.py", "if _answer(row.messages[turn:]) == _answer(row.rejected[turn:]):", "if False:")
def test_equal_sides_are_found_and_sides_that_differ_in_case_are_not():
    assert found(pair("Q", "Yes.", "Yes.")) == found(pair("Q", "Yes.", " Yes.\n")) == [(1, "EQUAL")]
    assert found(pair("Q", "Yes.", "yes")) == found(pair("Q", "Yes.", "No.")) == []


@mutation("lora/data/lint_pairs.py", 'row.messages[turn]["role"] != "assistant" or', "False and")
def test_prompts_that_differ_are_found_and_earlier_answers_that_differ_are_not():
    assert found(pair("Q", "Yes.", "No.", other="R")) == [(1, "PROMPTS")]
    sides = cut(row("Q", "A", "R", "B").messages, row("Q", "C", "R", "D").messages)
    assert found(Conversation(sides[0], "p.jsonl:1", "chosen/rejected", sides[1])) == []
    assert "message 3" in said(Conversation(*[row("Q", "A", "R", "B").messages, "p.jsonl:1", "x"],
                                            row("Q", "A", "S", "B").messages))  # fmt: skip


@mutation("lora/data/lint.py", "for one in noticed if len(one) == 3]", "for one in ()]")
@pytest.mark.parametrize("code", ["SCORES", "PROMPTS", "OVERLONG"])
def test_what_was_noticed_while_rows_were_read_is_a_finding_with_what_to_do(code):
    [finding] = check([pair("Q", "Yes.", "No.", 3)], (), [("p.jsonl:3", "what it is", code)])
    assert str(finding).startswith(f"p.jsonl:3: {code}: what it is. ") and finding.message.count(". ") == 1


@mutation("lora/data/lint.py", "rows[where.rpartition", "rows[where, where.rpartition")
def test_a_field_of_both_sides_is_one_row():
    noticed = [("p.jsonl:1", "mood"), ("p.jsonl:1", "mood"), ("p.jsonl:2", "mood")]
    [finding] = check([], (), noticed)
    assert finding.message.startswith('2 rows with "mood"')


@mutation("lora/data/lint.py", "turns = (*row.messages, *(row.rejected or ()))", "turns = row.messages")
def test_a_placeholder_is_found_on_either_side():
    assert found(pair("Q", "I am [NAME].", "No.")) == found(pair("Q", "No.", "I am [NAME].")) == [(1, "PLACEHOLDER")]


@mutation("lora/data/lint.py", "if row.good is not False else ()", "if True else ()")
def test_a_refusal_is_a_leftover_where_it_is_chosen_and_none_where_it_is_rejected_or_bad():
    sorry = "I'm sorry, but I can't help with that."
    assert found(pair("Q", sorry, "Yes.")) == [(1, "LEFTOVER")] and found(pair("Q", "Yes.", sorry)) == []
    assert found(judged("Q", sorry, True)) == [(1, "LEFTOVER")] and found(judged("Q", sorry, False)) == []


# ---- lengths ---------------------------------------------------------------------------------------------------------


def pairs_of(longer: int, shorter: int, equal: int = 0):
    """Pairs of which so many have the longer answer chosen."""
    source, rows = random.Random(0), []
    for line in range(1, longer + shorter + equal + 1):
        words = [" ".join(source.choices(WORDS, k=8)) for _ in range(3)]
        sides = f"{words[1]} {words[2]}", words[0]
        if line > longer + shorter:
            sides = words[1], words[1][::-1]
        rows.append(pair(f"{line}?", *(sides if line <= longer else sides[::-1]), line))
    return rows


@mutation("lora/data/lint_pairs.py", "if not n or many < BIASED * n or", "if not n or", case="65-35-False")
@mutation("lora/data/lint_pairs.py", "or many - n / 2 < DEVIATIONS * sqrt(n) / 2:", "or False:", case="8-0-False")
@mutation("lora/data/lint_pairs.py", "many = max(longer, n - longer)", "many = longer", case="0-40-True")
@pytest.mark.parametrize(
    ("longer", "shorter", "biased"),
    [(40, 0, True), (0, 40, True), (67, 33, True), (65, 35, False), (50, 50, False), (8, 0, False), (9, 0, True),
     (20, 10, False), (1, 0, False), (0, 0, False)],
    ids=lambda value: str(value),
)  # fmt: skip
def test_a_length_bias_is_a_finding_from_two_thirds_and_three_standard_deviations_on(longer, shorter, biased):
    rows = [*pairs_of(longer, shorter), pair("Equal?", "abc", "cba", 999)]
    assert ("LENGTH" in [code for _, code in found(*rows)]) == biased


@mutation("lora/data/lint_pairs.py", 'which, fix = "longer" if many == longer', 'which, fix = "longer" if True')
def test_a_length_bias_is_reported_with_its_size():
    rows = [pair(f"{WORDS[i]} {i}?", "a bc " * (i + 2), "d" * (i + 1), i + 1) for i in range(10)]
    line = (
        "in 10 of 10 pairs (100%) the longer answer is chosen; on average chosen ones have 32 characters or 13 words, "
    )
    assert said(*rows).startswith(line + "rejected ones 6 characters or 1 words. ")
    assert "the shorter answer is chosen" in said(*(r._replace(messages=r.rejected, rejected=r.messages) for r in rows))


@mutation("lora/data/lint_pairs.py", 'files[row.where.rpartition(":")[0]]', 'files[""]')
def test_each_file_has_its_own_length_bias():
    one = pairs_of(30, 0)
    other = [r._replace(messages=r.rejected, rejected=r.messages, where=f"q.jsonl:{i}") for i, r in enumerate(one, 1)]
    findings = [f for f in check([*one, *other]) if f.code == "LENGTH"]
    assert [(f.file, "longer" in f.message) for f in findings] == [("p.jsonl", True), ("q.jsonl", False)]


# ---- rows beside others ----------------------------------------------------------------------------------------------


@mutation("lora/data/lint.py", "lines += other[cut:]", "pass")
def test_a_pair_is_a_duplicate_where_both_sides_are():
    assert found(pair("Q", "A", "B"), pair("q!", "a", "b.", 2)) == [(2, "DUPLICATE")]
    assert found(pair("Q", "A", "B"), pair("Q", "A", "C", 2)) == []


@mutation("lora/data/lint.py", "if (q, a, not good) in known}", "if False}")
@mutation("lora/data/lint.py", "verdicts = verdicts if lines != other else ()", "pass")
def test_pairs_that_contradict_each_other_are_found():
    assert "swapped in p.jsonl:1" in said(pair("Q", "A", "B"), pair("q?", "b", "a", 2))
    assert "its chosen answer is rejected in p.jsonl:1" in said(pair("Q", "A", "B"), pair("Q", "B", "C", 2))
    assert "its rejected answer is chosen in p.jsonl:1" in said(pair("Q", "A", "B"), pair("Q", "C", "A", 2))
    assert found(pair("Q", "A", "B"), pair("R", "B", "A", 2)) == []
    assert found(pair("Q", "A", "B"), pair("Q", "A", "C", 2), pair("Q", "D", "B", 3)) == []
    assert found(pair("Q", "A", "a"), pair("Q", "a", "B", 2)) == []  # the first differs in case alone


@mutation("lora/data/lint.py", "for row in (row for row in rows if row.verdicts is None):", "for row in rows:")
def test_one_question_with_several_answers_is_no_conflict_where_answers_are_compared_or_judged():
    assert found(pair("Q", "A", "B"), pair("Q", "C", "D", 2)) == []
    assert found(judged("Q", "A", True), judged("Q", "C", True, 2), judged("Q", "D", False, 3)) == []


@mutation("lora/data/lint.py", "good = row.verdicts and row.verdicts[0][2]", "good = None")
def test_an_answer_that_is_good_and_bad_is_found():
    assert "its answer is bad, and in k.jsonl:1 it is not" in said(judged("Q", "A", True), judged("Q", "a.", False, 2))
    long = " ".join(WORDS)
    assert found(judged("Q", long, True), judged("Q", long, False, 2)) == [(2, "CONFLICT")]
    assert found(judged("Q", "A", True), judged("Q", "A", True, 2), judged("Q", "B", False, 3)) == [(2, "DUPLICATE")]


@mutation("lora/data/lint_pairs.py", "len({row.good for row in judged}) == 1", "False")
def test_answers_that_are_all_good_or_all_bad_are_found():
    for good, word in ((True, "good"), (False, "bad")):
        assert f"all 2 answers are {word}. " in said(judged("Q", "A", good), judged("R", "B", good, 2))
    assert found(judged("Q", "A", True), judged("R", "B", False, 2)) == found(judged("Q", "A", True)) == []


@mutation("lora/data/lint.py", "lines += other[cut:]", "lines = other[cut:] + lines")
def test_a_held_out_pair_whose_question_is_trained_is_found():
    train = [pair("What is the sea?", "Water.", "Sand.")]
    assert found(*train, evaluation=[pair("what is the sea", "Salt.", "Mud.", 7, "e.jsonl")]) == [(7, "OVERLAP")]
    assert found(*train, evaluation=[pair("What is a hill?", "Water.", "Sand.", 7, "e.jsonl")]) == []
