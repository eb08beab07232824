"""The linter finds what is wrong with training data before a run pays for it. A finding is `FILE:LINE: CODE: message`.

Rows are compared as `normal` text, a turn a line.
"""

import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import blake2b
from typing import NamedTuple

from lora.data import lint_pairs, near
from lora.data.formats import Conversation, Problem, plain_shape
from lora.data.leftovers import LABEL, is_leftover
from lora.errors import one_line

CODES = {  # code -> what it means; first what a row is itself, then what it is beside others
    "FILE": "the file cannot be read, or holds no rows",
    "ENCODING": "the file is not UTF-8",
    "BROKEN": "the line is not JSON",
    "UNKNOWN": "the row has none of the known shapes",
    "ROW": "the row has a known shape but cannot be used",
    "ROLES": "the turns are not system, then user and assistant alternately",
    "EMPTY": "a turn has no text",
    "SURROGATE": "a text holds half a surrogate pair, which is no character",
    "PLACEHOLDER": "a slot such as [NAME] or {{name}} was never filled in (code between backticks may have some)",
    "LEFTOVER": "the answer is an error message or a refusal that a teacher left",
    "PREFIX": "some questions or answers of the file begin with 问：, 答：, Q:, User: or the like, and others do not",
    "FIELD": "rows or their messages have a field with a value that nothing here reads",
    "SCHEMA": "the file has rows of more than one shape",
    "DUPLICATE": "all turns are those of another row, but for case, white space and punctuation",
    "NEAR-DUPLICATE": "90 % or more of its 5-grams of characters are those of another row (Jaccard)",
    "CONFLICT": "another row answers the same question differently, or judges the same answer the other way",
    "OVERLAP": "an evaluation row or its question is in the training data too, perhaps with its numbers swapped",
    "EQUAL": "both sides of a pair are the same",
    "PROMPTS": "the sides of a pair answer different questions, or its prompt is not theirs",
    "SCORES": "the rejected answer has the better score",
    "LENGTH": "the length alone says of most pairs which answer is chosen",
    "LABELS": "all answers are good, or all are bad",
    "OVERLONG": "a side of a pair, or a prompt with its completion, is longer than --max-len or the model takes",
}
MEND = {  # what was noticed while rows were read
    "PROMPTS": "Repair the row, or remove the prompt",
    "SCORES": "Swap the sides, or remove the pair",
    "OVERLONG": "Shorten it, or raise --max-len",
}


class Finding(NamedTuple):
    """One line of the report; findings sort by file, line and code."""

    file: str
    line: int
    code: str
    message: str

    def __str__(self) -> str:
        return one_line(f"{self.file}:{self.line}: {self.code}: {self.message}")


def check(
    train: Sequence[Conversation | Problem],
    evaluation: Sequence[Conversation | Problem] = (),
    noticed: Sequence[tuple[str, ...]] = (),
) -> list[Finding]:
    """All findings, sorted. Rows that could not be read pass through; each set is also compared with itself. `noticed`
    while they were read are (place, field that nothing reads) and (place, what, code)."""
    found = []
    for row in (*train, *evaluation):
        found += [_finding(*row)] if isinstance(row, Problem) else _by_itself(row)
    train, evaluation = ([row for row in rows if isinstance(row, Conversation)] for rows in (train, evaluation))
    found += [*_mixed([*train, *evaluation]), *_unused([one for one in noticed if len(one) == 2])]
    found += [_finding(one[0], one[2], f"{one[1]}. {MEND[one[2]]}") for one in noticed if len(one) == 3]
    found += [_finding(*one) for rows in (train, evaluation) for one in lint_pairs.find(rows)]
    sets = [[_Row.of(row) for row in rows] for rows in (train, evaluation)]
    for rows in sets:
        found += [*_repeats(rows), *_conflicts(rows), *_contradictions(rows)]
    return sorted([*found, *_overlap(*sets)])


def _finding(where: str, code: str, message: str) -> Finding:
    file, _, line = where.rpartition(":")
    return Finding(file, int(line), code, message) if file and line.isdecimal() else Finding(where, 1, code, message)


def _quote(text: str) -> str:
    text = one_line(" ".join(text[:400].split()))
    return f'"{text if len(text) <= 60 else text[:57] + "..."}"'


