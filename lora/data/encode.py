"""Conversations become examples: a batch of rows at a time, kept as arrays, so that 100,000 rows need little memory."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from lora.data.formats import Conversation, Problem
from lora.errors import MOST_LINES, BadInput
from lora.text.chat import Chat, Example, TokenizedChat

ROWS = 512  # encoded together
KEPT = 64  # conversations kept at most, to show some


@dataclass
class Encoded(Sequence):
    """Examples as one long array of tokens (4 bytes each) and flags (1 byte), and what became of the rows.

    `dropped` and `truncated` count examples that were longer than the limit; `overlong` is the first one's place and
    length. `kept` are conversations from all over the file.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    trained: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    ends: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    where: list[str] = field(default_factory=list)
    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    overlong: tuple[str, int] | None = None
    shapes: dict[str, int] = field(default_factory=dict)
    kept: list[Conversation] = field(default_factory=list)

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


class _Collector:
    """Rows of one source on their way into an `Encoded`."""

    def __init__(self, chat: Chat, limit: int, train_on: str, overlong: str):
        self.chat, self.limit, self.train_on, self.overlong = chat, limit, train_on, overlong
        self.found, self.problems, self.stride = Encoded(), [], 1
        self.tokens, self.trained, self.lengths = array("i"), bytearray(), array("i")

    def add(self, rows: Sequence[Conversation | Problem]) -> None:
        conversations = [row for row in rows if isinstance(row, Conversation)]
        laid = iter(self.chat.tokenize_all([row.messages for row in conversations], self.train_on))
        for row in rows:
            if isinstance(row, Problem):
                self.problems.append(str(row))
                continue
            found, document = next(laid), row.messages[0]["role"] == "text"
            if self.found.rows % self.stride == 0 and not document:
                self._keep(row)
            self.found.rows += 1
            self.found.shapes[row.shape] = self.found.shapes.get(row.shape, 0) + 1
            if isinstance(found, BadInput):
                self.problems += [f"wrong row in {row.where}: {problem}" for problem in found.problems]
                continue
            for example in found:
                if fitting := self._fitting(example, row.where):
                    self._store(fitting.example(self.train_on == "all"), row.where)

    def _keep(self, row: Conversation) -> None:
        """Evenly over the file, however long it is: with every KEPT kept, every other one goes."""
        self.found.kept.append(row)
        if len(self.found.kept) == KEPT:
            del self.found.kept[1::2]
            self.stride *= 2

    def _fitting(self, laid: TokenizedChat, where: str) -> TokenizedChat | None:
        """The example within the limit, or None where it is dropped or refused."""
        length = len(laid.tokens)
        if length <= self.limit:
            return laid
        self.found.overlong = self.found.overlong or (where, length)
        if self.overlong == "error":
            fix = "Raise --max-len, or --overlong drop or truncate"
            self.problems.append(f"too long in {where}: {length} tokens, --max-len is {self.limit}. {fix}")
            return None
        short = laid.within(self.limit) if self.overlong == "truncate" else None
        self.found.dropped += short is None
        self.found.truncated += short is not None
        return short

    def _store(self, example: Example, where: str) -> None:
        self.tokens.extend(example.tokens)
        self.trained.extend(example.trained)
        self.lengths.append(len(example.tokens))
        self.found.where.append(where)

    def result(self) -> Encoded:
        if self.lengths:
            self.found.tokens = np.frombuffer(self.tokens, np.int32)
            self.found.trained = np.frombuffer(self.trained, bool)
            self.found.ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return self.found


def encode(
    rows: Iterable[Conversation | Problem],
    chat: Chat,
    limit: int,
    train_on: str = "assistant",
    overlong: str = "drop",
) -> Encoded:
    """The examples of some rows, of at most `limit` tokens each.

    A longer one is dropped, truncated so that it keeps an end of turn (or dropped, if no part of an answer is left),
    or an error. Raises BadInput with everything that is wrong with any row.
    """
    collector, rows = _Collector(chat, limit, train_on, overlong), iter(rows)
    while part := list(islice(rows, ROWS)):
        collector.add(part)
        if len(collector.problems) > 10 * MOST_LINES:  # the whole file is something else
            break
    if collector.problems:
        raise BadInput(*collector.problems)
    return collector.result()


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The examples of several sources, one after another."""
    if len(parts) == 1:
        return parts[0]
    whole = Encoded(np.concatenate([p.tokens for p in parts]), np.concatenate([p.trained for p in parts]))
    whole.ends = np.concatenate([[0], np.cumsum(np.concatenate([p.lengths for p in parts]))])
    for part in parts:
        whole.where += part.where
        whole.rows, whole.dropped = whole.rows + part.rows, whole.dropped + part.dropped
        whole.truncated += part.truncated
    return whole
