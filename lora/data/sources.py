"""The files that --data, --replay and --eval-data name: read, counted, and what is to say about them."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lora.data import formats, lint
from lora.data.encode import Encoded, encode, joined
from lora.errors import BadInput, say
from lora.text.chat import Chat


@dataclass(frozen=True)
class Sources:
    """Examples of every data file and their weights (None where none has one); of files to replay, each with its share
    of a step; and those held out."""

    data: list[Encoded]
    weights: list[float] | None
    replays: list[tuple[Encoded, float]]
    held_out: Encoded | None

    @cached_property
    def examples(self) -> Encoded:
        """Of all sources, one behind the other: what `batch.steps` counts through."""
        return joined([*self.data, *(part for part, _ in self.replays)])

    def fingerprint(self) -> str:
        """sha256 over all that is trained: every example, in order, and how sources are mixed."""
        shares = [share for _, share in self.replays]
        digest = hashlib.sha256(f"{[len(part) for part in self.data]} {self.weights} {shares}\n".encode())
        for array in (self.examples.tokens, self.examples.trained, self.examples.ends):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def numbered(name: str) -> tuple[str, float | None]:
    """`a.jsonl:3` as ("a.jsonl", 3.0): what follows the last colon is a number, or belongs to the name (None)."""
    path, _, tail = name.rpartition(":")
    try:
        number = float(tail)
    except ValueError:
        return name, None
    if "_" in tail or not tail.isascii():
        return name, None
    return (path, number) if path and not math.isnan(number) else (name, None)


def named(s) -> list[tuple[str, str, float | None]]:
    """Flag, file and number of every file that is named. Raises BadInput for a number that makes no sense."""
    files, problems = [], []
    for flag, names in (("data", s.data), ("replay", s.replay), ("eval", s.eval_data)):
        for name in names or ():
            path, number = (name, None) if flag == "eval" else numbered(name)
            files.append((flag, path, number))
            most, what = (10, "a share") if flag == "replay" else (1e6, "a weight")
            if (flag == "replay" and number is None) or (number is not None and not 0 < number <= most):
                why = f"{name!r} has no number that could be {what}"
                problems.append(f"wrong --{flag} in the command line: {why}. Give FILE:NUMBER, above 0, as 0.25")
    if bool(s.prompt_key) != bool(s.response_key):
        problems.append("wrong keys in the command line: --prompt-key and --response-key need each other. Give both")
    if problems:
        raise BadInput(*problems)
    return files


def read_sources(s, chat: Chat, locate: Callable[[str], Path], made: Sequence[dict] | None = None) -> Sources:
    """All examples that the settings ask for; `made` are rows for where no data is named, `locate` finds a file.

    Says in a line what each file is. Raises BadInput with everything that is wrong in any of them.
    """
    found, problems = {"data": [], "replay": [], "eval": []}, []
    files, chosen = named(s), set()
    if s.eval_fraction is not None:
        chosen = _to_hold_out(lambda: _rows_of(s, locate, made, ("data",)), s)
    if made is not None:
        found["data"].append((_made(made, s, chat, chosen), None))
    for flag, name, number in files:
        try:
            part = _read(locate(name), s, chat, chosen if flag != "eval" else ())
        except BadInput as error:
            problems += error.problems
            continue
        what = f"{part.rows:,} rows of {' and '.join(part.shapes)}"
        times = "" if number is None else f", weight {number:g}"
        if flag == "replay":
            times = f", share {number:g}: {number * s.batch_size:g} on top of the {s.batch_size} of a step"
        say(f"{flag:8} {name}: {what}{times}")
        if part.overlong:
            where, length = part.overlong
            done = f"{part.dropped} dropped, {part.truncated} truncated"
            say(f"overlong {done}; over {s.max_len} tokens (--max-len), the first is {where} with {length}")
        if not len(part):
            what = "measure" if flag == "eval" else "train"
            why = f"no example fits {s.max_len} tokens. Raise --max-len"
            if not part.rows:
                why = "all its questions are held out. Lower --eval-fraction, or give --eval-data"
            problems.append(f"nothing to {what} in {name}: {why}")
        found[flag].append((part, number))
    if s.prompt_key and not problems:
        pair = f"{s.prompt_key}/{s.response_key}"
        if not any(pair in part.shapes for parts in found.values() for part, _ in parts):
            problems.append(
                f"wrong keys in the command line: no row has both {pair}. Check --prompt-key, --response-key"
            )
    if problems:
        raise BadInput(*problems)
    _notes(s, chat)
    if chosen:
        rows = (row for row in _rows_of(s, locate, made, ("data",)) if group(row) in chosen)
        part = encode(rows, chat, s.max_len, s.train_on, s.overlong)
        over = f", {part.dropped} over {s.max_len} tokens dropped" if part.dropped else ""
        say(f"held out {part.rows:,} rows, chosen by question{over}")
        if len(part):
            found["eval"].append((part, None))
    data, numbers = zip(*found["data"], strict=True)
    weights = None if not any(numbers) else [number or 1.0 for number in numbers]
    held_out = joined([part for part, _ in found["eval"]]) if found["eval"] else None
    return Sources(list(data), weights, found["replay"], held_out)


def _keys(s) -> tuple[str, str] | None:
    """The keys of question and answer that were named."""
    return (s.prompt_key, s.response_key) if s.prompt_key else None


def _rows_of(s, locate: Callable, made: Sequence[dict] | None, flags: Iterable[str]) -> Iterator:
    """The rows that were made, and those of all files that some flags name."""
    yield from _conversations(made or ())
    for flag, name, _ in named(s):
        if flag in flags:
            yield from formats.scan([locate(name)], keys=_keys(s))


def trained_rows(s, locate: Callable[[str], Path], made: Sequence[dict] | None = None) -> Iterator:
    """The rows of all examples and replays, to be compared with."""
    return _rows_of(s, locate, made, ("data", "replay"))


def group(row) -> bytes | None:
    """What rows with the same first question have in common (a document: its text), as the linter compares them; so no
    question is on both sides where rows are split by it. None for a row that cannot be read."""
    return None if isinstance(row, formats.Problem) else next(lint.asked(row))


def _to_hold_out(rows: Callable[[], Iterator], s) -> set[bytes]:
    """The groups that --eval-fraction holds out: those with the smallest hashes, the same whatever the rows' order."""
    groups = {group(row) for row in rows()} - {None}
    count = min(max(1, round(s.eval_fraction * len(groups))), len(groups) - 1)
    if count < 1:
        why = "the data has but one question, and something must be left to train"
        raise BadInput(f"wrong --eval-fraction in the command line: {why}. Give --eval-data")
    key = f"{s.seed}/held out/".encode()
    return set(sorted(groups, key=lambda one: hashlib.blake2b(key + one).digest())[:count])


