"""Worked multiplications: the article's example, a checker that finds the first wrong line, and what is held out.

An answer is one text, to the character. So whatever is done to it, the first line that differs is the first wrong one,
and that is what the checker, which solves nothing, must find.
"""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen import multiply
from data_gen.multiply import (
    ASK,
    LINES,
    STYLES,
    WORDINGS,
    Fault,
    check,
    conversations,
    final,
    held_out_conversations,
    is_test,
    main,
    pairs,
    question,
    solve,
)
from lora.data import formats
from lora.errors import BadInput
from tests.mutation import mutation

ROOT = Path(__file__).resolve().parents[2]
KINDS = [(style, lang) for style in STYLES for lang in LINES]
EVERY_KIND = pytest.mark.parametrize(("style", "lang"), KINDS)
NUMBERS = st.one_of(st.integers(1, 999), st.integers(1, 10**5), st.sampled_from([1, 9, 10, 99, 100, 805, 999, 10_000]))

# ---- answers ---------------------------------------------------------------------------------------------------------

PRINTED = """开始计算 874 * 265:
把 (874, 265) 拆成:
874 = 800 + 70 + 4
265 = 200 + 60 + 5
分别计算乘积:
800 * 200 = 160000
800 * 60 = 48000
……
4 * 60 = 240
4 * 5 = 20
开始相加乘积:
计算 160000 + 048000:
第0位,0 + 0 + 之前的进位 0 = 0
……
第4位,6 + 4 + 之前的进位 0 = 10;有进位1,保留0
第5位,1 + 0 + 之前的进位 1 = 2
得到结果 = 208000
计算 208000 + 004000:
……
计算 231590 + 000020:
第0位,0 + 0 + 之前的进位 0 = 0
第1位,9 + 2 + 之前的进位 0 = 11;有进位1,保留1
第2位,5 + 0 + 之前的进位 1 = 6
……
得到结果 = 231610
所以,最终结果是231610"""  # as the source prints it, a statement a line; …… are its own gaps

ENGLISH = """Start computing 15 * 70:
Split (15, 70):
15 = 10 + 5
70 = 70
Compute the products one by one:
10 * 70 = 700
5 * 70 = 350
Start adding the products:
Compute 700 + 350:
Place 0, 0 + 0 + previous carry 0 = 0
Place 1, 0 + 5 + previous carry 0 = 5
Place 2, 7 + 3 + previous carry 0 = 10; carry 1, keep 0
Result = 1050
So, the final result is 1050"""

TERSE = """874=a4b7c8
265=a5b6c2
a5:a4b7c8
a4*5=20+0=20+0=20
b7*5=35+0=35+2=37
c8*5=40+0=40+3=43
a0b7c3d4
b6:b4c7d8
b4*6=24+7=31+0=31
c7*6=42+3=45+3=48
d8*6=48+4=52+4=56
b1c8d6e5
c2:c4d7e8
c4*2=08+8=16+0=16
d7*2=14+6=20+1=21
e8*2=16+5=21+2=23
c6d1e3f2
f2e3d1c6b1a0
=231610"""


@mutation(
    "data_gen/multiply.py", "enumerate(zip(*map(reversed, rows), strict=True))", "enumerate(zip(*rows, strict=True))"
)
@mutation(
    "data_gen/multiply.py",
    """        total += other
""",
    """        total = total
""",
)
def test_the_articles_example_line_for_line():
    assert question(874, 265, "zh") == "计算874*265"
    answer = solve(874, 265, "article", "zh")
    between_gaps = (re.escape(part.strip("\n")) for part in PRINTED.split("……"))
    assert re.fullmatch(r"\n(?:.+\n)+".join(between_gaps), answer)
    assert len(answer.split("\n")) == 4 + 1 + 9 + 1 + 8 * (1 + 6 + 1) + 1
    sums = [line for line in answer.split("\n") if line.startswith("得到结果")]
    assert [int(line.split()[-1]) for line in sums] == [208000, 212000, 226000, 230200, 230550, 231350, 231590, 231610]


@mutation("data_gen/multiply.py", "width = max(len(str(a)), len(str(b)))", "width = len(str(a + b))")
def test_an_english_example_whose_carry_leaves_the_last_column():
    assert solve(15, 70, "article", "en") == ENGLISH


