"""What of an answer a template did not write: a thought that it cuts out, say, which then nobody would learn."""

from collections.abc import Sequence


def left_out(content: str, before: str, written: str) -> str:
    """The words of `content` that are missing in what was `written` behind `before`; "" where all of it is there.

    White space does not count, nor what the template writes round it; and the content may begin at the end of `before`,
    as a mark that is not written twice.
    """
    if content in written:
        return ""
    wanted, start = _letters(content), _letters(before[max(0, len(before) - 2 * len(content)) :])
    if wanted in start[max(0, len(start) - len(wanted) + 1) :] + _letters(written):
        return ""
    words, there = content.split(), written.split()
    first = alike(words, there)
    last = alike(words[first:][::-1], there[first:][::-1])
    return " ".join(words[first : len(words) - last])


def alike(a: Sequence, b: Sequence) -> int:
    """How many items are the same at the beginning of both."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _letters(text: str) -> str:
    return "".join(text.split())
