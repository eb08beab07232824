"""The journal of a run: every reply of a teacher is a durable line as it arrives, so that nothing is asked twice.

A line that a kill cut in half is closed by another line, never rewritten; its question is asked again.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from lora import files
from lora.errors import BadInput

try:
    import fcntl
except ImportError:  # Windows: two runs of the same --out are not noticed there
    fcntl = None

MENDED = {"half a line": "ends here"}  # written after a line that a kill cut off


class Question(NamedTuple):
    """`key` is unique in a run and stays the same in its repetition."""

    key: str
    messages: list[dict]


class Reply(NamedTuple):
    """`finish` is the endpoint's word ("stop", "length", "content_filter"), "refusal" or "failed"; `tokens` are those
    of prompt and answer, 0 where the endpoint does not tell."""

    key: str
    text: str
    finish: str
    tokens: int


def digest(question: Question) -> str:
    """What was asked, in short."""
    return hashlib.sha256(json.dumps(question.messages).encode()).hexdigest()[:16]


def _shown(value: object) -> str:
    return "not given" if value is None else repr(value)


class Journal:
    """Replies by key, each a line of `path`: `key in journal`, `journal[key]`, `add`. Texts stay on disk. `requests`,
    `tokens` and `cost` are those of all lines; `requests` only of those that were there before.

    The first line says what the run is about. Raises BadInput where that is something else than `about`, or where
    another process has the journal open.
    """

    def __init__(self, path: Path, about: dict):
        self.path, self.requests, self.tokens, self.cost = Path(path), 0, 0, 0
        self._lines: dict[str, tuple[int, str]] = {}  # key -> offset, digest of what was asked
        if not self.path.exists():
            files.append_row(self.path, {"journal": about})
            files.sync(self.path.absolute().parent)
        self._file = files.open_regular(self.path, 2**40)
        try:
            self._lock()
            self._read(about)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __getitem__(self, key: str) -> Reply:
        self._file.seek(self._lines[key][0])
        row = json.loads(self._file.readline())
        return Reply(key, row["text"], row["finish"], row["tokens"])

    def fits(self, question: Question) -> bool:
        """Was the reply under this key given to this question?"""
        return self._lines[question.key][1] == digest(question)

    def add(self, question: Question, reply: Reply, requests: int, cost: int) -> None:
        """One durable line; `requests` are those it took, `cost` is what it counts for --max-tokens."""
        start, asked = self._size(), digest(question)
        row = {**reply._asdict(), "asked": asked, "requests": requests, "cost": cost}
        files.append_row(self.path, row)
        files.sync(self.path)
        self._lines[reply.key] = (start, asked)
        self.tokens += reply.tokens
        self.cost += cost

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _lock(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fix = "Wait for it, or choose another --out"
                raise BadInput(f"taken journal in {self.path}: another run is writing it. {fix}") from None
            except OSError:  # a file system without locks
                pass

    def _read(self, about: dict) -> None:
        offset, first = 0, None
        for number, line in enumerate(self._file, 1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
                if row is not None and first is None:
                    first = dict(row["journal"])
                elif row is not None and "journal" not in row:  # two runs that began at the same moment both wrote one
                    self._lines[row["key"]] = (offset, row["asked"])
                    self.requests += row["requests"]
                    self.tokens += row["tokens"]
                    self.cost += row["cost"]
            except (ValueError, KeyError, TypeError, RecursionError):
                if not line.endswith(json.dumps(MENDED).encode() + b"\n"):
                    why = "no line of a journal of answers" if first else "it is no journal of answers"
                    fix = "Remove the line; its question is asked again" if first else "Choose another --out"
                    raise BadInput(f"wrong line in {self.path}:{number}: {why}. {fix}") from None
            offset += len(line)
        if offset and not line.endswith(b"\n"):
            files.append_row(self.path, MENDED)
            self._file.seek(0)
        if first is None:
            files.append_row(self.path, {"journal": about})
            return
        about = json.loads(json.dumps(about))
        changed = [
            f"{name} was {_shown(first.get(name))} and is {_shown(about.get(name))}"
            for name in {**first, **about}
            if first.get(name) != about.get(name)
        ]
        if changed:
            fix = "Give what it was, choose another --out, or delete the journal to start afresh"
            raise BadInput(f"journal of another run in {self.path}: {', '.join(changed)}. {fix}")
