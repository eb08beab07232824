"""Tasks whose answers are checked by a rule, for `train.py --reward NAME`.

A task is a function (row, turns, text) -> 1.0 or 0.0: the row of the data, the turns of its prompt, the answer. For a
row that is no such task it raises ValueError with the reason and what to do.
"""

import re
from fractions import Fraction

from data_gen import multiply as multiplication

INTEGER = re.compile("[0-9]{1,40}")  # int() refuses 4,301 digits
WRITTEN = re.compile(r"[-+]?[0-9]+(?:[.,][0-9]+)*")
TOKEN = re.compile(r"\s*([0-9]{1,40}|[-+*/()×÷−xX])")
SPELLED = {"×": "*", "x": "*", "X": "*", "÷": "/", "−": "-"}
TAG = re.compile("<(/?)answer>", re.IGNORECASE)
EXPRESSION = re.compile(r"(?<!\w)(?:[0-9]|[-+*/()×÷−\s]|(?<![^\W\d])[xX](?![^\W\d]))+\Z")
LONGEST = 1000  # characters of an expression
MOST_NUMBERS = 20
STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2, "negative": 3}


# ---- multiply --------------------------------------------------------------------------------------------------------


def multiply(row: dict, turns: list[dict], text: str) -> float:
    """Does the answer state the product, in a form that `multiply.py` writes?"""
    a, b = factors(row, turns)
    return float(multiplication.final(text) == a * b)


def factors(row: dict, turns: list[dict]) -> tuple[int, int]:
    """Columns a and b, or the two whole numbers of the last user turn."""
    if row.get("a") is not None and row.get("b") is not None:
        return _whole("a", row["a"]), _whole("b", row["b"])
    asked = next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")
    found = WRITTEN.findall(asked)
    if len(found) != 2 or not all(INTEGER.fullmatch(number) for number in found):
        why = f"it has no columns a and b, and its question has {len(found)} numbers, not two whole ones"
        raise ValueError(f"{why}. Add the columns, or ask for one product")
    return int(found[0]), int(found[1])


def _whole(name: str, value: object) -> int:
    if isinstance(value, str) and INTEGER.fullmatch(value.strip()):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**40:
        raise ValueError(f"{name} is {repr(value)[:40]}, no whole number from 0 on. Write a number")
    return value


# ---- countdown -------------------------------------------------------------------------------------------------------


def countdown(row: dict, turns: list[dict], text: str) -> float:
    """Does the stated expression make the target, of every given number once and of nothing else?"""
    given, target = game(row)
    try:
        value, used = evaluate(stated(text))
    except (ValueError, ZeroDivisionError):
        return 0.0
    return float(sorted(used) == sorted(given) and value == target)


def game(row: dict) -> tuple[list[int], int]:
    """Columns nums, or numbers, and target."""
    given = row.get("nums") if row.get("nums") is not None else row.get("numbers")
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_NUMBERS:
        why = f"it has no column nums, a list of up to {MOST_NUMBERS} numbers"
        raise ValueError(f"{why}. Add it, as data_gen/countdown.py does")
    if row.get("target") is None:
        raise ValueError("it has no column target. Add it, as data_gen/countdown.py does")
    return [_whole("a number of nums", number) for number in given], _whole("target", row["target"])


def stated(text: str) -> str:
    """The expression that an answer states: in the last <answer>...</answer>, or at the end of what stands left of "="
    in the last line."""
    marked, begin = None, None
    for tag in TAG.finditer(text):  # one pattern for both tags would look for the second behind every first one
        if tag[1] and begin is not None:
            marked = text[begin : tag.start()]
        begin = None if tag[1] else tag.end()
    if marked is not None:
        return marked.partition("=")[0]
    lines = text.strip().splitlines()
    found = EXPRESSION.search(lines[-1].partition("=")[0].rstrip(" .。")[-LONGEST:]) if lines else None
    return found[0] if found else ""


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression, and its numbers. Operators wait on a stack until a weaker one comes (Dijkstra's
    shunting yard), so depth costs nothing. Raises ValueError, ZeroDivisionError."""
    values: list[Fraction] = []
    waiting: list[str] = []
    used: list[int] = []
    value_is_due, text, place = True, text.strip(), 0
    if len(text) > LONGEST:
        raise ValueError("too long")
    while place < len(text):
        match = TOKEN.match(text, place)
        if not match:
            raise ValueError(f"{text[place:][:10]!r} is no part of an expression")
        token, place = SPELLED.get(match[1], match[1]), match.end()
        if value_is_due:
            if token in "+-":
                waiting += ["negative"] if token == "-" else []
            elif token == "(":
                waiting.append(token)
            elif token.isdigit():
                used.append(int(token))
                values.append(Fraction(used[-1]))
                value_is_due = False
            else:
                raise ValueError(f"{token!r} where a number is due")
        elif token == ")":
            while waiting and waiting[-1] != "(":
                _apply(waiting.pop(), values)
            if not waiting:
                raise ValueError("a ) without (")
            waiting.pop()
        elif token in "+-*/":
            while waiting and STRENGTH.get(waiting[-1], 0) >= STRENGTH[token]:
                _apply(waiting.pop(), values)
            waiting.append(token)
            value_is_due = True
        else:
            raise ValueError(f"{token!r} where an operator is due")
    if value_is_due or "(" in waiting:
        raise ValueError("it ends too early")
    while waiting:
        _apply(waiting.pop(), values)
    return values[0], used


def _apply(operator: str, values: list[Fraction]) -> None:
    b = values.pop()
    if operator == "negative":
        values.append(-b)
        return
    a = values.pop()
    values.append(a + b if operator == "+" else a - b if operator == "-" else a * b if operator == "*" else a / b)


TASKS = {"multiply": multiply, "countdown": countdown}
