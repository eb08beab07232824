"""Tasks are graded by rules: the product that an answer states, the expression that makes a target."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen import multiply as multiplication
from data_gen import tasks
from tests.mutation import mutation

GAME = {"nums": [3, 5, 8], "target": 9}


def user(text: str) -> list[dict]:
    return [{"role": "system", "content": "Work 1 by 1."}, {"role": "user", "content": text}]


# ---- multiply --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", multiplication.STYLES)
@pytest.mark.parametrize("lang", ["en", "zh"])
@mutation(
    "data_gen/tasks.py",
    "return float(multiplication.final(text) == a * b)",
    "return float(multiplication.final(text) is not None)",
)
def test_a_right_product_is_worth_1_and_a_wrong_one_0(style, lang):
    right, wrong = multiplication.solve(12, 34, style, lang), multiplication.solve(12, 35, style, lang)
    for row, turns in (({"a": 12, "b": 34}, []), ({"a": "12", "b": " 34"}, []), ({}, user("Compute 12*34"))):
        assert [tasks.multiply(row, turns, text) for text in (right, wrong, "", "It is 408, so to say.")] == [
            1,
            0,
            0,
            0,
        ]


def test_every_question_of_multiply_py_says_its_factors():
    for lang in multiplication.LINES:
        for wording in (None, *range(len(multiplication.WORDINGS[lang]))):
            turns = [*user("Compute 1*1"), {"role": "assistant", "content": "=1"}]
            turns.append({"role": "user", "content": multiplication.question(70, 8, lang, wording)})
            assert tasks.factors({}, turns) == (70, 8)


@mutation("data_gen/tasks.py", 'row.get("a") is not None and', "False and")
def test_columns_count_before_the_question():
    assert tasks.factors({"a": 2, "b": 3}, user("Compute 4*5")) == (2, 3)
    assert tasks.factors({"a": 2}, user("Compute 4*5")) == tasks.factors({"a": 2, "b": None}, user("4 5")) == (4, 5)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({}, []), ({}, user("What is it?")), ({}, user("Compute 3*4*5")), ({"a": 3}, user("Compute 3")),
        ({}, user("Compute 1.5*2")), ({}, user("Compute 1,234*5")), ({}, user("Compute -3*4")),
        ({"a": "x", "b": 1}, []),
        ({"a": 3.0, "b": 1}, []), ({"a": True, "b": 1}, []), ({"a": -3, "b": 1}, []), ({"a": [3], "b": 1}, []),
        ({}, user("9" * 5000 + "*3")), ({"a": "9" * 5000, "b": 3}, []), ({"a": 10**40, "b": 3}, []),
    ],
)  # fmt: skip
@mutation("data_gen/tasks.py", 'WRITTEN = re.compile(r"[-+]?[0-9]+(?:[.,][0-9]+)*")', 'WRITTEN = re.compile("[0-9]+")')
@mutation("data_gen/tasks.py", "or isinstance(value, bool) or", "or")
def test_a_row_without_two_factors_is_no_task(row, turns):
    with pytest.raises(ValueError, match=r"\. [A-Z]"):
        tasks.multiply(row, turns, "=12")


# ---- countdown -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "(8-5)*3", "(8 - 5) * 3 = 9", "3*8-3*5\n(8 − 5) × 3 = 9", "so: (8-5)x3.", "The answer is 3 X (8 - 5) = 9.",
        "<answer>(8-5)*3</answer>", "<ANSWER> (8-5)*3 = 9 </ANSWER> and so on = 7",
        "<answer>1</answer><answer>(8-5)*3</answer>",
        "-(5-8)*3", "3*(8-5)", "((((8))-(5)))*+3\n\n", "<answer>\n(8-5)\n*3\n</answer>",
    ],
)  # fmt: skip
@mutation(
    "data_gen/tasks.py", "if tag[1] and begin is not None:", "if tag[1] and begin is not None and marked is None:"
)
def test_an_expression_of_every_number_once_that_makes_the_target_is_worth_1(text):
    assert tasks.countdown(GAME, [], text) == 1.0
    assert tasks.countdown({"numbers": ["8", 5, 3], "target": "9"}, [], text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "", "9", "(8-5)*3*1", "8+5-3-1", "8-5+3", "(8-5)*3-3+3", "8+1", "(8-5)3", "(8-5)(3)", "8 5 - 3 *",
        "(8-5*3", "8-5)*3",
        "()", "((", "8-5*", "*8", "8**3-5", "8//5*3", "(8-5)^2*3", "int((8-5)*3)", "__import__('os')",
        "x = (8-5)*3", "9 = (8-5)*3",
        "(8-5)*3\nSo that is it", "(8-5)*3.0", "max 8-5)*3", "(8-5)*3 <answer>9</answer>", "8/(5-5)*3", "5*3-8+2",
        "1e1-1", "<answer>9 </answer> (8-5)*3", "</answer>(8-5)*3<answer>9",
        "(8-5)*３",
    ],
)  # fmt: skip
@mutation("data_gen/tasks.py", "sorted(used) == sorted(given) and", "{*used} == {*given} and", case="(8-5)*3-3+3")
@mutation("data_gen/tasks.py", "and value == target)", ")", case="8-5+3")
@mutation("data_gen/tasks.py", "except (ValueError, ZeroDivisionError):", "except ValueError:", case="8/(5-5)*3")
def test_anything_else_is_worth_0(text):
    assert tasks.countdown(GAME, [], text) == 0.0


@mutation("data_gen/tasks.py", "values.append(Fraction(used[-1]))", "values.append(float(used[-1]))")
def test_fractions_are_exact():
    assert 1 / 49 * 49 != 1
    assert tasks.countdown({"nums": [1, 49, 7, 7], "target": 1}, [], "1 / 49 * (7 * 7)") == 1.0
    assert tasks.countdown({"nums": [3, 3, 8, 8], "target": 24}, [], "8 / (3 - 8 / 3) = 24") == 1.0


@mutation("data_gen/tasks.py", "    if len(text) > LONGEST:", "    if False:")
def test_no_answer_takes_long():
    begun = time.monotonic()
    huge = "<answer>" + "*".join(["9" * 40] * 100_000) + "</answer>"
    for text in (
        huge,
        "(" * 10**6,
        "-" * 10**6 + "3",
        "9" * 10**6,
        "3**8**8**8**8**8",
        "<answer>" * 10**5,
        "</answer>" * 10**5,
        "x " * 10**6,
    ):
        assert tasks.countdown(GAME, [], text) == tasks.multiply({"a": 3, "b": 4}, [], text) == 0.0
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "row",
    [
        {}, {"nums": [3, 5]}, {"target": 8}, {"nums": [], "target": 8}, {"nums": "3 5", "target": 8},
        {"nums": [3, -5], "target": 8}, {"nums": [3, 5.5], "target": 8}, {"nums": [3, 5], "target": "eight"},
        {"nums": [1] * 21, "target": 21}, {"nums": [True, 5], "target": 6}, {"nums": [3, 5], "target": None},
    ],
)  # fmt: skip
def test_a_row_without_numbers_and_a_target_is_no_game(row):
    with pytest.raises(ValueError, match=r"\. (Add it|Write a number)"):
        tasks.countdown(row, [], "3+5")


NUMBER = st.integers(0, 99).map(str)
EXPRESSIONS = st.recursive(
    NUMBER,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join),
        inner.map("({})".format),
        inner.map("-({})".format),
    ),
    max_leaves=12,
)


@given(EXPRESSIONS)
@settings(deadline=None, max_examples=300)
@mutation("data_gen/tasks.py", ">= STRENGTH[token]:", "> STRENGTH[token]:")
def test_values_are_those_of_python(text):
    exact = "".join(f"Fraction({part})" if part.isdigit() else part for part in tokens(text))
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            tasks.evaluate(text)
        return
    assert tasks.evaluate(text) == (expected, [int(part) for part in tokens(text) if part.isdigit()])


def tokens(text: str) -> list[str]:
    return tasks.TOKEN.findall(text)