@mutation(
    "data_gen/multiply.py",
    """        total[end] = carry
""",
    "",
)
@pytest.mark.parametrize("lang", LINES)
def test_a_terse_example_the_same_in_every_language(lang):
    assert solve(874, 265, "terse", lang) == TERSE


def test_a_terse_product_that_has_a_digit_less_keeps_the_place():
    assert solve(7, 100, "terse", "en").split("\n")[-3:] == ["c7d0", "d0c7b0a0", "=700"]


def test_a_zero_makes_no_part_and_one_product_is_not_added():
    lines = solve(805, 30, "article", "zh").split("\n")
    assert lines[2:8] == [
        "805 = 800 + 5",
        "30 = 30",
        "分别计算乘积:",
        "800 * 30 = 24000",
        "5 * 30 = 150",
        "开始相加乘积:",
    ]
    single = ["分别计算乘积:", "500 * 8 = 4000", "所以,最终结果是4000"]
    assert solve(500, 8, "article", "zh").split("\n")[4:] == single


@mutation(
    "data_gen/multiply.py",
    "        total = _check_addition(reader, total, product, forms)",
    "        total = _check_addition(reader, total, product, forms) and total",
)
@EVERY_KIND
def test_ten_thousand_answers_are_right_to_the_checker(style, lang):
    draw = random.Random(0)
    for _ in range(10_000):
        a, b = draw.randint(1, 999), draw.randint(1, 999)
        answer = solve(a, b, style, lang)
        assert check(a, b, answer, style, lang) is None, (a, b)
        assert final(answer) == a * b


@mutation("data_gen/multiply.py", 'expected = digits if carry == "0" else carry + digits', "expected = digits")
@EVERY_KIND
@pytest.mark.parametrize("digits", [1, 2, 4, 9])
def test_answers_of_any_length_are_right_to_the_checker(style, lang, digits):
    draw, most = random.Random(digits), 10**digits - 1
    some = [(draw.randint(1, most), draw.randint(1, most)) for _ in range(20)]
    for a, b in [(1, 1), (most, most), (1, most), (most, 10 ** (digits - 1)), *some]:
        answer = solve(a, b, style, lang)
        assert check(a, b, answer, style, lang) is None, (a, b)
        assert final(answer) == a * b


@mutation("data_gen/multiply.py", "if not 0 < number < 10**MOST_DIGITS:", "if not 0 <= number <= 10**MOST_DIGITS:")
@pytest.mark.parametrize("of", [solve, lambda a, b, style, lang: check(a, b, "", style, lang)], ids=["solve", "check"])
@pytest.mark.parametrize("task", [(0, 1, "terse", "en"), (1, -1, "terse", "en"), (1, 10**9, "article", "en"),
                                  (1, 1, "long", "en"), (1, 1, "terse", "fr")])  # fmt: skip
def test_a_task_that_cannot_be_worked_out_is_bad_input(of, task):
    with pytest.raises(BadInput, match=r"wrong (number|style|language) in the task"):
        of(*task)


# ---- the checker -----------------------------------------------------------------------------------------------------


def first_difference(one: str, other: str) -> int:
    lines = [text.split("\n") for text in (one, other)]
    same = [x == y for x, y in zip(*lines, strict=False)]
    return (same.index(False) if False in same else len(same)) + 1


