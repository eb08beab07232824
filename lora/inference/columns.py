"""Answers side by side in a terminal: a column for each model, long answers wrapped."""

from collections.abc import Sequence
from unicodedata import combining, east_asian_width

from lora.errors import one_line

LEAST, GAP = 20, 2  # cells: the least width of a column, and the space between two


def cells(text: str) -> int:
    """The width of a text in a terminal, where Chinese characters take two cells and combining marks none."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def wrapped(text: str, room: int) -> list[str]:
    """Lines of at most `room` (>= 2) cells, broken at spaces where that is possible; control characters escaped."""
    lines = []
    for line in text.rstrip("\n").split("\n"):
        line = one_line(line.expandtabs(4))
        while cells(line) > room:
            fits = next(end for end in range(len(line), 0, -1) if cells(line[:end]) <= room)
            space = line.rfind(" ", 1, fits + 1)
            end = space if line[:space].strip() and space > 0 else fits
            lines.append(line[:end].rstrip())
            line = line[end:].lstrip()
        lines.append(line.rstrip())
    return lines


def table(prompts: Sequence[str], answers: dict[str, Sequence[str]], room: int) -> str:
    """A head with the models' names, then each prompt on a line and, below the names, the models' answers to it.

    The table is `room` cells wide, or wider where columns would be narrower than LEAST.
    """
    width = max(LEAST, (room - GAP * (len(answers) - 1)) // len(answers))

    def beside(texts: Sequence[str]) -> list[str]:
        columns = [wrapped(text, width) for text in texts]
        rows = range(max(map(len, columns)))
        lines = ([column[row] if row < len(column) else "" for column in columns] for row in rows)
        return [(" " * GAP).join(text + " " * (width - cells(text)) for text in line).rstrip() for line in lines]

    lines = [*beside(list(answers)), "-" * max(room, (width + GAP) * len(answers) - GAP)]
    for prompt, *texts in zip(prompts, *answers.values(), strict=True):
        lines += [*(f"> {line}" for line in wrapped(prompt, room - GAP)), *beside(texts), ""]
    return "\n".join(lines[:-1])
