"""The files that --data, --replay and --eval-data name: read, counted, and what is to say about them."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lora.data import formats, lint
from lora.data.encode import RAISE_OR_LOWER, Encoded, encode, joined, may_be_raised, tokenize
from lora.errors import BadInput, say
from lora.text.chat import Chat

BOTH_KEYS = ("conversation", "judged")  # kinds of rows in which the answer's key must be named beside the question's
MOST_NAMES = 5  # of control tokens that one line lists


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
        """The examples of all sources, one source behind the other, as `order.steps` counts them."""
        return joined([*self.data, *(part for part, _ in self.replays)])

    def fingerprint(self) -> str:
        """sha256 over all that is trained: every example, in order, and how sources are mixed."""
        shares = [share for _, share in self.replays]
        digest = hashlib.sha256(f"{[len(part) for part in self.data]} {self.weights} {shares}\n".encode())
        arrays = (self.examples.tokens, self.examples.trained, self.examples.ends, *self.examples.known.values())
        for array in arrays:
            digest.update(np.ascontiguousarray(array))
        for prompt in self.examples.prompts:  # rewards depend on all its columns
            digest.update(f"{json.dumps(prompt.row, sort_keys=True)}\n".encode())
        return digest.hexdigest()


# ---- the files that are named ----------------------------------------------------------------------------------------


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


def named(args, kind: str | None = None) -> list[tuple[str, str, float | None]]:
    """Flag, file and number of every file that is named. Raises BadInput for a number that makes no sense, and for
    keys that do not suit the `kind` of its rows."""
    files, problems = [], []
    for flag, names in (("data", args.data), ("replay", args.replay), ("eval", args.eval_data)):
        for name in names or ():
            path, number = (name, None) if flag == "eval" else numbered(name)
            files.append((flag, path, number))
            most, what = (10, "a share") if flag == "replay" else (1e6, "a weight")
            if (flag == "replay" and number is None) or (number is not None and not 0 < number <= most):
                why = f"{name!r} has no number that could be {what}"
                problems.append(f"wrong --{flag} in the command line: {why}. Give FILE:NUMBER, above 0, as 0.25")
    if problems := [*problems, *key_problems(args, kind)]:
        raise BadInput(*problems)
    return files


def key_problems(args, kind: str | None) -> list[str]:
    """The line that is due where the keys that are named do not suit the kind of rows: the question's is enough but for
    BOTH_KEYS."""
    if kind == "prompt" and args.response_key:
        why = "answers are sampled, and rewards get all columns of a row"
        return [f"contradiction in the command line: --method {args.method} and --response-key: {why}. Leave it out"]
    if kind is None or (args.prompt_key and kind not in BOTH_KEYS):
        return []
    line = "wrong keys in the command line: --prompt-key and --response-key need each other. Give both"
    return [line] if bool(args.prompt_key) != bool(args.response_key) else []


def how(args, kind: str = "conversation") -> dict:
    """How `formats` reads rows, by the flags and by the `kind` of rows that a method learns from."""
    enough = args.response_key or kind not in BOTH_KEYS
    keys = (args.prompt_key, args.response_key) if args.prompt_key and enough else None
    return {"keys": keys, "leading": args.leading_answers, "kind": "pair" if kind == "scored" else kind}


def limit(args, kind: str, most: int | None = None) -> int:
    """The most tokens of an example, --max-len or what the model takes; of a prompt, what is left for it."""
    longest = args.max_len or most
    return max(1, longest - args.max_new_tokens) if kind == "prompt" else longest


def _rows(
    args, locate: Callable, generated_rows: Sequence[dict] | None, kind: str, flags: Sequence[str] = ("data",), **more
) -> Iterator:
    """The rows that were generated, and those of all files that some flags name."""
    for i, row in enumerate(generated_rows or (), 1):
        yield formats.Conversation(row["messages"], f"row {i}")
    yield from formats.scan([locate(name) for flag, name, _ in named(args) if flag in flags], **how(args, kind), **more)


def trained_rows(args, locate: Callable[[str], Path], generated_rows: Sequence[dict] | None, kind: str) -> Iterator:
    """The rows of all examples and replays, to be compared with."""
    return _rows(args, locate, generated_rows, kind, ("data", "replay"))


# ---- rows that are held out ------------------------------------------------------------------------------------------


def group(row) -> bytes | None:
    """What rows with the same first question have in common (a document: its text), as the linter compares them; so no
    question is on both sides where rows are split by it. None for a row that cannot be read."""
    return None if isinstance(row, formats.Problem) else next(lint.asked(row))


def _to_hold_out(rows: Iterator, fraction: float, seed: int) -> set[bytes]:
    """The groups that --eval-fraction holds out: those with the smallest hashes, the same whatever the rows' order."""
    groups = {group(row) for row in rows} - {None}
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    if count < 1:
        why = "the data has but one question, and something must be left to train"
        raise BadInput(f"wrong --eval-fraction in the command line: {why}. Give --eval-data")
    key = f"{seed}/held out/".encode()
    return set(sorted(groups, key=lambda one: hashlib.blake2b(key + one).digest())[:count])


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_sources(
    args,
    chat: Chat,
    locate: Callable[[str], Path],
    generated_rows: Sequence[dict] | None = None,
    most: int | None = None,
    kind: str = "conversation",
) -> Sources:
    """All examples that the settings ask for; `generated_rows` stand where no data is named, `locate` finds a file, the
    model takes at most `most` tokens, `kind` is one of `encode.KINDS`.

    Says in a line what each file is. Raises BadInput with everything that is wrong in any of them.
    """
    found, problems, files = {"data": [], "replay": [], "eval": []}, [], named(args, kind)
    limits = limit(args, kind), args.train_on, args.overlong, most, kind
    chosen = set()
    if args.eval_fraction is not None:
        chosen = _to_hold_out(_rows(args, locate, generated_rows, kind), args.eval_fraction, args.seed)
    if generated_rows is not None:
        rows = (row for row in _rows(args, locate, generated_rows, kind, ()) if group(row) not in chosen)
        found["data"].append((encode(rows, chat, *limits), None))
        if not len(found["data"][0][0]):
            raise BadInput(f"nothing to train in the rows made here: {_none_fits(args, limits)}")
    for flag, name, number in files:
        try:
            part = _read(locate(name), args, chat, limits, chosen if flag != "eval" else set())
        except BadInput as error:
            problems += error.problems
            continue
        problems += _describe(flag, name, number, part, args, limits)
        found[flag].append((part, number))
    if args.prompt_key and not problems:
        pair = "/".join(filter(None, (args.prompt_key, args.response_key)))
        shapes = {formats.plain_shape(shape) for parts in found.values() for part, _ in parts for shape in part.shapes}
        if not any(f"{shape}/".startswith(f"{pair}/") for shape in shapes):  # of a pair, the rejected answer's follows
            why = f"no row has {pair}. Check --prompt-key, --response-key"
            problems.append(f"wrong keys in the command line: {why}")
    if problems:
        raise BadInput(*problems)
    _notes(args, chat, kind)
    if chosen:
        part = encode((row for row in _rows(args, locate, generated_rows, kind) if group(row) in chosen), chat, *limits)
        over = f", {part.dropped} over {limits[0]} tokens dropped" if part.dropped else ""
        say(f"held out {part.rows:,} rows, chosen by question{over}")
        if len(part):
            found["eval"].append((part, None))
    data, numbers = zip(*found["data"], strict=True)
    weights = [number or 1.0 for number in numbers] if any(numbers) else None
    held_out = joined([part for part, _ in found["eval"]]) if found["eval"] else None
    return Sources(list(data), weights, found["replay"], held_out)