@mutation(
    "data_gen/multiply.py", 'reader.same("split", "the sum of the parts", str(sum(map(int, parts))), number)', "pass"
)
@mutation("data_gen/multiply.py", 'reader.same("product", f"{x} * {y}", product, str(int(x) * int(y)))', "pass")
@mutation("data_gen/multiply.py", 'reader.same("addition", "the column", where, str(place))', "pass")
@mutation("data_gen/multiply.py", 'reader.same("carry", "the digit kept", kept, column[1])', "pass")
@mutation(
    "data_gen/multiply.py",
    'reader.same("final", "the final result", *reader.take(forms["final"], "the line with the final result"), total)',
    'reader.take(forms["final"], "the line with the final result")',
)
@mutation("data_gen/multiply.py", 'reader.same("split", "the digits", placed[1::2], a[::-1])', "pass")
@mutation(
    "data_gen/multiply.py",
    'reader.same("result", "the digits", placed[1::2], "".join(sums[place] for place in placed[::2]))',
    "pass",
)
@mutation("data_gen/multiply.py", 'reader.same("final", "the final result", number, placed[1::2].lstrip("0"))', "pass")
@EVERY_KIND
@pytest.mark.parametrize(("a", "b"), [(874, 265), (95, 70), (8, 805)])
def test_every_other_digit_anywhere_is_a_fault_of_its_line(a, b, style, lang):
    answer = solve(a, b, style, lang)
    for at, char in enumerate(answer):
        for digit in "0123456789" if char.isdigit() else "":
            if digit != char:
                fault = check(a, b, answer[:at] + digit + answer[at + 1 :], style, lang)
                assert fault and fault.line_number == answer.count("\n", 0, at) + 1, (at, digit, fault)
                assert fault.kind != "format" and fault.why


