"""Conversations become examples: some rows at a time, kept as arrays, so that 100,000 rows need little memory."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import ceil

import numpy as np

from lora.data.formats import Conversation, Problem
from lora.errors import MOST_LINES, BadInput
from lora.text.chat import Chat, Example, TokenizedChat

ROWS = 512  # encoded together
KEPT = 64  # conversations kept at most, to show some


@dataclass
class Encoded(Sequence):
    """Examples as one long array of tokens (4 bytes each) and flags (1 byte), and what became of the rows.

    `dropped`, `truncated` and `split` count those that were longer than the limit; `overlong` is the first one's place
    and length. `kept` are conversations from all over the file.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    trained: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    ends: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    where: list[str] = field(default_factory=list)
    rows: int = 0
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
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = slice(self.ends[i], self.ends[i + 1])
        return Example(self.tokens[part].tolist(), self.trained[part].tolist())

    def trained_in(self, indices: Sequence[int]) -> int:
        """How many tokens of some examples are trained; the first token of one has nothing before it."""
        return sum(int(self.trained[self.ends[i] + 1 : self.ends[i + 1]].sum()) for i in indices)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (N,)."""
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

    def _fit(self, chat: TokenizedChat, limit: int, overlong: str, where: str, document: bool) -> list[TokenizedChat]:
        """The example within the limit: itself, cut short, in pieces, or none where it is dropped."""
        if len(chat.tokens) <= limit:
            return [chat]
        self.overlong = self.overlong or (where, len(chat.tokens))
        pieces = _pieces(chat, limit) if overlong == "split" and document else []
        short = chat.within(limit) if overlong == "truncate" else None
        self.split += bool(pieces)
        self.truncated += short is not None
        self.dropped += not (pieces or short)
        return [short] if short else pieces


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
) -> Encoded:
    """The examples of some rows, of at most `limit` tokens each; the model's own limit is `most`.

    A longer one is dropped, truncated so that it keeps an end of turn (or dropped, if no part of an answer is left),
    a document split into several (a conversation is dropped), or an error. Raises BadInput with everything that is
    wrong with any row.
    """
    found, problems, rows = Encoded(), [], iter(rows)
    tokens, trained, lengths = array("i"), bytearray(), array("i")
    while (part := list(islice(rows, ROWS))) and len(problems) <= 10 * MOST_LINES:  # then the file is something else
        messages = [row.messages for row in part if isinstance(row, Conversation)]
        tokenized = iter(chat.tokenize_all(messages, train_on))
        for row in part:
            if isinstance(row, Problem):
                problems.append(str(row))
                continue
            found._count(row)
            examples = next(tokenized)
            if isinstance(examples, BadInput):
                problems += [f"wrong row in {row.where}: {problem}" for problem in examples.problems]
                continue
            for example in examples:
                found._count_missing(example, row.where)
                if overlong == "error" and (length := len(example.tokens)) > limit:
                    why, fix = f"the model takes at most {most}", "Give"
                    if may_be_raised(limit, most):
                        why, fix = f"--max-len is {limit}", "Raise --max-len, or give"
                    fix = f"{fix} --overlong drop, truncate or split"
                    problems.append(f"too long in {row.where}: {length} tokens, {why}. {fix}")
                    continue
                for part in found._fit(example, limit, overlong, row.where, row.messages[0]["role"] == "text"):
                    ids, flags = part.example(train_on == "all")
                    tokens.extend(ids)
                    trained.extend(flags)
                    lengths.append(len(ids))
                    found.where.append(row.where)
    if problems:
        raise BadInput(*problems)
    if lengths:
        found.tokens, found.trained = np.frombuffer(tokens, np.int32), np.frombuffer(trained, bool)
        found.ends = np.concatenate([[0], np.cumsum(lengths)])
    return found


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The examples of several sources, one after another."""
    if len(parts) == 1:
        return parts[0]
    whole = Encoded(np.concatenate([p.tokens for p in parts]), np.concatenate([p.trained for p in parts]))
    whole.ends = np.concatenate([[0], np.cumsum(np.concatenate([p.lengths for p in parts]))])
    whole.where = [where for part in parts for where in part.where]
    for shape in [shape for part in parts for shape in part.shapes]:
        whole.shapes[shape] = sum(part.shapes.get(shape, 0) for part in parts)
    for count in ("rows", "dropped", "truncated", "split"):
        setattr(whole, count, sum(getattr(part, count) for part in parts))
    return whole
