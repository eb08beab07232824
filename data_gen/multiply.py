"""Multiplications worked out step by step, a checker that finds the first wrong line, and pairs held out for testing.

`article`, in Chinese or English: both numbers are split into round parts, every part of the first is multiplied by
every part of the second, and the products are added one after the other, digit by digit from the right, with the
carries. The source prints one example without its line breaks and with gaps; one statement is one line here. Its
punctuation is half-width throughout, and so is ours. What the example leaves open:

- A zero makes no part: 805 = 800 + 5. So no product is zero.
- Both addends are padded to the longer one. A carry out of the last column has no line; it leads the result.
- Where there is one product there is nothing to add: the last line follows it.

`terse` is the same work by rows in ASCII, of one shape throughout. A letter is a place (a ones, b tens, ...), and a
digit that is needed again stands behind its letter, so that it is found by the letter and not by counting:

    874=a4b7c8               the digits of both numbers, ones first
    265=a5b6c2
    ...
    b6:b4c7d8                6 stands for 60: where it puts the digits of 874
    b4*6=24+7=31+0=31        digit times digit, + the sum so far at place b, + the carry: 1 stays, 3 is carried
    c7*6=42+3=45+3=48
    d8*6=48+4=52+4=56
    b1c8d6e5                 the sum so far from place b on; a is final
    ...
    f2e3d1c6b1a0             all places, ones last
    =231610
"""

import hashlib
import random
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from math import isqrt
from pathlib import Path
from string import ascii_lowercase as PLACES
from typing import NamedTuple

if not __package__:  # run as a script: Python looks beside this file, and `lora` lies one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from lora.errors import before_imports

    before_imports(__name__)


from tqdm import tqdm

from data_gen import outputs
from lora import errors, files

STYLES = ("article", "terse")
ASK = {"en": "Compute {}*{}", "zh": "计算{}*{}"}  # the only wording in training
WORDINGS = {  # never in training
    "en": ("What is {} times {}?", "Please multiply {} by {}.", "{} x {} = ?", "Find the product of {} and {}."),
    "zh": ("{}乘以{}等于多少？", "请问 {} × {} 的结果是什么？", "求{}和{}的乘积。", "帮我算算，{} 乘 {} 得多少"),
}
LINES = {  # of an article answer; {} is a number
    "en": {
        "start": "Start computing {} * {}:",
        "split": "Split ({}, {}):",
        "products": "Compute the products one by one:",
        "sums": "Start adding the products:",
        "sum": "Compute {} + {}:",
        "column": "Place {}, {} + {} + previous carry {} = {}",
        "carry": "; carry {}, keep {}",
        "result": "Result = {}",
        "final": "So, the final result is {}",
    },
    "zh": {
        "start": "开始计算 {} * {}:",
        "split": "把 ({}, {}) 拆成:",
        "products": "分别计算乘积:",
        "sums": "开始相加乘积:",
        "sum": "计算 {} + {}:",
        "column": "第{}位,{} + {} + 之前的进位 {} = {}",
        "carry": ";有进位{},保留{}",
        "result": "得到结果 = {}",
        "final": "所以,最终结果是{}",
    },
}
MOST_DIGITS = 9  # of a number: their product has 18, and there are 26 letters for its places
MOST_ROWS = 1_000_000
TEST_SHARE = 10  # one pair in so many is held out


def question(a: int, b: int, lang: str, wording: int | None = None) -> str:
    """The question in the wording of training, or in one of WORDINGS[lang]."""
    return (ASK[lang] if wording is None else WORDINGS[lang][wording]).format(a, b)


# ---- answers ---------------------------------------------------------------------------------------------------------


def solve(a: int, b: int, style: str, lang: str) -> str:
    """The worked answer, without a line break at its end. Raises BadInput for what cannot be worked out."""
    _known(a, b, style, lang)
    return "\n".join(_article(a, b, LINES[lang]) if style == "article" else _terse(a, b))


def _known(a: int, b: int, style: str, lang: str) -> None:
    wrong = []
    for what, value, known in (("style", style, STYLES), ("language", lang, LINES)):
        if value not in known:
            wrong.append(f"wrong {what} in the task: {value!r} is unknown. Use one of {', '.join(known)}")
    for number in (a, b):
        if not 0 < number < 10**MOST_DIGITS:
            wrong.append(f"wrong number in the task: {number} is not in 1..{10**MOST_DIGITS - 1}. Give another one")
    if wrong:
        raise errors.BadInput(*wrong)