@EVERY_KIND
@given(a=NUMBERS, b=NUMBERS, at=st.integers(0), other=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_a_digit_of_any_answer_changed_is_a_fault_of_its_line(style, lang, a, b, at, other):
    answer = solve(a, b, style, lang)
    places = [place for place, char in enumerate(answer) if char.isdigit()]
    place = places[at % len(places)]
    wrong = answer[:place] + str((int(answer[place]) + other) % 10) + answer[place + 1 :]
    assert check(a, b, wrong, style, lang).line_number == answer.count("\n", 0, place) + 1


@mutation("data_gen/multiply.py", 'self.fault("format", f"the text ends before {due}")', "return (None,) * 9")
@EVERY_KIND
@pytest.mark.parametrize(("a", "b"), [(874, 265), (95, 70), (8, 805)])
def test_a_line_missing_doubled_or_swapped_is_a_fault_where_the_text_first_differs(a, b, style, lang):
    answer = solve(a, b, style, lang)
    lines = answer.split("\n")
    for at in range(len(lines)):
        missing = lines[:at] + lines[at + 1 :]
        doubled = lines[: at + 1] + lines[at:]
        swapped = lines[:at] + lines[at : at + 2][::-1] + lines[at + 2 :]
        for wrong in map("\n".join, (missing, doubled, swapped)):
            if wrong != answer:
                assert check(a, b, wrong, style, lang).line_number == first_difference(answer, wrong)
    assert check(a, b, answer + "\n", style, lang) == (len(lines) + 1, "format", "'' follows the last line")
    cut = check(a, b, "\n".join(lines[:-1]), style, lang)
    assert cut == (len(lines), "format", "the text ends before the line with the final result") or style == "terse"


@EVERY_KIND
@given(data=st.data(), a=NUMBERS, b=NUMBERS)
@settings(max_examples=150, deadline=None)
def test_whatever_is_done_to_an_answer_the_first_line_that_differs_is_the_fault(style, lang, data, a, b):
    answer = solve(a, b, style, lang)
    start = data.draw(st.integers(0, len(answer)))
    end = data.draw(st.integers(start, min(len(answer), start + 30)))
    piece = st.text("0123456789 +*=,;:abc\n\r\u2028٣₂,", max_size=4) | st.sampled_from(answer.split("\n"))
    wrong = answer[:start] + data.draw(piece) + answer[end:]
    fault = check(a, b, wrong, style, lang)
    assert (fault is None) == (wrong == answer)
    assert fault is None or fault.line_number == first_difference(answer, wrong)


@EVERY_KIND
@given(text=st.text() | st.sampled_from(["9" * 5000, "=" + "9" * 5000, "a" * 5000, "1=" + "a0" * 5000]))
@settings(max_examples=50, deadline=None)
def test_any_text_has_a_fault_and_none_breaks_the_checker(style, lang, text):
    assert isinstance(check(12, 34, text, style, lang), Fault)
    assert final(text) is None


@EVERY_KIND
def test_the_checker_solves_nothing(monkeypatch, style, lang):
    answer = solve(874, 265, style, lang)
    for name in ("solve", "_article", "_terse", "_addition", "_parts", "_placed"):
        monkeypatch.setattr(multiply, name, None)
    assert check(874, 265, answer, style, lang) is None
    assert check(874, 265, answer.replace("231610", "231611"), style, lang)


FAULTS = {  # style -> (line, what stands there, what stands there instead, kind, part of why)
    "article": [
        (1, "874 * 265", "847 * 265", "split", "the first number is 847, not 874"),
        (2, "(874, 265)", "(874, 256)", "split", "the second number is 256, not 265"),
        (3, "800 + 70 + 4", "700 + 170 + 4", "split", "170 is not one digit and zeros"),
        (3, "800 + 70 + 4", "70 + 800 + 4", "split", "do not get shorter"),
        (3, "800 + 70 + 4", "800 + 40 + 30 + 4", "split", "do not get shorter"),
        (3, "800 + 70 + 4", "800 + 60 + 4", "split", "the sum of the parts is 864, not 874"),
        (4, "200 + 60 + 5", "200 + 60 + 5 + 0", "split", "0 is not one digit and zeros"),
        (7, "800 * 60", "800 * 06", "product", "the second factor is 06, not 60"),
        (7, "= 48000", "= 4800", "product", "800 * 60 is 4800, not 48000"),
        (7, "= 48000", "= 048000", "product", "800 * 60 is 048000, not 48000"),
        (16, "+ 048000", "+ 480000", "addition", "the next product is 480000, not 048000"),
        (16, "160000 + 048000", "0160000 + 0048000", "addition", "the sum so far is 0160000, not 160000"),
        (20, "{Place}3", "{Place}2", "addition", "the column is 2, not 3"),
        (20, "0 + 8", "1 + 8", "addition", "the upper digit is 1, not 0"),
        (20, "0 + 8", "0 + 7", "addition", "the lower digit is 7, not 8"),
        (21, " = 10", " = 11", "addition", "6 + 4 + 0 is 11, not 10"),
        (21, "{carry}1{keep}0", "", "carry", "the carry is absent, not 1"),
        (21, "{carry}1{keep}0", "{carry}0{keep}0", "carry", "the carry is 0, not 1"),
        (21, "{carry}1{keep}0", "{carry}1{keep}1", "carry", "the digit kept is 1, not 0"),
        (20, " = 8", " = 8{carry}0{keep}8", "carry", "8 has no carry"),
        (22, "{before}1 = 2", "{before}0 = 1", "carry", "the carry before is 0, not 1"),
        (23, "208000", "108000", "result", "the result is 108000, not 208000"),
        (24, "208000 +", "280000 +", "addition", "the sum so far is 280000, not 208000"),
        (80, "231610", "231601", "final", "the final result is 231601, not 231610"),
        (80, "231610", "231610 ", "format", "231610 ' is not the line with the final result"),
    ],
    "terse": [
        (1, "874=", "847=", "split", "the number is 847, not 874"),
        (1, "a4b7c8", "a8b7c4", "split", "the digits is 874, not 478"),
        (2, "a5b6c2", "a5b6d2", "split", "the places is abd, not abc"),
        (8, "b6:", "b2:", "split", "the digit is 2, not 6"),
        (8, "b6:", "c6:", "split", "the place is c, not b"),
        (8, "b4c7d8", "b4c7c8", "split", "the places is bcc, not bcd"),
        (8, "b4c7d8", "b4c8d8", "split", "the digits is 488, not 478"),
        (10, "c7", "d7", "product", "the place is d, not c"),
        (10, "c7*6", "c8*6", "product", "the first digit is 8, not 7"),
        (10, "7*6", "7*5", "product", "the second digit is 5, not 6"),
        (10, "=42", "=41", "product", "7 * 6 is 41, not 42"),
        (14, "=08", "=80", "product", "4 * 2 is 80, not 08"),
        (10, "+3=45", "+4=46", "addition", "the sum so far is 4, not 3"),
        (10, "=45", "=46", "addition", "42 + 3 is 46, not 45"),
        (10, "+3=48", "+2=47", "carry", "the carry is 2, not 3"),
        (10, "=48", "=49", "addition", "45 + 3 is 49, not 48"),
        (12, "b1c8d6e5", "b1c8d6e6", "result", "the digits is 1866, not 1865"),
        (12, "b1c8d6e5", "c1d8e6f5", "result", "the places is cdef, not bcde"),
        (18, "f2e3", "f3e3", "result", "the digits is 331610, not 231610"),
        (18, "f2e3", "e3f2", "result", "the places is efdcba, not fedcba"),
        (19, "=231610", "=0231610", "final", "the final result is 0231610, not 231610"),
        (19, "=231610", "=231610 ", "format", "'=231610 ' is not the final result"),
    ],
}
WORDS = {
    "zh": {"Place": "第", "before": "之前的进位 ", "carry": ";有进位", "keep": ",保留"},
    "en": {"Place": "Place ", "before": "previous carry ", "carry": "; carry ", "keep": ", keep "},
}


@mutation(
    "data_gen/multiply.py",
    """        reader.same("carry", "the carry before", before, carry)
""",
    """        pass
""",
)
@mutation(
    "data_gen/multiply.py",
    'reader.same("addition", f"{x} + {y} + {before}", column, str(int(x) + int(y) + int(before)))',
    "pass",
)
@mutation("data_gen/multiply.py", 'reader.same("product", f"{x} * {y}", product, f"{int(x) * int(y):02}")', "pass")
@mutation(
    "data_gen/multiply.py",
    """            reader.same("carry", "the carry", before, carry)
""",
    """            pass
""",
)
@EVERY_KIND
def test_a_fault_says_which_step_went_wrong_and_how(style, lang):
    for number, there, instead, kind, why in FAULTS[style]:
        there, instead = (text.format(**WORDS[lang]) for text in (there, instead))
        lines = solve(874, 265, style, lang).split("\n")
        assert there in lines[number - 1]
        lines[number - 1] = lines[number - 1].replace(there, instead, 1)
        fault = check(874, 265, "\n".join(lines), style, lang)
        assert fault[:2] == (number, kind) and why in fault.why, fault


@EVERY_KIND
def test_the_right_answer_to_another_task_is_wrong_where_it_names_the_number(style, lang):
    fault = check(874, 265, solve(874, 264, style, lang), style, lang)
    assert fault[:2] == ({"article": 1, "terse": 2}[style], "split")


def test_a_wrong_step_that_all_later_lines_build_on_is_the_only_fault_named():
    wrong = TERSE.replace("b7*5=35+0=35+2=37", "b7*5=36+0=36+2=38").replace("a0b7c3d4", "a0b8c3d4")
    wrong = wrong.replace("b4*6=24+7=31+0=31", "b4*6=24+8=32+0=32").replace("b1c8", "b2c8")
    wrong = wrong.replace("b1a0", "b2a0").replace("=231610", "=231620")
    assert check(874, 265, wrong, "terse", "en") == (5, "product", "7 * 5 is 36, not 35")
    mended = wrong.replace("b7*5=36+0=36+2=38", "b7*5=35+0=35+2=37")
    assert check(874, 265, mended, "terse", "en")[:2] == (7, "result")


@mutation("data_gen/multiply.py", 're.compile("^(?:{})$".format(', 're.compile("(?:{})".format(')
@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("所以,最终结果是12", 12),
        ("So, the final result is 12", 12),
        ("=12", 12),
        ("=12\n=13", 13),
        ("得到结果 = 12", None),
        ("So, the final result is 12 or 13", None),
        ("3*4=12", None),
        ("=" + "1" * 5000, None),
        ("", None),
    ],
)
def test_final_reads_what_an_answer_states_at_its_end(text, result):
    assert final(text) == result