# ---- a row by itself -------------------------------------------------------------------------------------------------

CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
PLACEHOLDER = re.compile(
    r"(?<![A-Za-z0-9_\]])\[(?!(?:ERROR|INFO|WARN|WARNING|DEBUG|FATAL|TRACE|INST|MASK|CLS|SEP|PAD|UNK|BOS|EOS)\])"
    r"[A-Z]{2}[A-Z0-9]*(?:[_ ][A-Z0-9]+)*\](?!\()"  # [NAME], [FIRST_NAME]; not x[KEY], [A-Z], [LINK](url)
    r"|\[(?i:your|insert|enter)[ _][^\]\n]{1,40}\](?!\()"
    r"|[\[【](?:[你您]的[^\]】\n]{1,20}|姓名|名字|作者)[\]】]"
    r"|(?<![\\^_}])\{\{\s*[^\W\d][\w .-]+\}\}"  # {{name}}; not TeX's x^{{n}}
    r"|<image>|(?m:^<(?:video|audio)>|<(?:video|audio)>$)"  # where a model that sees would have them
)


def _by_itself(row: Conversation) -> Iterator[Finding]:
    turns = (*row.messages, *(row.rejected or ()))
    slots = (PLACEHOLDER.search(CODE.sub(" ", message["content"])) for message in turns)
    if slot := next(filter(None, slots), None):
        yield _finding(row.where, "PLACEHOLDER", f"{_quote(slot[0])} is not filled in. Fill it in or remove the row")
    for message in row.messages if row.good is not False else ():  # a bad answer may be one
        learned = message["role"] in ("assistant", "text") and message.get("train", row.row is None)
        if learned and is_leftover(message["content"]):
            why = "is an error message or a refusal. Ask again or remove the row"
            yield _finding(row.where, "LEFTOVER", f"{_quote(message['content'])} {why}")
            return


# ---- the rows of a file ----------------------------------------------------------------------------------------------


def _mixed(rows: Sequence[Conversation]) -> Iterator[Finding]:
    """PREFIX and SCHEMA: one finding a file, at its first row that is not as most are."""
    files = defaultdict(list)
    for row in rows:
        files[row.where.rpartition(":")[0]].append(row)
    for same in files.values():
        asking = [(row.where, _labels(row, "user"), _labels(row, "assistant")) for row in same]
        choices = any(labels & set("bcd") for _, _, labels in asking)  # "A: Paris", "B: London"
        styles = [(where, _style(q, a - set("abcd") if choices else a)) for where, q, a in asking if q or a]
        yield from _minority(styles, "PREFIX", "Write all alike")
        yield from _minority([(row.where, plain_shape(row.shape)) for row in same], "SCHEMA", "Write all in one shape")


def _unused(unused: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """FIELD: one finding a file and field, at the first row that has it."""
    rows = defaultdict(dict)
    for where, field in unused:
        rows[where.rpartition(":")[0], field][where] = None  # both sides of a pair may have it
    for (_, field), places in rows.items():
        count = f"{len(places)} row{'s' if len(places) > 1 else ''}"
        fix = "Remove it, put it into the content, or leave out rows by it"
        yield _finding(next(iter(places)), "FIELD", f"{count} with {_quote(field)}, which is not learned. {fix}")


def _labels(row: Conversation, role: str) -> set[str]:
    """How the turns of a role begin: "问", "answer", or "" where there is no prefix."""
    matches = (LABEL.match(message["content"]) for message in row.messages if message["role"] == role)
    return {match[1].casefold() if match else "" for match in matches}


def _style(questions: set[str], answers: set[str]) -> str:
    sides = (" or ".join(f"{label}:" if label else "none" for label in sorted(side)) for side in (questions, answers))
    return "prefix of questions {}, of answers {}".format(*(side or "none" for side in sides))


def _minority(kinds: list[tuple[str, str]], code: str, fix: str) -> Iterator[Finding]:
    counts = Counter(kind for _, kind in kinds)
    if len(counts) > 1:
        [(most, count)] = counts.most_common(1)
        where, other = next(pair for pair in kinds if pair[1] != most)
        yield _finding(where, code, one_line(f"{count} of {len(kinds)} rows: {most}; this one: {other}. {fix}"))


# ---- rows beside others ----------------------------------------------------------------------------------------------

SIGNS = "-*/%#&@\\·"  # punctuation to Unicode, but 12-3 is not 123 and C# is not C; + = < > are symbols anyway
# Signs that are none: in or between words (well-known), marks of emphasis, bullets
MARKS = re.compile(
    r"(?<=[^\W\d_]{2})-(?=[^\W\d_])|(?<=[^\W\d_])-(?=[^\W\d_]{2})|(?<=[^\W\d_]{2} )-(?= [^\W\d_]{2})"
    r"|(?<![0-9)])\*\*+(?![0-9(])|^[ \t]*[-*][ \t]+",
    re.MULTILINE,
)
POWER = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]")  # 3² is not 32
NUMBER = re.compile(r"[0-9]+(?:˙[0-9]+)?")


