"""What --reward NAME[:WEIGHT] says.

multiply  countdown         a task: is the answer right?
format:REGEX                does the regular expression find anything in the answer?
length:N                    1 at N tokens, less for shorter and longer ones
FILE.py:FUNCTION            a function of the user's own
FOLDER                      a reward model
"""

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lora.errors import BadInput

TASKS = ("multiply", "countdown")
# what float() takes of plain text, so that a weight which is not finite is refused as a weight
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|infinity|nan)", re.ASCII | re.IGNORECASE)
FUNCTION = re.compile(r"(.+\.py):([^\W\d]\w*)", re.DOTALL)  # the last .py: of a path with colons
MOST_TOKENS = 10**6
FORMS = f"{', '.join(TASKS)}, format:REGEX, length:N, FILE.py:FUNCTION or a folder, with :WEIGHT behind it or without"


class Spec(NamedTuple):
    """`kind` is task, format, length, function or model; `target` is the task, the regular expression, N, FILE.py:NAME
    or the folder."""

    kind: str
    name: str
    target: str
    weight: float


def parse(text: str) -> Spec:
    """One --reward. Its last `:NUMBER` is the weight, so that a regular expression which ends in one needs a weight
    behind it. Raises ValueError with the reason."""
    word, _, rest = text.partition(":")
    if word in ("format", "length"):
        if not rest:
            raise ValueError(f"{text!r} says no {'REGEX' if word == 'format' else 'N'}. Give {FORMS}")
        target, weight = _weighed(rest)
        (_check_regex if word == "format" else _check_length)(target, text)
        return Spec(word, word, target, weight)
    target, weight = (text, 1.0) if FUNCTION.fullmatch(text) else _weighed(text)  # a function may be called nan
    if word in TASKS:
        if target != word:
            raise ValueError(f"{text!r} has {rest!r} for a weight, which is no number. Give {word} or {word}:0.5")
        return Spec("task", word, word, weight)
    if match := FUNCTION.fullmatch(target):
        return Spec("function", _plain(match[2]), target, weight)
    if not target.strip() or f"{target}:".find(".py:") > 0:
        why = "names no function" if target.strip() else "names nothing"
        raise ValueError(f"{text!r} {why}. Give {FORMS}")
    return Spec("model", _plain(os.path.basename(os.path.abspath(target))), target, weight)


def wrong(texts: Sequence[str]) -> Iterator[str]:
    """A line for each --reward that cannot be."""
    for text in texts:
        try:
            parse(text)
        except ValueError as error:
            yield f"wrong --reward in the command line: {error}"


def parse_all(texts: Sequence[str]) -> list[Spec]:
    """Every --reward, each under a name of its own. Raises BadInput with all that is wrong."""
    if problems := [*wrong(texts)]:
        raise BadInput(*problems)
    specs, names = [], Counter()
    for spec in map(parse, texts):
        names[spec.name] += 1
        number = names[spec.name]
        specs.append(spec._replace(name=f"{spec.name}-{number}") if number > 1 else spec)
    return specs


def _weighed(text: str) -> tuple[str, float]:
    """What stands before a last `:NUMBER`, and that number; else all of it, and 1."""
    before, colon, number = text.rpartition(":")
    if not colon or not NUMBER.fullmatch(number):
        return text, 1.0
    weight = float(number)
    if not math.isfinite(weight) or weight == 0:
        fix = "Give a finite number other than 0, or a weight behind a regular expression that ends so"
        raise ValueError(f"{text!r} has the weight {number}, which weighs nothing that can be summed. {fix}")
    return before, weight


def _check_regex(target: str, text: str) -> None:
    if not target:
        raise ValueError(f"{text!r} has an empty regular expression, which every answer has. Give another one")
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(target)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{text!r} is no regular expression: {error}. Repair it, in quotes for the shell") from None


def _check_length(target: str, text: str) -> None:
    if not re.fullmatch("[0-9]{1,7}", target) or not 1 <= int(target) <= MOST_TOKENS:
        why = f"N is {target!r}, no whole number from 1 to {MOST_TOKENS}"
        raise ValueError(f"{text!r}: {why}. Give length:40, or length:40:0.5 with a weight")


def _plain(name: str) -> str:
    """A name as metrics have them: letters, digits and _."""
    return re.sub("[^A-Za-z0-9_]", "_", name) or "reward"
