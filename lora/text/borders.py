"""How many ids lie before each border between prompt and answer.

Ids are those of the whole rendered text, as transformers forms them. But a tokenizer may fuse the last characters of a
prompt with the first of its answer into one token, and generation never sees that token: it starts at the border. There
the text is cut, and each side is encoded by itself.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from lora.text.answers import Rendered
from lora.text.guard import encode_guarded
from lora.text.tokenizer import Tokenizer


class Encoded(NamedTuple):
    """Ids of a text, how many of them lie before each of its borders, and whether it was cut at one."""

    tokens: list[int]
    counts: list[int]
    cut: bool


def encode(text: Rendered, tokenizer: Tokenizer) -> Encoded:
    """By definition: every prefix is encoded, and there is a cut where the next one does not begin with its ids."""
    cuts, counts, ends = [0], [], [*text.borders, len(text.text)]
    ids = encode_guarded(text.text[: ends[0]], text.guard, tokenizer)
    for border, end in pairwise(ends):
        counts.append(len(ids))
        parts = [encode_guarded(text.text[a:b], text.guard, tokenizer) for a, b in pairwise([*cuts, end])]
        longer = [i for part in parts for i in part]
        if longer[: len(ids)] != ids:
            cuts.append(border)
            longer = ids + encode_guarded(text.text[border:end], text.guard, tokenizer)
        ids = longer
    return Encoded(ids, counts, len(cuts) > 1)


def encode_all(texts: Sequence[Rendered], tokenizer: Tokenizer) -> list[Encoded]:
    """`encode` of each. Most texts have no guard and need no cut: those are encoded together, on all cores.

    A control token makes a fresh start, so the ids before a border can be checked from the last control token before it
    on: the work grows with the length of a conversation, not with its square.
    """
    plain = [text for text in texts if not text.guard]
    strings = [string for t in plain for string in (t.text, *(t.text[a:b] for a, b in _stretches(t)))]
    encoded, results = iter(tokenizer.encode_all(strings)), []
    for text in texts:
        counts = None
        if not text.guard:
            tokens, stretches = next(encoded), [next(encoded) for _ in text.borders]
            counts = _counts(text, tokens, stretches, tokenizer)
        results.append(encode(text, tokenizer) if counts is None else Encoded(tokens, counts, False))
    return results


def _controls_before(text: Rendered) -> list[int]:
    """How many control tokens start before each border."""
    starts = [match.start() for match in text.controls]
    return [bisect_left(starts, border) for border in text.borders]


def _stretches(text: Rendered) -> list[tuple[int, int]]:
    """For each border, what lies between the last control token before it, included, and the border."""
    numbers = zip(_controls_before(text), text.borders, strict=True)
    return [(text.controls[number - 1].start() if number else 0, border) for number, border in numbers]


def _counts(text: Rendered, tokens: list[int], stretches: list[list[int]], tokenizer: Tokenizer) -> list[int] | None:
    """How many ids lie before each border; None where the tokenizer fuses characters across one."""
    places, last = [0], -1  # where each control token of the text stands among the ids
    for match in text.controls:
        try:
            last = tokens.index(tokenizer.control[match[0]], last + 1)
        except ValueError:  # not where the tokenizer sees it
            return None
        places.append(last)
    counts = []
    for number, ids in zip(_controls_before(text), stretches, strict=True):
        begin = places[number]
        counts.append(begin + len(ids))
        if tokens[begin : counts[-1]] != ids:
            return None
    return counts
