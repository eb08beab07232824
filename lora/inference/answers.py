"""Measures of answers that need no task: are they the expected ones, are they varied, do they repeat."""

import re
from collections.abc import Iterable, Sequence, Sized

# Han, kana and their punctuation and full-width forms are written without spaces
UNSPACED = "\u3001-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
UNIT = re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")


def exact_match(prediction: str, target: str) -> bool:
    """Are they the same text? White space at both ends is left out; nothing else is normalised."""
    return prediction.strip() == target.strip()


def units(text: str) -> list[str]:
    """The words of a text, split at white space, nothing normalised; every Chinese or Japanese character is one."""
    return UNIT.findall(text)


def _grams(sequence: Sequence, n: int) -> list[tuple]:
    return [tuple(sequence[start : start + n]) for start in range(len(sequence) - n + 1)]


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Different n-grams of `units` over all n-grams of all texts, from 0 to 1; 0 where there are none.

    Li et al. 2016, https://arxiv.org/abs/1510.03055, section 5.
    """
    grams = [gram for text in texts for gram in _grams(units(text), n)]
    return len(set(grams)) / max(1, len(grams))


def repetition(answer: str | Sequence[int], n: int = 4) -> float:
    """The share of the n-grams of one answer (a text's `units`, or ids) that occurred before; 0 where it is short."""
    grams = _grams(units(answer) if isinstance(answer, str) else answer, n)
    return (len(grams) - len(set(grams))) / max(1, len(grams))


def mean_length(answers: Sequence[Sized]) -> float:
    """The mean length: characters of texts, tokens of lists of ids; 0 where there are none."""
    return sum(map(len, answers)) / max(1, len(answers))