def _read(path: Path, args, chat: Chat, limits: tuple, without: set[bytes]) -> Encoded:
    """The examples of a file, but for rows of some groups."""
    size = path.stat().st_size if path.is_file() else None
    with tqdm(total=size, desc=f"reading {path.name}", unit="B", unit_scale=True, delay=1, leave=False) as bar:
        rows = formats.scan([path], **how(args, limits[-1]), progress=bar.update)
        rows = (row for row in rows if group(row) not in without) if without else rows
        return encode(rows, chat, *limits)


def _describe(flag: str, name: str, number: float | None, part: Encoded, args, limits: tuple) -> list[str]:
    """Says what a file is; returns why nothing of it can be used."""
    shapes = [f"{count:,} {shape}" for shape, count in part.shapes.items()] if len(part.shapes) > 1 else part.shapes
    times = "" if number is None else f", weight {number:g}"
    if flag == "replay":
        times = f", share {number:g}: {number * args.batch_size:g} on top of the {args.batch_size} of a step"
    say(f"{flag:8} {name}: {part.rows:,} rows of {' and '.join(shapes)}{times}")
    if part.overlong:
        where, length = part.overlong
        done = f"{part.dropped} dropped, {part.truncated} truncated" + (
            f", {part.split} documents split" if part.split else ""
        )
        flags = "--max-len less --max-new-tokens" if limits[-1] == "prompt" else "--max-len"
        say(f"overlong {done}; over {limits[0]} tokens ({flags}), the first is {where} with {length}")
    if part.equal:
        say(f"note     dropped pairs whose sides are equal, which teach nothing: {part.equal}")
    if part.first_missing:
        where, text = part.first_missing
        what = "answers are trained without what the template leaves out of them"
        say(f"note     {part.missing} {what}; the first is {where}, without: {text[:60]}{'…' * (len(text) > 60)}")
    if len(part):
        return []
    why = _none_fits(args, limits)
    if not part.rows:
        why = "all its questions are held out. Lower --eval-fraction, or give --eval-data"
    return [f"nothing to {'measure' if flag == 'eval' else 'train'} in {name}: {why}"]


