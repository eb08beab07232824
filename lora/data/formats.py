"""Any accepted file of conversations becomes one internal form: messages.

    {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}        OpenAI's chat form
    {"conversations": [{"from": "human" | "gpt", "value": "..."}, ...]}                     ShareGPT's
    {"instruction", "output"}, also with "input", "history": [[question, answer], ...], "system"
    {"prompt", "completion"}, {"question", "answer"}, {"q", "a"}, or any two keys that are named
    {"text": "..."}                                            a document: one message of the role "text"

JSON objects in lines (several on one line are several rows) or in a list, plain or gzip, UTF-8. What a file is, its
bytes say, not its name. Nothing is repaired silently: what is wrong is collected with its line and raised.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from lora import files
from lora.errors import MOST_LINES, BadInput

LIMIT = 4 * 2**30  # bytes of one file, unpacked
LINE_LIMIT = 64 * 2**20  # bytes of one line
LIST_LIMIT = 512 * 2**20  # bytes of a list: it is read as a whole
PAIRS = (("prompt", "completion"), ("question", "answer"), ("q", "a"), ("instruction", "output"))
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
OTHER_FILES = {  # first bytes of files that people give, and what to do
    b"PAR1": "a parquet file. Write it as JSON lines first, for example with pandas: read_parquet, then "
    "to_json(orient='records', lines=True)",
    b"PK\x03\x04": "a zip archive or a spreadsheet. Unpack it, or save it as JSON lines",
    b"\xff\xfe": "UTF-16. Convert it to UTF-8",
    b"\xfe\xff": "UTF-16. Convert it to UTF-8",
}
WHAT = {"BROKEN": "broken JSON", "ENCODING": "wrong encoding", "UNKNOWN": "unknown row", "FILE": "wrong file"}


class Conversation(NamedTuple):
    """Messages {"role", "content"}, also "train": False; `file:line` to name them by; the shape of their row."""

    messages: list[dict]
    where: str
    shape: str = "messages"


class Problem(NamedTuple):
    """What is wrong with a row: `text` is why, and how to mend it."""

    where: str
    code: str
    text: str

    def __str__(self) -> str:
        return f"{WHAT.get(self.code, 'wrong row')} in {self.where}: {self.text}"


class _Wrong(Exception):
    def __init__(self, text: str, code: str = "ROW"):
        self.text, self.code = text, code


def read(paths: Sequence[Path], answered: bool = True, keys: tuple[str, str] | None = None) -> list[Conversation]:
    """All conversations of some files, in order; with `answered`, each needs an answer to train.

    Raises BadInput with every bad line (the first 20 and a count).
    """
    found, problems = [], []
    for row in scan(paths, answered, keys):
        (problems if isinstance(row, Problem) else found).append(row)
        if len(problems) > 10 * MOST_LINES:  # the whole file is something else
            break
    if problems:
        raise BadInput(*map(str, problems))
    return found


def scan(
    paths: Sequence[Path],
    answered: bool = True,
    keys: tuple[str, str] | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> Iterator[Conversation | Problem]:
    """Every row of some files, in order, as it is read: a conversation, or what is wrong with it.

    `keys` are those of question and answer in rows that have both; `progress` hears how many bytes have been read.
    Raises BadInput for a file that cannot be opened.
    """
    for path in paths:
        count = 0
        for row in _values(Path(path), progress):
            count += 1
            if isinstance(row, Problem):
                yield row
                continue
            where, value = row
            try:
                messages, shape = _messages(value, keys, answered)
                if not answered and shape == "text":
                    raise _Wrong("a document asks nothing. Give prompts")
                if answered and not any(m["role"] in ("assistant", "text") and "train" not in m for m in messages):
                    raise _Wrong("nothing to train, there is no assistant turn to learn. Add an answer")
                yield Conversation(messages, where, shape)
            except _Wrong as wrong:
                yield Problem(where, wrong.code, wrong.text)
        if not count:
            yield Problem(str(path), "FILE", "no examples, the file is empty. Give JSON objects in lines, or a list")


# ---- from bytes to JSON values ---------------------------------------------------------------------------------------


def _values(path: Path, progress: Callable[[int], object]) -> Iterator[tuple[str, object] | Problem]:
    """`file:line` and value of every row. Lines end at \\n only: U+2028 is text."""
    with files.open_regular(path, LIMIT) as raw:
        start = raw.read(4)
        raw.seek(0)
        for magic, what in OTHER_FILES.items():
            if start.startswith(magic):
                yield Problem(str(path), "ENCODING" if what.startswith("UTF") else "FILE", what)
                return
        stream = gzip.GzipFile(fileobj=raw) if start.startswith(b"\x1f\x8b") else raw
        try:
            done = 0
            for row in _lines(stream, str(path)):
                yield row
                if (here := raw.tell()) > done:
                    progress(here - done)
                    done = here
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield Problem(str(path), "FILE", f"damaged gzip: {str(error).rstrip('.')}. Pack it again")


def _lines(stream, path: str) -> Iterator[tuple[str, object] | Problem]:
    number = unpacked = 0
    first = True  # nothing but blank lines so far
    while line := stream.readline(LINE_LIMIT + 1):
        number += 1
        unpacked += len(line)
        if len(line) > LINE_LIMIT or unpacked > LIMIT:
            most = f"a line of over {LINE_LIMIT >> 20} MiB" if len(line) > LINE_LIMIT else f"over {LIMIT >> 20} MiB"
            yield Problem(f"{path}:{number}", "FILE", f"{most}. It can't be what it claims to be; cut it")
            return
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        if first and line.lstrip().startswith(b"["):
            yield from _list(line + stream.read(LIST_LIMIT), path, number)
            return
        values = list(_objects(line, path, number))
        if first and isinstance(values[0], Problem):  # perhaps objects that spread over several lines
            rest = stream.read(LIST_LIMIT)
            spread = list(_list(line + rest, path, number))
            if not any(isinstance(row, Problem) for row in spread):
                yield from spread
                return
            stream = BytesIO(rest)
        first = False
        yield from values
        if isinstance(values[-1], Problem) and values[-1].code == "ENCODING":
            return  # it would be every line


def _objects(line: bytes, path: str, number: int) -> Iterator[tuple[str, object] | Problem]:
    """The values of one line."""
    where, position = f"{path}:{number}", 0
    try:
        text = line.decode().strip(" \t\r\n")
        while position < len(text):
            value, position = DECODER.raw_decode(text, position)
            yield where, value
            position = BLANK.match(text, position).end()
    except UnicodeDecodeError as error:
        why = f"not UTF-8 at byte {error.start}. Convert the file to UTF-8"
        yield Problem(where, "ENCODING", why)
    except json.JSONDecodeError as error:
        yield Problem(where, "BROKEN", f"{error.msg} at column {error.colno}. Repair the line")
    except (RecursionError, ValueError) as error:
        yield Problem(where, "BROKEN", f"{error}. Repair the line")


def _list(data: bytes, path: str, number: int) -> Iterator[tuple[str, object] | Problem]:
    """The elements of a list, or objects one after another, over any number of lines; each with its own line."""
    if len(data) > LIST_LIMIT:
        fix = "Write it as lines, one object each"
        yield Problem(path, "FILE", f"a list of over {LIST_LIMIT >> 20} MiB, which is read as a whole. {fix}")
        return
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        yield Problem(f"{path}:{line}", "ENCODING", f"not UTF-8 at byte {error.start}. Convert the file to UTF-8")
        return
    position = counted = 0
    separated, some = True, False

    def skip(position: int) -> int:
        return BLANK.match(text, position).end()

    def wrong(why: str) -> Problem:
        line, column = number + text.count("\n", counted, position), position - text.rfind("\n", 0, position)
        return Problem(f"{path}:{line}", "BROKEN", f"{why} at column {column}. Repair the list")

    listed = text.startswith("[", skip(0))
    position = skip(0) + listed
    while True:
        position = skip(position)
        number += text.count("\n", counted, position)
        counted = position
        if position == len(text):
            if listed:
                yield wrong("the list does not end")
            return
        if listed and text[position] == "]" and not (separated and some):
            position = skip(position + 1)
            if position < len(text):
                yield wrong("there is more after the list")
            return
        if not separated:
            yield wrong("expected a comma or the end of the list")
            return
        try:
            value, position = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            position = error.pos
            yield wrong(error.msg)
            return
        except (RecursionError, ValueError) as error:
            yield wrong(str(error))
            return
        yield f"{path}:{number}", value
        some, position = True, skip(position)
        separated = not listed
        if listed and text[position : position + 1] == ",":
            position, separated = position + 1, True


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


BLANK = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder(parse_constant=_no_constant)


# ---- from a value to messages ----------------------------------------------------------------------------------------


def _messages(value: object, keys: tuple[str, str] | None, answered: bool) -> tuple[list[dict], str]:
    """Messages of a row, and the name of its shape."""
    if not isinstance(value, dict):
        raise _Wrong(f"expected an object, found {type(value).__name__}. Repair the line")
    if keys and keys[0] in value and keys[1] in value:
        return _checked(_turns(value, *keys), ROLES), "/".join(keys)
    if "chosen" in value and "rejected" in value:
        fix = "Give --prompt-key prompt --response-key chosen to train the chosen ones"
        raise _Wrong(f"a preference row (chosen, rejected), which is not trained here. {fix}", "UNKNOWN")
    if value.get("tools") or value.get("functions"):
        raise _Wrong("it has tools, whose calls are not trained here. Remove them", "UNKNOWN")
    for key, roles in (("messages", ROLES), ("conversations", SHAREGPT_ROLES)):
        if key in value:
            turns, system = value[key], value.get("system")
            _alone(value, (key,))
            turns = _sharegpt(turns) if key == "conversations" else turns
            if system and isinstance(turns, list):  # beside the messages; twice is refused
                turns = [{"role": "system", "content": system}, *turns]
            return _checked(turns, roles), key
    for prompt, answer in PAIRS:
        if prompt in value and answer in value:
            return _checked(_turns(value, prompt, answer), ROLES), f"{prompt}/{answer}"
    if "text" in value:
        return _checked([{"role": "text", "content": value["text"]}], {"text": "text"}), "text"
    for prompt, _ in PAIRS:
        if not answered and prompt in value:
            return _checked([{"role": "user", "content": value[prompt]}], ROLES), prompt
    found = ", ".join(list(value)[:8])[:200] or "none"
    known = ", ".join(("messages", "conversations", *("/".join(pair) for pair in PAIRS), "text"))
    raise _Wrong(f"its keys are {found}. Known are {known}; others by --prompt-key and --response-key", "UNKNOWN")


def _turns(value: dict, prompt: str, answer: str) -> list[dict]:
    """A pair of question and answer, what comes before it, and what belongs to the question."""
    question, history, system = value[prompt], value.get("history") or [], value.get("system")
    if isinstance(question, list) and isinstance(value[answer], list):  # both are messages already
        _alone(value, (prompt, answer))
        return [*([{"role": "system", "content": system}] if system else []), *question, *value[answer]]
    for key in ("input", "context"):
        if value.get(key) and key not in (prompt, answer):
            if prompt != "instruction":
                raise _Wrong(f"its {key} would not be learned. Put it into the {prompt}")
            question = f"{question}\n{value[key]}" if isinstance(value[key], str) else value[key]
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise _Wrong("history is not a list of [question, answer] pairs. Repair the line")
    texts = [text for pair in [*history, [question, value[answer]]] for text in pair]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def _alone(value: dict, its: tuple[str, ...]) -> None:
    """Raises _Wrong where beside messages there is what belongs to a single question."""
    for key in ("history", "input", "context"):
        if value.get(key) and key not in its:
            raise _Wrong(f"its {key} would not be learned beside messages. Put it into them")


def _sharegpt(turns: object) -> object:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    return [{**turn, "role": turn.get("from", turn.get("role")), "content": turn.get("value", turn.get("content"))}
            for turn in turns]  # fmt: skip


def _checked(messages: object, roles: dict[str, str]) -> list[dict]:
    """Role, content and train flag of every message: an optional system turn, then user and assistant in turn."""
    if not isinstance(messages, list) or not messages:
        raise _Wrong("messages is not a list of messages. Repair the line")
    clean = []
    for number, message in enumerate(messages, 1):
        name = f"message {number}"
        if not isinstance(message, dict):
            raise _Wrong(f"{name} is no object. Repair the line")
        given, content = message.get("role"), message.get("content")
        role = roles.get(given) if isinstance(given, str) else None
        if role is None:
            known = "system, user, assistant"
            raise _Wrong(f"{name} has role {repr(given)[:40]}; expected {known}. Repair the line", "ROLES")
        if isinstance(content, list) and content and all(map(_is_text, content)):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            tools = "; calls of tools are not trained here" if message.get("tool_calls") else ""
            raise _Wrong(f"{name} has {type(content).__name__} as content, expected text{tools}. Repair the line")
        for lost in ("tool_calls", "function_call", "reasoning_content"):
            if message.get(lost):
                fix = "Put it into the content, or remove it"
                raise _Wrong(f"{name} has {lost}, which is not trained here. {fix}")
        if role == "system" and number > 1:
            raise _Wrong(f"{name} is a system turn; only the first may be one. Repair the line", "ROLES")
        expected = "user" if not clean or clean[-1]["role"] != "user" else "assistant"
        if role in ("user", "assistant") and role != expected:
            raise _Wrong(f"{name} is a turn of {role}, expected {expected}. Let user and assistant alternate", "ROLES")
        if role != "system" and not content.strip():
            raise _Wrong(f"{name} of {role} is empty. Remove it or write it", "EMPTY")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise _Wrong(f"{name} has half a surrogate pair, which is no character. Remove it", "SURROGATE") from None
        clean.append({"role": role, "content": content, **_train(message, role, name)})
    return clean


def _is_text(part: object) -> bool:
    """One of OpenAI's content parts."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _train(message: dict, role: str, name: str) -> dict:
    """{"train": False} for an answer that shall not be learned: "train": false, or OpenAI's "weight": 0."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise _Wrong(f"{name} has {repr(train)[:40]} as train. Write true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise _Wrong(f"{name} has {repr(weight)[:40]} as weight. Write 0 or 1")
    if train and role != "assistant":
        raise _Wrong(f'{name} of {role} has "train": true, but only answers are learned. Remove it, or --train-on all')
    return {"train": False} if role == "assistant" and (train is False or weight == 0) else {}
