"""Any accepted file of conversations becomes one internal form: messages.

    {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}
    {"instruction": ..., "input": ..., "output": ...}      input may be absent or empty
    {"prompt": ..., "completion": ...}, {"question": ..., "answer": ...}, {"q": ..., "a": ...}

One JSON object a line, UTF-8. Nothing is repaired silently: what is wrong is collected with its line and raised.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lora import files
from lora.errors import MOST_LINES, BadInput

LIMIT = 4 * 2**30  # bytes of one file
PAIRS = (("prompt", "completion"), ("question", "answer"), ("q", "a"), ("instruction", "output"))
ROLES = ("system", "user", "assistant")


class Conversation(NamedTuple):
    """Messages, and `file:line` to name them by."""

    messages: list[dict]
    where: str


def read(paths: Sequence[Path], answered: bool = True) -> list[Conversation]:
    """All conversations of some files, in order; with `answered`, each needs an assistant turn to train. Raises
    BadInput with every bad line (the first 20 and a count)."""
    conversations, problems = [], []
    for path in map(Path, paths):
        before = len(conversations) + len(problems)
        for where, value in _rows(path, problems):
            found = len(problems)
            messages = _messages(value, where, problems)
            if messages and answered and all(message["role"] != "assistant" for message in messages):
                problems.append(f"wrong row in {where}: nothing to train, there is no assistant turn. Add an answer")
            if len(problems) == found:
                conversations.append(Conversation(messages, where))
        if len(conversations) + len(problems) == before:
            problems.append(f"no examples in {path}: the file is empty. Give one JSON object a line")
        if len(problems) > 10 * MOST_LINES:  # the whole file is something else
            break
    if problems:
        raise BadInput(*problems)
    return conversations


def _rows(path: Path, problems: list[str]) -> Iterator[tuple[str, object]]:
    """`file:line` and the JSON value of every line that is not blank. Lines end at \\n only: U+2028 is text."""
    data = files.read_bytes(path, LIMIT)
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        except UnicodeDecodeError as error:
            problems.append(f"wrong encoding in {where}: not UTF-8 at byte {error.start}. Convert the file to UTF-8")
            return
        except json.JSONDecodeError as error:
            problems.append(f"broken JSON in {where}: {error.msg} at column {error.colno}. Repair the line")
        except (RecursionError, ValueError) as error:
            problems.append(f"broken JSON in {where}: {error}. Repair the line")


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def _messages(value: object, where: str, problems: list[str]) -> list[dict]:
    if not isinstance(value, dict):
        problems.append(f"wrong row in {where}: expected an object, found {type(value).__name__}. Repair the line")
        return []
    if "messages" in value:
        return _checked(value["messages"], where, problems)
    for prompt, answer in PAIRS:
        if prompt in value and answer in value:
            parts = [value[prompt], value[answer]]
            if prompt == "instruction" and value.get("input"):
                parts[0] = f"{value[prompt]}\n{value['input']}" if isinstance(value["input"], str) else value["input"]
            turns = zip(("user", "assistant"), parts, strict=True)
            return _checked([{"role": role, "content": text} for role, text in turns], where, problems)
    found, known = ", ".join(list(value)[:8])[:200] or "none", "messages, " + ", ".join("/".join(p) for p in PAIRS)
    problems.append(f"unknown row in {where}: its keys are {found}. Known are {known}")
    return []


def _checked(messages: object, where: str, problems: list[str]) -> list[dict]:
    """Role and content of every message: an optional system turn, then user and assistant in turn."""

    def wrong(why: str, fix: str = "Repair the line") -> list[dict]:
        problems.append(f"wrong row in {where}: {why}. {fix}")
        return []

    if not isinstance(messages, list) or not messages:
        return wrong("messages is not a list of messages")
    clean = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return wrong(f"message {number} is no object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            return wrong(f"message {number} has role {repr(role)[:40]}; expected {', '.join(ROLES)}")
        if not isinstance(content, str):
            return wrong(f"message {number} has {type(content).__name__} as content, expected text")
        if role == "system" and number > 1:
            return wrong(f"message {number} is a system turn; only the first may be one")
        expected = "user" if not clean or clean[-1]["role"] != "user" else "assistant"
        if role != "system" and role != expected:
            return wrong(
                f"message {number} is a turn of {role}, expected {expected}", "Let user and assistant alternate"
            )
        if role != "system" and not content.strip():
            return wrong(f"message {number} of {role} is empty", "Remove it or write it")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            return wrong(f"message {number} has half a surrogate pair, which is no character", "Remove it")
        clean.append({"role": role, "content": content})
    return clean