@cache
def _dropped() -> tuple[dict[int, None], re.Pattern]:
    """What `normal` leaves out, as a table for str.translate, and as it stands between two digits."""
    chars = [chr(code) for code in range(sys.maxunicode + 1)]
    chars = [c for c in chars if unicodedata.category(c) in ("Cc", "Cf") or unicodedata.category(c)[0] in "PZ"]
    chars = [c for c in chars if c not in SIGNS]
    return {ord(c): None for c in chars}, re.compile(rf"(?<=[0-9])[{re.escape(''.join(chars))}]+(?=[0-9])")


def normal(text: str) -> str:
    """A text for comparison: NFKC, case folded, without white space and punctuation (SIGNS stay).

    Numbers stay apart (1, 12 and 11, 2 are different) and keep their decimal point. Nothing but punctuation is itself.
    """
    table, between = _dropped()
    folded = text if text.isascii() else unicodedata.normalize("NFKC", POWER.sub(r"^\g<0>", text))
    folded = between.sub(lambda gap: "˙" if gap[0] == "." else "|", MARKS.sub("", folded.casefold()))
    return folded.translate(table) or "".join(text.split())


class _Row(NamedTuple):
    """A conversation as it is compared with others."""

    where: str
    text: str  # normal turns, a line each; of a pair, then what the rejected side has for those that differ
    system: bool  # the first of them is a system turn
    answers: frozenset[int]  # those that are answers to learn
    verdicts: tuple[tuple[str, str, bool], ...] | None  # of answers that are compared or judged: question, answer, good

    @classmethod
    def of(cls, row: Conversation) -> "_Row":
        turns = row.messages
        learned = (i for i, m in enumerate(turns) if m["role"] == "assistant" and m.get("train", True))
        answers = frozenset(learned if row.row is None else ())  # those of a prompt belong to its question
        lines, verdicts = cls._lines(turns), None
        if row.good is not None:
            verdicts = (("\n".join(lines[:-1]), lines[-1], row.good),)
        elif row.rejected:
            cut, other = lint_pairs.common(row), cls._lines(row.rejected)
            verdicts = (("\n".join(lines[:cut]), "\n".join(lines[cut:]), True),
                        ("\n".join(other[:cut]), "\n".join(other[cut:]), False))  # fmt: skip
            verdicts = verdicts if lines != other else ()
            lines += other[cut:]
        return cls(row.where, "\n".join(lines), turns[0]["role"] == "system", answers, verdicts)

    @staticmethod
    def _lines(turns: list[dict]) -> list[str]:
        return [normal(message.get("reasoning_content", "") + message["content"]) for message in turns]

    def asked(self, loosely: bool = False) -> Iterator[tuple[bytes, str]]:
        """For every answer, a digest of all turns before it, and the answer; for a document, its digest and "".

        `loosely`: without a system turn, the numbers of a turn sorted.
        """
        turns, digest = self.text.split("\n"), blake2b(digest_size=16)
        for place, turn in enumerate(turns):
            if place in self.answers:
                yield digest.digest(), turn
            if not (loosely and place == 0 and self.system):
                turn = _numbers_sorted(turn) if loosely else turn
                digest.update(turn.encode("utf-8", "surrogatepass") + b"\n")
        if not self.answers:
            yield digest.digest(), ""

    def question(self) -> str:
        """The turns before the last answer, without a system turn; of a document all of it."""
        return "\n".join(self.text.split("\n")[self.system : max(self.answers, default=None)])


