"""Conversations become examples: some rows at a time, kept as arrays, so that 100,000 rows need little memory."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import ceil

import numpy as np

from lora.data.batch import Linked
from lora.data.formats import Conversation, Problem
from lora.errors import MOST_LINES, BadInput
from lora.text.chat import Chat, Example, TokenizedChat

ROWS = 512  # encoded together
RAISE_OR_LOWER = "Raise --max-len, or lower --max-new-tokens"
KEPT = 64  # conversations kept at most, to show some
# How many examples of a row are linked. A pair is "scored" where a value is read at its ends of turn
KINDS = {"conversation": 1, "pair": 2, "scored": 2, "judged": 2, "prompt": 1}
KNOWN = {  # by kind: name -> the numbers of a row's examples
    "conversation": {},
    "prompt": {},
    "pair": {"margin": lambda row: (row.margin,) * 2},
    "scored": {"margin": lambda row: (row.margin,) * 2},
    "judged": {"good": lambda row: (row.good,) * 2},
}


@dataclass
class Encoded(Sequence):
    """Examples as one long array of tokens (4 bytes each) and flags (1 byte), and what became of the rows.

    `dropped`, `truncated` and `split` count those that were longer than the limit; `overlong` is the first one's place
    and length. `kept` are conversations from all over the file. Where `group` is 2, so many examples are linked: the
    sides of a pair; or a judged answer, and another row's answer to its question. `known` has their numbers. In
    prompts nothing is trained; `prompts` are their rows, in the order of the examples.
    """

    group: int = 1
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    trained: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    ends: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    known: dict[str, np.ndarray] = field(default_factory=dict)  # (len, group) each
    where: list[str] = field(default_factory=list)
    prompts: list[Conversation] = field(default_factory=list)
    rows: int = 0
    equal: int = 0  # pairs with equal sides, as the template writes them and the limit leaves them: they are dropped
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    overlong: tuple[str, int] | None = None
    shapes: dict[str, int] = field(default_factory=dict)
    missing: int = 0  # answers of which the template leaves something out
    first_missing: tuple[str, str] | None = None  # the place of the first one, and what
    kept: list[Conversation] = field(default_factory=list)
    stride: int = 1  # from one that is kept to the next

    def __len__(self) -> int:
        return (len(self.ends) - 1) // self.group

    def __getitem__(self, i: int) -> Example | Linked:
        if not 0 <= i < len(self):
            raise IndexError(i)
        first = self.group * i
        examples = tuple(self._example(n) for n in range(first, first + self.group))
        if self.group == 1:
            return examples[0]
        return Linked(examples, {name: tuple(numbers[i].tolist()) for name, numbers in self.known.items()})

    def _example(self, n: int) -> Example:
        part = slice(self.ends[n], self.ends[n + 1])
        return Example(self.tokens[part].tolist(), self.trained[part].tolist())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, (len,)."""
        return np.diff(self.ends[:: self.group])

    @property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each example by itself, (len · group,)."""
        return np.diff(self.ends)

    def _count(self, row: Conversation) -> None:
        """One row more. Conversations are kept evenly over the file: with KEPT of them, every other one goes."""
        if self.rows % self.stride == 0 and row.messages[0]["role"] != "text":
            self.kept.append(row)
            if len(self.kept) == KEPT:
                del self.kept[1::2]
                self.stride *= 2
        self.rows += 1
        self.shapes[row.shape] = self.shapes.get(row.shape, 0) + 1

    def _count_missing(self, chat: TokenizedChat, where: str) -> None:
        self.missing += len(chat.missing)
        if chat.missing and not self.first_missing:
            self.first_missing = where, chat.missing[0]

    def _fit(self, linked: tuple, limit: int, overlong: str, where: str, document: bool) -> list[tuple]:
        """Linked examples within the limit: as they are, cut short, in pieces, or none where they are dropped."""
        longest = max(len(chat.tokens) for chat in linked)
        if longest <= limit:
            return [linked]
        self.overlong = self.overlong or (where, longest)
        pieces = _pieces(*linked, limit) if overlong == "split" and document else []
        short = tuple(chat.within(limit) for chat in linked) if overlong == "truncate" else (None,)
        self.split += bool(pieces)
        self.truncated += None not in short
        self.dropped += not pieces and None in short
        return [short] if None not in short else [(piece,) for piece in pieces]


def _pieces(document: TokenizedChat, limit: int) -> list[TokenizedChat]:
    """A document in parts of about the same length, which hold every token once; the first of a part has nothing before
    it that could predict it. None where a part would be a single token."""
    n, tokens = len(document.tokens), document.tokens
    count = ceil(n / limit)
    parts = [tokens[i * n // count : (i + 1) * n // count] for i in range(count)]
    return [TokenizedChat(part, [(0, len(part))], []) for part in parts] if n >= 2 * count else []


def may_be_raised(limit: int, most: int | None) -> bool:
    """Does the model, which takes `most` tokens (None: nobody knows), take more than this limit?"""
    return most is None or limit < most


def encode(
    rows: Iterable[Conversation | Problem],
    chat: Chat,
    limit: int,
    train_on: str = "assistant",
    overlong: str = "drop",
    most: int | None = None,
    kind: str = "conversation",
) -> Encoded:
    """The examples of some rows, of at most `limit` tokens each; the model's own limit is `most`.

    A longer one is dropped, truncated so that it keeps an end of turn (or dropped, if no part of an answer is left),
    a document split into several (a conversation is dropped), or an error. `kind` is one of `KINDS`. Raises BadInput
    with everything that is wrong with any row.
    """
    found, problems = Encoded(KINDS[kind]), []
    rows = iter(_with_others(rows) if kind == "judged" else rows)
    tokens, trained, lengths, known = array("i"), bytearray(), array("i"), {name: array("d") for name in KNOWN[kind]}
    while (part := list(islice(rows, ROWS))) and len(problems) <= 10 * MOST_LINES:  # then the file is something else
        tokenized = iter(tokenize([row for row in part if isinstance(row, Conversation)], chat, train_on))
        for row in part:
            if isinstance(row, Problem):
                problems.append(str(row))
                continue
            found._count(row)
            of_sides = [next(tokenized) for _ in sides(row)]
            wrong = [problem for of in of_sides if isinstance(of, BadInput) for problem in of.problems]
            if found.group > 1 and not wrong and any(len(of) > 1 for of in of_sides):
                wrong = ["the template rewrites its earlier answers. Leave one answer after the question"]
            if wrong:
                problems += [f"wrong row in {row.where}: {problem}" for problem in dict.fromkeys(wrong)]
                continue
            document = row.messages[0]["role"] == "text"
            for linked in [*zip(*of_sides, strict=True)]:
                for example in linked:
                    found._count_missing(example, row.where)
                longest = max(len(example.tokens) for example in linked)
                if overlong == "error" and longest > limit:
                    problems.append(_too_long(row, longest, limit, most))
                    continue
                for fitting in found._fit(linked, limit, overlong, row.where, document):
                    if kind in ("pair", "scored") and fitting[0].tokens == fitting[1].tokens:
                        found.equal += 1
                        continue
                    for example in fitting:
                        ids, flags = (_scored(example) if kind == "scored" else example).example(train_on == "all")
                        tokens.extend(ids)
                        trained.extend(flags)
                        lengths.append(len(ids))
                    found.where.append(row.where)
                    found.prompts += [row] if kind == "prompt" else []
                    for name in known:
                        known[name].extend(KNOWN[kind][name](row))
    if problems:
        raise BadInput(*problems)
    if lengths:
        found.tokens, found.trained = np.frombuffer(tokens, np.int32), np.frombuffer(trained, bool)
        found.ends = np.concatenate([[0], np.cumsum(lengths)])
    found.known = {name: np.array(numbers).reshape(-1, found.group) for name, numbers in known.items()}
    return found


def _too_long(row: Conversation, length: int, limit: int, most: int | None) -> str:
    why, fix = f"the model takes at most {most}", "Give --overlong drop, truncate or split"
    if row.row is not None:
        why, fix = f"{limit} are left beside --max-new-tokens", f"{RAISE_OR_LOWER}, or give --overlong drop"
    elif may_be_raised(limit, most):
        why, fix = f"--max-len is {limit}", "Raise --max-len, or give --overlong drop, truncate or split"
    return f"too long in {row.where}: {length} tokens, {why}. {fix}"


def tokenize(rows: Sequence[Conversation], chat: Chat, train_on: str = "assistant") -> list[list | BadInput]:
    """What `Chat.tokenize_all` makes of the sides of some rows, one after another; a prompt is as generation has it."""
    if rows and rows[0].row is not None:
        return [_of_prompt(row, chat) for row in rows]
    return chat.tokenize_all([side for row in rows for side in sides(row)], train_on)


def _of_prompt(row: Conversation, chat: Chat) -> list[TokenizedChat] | BadInput:
    try:
        return [chat.tokenize_prompt(row.messages)]
    except BadInput as error:
        return error


def sides(row: Conversation) -> tuple[list[dict], ...]:
    """The conversations that a row is encoded as."""
    return (row.messages,) if row.rejected is None else (row.messages, row.rejected)


def _with_others(rows: Iterable[Conversation | Problem]) -> Iterator[Conversation | Problem]:
    """Each judged row, and as its other side its question with the answer of the next row that asks something else:
    answers that have nothing to do with the question, by which KTO measures how far the model has moved."""
    waiting, first, second = [], None, None
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        if waiting and _question(row) != _question(waiting[0]):
            yield from (_beside(one, row) for one in waiting)
            waiting, second = [], second or row
        waiting.append(row)
        first = first or row
    for one in waiting:
        yield _beside(one, first if _question(one) != _question(first) else second or first)


def _question(row: Conversation) -> list[dict]:
    return row.messages[:-1]


def _beside(row: Conversation, other: Conversation) -> Conversation:
    return row._replace(rejected=[*_question(row), other.messages[-1]])


def _scored(chat: TokenizedChat) -> TokenizedChat:
    """A conversation whose last position is the end of turn of its last answer, where a reward model reads its score.
    A last token predicts nothing and is left out of a batch, so one more follows."""
    _, end = chat.answers[-1]
    return TokenizedChat([*chat.tokens[:end], chat.tokens[end - 1]], chat.answers, chat.masked)


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The examples of several sources, one after another."""
    if len(parts) == 1:
        return parts[0]
    arrays = (np.concatenate([getattr(p, name) for p in parts]) for name in ("tokens", "trained"))
    whole = Encoded(parts[0].group, *arrays)
    whole.ends = np.concatenate([[0], np.cumsum(np.concatenate([p.document_lengths for p in parts]))])
    whole.known = {name: np.concatenate([p.known[name] for p in parts]) for name in parts[0].known}
    whole.where = [where for part in parts for where in part.where]
    whole.prompts = [row for part in parts for row in part.prompts]
    for shape in [shape for part in parts for shape in part.shapes]:
        whole.shapes[shape] = sum(part.shapes.get(shape, 0) for part in parts)
    for count in ("rows", "equal", "dropped", "truncated", "split"):
        setattr(whole, count, sum(getattr(part, count) for part in parts))
    return whole