# ---- which pairs -----------------------------------------------------------------------------------------------------


def unordered(chosen):
    return {tuple(sorted(pair)) for pair in chosen}


@mutation("data_gen/multiply.py", "digest[:8]", "digest[:4]")
def test_what_is_held_out_never_changes():
    """Test files that are already written, and adapters trained without these pairs, depend on it."""
    assert [(a, b) for b in range(1, 10) for a in range(1, b + 1) if is_test(a, b)] == ONE_DIGIT_TEST_PAIRS
    assert sum(is_test(a, b) for b in range(1, 100) for a in range(1, b + 1)) == 513


ONE_DIGIT_TEST_PAIRS = [(1, 1), (1, 2), (3, 3), (3, 4), (3, 6), (7, 8)]


@given(a=st.integers(1, 10**9), b=st.integers(1, 10**9))
def test_swapped_operands_are_on_the_same_side(a, b):
    assert is_test(a, b) == is_test(b, a)


@mutation("data_gen/multiply.py", 'f"{min(a, b)}*{max(a, b)}"', 'f"{a}*{b}"')
@mutation("data_gen/multiply.py", "if is_test(*pair) == held_out)", "if not held_out or is_test(*pair))")
@pytest.mark.parametrize("digits", [1, 2, 3, 9])
def test_no_training_row_of_any_seed_is_a_test_pair_in_either_order(digits):
    held_out = set()
    for seed in range(3):
        held_out |= unordered(pairs(digits, 5, seed, held_out=True))
        training = pairs(digits, 39 if digits == 1 else 2000, seed)
        assert not any(is_test(*pair) or is_test(*pair[::-1]) for pair in training)
        assert len(unordered(training)) == len(training)
        assert any(a > b for a, b in training) and any(a < b for a, b in training)
        assert unordered(training).isdisjoint(held_out)