def asked(row: Conversation) -> Iterator[bytes]:
    """A digest for every question of a row, equal where OVERLAP takes two questions for the same."""
    return (digest for digest, _ in _Row.of(row).asked(loosely=True))


def _numbers_sorted(text: str) -> str:
    numbers = iter(sorted(NUMBER.findall(text), key=lambda number: (len(number), number)))
    return NUMBER.sub(lambda _: next(numbers), text)


def _repeats(rows: list[_Row]) -> Iterator[Finding]:
    """DUPLICATE and NEAR-DUPLICATE: every later row of a group once, beside its first row or one between them."""
    first: dict[tuple, _Row] = {}
    for row in rows:
        good = row.verdicts and row.verdicts[0][2]  # an answer that is good here and bad there is a CONFLICT
        if (other := first.setdefault((row.text, good), row)) is not row:
            yield _finding(row.where, "DUPLICATE", f"same as {other.where}. Remove one of them")
    unlike: dict[str, _Row] = {}
    for row in first.values():
        unlike.setdefault(row.text, row)
    texts, rows = list(unlike), list(unlike.values())
    beside = defaultdict(list)
    for one, other in near.near_pairs(texts):
        beside[one].append(other)
        beside[other].append(one)
    reached = set()
    for start in sorted(beside):
        queue = [] if start in reached else [start]
        reached.add(start)
        for member in queue:
            for row in sorted(set(beside[member]) - reached):
                reached.add(row)
                queue.append(row)
                other = start if member == start or near.is_near(texts[start], texts[row]) else member
                text = f"nearly the same as {rows[other].where}. Keep one of them, or make them differ"
                yield _finding(rows[row].where, "NEAR-DUPLICATE", text)


def _conflicts(rows: list[_Row]) -> Iterator[Finding]:
    known: dict[bytes, tuple[str, str]] = {}
    for row in (row for row in rows if row.verdicts is None):
        for asked, answer in row.asked():
            where, other = known.setdefault(asked, (row.where, answer))
            if answer != other:
                text = f"its question is answered differently in {where}. Keep one answer, or ask differently"
                yield _finding(row.where, "CONFLICT", text)
                break


def _contradictions(rows: list[_Row]) -> Iterator[Finding]:
    """CONFLICT: an answer that another row judges the other way."""
    known: dict[tuple[str, str, bool], str] = {}
    for row in rows:
        verdicts = row.verdicts or ()
        other = {good: known[q, a, not good] for q, a, good in verdicts if (q, a, not good) in known}
        if other:
            where, names = next(iter(other.values())), ("rejected", "chosen")
            text = f"its sides are swapped in {where}"
            if len(verdicts) == 1:
                text = f"its answer is {('bad', 'good')[verdicts[0][2]]}, and in {where} it is not"
            elif len(other) == 1:
                [good] = other
                text = f"its {names[good]} answer is {names[not good]} in {where}, right in a ranking of several alone"
            yield _finding(row.where, "CONFLICT", f"{text}. Keep one of them")
        for verdict in verdicts:
            known.setdefault(verdict, row.where)


def _overlap(train: list[_Row], evaluation: list[_Row]) -> Iterator[Finding]:
    if not evaluation:
        return
    known = {key: row.where for row in reversed(train) for key, _ in row.asked(loosely=True)}
    texts = {text: row.where for row in reversed(train) for text in (row.text, row.question())}
    fix = "Remove it from one of them"
    left: dict[str, list[str]] = defaultdict(list)
    for row in evaluation:
        *_, (key, _) = row.asked(loosely=True)
        if key in known:
            text = f"the same question or text is in the training data at {known[key]}. {fix}"
            yield _finding(row.where, "OVERLAP", text)
        else:
            for text in {row.question(), row.text}:
                left[text].append(row.where)
    both, found = [*texts, *left], set()
    for one, other in near.near_pairs(both, len(texts)):
        for where in left[both[other]]:
            if where not in found:
                found.add(where)
                text = f"nearly the same is in the training data at {texts[both[one]]}. {fix}"
                yield _finding(where, "OVERLAP", text)