def _conversations(rows: Sequence[dict]) -> Iterator[formats.Conversation]:
    return (formats.Conversation(row["messages"], f"row {i}") for i, row in enumerate(rows, 1))


def _made(rows: Sequence[dict], s, chat: Chat, without: set[bytes]) -> Encoded:
    conversations = (row for row in _conversations(rows) if group(row) not in without)
    part = encode(conversations, chat, s.max_len, s.train_on, s.overlong)
    if not len(part):
        raise BadInput(f"nothing to train in the rows made here: none fits {s.max_len} tokens. Raise --max-len")
    return part


def _read(path: Path, s, chat: Chat, without: set[bytes]) -> Encoded:
    """The examples of a file, but for rows of some groups."""
    size = path.stat().st_size if path.is_file() else None
    with tqdm(total=size, desc=f"reading {path.name}", unit="B", unit_scale=True, delay=1, leave=False) as bar:
        rows = formats.scan([path], keys=_keys(s), progress=bar.update)
        rows = (row for row in rows if group(row) not in without) if without else rows
        return encode(rows, chat, s.max_len, s.train_on, s.overlong)


def _notes(s, chat: Chat) -> None:
    """What the template and the tokenizer do that a reader of the data would not expect."""
    if chat.own_system and s.system is None and not s.no_system:
        own = " ".join(chat.own_system.split())
        say(f"system   the template adds, where a row has none: {own[:120]} (--no-system leaves it out)")
    for count, what in (
        (chat.guarded, "rows spell a control token in their text; it is kept as plain text"),
        (chat.cuts, "examples are cut into tokens where the answer begins, as in generation"),
        (chat.split, "rows became an example for each answer, because the template rewrites earlier turns"),
    ):
        if count:
            say(f"note     {count} {what}")


def lint_report(s, locate: Callable[[str], Path]) -> int:
    """What --check finds, a line each on stdout; exit code 2 if anything."""
    files, keys = named(s), _keys(s)
    if not files:
        raise BadInput("nothing to check in the command line: there is no --data. Give files of conversations")
    train = list(formats.scan([locate(name) for flag, name, _ in files if flag != "eval"], keys=keys))
    held_out = list(formats.scan([locate(name) for flag, name, _ in files if flag == "eval"], keys=keys))
    findings = lint.check(train, held_out)
    for finding in findings:
        print(finding)
    say(f"{len(findings)} finding{'s' if len(findings) != 1 else ''} in {len(train) + len(held_out):,} rows")
    return 2 if findings else 0