def _article(a: int, b: int, say: dict[str, str]) -> Iterator[str]:
    parts = [_parts(a), _parts(b)]
    yield say["start"].format(a, b)
    yield say["split"].format(a, b)
    for number, its in zip((a, b), parts, strict=True):
        yield f"{number} = {' + '.join(map(str, its))}"
    yield say["products"]
    for x in parts[0]:
        for y in parts[1]:
            yield f"{x} * {y} = {x * y}"
    total, *others = [x * y for x in parts[0] for y in parts[1]]
    if others:
        yield say["sums"]
    for other in others:
        yield from _addition(total, other, say)
        total += other
    yield say["final"].format(total)


def _parts(number: int) -> list[int]:
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - at) for at, digit in enumerate(digits, 1) if digit != "0"]


def _addition(a: int, b: int, say: dict[str, str]) -> Iterator[str]:
    width = max(len(str(a)), len(str(b)))
    rows = [str(number).zfill(width) for number in (a, b)]
    yield say["sum"].format(*rows)
    carry = 0
    for place, (x, y) in enumerate(zip(*map(reversed, rows), strict=True)):
        column = int(x) + int(y) + carry
        line = say["column"].format(place, x, y, carry, column)
        carry = column // 10
        yield line + (say["carry"].format(carry, column % 10) if carry else "")
    yield say["result"].format(a + b)


def _terse(a: int, b: int) -> Iterator[str]:
    first, second = ([int(digit) for digit in reversed(str(number))] for number in (a, b))
    yield f"{a}={_placed(first)}"
    yield f"{b}={_placed(second)}"
    total = [0] * (len(first) + len(second))
    for shift, factor in enumerate(second):
        yield f"{PLACES[shift]}{factor}:{_placed(first, shift)}"
        carry = 0
        for place, digit in enumerate(first, shift):
            product, so_far = digit * factor, total[place]
            both = product + so_far
            column = both + carry  # at most 9 * 9 + 9 + 9
            yield f"{PLACES[place]}{digit}*{factor}={product:02}+{so_far}={both:02}+{carry}={column:02}"
            carry, total[place] = divmod(column, 10)
        end = shift + len(first)
        total[end] = carry
        yield _placed(total[shift : end + 1], shift)
    yield "".join(PLACES[place] + str(total[place]) for place in reversed(range(len(total))))
    yield f"={int(''.join(map(str, reversed(total))))}"


def _placed(digits: list[int], shift: int = 0) -> str:
    return "".join(PLACES[place] + str(digit) for place, digit in enumerate(digits, shift))