@mutation("data_gen/multiply.py", "rank - larger * (larger + 1) // 2 + 1)", "rank - larger * (larger + 1) // 2)")
@pytest.mark.parametrize(("digits", "training", "held_out"), [(1, 39, 6), (2, 4437, 513)])
def test_all_pairs_there_are_and_not_one_more(digits, training, held_out):
    most = 10**digits - 1
    assert training + held_out == most * (most + 1) // 2
    every = unordered(pairs(digits, training)) | unordered(pairs(digits, held_out, held_out=True))
    assert every == {(a, b) for b in range(1, most + 1) for a in range(1, b + 1)}
    with pytest.raises(BadInput, match=f"--rows .*only {training} pairs .* for training, not {training + 1}"):
        pairs(digits, training + 1)
    with pytest.raises(BadInput, match=f"--test-rows .*only {held_out} pairs .* held out, not {held_out + 1}"):
        pairs(digits, held_out + 1, held_out=True)


def test_a_pair_is_a_pure_function_of_digits_and_seed_and_more_rows_begin_with_the_same():
    first = pairs(3, 100, seed=1)
    assert pairs(3, 100, seed=1) == first == pairs(3, 300, seed=1)[:100]
    assert not unordered(pairs(3, 100, seed=2)) & unordered(first)


def test_numbers_are_drawn_evenly_from_1_to_the_largest():
    numbers = [number for pair in pairs(3, 5000) for number in pair]
    assert {len(str(number)) for number in numbers} == {1, 2, 3}
    for start in range(0, 1000, 100):
        assert 0.09 < sum(start <= number < start + 100 for number in numbers) / len(numbers) < 0.11


@EVERY_KIND
def test_training_rows_are_the_question_in_its_one_wording_and_the_worked_answer(style, lang):
    rows = conversations(3, 50, style, lang, seed=4)
    for row, (a, b) in zip(rows, pairs(3, 50, seed=4), strict=True):
        turns = [("user", ASK[lang].format(a, b)), ("assistant", solve(a, b, style, lang))]
        assert row == {"messages": [{"role": role, "content": text} for role, text in turns]}


@mutation("data_gen/multiply.py", "number % wordings if wordings", "0 if wordings")
@EVERY_KIND
def test_held_out_rows_are_test_pairs_in_each_unseen_wording_in_turn(style, lang):
    assert len(set(WORDINGS[lang])) >= 3 and ASK[lang] not in WORDINGS[lang]
    rows = held_out_conversations(2, 50, style, lang)
    for number, row in enumerate(rows):
        asked, answered = (message["content"] for message in row["messages"])
        a, b = row["a"], row["b"]
        assert is_test(a, b) and row["wording"] == number % len(WORDINGS[lang])
        assert asked == WORDINGS[lang][row["wording"]].format(a, b) == question(a, b, lang, row["wording"])
        assert re.findall("[0-9]+", asked) == [str(a), str(b)]
        assert check(a, b, answered, row["style"], row["lang"]) is None and (row["style"], row["lang"]) == (style, lang)
    assert [(row["a"], row["b"]) for row in rows] == pairs(2, 50, held_out=True)


