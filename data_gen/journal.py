"""The journal of a run: a teacher's replies in an SQLite file, so that no answer is paid for twice.

The table `replies` has one row a question: its `key`; `asked`, a hash of the messages; the answer as `text`, `finish`
and `tokens`; the `requests` that it took; its `cost`, which is what it counts for --max-tokens. The table `about` has
the settings of the run, name and JSON value: a run with others must not go on with these answers.

Each reply is a transaction of its own, on disk before `add` returns. A kill loses what was not added, nothing else;
SQLite holds the lock that keeps a second process out, and the kernel releases it with the process.
"""

import hashlib
import json
import os
import sqlite3
from pathlib import Path
from typing import NamedTuple

from lora import files
from lora.errors import BadEnvironment, BadInput

SUFFIX = ".journal"  # after the name of --out; before SQLite it was .journal.jsonl
MARK = 0x4C6F5241  # SQLite's application_id: the file is ours
TABLES = (
    "create table about (name text primary key, value text)",
    "create table replies "
    "(key text primary key, asked text, text text, finish text, tokens int, requests int, cost int)",
    f"pragma application_id = {MARK}",
)


class Question(NamedTuple):
    """`key` is unique in a run and stays the same when the run is repeated."""

    key: str
    messages: list[dict]


class Reply(NamedTuple):
    """`finish` is the endpoint's word ("stop", "length", "content_filter"), "refusal" or "failed"; `tokens` are those
    of prompt and answer, 0 where the endpoint does not tell."""

    key: str
    text: str
    finish: str
    tokens: int


def beside(out: Path) -> Path:
    """The journal of the run that writes `out`."""
    return out.with_name(out.name + SUFFIX)


def digest(question: Question) -> str:
    """A short hash of what was asked."""
    return hashlib.sha256(json.dumps(question.messages).encode()).hexdigest()[:16]


def _shown(value: object) -> str:
    return "not given" if value is None else repr(value)


class Journal:
    """Replies by key: `key in journal`, `journal[key]`, `add`. Texts stay on disk. `tokens` and `cost` are sums over
    all replies; `requests` only over those that were there before.

    Raises BadInput where the file belongs to a run about something else, is no journal or is damaged, and where another
    process has it open. The file then stays as it is.
    """

    def __init__(self, path: Path, about: dict):
        self.path = Path(path)
        earlier = self.path.with_name(self.path.name + ".jsonl")
        if earlier.exists() and not self.path.exists():
            fix = "Delete it to ask all of its questions again, or choose another --out"
            raise BadInput(f"old journal in {earlier}: an earlier version wrote it, as JSON lines. {fix}")
        if self.path.exists() and not files.is_regular(self.path):
            raise BadInput(f"wrong file in {self.path}: not a regular file. Choose another --out")
        try:
            self._db = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        except sqlite3.Error as error:
            raise BadEnvironment(f"no journal in {self.path}: {error}. Choose another --out") from None
        try:
            self._open(about)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self.close()
            raise self._wrong(error) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._db.close()

    def __contains__(self, key: str) -> bool:
        return self._row("select 1 from replies where key = ?", key) is not None

    def __getitem__(self, key: str) -> Reply:
        reply = self._row("select key, text, finish, tokens from replies where key = ?", key)
        if [type(value) for value in reply] != [str, str, str, int]:
            raise self._damaged(f"the answer to question {key} is no text")
        return Reply(*reply)

    def fits(self, question: Question) -> bool:
        """Was the reply under this key given to this question?"""
        return self._row("select asked from replies where key = ?", question.key) == (digest(question),)

    def add(self, question: Question, reply: Reply, requests: int, cost: int) -> None:
        """Make a reply durable; `requests` are those it took, `cost` is what it counts for --max-tokens."""
        row = (reply.key, digest(question), reply.text, reply.finish, reply.tokens, requests, cost)
        try:
            self._db.execute("insert into replies values (?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.OperationalError as error:
            why = f"the reply to question {reply.key} could not be written ({error})"
            raise BadEnvironment(f"file operation failed in {self.path}: {why}. Free some space") from None
        self.tokens += reply.tokens
        self.cost += cost

    def _row(self, query: str, *values) -> tuple | None:
        try:
            return self._db.execute(query, values).fetchone()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._wrong(error) from None

    def _open(self, about: dict) -> None:
        self._db.execute("pragma locking_mode = exclusive")  # the lock of the first transaction is kept
        self._db.execute("pragma synchronous = extra")  # a reply that was added survives a power loss
        self._db.execute("begin exclusive")
        if not self._row("select 1 from sqlite_master") and self._row("pragma application_id") == (0,):
            for statement in TABLES:
                self._db.execute(statement)
        elif self._row("pragma application_id") != (MARK,):
            raise self._foreign()
        else:
            self._check(about)
        settings = [(name, json.dumps(value)) for name, value in about.items()]
        self._db.executemany("insert or replace into about values (?, ?)", settings)
        self._db.execute("commit")  # has written something: a file that is read-only is refused before anything is paid
        sums = self._row("select sum(requests), sum(tokens), sum(cost) from replies")
        self.requests, self.tokens, self.cost = (number or 0 for number in sums)

    def _check(self, about: dict) -> None:
        """Raises BadInput for a damaged file, and for one about another run."""
        pages, size = self._row("pragma page_count")[0], self._row("pragma page_size")[0]
        [problem] = self._row("pragma integrity_check(1)")
        if problem != "ok" or os.path.getsize(self.path) < pages * size:
            raise self._damaged(" ".join(problem.split()) if problem != "ok" else "its end is missing")
        try:
            first = {name: json.loads(value) for name, value in self._db.execute("select name, value from about")}
        except (ValueError, TypeError, RecursionError):
            raise self._damaged("its settings are no JSON") from None
        about = json.loads(json.dumps(about))
        changed = [
            f"{name} was {_shown(first.get(name))} and is {_shown(about.get(name))}"
            for name in {**first, **about}
            if first.get(name) != about.get(name)
        ]
        if changed:
            fix = "Give what it was, choose another --out, or delete the journal to start afresh"
            raise BadInput(f"journal of another run in {self.path}: {', '.join(changed)}. {fix}")

    def _foreign(self) -> BadInput:
        return BadInput(f"wrong file in {self.path}: it is no journal of answers. Choose another --out")

    def _damaged(self, why: object) -> BadInput:
        fix = "Rescue the answers with sqlite3's .recover, or delete it to ask all questions again"
        return BadInput(f"damaged journal in {self.path}: {why}. {fix}")

    def _wrong(self, error: sqlite3.Error | UnicodeDecodeError) -> BadInput | BadEnvironment:
        """What kept the file from being opened or read, by SQLite's code for it. https://sqlite.org/rescode.html"""
        # without the extension; Python's own errors have none: a text, or SQLite's message, is not UTF-8
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code == sqlite3.SQLITE_BUSY:
            fix = "Wait for it, or choose another --out"
            return BadInput(f"taken journal in {self.path}: another run is writing it. {fix}")
        if code == sqlite3.SQLITE_NOTADB:
            return self._foreign()
        if code == sqlite3.SQLITE_CORRUPT:
            return self._damaged(error)
        return BadEnvironment(f"no journal in {self.path}: {error}. Choose another --out")