# ---- the checker -----------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """The first wrong line of an answer, counted from 1; `kind` is split, product, addition, carry, result, final or
    format (not the line that is due, a missing or a further one)."""

    line_number: int
    kind: str
    why: str


class _Found(Exception):
    pass


class _Reader:
    """Lines that are taken one after the other; the first that is not as it must be ends the reading."""

    def __init__(self, text: str):
        self.lines, self.number = text.split("\n"), 0

    def fault(self, kind: str, why: str):
        raise _Found(Fault(self.number, kind, why))

    def take(self, form: re.Pattern, due: str) -> tuple[str | None, ...]:
        self.number += 1
        if self.number > len(self.lines):
            self.fault("format", f"the text ends before {due}")
        if not (match := form.fullmatch(self.lines[self.number - 1])):
            self.fault("format", f"{self.lines[self.number - 1][:60]!r} is not {due}")
        return match.groups()

    def same(self, kind: str, what: str, found: str | None, expected: str) -> None:
        if found != expected:
            self.fault(kind, f"{what} is {'absent' if found is None else found}, not {expected}")

    def end(self) -> None:
        self.number += 1
        if self.number <= len(self.lines):
            self.fault("format", f"{self.lines[self.number - 1][:60]!r} follows the last line")


NUMBER = "([0-9]{1,40})"  # more digits are no line of ours, and int() would refuse 4,301
SPLIT = re.compile(rf"{NUMBER} = ([0-9]{{1,40}}(?: \+ [0-9]{{1,40}})*)")
PART = re.compile("[1-9]0*")
PRODUCT = re.compile(rf"{NUMBER} \* {NUMBER} = {NUMBER}")
PLACED = "((?:[a-z][0-9])+)"
TERSE_SPLIT, TERSE_ROW = re.compile(f"{NUMBER}={PLACED}"), re.compile(f"([a-z])([0-9]):{PLACED}")
TERSE_STEP = re.compile(r"([a-z])([0-9])\*([0-9])=([0-9]{2})\+([0-9])=([0-9]{2})\+([0-9])=([0-9]{2})")
TERSE_TOTAL, TERSE_FINAL = re.compile(PLACED), re.compile(f"={NUMBER}")


def _pattern(template: str) -> str:
    return NUMBER.join(map(re.escape, template.split("{}")))


@cache
def _forms(lang: str) -> dict[str, re.Pattern]:
    forms = {name: re.compile(_pattern(template)) for name, template in LINES[lang].items()}
    column, carry = (_pattern(LINES[lang][name]) for name in ("column", "carry"))
    return forms | {"column": re.compile(f"{column}(?:{carry})?")}


def check(a: int, b: int, text: str, style: str, lang: str) -> Fault | None:
    """The first wrong line of an answer to a*b, or None. Nothing is solved: a line is held against those before it.

    A right answer is one text, to the character. Raises BadInput for a task that `solve` refuses.
    """
    _known(a, b, style, lang)
    reader = _Reader(text)
    try:
        if style == "article":
            _check_article(reader, str(a), str(b), _forms(lang))
        else:
            _check_terse(reader, str(a), str(b))
        reader.end()
    except _Found as found:
        return found.args[0]
    return None


def _check_article(reader: _Reader, a: str, b: str, forms: dict[str, re.Pattern]) -> None:
    for name in ("start", "split"):
        numbers = reader.take(forms[name], f"the line that names {a} and {b}")
        reader.same("split", "the first number", numbers[0], a)
        reader.same("split", "the second number", numbers[1], b)
    parts = [_check_parts(reader, number) for number in (a, b)]
    reader.take(forms["products"], "the line before the products")
    products = []
    for x in parts[0]:
        for y in parts[1]:
            left, right, product = reader.take(PRODUCT, f"the product of {x} and {y}")
            reader.same("product", "the first factor", left, x)
            reader.same("product", "the second factor", right, y)
            reader.same("product", f"{x} * {y}", product, str(int(x) * int(y)))
            products.append(product)
    total = products[0]
    if len(products) > 1:
        reader.take(forms["sums"], "the line before the sums")
    for product in products[1:]:
        total = _check_addition(reader, total, product, forms)
    reader.same("final", "the final result", *reader.take(forms["final"], "the line with the final result"), total)


def _check_parts(reader: _Reader, number: str) -> list[str]:
    left, right = reader.take(SPLIT, f"the parts of {number}")
    reader.same("split", "the number", left, number)
    parts = right.split(" + ")
    for part in parts:
        if not PART.fullmatch(part):
            reader.fault("split", f"{part} is not one digit and zeros")
    lengths = [len(part) for part in parts]
    if lengths != sorted(set(lengths), reverse=True):
        reader.fault("split", f"the parts {right} do not get shorter")
    reader.same("split", "the sum of the parts", str(sum(map(int, parts))), number)
    return parts


def _check_addition(reader: _Reader, total: str, product: str, forms: dict[str, re.Pattern]) -> str:
    """Check from the line that names both addends to the one with their sum; return that sum as it is written."""
    width = max(len(total), len(product))
    upper, lower = reader.take(forms["sum"], f"the addition of {product}")
    reader.same("addition", "the sum so far", upper, "0" * (width - len(total)) + total)
    reader.same("addition", "the next product", lower, "0" * (width - len(product)) + product)
    carry, digits = "0", ""
    for place in range(width):
        where, x, y, before, column, after, kept = reader.take(forms["column"], f"column {place} of the addition")
        reader.same("addition", "the column", where, str(place))
        reader.same("addition", "the upper digit", x, upper[-1 - place])
        reader.same("addition", "the lower digit", y, lower[-1 - place])
        reader.same("carry", "the carry before", before, carry)
        reader.same("addition", f"{x} + {y} + {before}", column, str(int(x) + int(y) + int(before)))
        if len(column) == 1 and after is not None:
            reader.fault("carry", f"{column} has no carry")
        if len(column) == 2:
            reader.same("carry", "the carry", after, column[0])
            reader.same("carry", "the digit kept", kept, column[1])
        carry, digits = after or "0", column[-1] + digits
    expected = digits if carry == "0" else carry + digits
    reader.same("result", "the result", *reader.take(forms["result"], "the result of the addition"), expected)
    return expected


def _check_terse(reader: _Reader, a: str, b: str) -> None:
    for number in (a, b):
        left, placed = reader.take(TERSE_SPLIT, f"the digits of {number}")
        reader.same("split", "the number", left, number)
        reader.same("split", "the places", placed[::2], PLACES[: len(number)])
        reader.same("split", "the digits", placed[1::2], number[::-1])
    sums, size = {}, len(a)  # place -> digit of the sum so far
    for shift, factor in enumerate(reversed(b)):
        places = PLACES[shift : shift + size + 1]
        place, found, placed = reader.take(TERSE_ROW, f"the head of the row for digit {factor} at {places[0]}")
        reader.same("split", "the place", place, places[0])
        reader.same("split", "the digit", found, factor)
        reader.same("split", "the places", placed[::2], places[:-1])
        reader.same("split", "the digits", placed[1::2], a[::-1])
        carry, digits = "0", ""
        for due, digit in zip(places[:-1], reversed(a), strict=True):
            step = reader.take(TERSE_STEP, f"the step at {due}")
            place, x, y, product, so_far, both, before, column = step
            reader.same("product", "the place", place, due)
            reader.same("product", "the first digit", x, digit)
            reader.same("product", "the second digit", y, factor)
            reader.same("product", f"{x} * {y}", product, f"{int(x) * int(y):02}")
            reader.same("addition", "the sum so far", so_far, sums.get(place, "0"))
            reader.same("addition", f"{product} + {so_far}", both, f"{int(product) + int(so_far):02}")
            reader.same("carry", "the carry", before, carry)
            reader.same("addition", f"{both} + {before}", column, f"{int(both) + int(before):02}")
            carry, digits = column[0], digits + column[1]
        (placed,) = reader.take(TERSE_TOTAL, f"the sum so far from {places[0]} on")
        reader.same("result", "the places", placed[::2], places)
        reader.same("result", "the digits", placed[1::2], digits + carry)
        sums.update(zip(placed[::2], placed[1::2], strict=True))
    (placed,) = reader.take(TERSE_TOTAL, "all places of the result")
    reader.same("result", "the places", placed[::2], PLACES[: len(sums)][::-1])
    reader.same("result", "the digits", placed[1::2], "".join(sums[place] for place in placed[::2]))
    (number,) = reader.take(TERSE_FINAL, "the final result")
    reader.same("final", "the final result", number, placed[1::2].lstrip("0"))


FINAL = re.compile("^(?:{})$".format("|".join(map(_pattern, [*(say["final"] for say in LINES.values()), "={}"]))), re.M)


def final(text: str) -> int | None:
    """The result that an answer of any style states; of several statements the last, of none None."""
    stated = FINAL.findall(text)
    return int("".join(stated[-1])) if stated else None


# ---- which pairs -----------------------------------------------------------------------------------------------------


def is_test(a: int, b: int) -> bool:
    """Whether a pair is held out: a hash of the two numbers in either order, of nothing else."""
    digest = hashlib.sha256(f"{min(a, b)}*{max(a, b)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % TEST_SHARE == 0


def _shuffled(size: int, draw: random.Random) -> Iterator[int]:
    """0..size-1 in random order, each once: Fisher and Yates, with only what moved in memory."""
    moved = {}
    for last in reversed(range(size)):
        pick = draw.randrange(last + 1)
        yield moved.get(pick, pick)
        moved[pick] = moved.pop(last, last)
        if pick == last:
            del moved[last]


def _all_pairs(digits: int, seed: int) -> Iterator[tuple[int, int]]:
    """Every unordered pair of numbers of up to `digits` digits once, in random order and either operand first."""
    most, draw = 10**digits - 1, random.Random(seed)
    for rank in _shuffled(most * (most + 1) // 2, draw):
        larger = (isqrt(8 * rank + 1) - 1) // 2  # rank = larger (larger + 1) / 2 + smaller
        pair = (larger + 1, rank - larger * (larger + 1) // 2 + 1)
        yield pair if draw.random() < 0.5 else pair[::-1]


def pairs(digits: int, rows: int, seed: int = 0, held_out: bool = False) -> list[tuple[int, int]]:
    """`rows` different pairs of either training or the test, all equally likely: 9 numbers in 10 have all digits.

    A pure function of the arguments; more rows begin with the same pairs. Raises BadInput, also if there are too few.
    """
    flag = "--test-rows" if held_out else "--rows"
    wrong = []
    for name, value, most in (("--digits", digits, MOST_DIGITS), (flag, rows, MOST_ROWS)):
        if not 1 <= value <= most:
            wrong.append(f"wrong {name} in the command line: {value} is not in 1..{most}. Give another number")
    if wrong:
        raise errors.BadInput(*wrong)
    found = list(islice((pair for pair in _all_pairs(digits, seed) if is_test(*pair) == held_out), rows))
    if len(found) < rows:
        side = "held out" if held_out else "for training"
        why = f"only {len(found)} pairs of numbers below {10**digits} are {side}, not {rows}"
        raise errors.BadInput(f"wrong {flag} in the command line: {why}. Lower it or raise --digits")
    return found


def _rows(chosen: Iterable[tuple[int, int]], style: str, lang: str, wordings: int = 0) -> Iterator[dict]:
    """Conversations; with `wordings`, these in turn, and keys that say what the row is."""
    for number, (a, b) in enumerate(chosen):
        wording = number % wordings if wordings else None
        turns = (("user", question(a, b, lang, wording)), ("assistant", solve(a, b, style, lang)))
        row = {"messages": [{"role": role, "content": text} for role, text in turns]}
        yield row | ({"a": a, "b": b, "style": style, "lang": lang, "wording": wording} if wordings else {})


def conversations(digits: int, rows: int, style: str, lang: str, seed: int = 0) -> list[dict]:
    """Training rows {"messages": [user, assistant]}; no pair twice, none of them a test pair. Raises BadInput."""
    _known(1, 1, style, lang)
    return list(_rows(pairs(digits, rows, seed), style, lang))


def held_out_conversations(digits: int, rows: int, style: str, lang: str, seed: int = 0) -> list[dict]:
    """Rows of held-out pairs in unseen wordings, also with "a", "b", "style", "lang", "wording". Raises BadInput."""
    _known(1, 1, style, lang)
    return list(_rows(pairs(digits, rows, seed, held_out=True), style, lang, len(WORDINGS[lang])))


# ---- the command -----------------------------------------------------------------------------------------------------


def story(argv) -> None:
    about = "Write multiplications of two numbers that are worked out step by step, for training and for testing."
    parser = errors.Parser(prog="data_gen/multiply.py", description=about)
    parser.add_argument("--digits", type=int, default=3, help="numbers have up to so many digits")
    parser.add_argument("--rows", type=int, default=10000, help="how many rows")
    parser.add_argument("--style", choices=STYLES, default="article", help="the article's long lines, or short ones")
    parser.add_argument("--lang", choices=tuple(LINES), default="en", help="language of questions and article lines")
    parser.add_argument("--seed", type=int, default=0, help="which pairs, and their order")
    outputs.add_flags(parser, "held-out pairs, which no training file has, in unseen wordings")
    args = parser.parse_args(argv)
    made = outputs.of_flags(args, lambda rows, held_out: pairs(args.digits, rows, args.seed, held_out))
    for path, chosen, held_out in made:
        wordings = len(WORDINGS[args.lang]) if held_out else 0
        rows = _rows(chosen, args.style, args.lang, wordings)
        files.write_rows(path, tqdm(rows, total=len(chosen), unit="row", disable=None))
        what = f"held-out rows in {wordings} unseen wordings" if wordings else "rows"
        errors.say(f"{len(chosen)} {what} in {path}")


def main(argv=None) -> int:
    return errors.run(story, argv)


if __name__ == "__main__":
    sys.exit(main())