# ---- the command -----------------------------------------------------------------------------------------------------


def written(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_script_and_module_spelling_give_the_same_files(tmp_path):
    """The script from another folder: it finds `lora` in a bare checkout, too."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    flags = ["--digits", "2", "--rows", "30", "--style", "article", "--lang", "zh", "--seed", "3", "--test-rows", "9"]
    spellings = {"a": [str(ROOT / "data_gen/multiply.py")], "b": ["-m", "data_gen.multiply"]}
    for (name, spelling), folder in zip(spellings.items(), (tmp_path, ROOT), strict=True):
        outs = ["--out", str(tmp_path / f"{name}.train"), "--test-out", str(tmp_path / f"{name}.test")]
        command = [sys.executable, *spelling, *flags, *outs]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert re.fullmatch(
            r"30 rows in .*/[ab].train\n9 held-out rows in 4 unseen wordings in .*/[ab].test\n", done.stderr
        )
    for kind, rows in (
        ("train", conversations(2, 30, "article", "zh", 3)),
        ("test", held_out_conversations(2, 9, "article", "zh", 3)),
    ):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes() == written(rows)


@EVERY_KIND
def test_both_files_are_read_as_conversations_and_replace_old_ones(style, lang, tmp_path, capsys):
    out, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    out.write_text("old\n" * 10_000)
    words = f"--digits 2 --rows 20 --style {style} --lang {lang} --test-rows 10".split()
    assert main([*words, "--out", str(out), "--test-out", str(test)]) == 0
    capsys.readouterr()
    for path, rows in (
        (out, conversations(2, 20, style, lang)),
        (test, held_out_conversations(2, 10, style, lang)),
    ):
        assert [found.messages for found in formats.read([path])] == [row["messages"] for row in rows]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]


BAD = {
    "no digits": {"--digits": "0"},
    "too many digits": {"--digits": "10"},
    "digits in words": {"--digits": "two"},
    "no rows": {"--rows": "0"},
    "too many rows": {"--rows": "1000001"},
    "rows in words": {"--rows": "many"},
    "more rows than pairs": {"--digits": "1", "--rows": "40"},
    "style": {"--style": "long"},
    "language": {"--lang": "fr"},
    "seed": {"--seed": "x"},
    "missing folder": {"--out": "no/such/folder/rows.jsonl"},
    "out is a folder": {"--out": "."},
    "out is a device": {"--out": "/dev/null"},
    "out missing": {"--out": None},
    "missing folder for the test": {"--test-out": "no/such/folder/rows.jsonl", "--test-rows": "1"},
    "test-out is a folder": {"--test-out": ".", "--test-rows": "1"},
    "one file for both": {"--test-out": "./rows.jsonl", "--test-rows": "1"},
    "no test rows": {"--test-out": "test.jsonl", "--test-rows": "0"},
    "test rows in words": {"--test-out": "test.jsonl", "--test-rows": "many"},
    "more test rows than pairs": {"--test-out": "test.jsonl", "--test-rows": "514"},
    "test-out without test-rows": {"--test-out": "test.jsonl"},
    "test-rows without test-out": {"--test-rows": "3"},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_exit_2_with_one_line_and_write_nothing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = {"--digits": "2", "--rows": "10", "--out": "rows.jsonl"} | BAD[case]
    assert main([word for flag, value in flags.items() if value is not None for word in (flag, value)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err)
    assert any(flag in err for flag in BAD[case])
    assert ("mkdir -p no/such/folder" in err) == case.startswith("missing folder")
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_named_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "--digits 10 --rows 0 --out no/rows.jsonl --test-out no/rows.jsonl --test-rows 0"
    assert main(words.split()) == 2
    flags = [line.split()[2] for line in capsys.readouterr().err.splitlines()]
    assert flags == ["--out", "--digits", "--rows", "--test-out", "--test-out", "--test-rows"]


def test_help_names_every_flag_and_exits_0(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    flags = (
        "--digits",
        "--rows",
        "--style {article,terse}",
        "--lang {en,zh}",
        "--seed",
        "--out",
        "--test-out TEST_OUT",
    )
    assert all(flag in text for flag in (*flags, "--test-rows"))
    assert "None" not in text and "SUPPRESS" not in text