def _none_fits(args, limits: tuple) -> str:
    longest, *_, most, kind = limits
    if kind == "prompt":
        return f"no prompt fits the {longest} tokens that are left beside --max-new-tokens. {RAISE_OR_LOWER}"
    if may_be_raised(args.max_len, most):
        return f"no example fits {args.max_len} tokens. Raise --max-len"
    fix = "Shorten the rows" if args.overlong == "truncate" else "Give --overlong truncate"
    return f"no example fits {args.max_len} tokens, and the model takes no more. {fix}"


def _notes(args, chat: Chat, kind: str) -> None:
    """What the template and the tokenizer do that a reader of the data would not expect."""
    if chat.own_system and args.system is None and not args.no_system:
        own = " ".join(chat.own_system.split())
        say(f"system   the template adds, where a row has none: {own[:120]} (--no-system leaves it out)")
    spelled, foreign = (", ".join(n for n, _ in c.most_common(MOST_NAMES)) for c in (chat.spelled, chat.foreign))
    fix = "stay text, letter by letter; --control-tokens reads them as tokens, rows of messages train answers alone"
    for count, what in (
        (chat.guarded, "rows spell a control token in their text; it is kept as plain text"),
        (chat.documents, f"documents spell {spelled}, which {'are read as tokens' if chat.control_tokens else fix}"),
        (
            chat.foreign.total(),
            f"times documents spell {foreign}, which this tokenizer has no tokens for; it stays text",
        ),
        (kind != "prompt" and chat.cuts, "examples are cut into tokens where the answer begins, as in generation"),
        (chat.split, "rows became an example for each answer, because the template rewrites earlier turns"),
        (chat.joined, "examples are put together, prompt and answer, because the template writes the whole otherwise"),
        (chat.unclosed, "of these answers stand in the thought that the prompt opens; give them a thought and its end"),
    ):
        if count:
            say(f"note     {count} {what}")


def lint_report(args, locate: Callable, kind: str = "conversation", reader: Callable | None = None) -> int:
    """What --check finds, a line each on stdout; exit code 2 if anything. `reader()` gives a chat and the most tokens
    of an example, which sides of pairs or prompts may be over."""
    if not named(args, kind):
        raise BadInput("nothing to check in the command line: there is no --data. Give files of conversations")
    noticed = []
    hear = {"unused": lambda *found: noticed.append(found)}
    train, held_out = (
        list(_rows(args, locate, None, kind, flags, **hear)) for flags in (("data", "replay"), ("eval",))
    )
    if kind != "conversation":
        chat, most = reader()
        noticed += _overlong_sides([*train, *held_out], chat, limit(args, kind, most))
    findings = lint.check(train, held_out, noticed)
    for finding in findings:
        print(finding)
    say(f"{len(findings)} finding{'s' if len(findings) != 1 else ''} in {len(train) + len(held_out):,} rows")
    return 2 if findings else 0


def _overlong_sides(rows: Sequence, chat: Chat, most: int) -> Iterator[tuple[str, str, str]]:
    """(place, what, code) for each answer that is over the limit with its prompt."""
    for row in (row for row in rows if isinstance(row, formats.Conversation)):
        names = ("chosen side", "rejected side") if row.rejected else ("prompt" if row.row else "side",)
        for name, examples in zip(names, tokenize([row], chat), strict=True):
            length = 0 if isinstance(examples, BadInput) else max(len(example.tokens) for example in examples)
            if length > most:
                yield row.where, f"its {name} has {length} tokens, over {most}", "OVERLONG"
