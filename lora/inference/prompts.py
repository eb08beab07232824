"""Prompts: read from a file, turned into ids; and the files that their answers may be written to."""

import json
from pathlib import Path

from lora import files
from lora.data import file_kinds, formats
from lora.errors import BadInput
from lora.text.chat import Chat


def read(path: str, key: str | None = None) -> list[tuple[list[dict], str]]:
    """(messages, where) of each prompt in a file with a prompt a line, or with conversation rows, whose question may
    have a `key` of its own."""
    data = files.read_bytes(path)
    start = data.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith((b"{", b"\x1f\x8b")) or (start.startswith(b"[") and path.endswith(".json")):
        return [(without_last_answer(c.messages), c.where) for c in formats.read([path], False, key and (key, None))]
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        if kind := file_kinds.of_bytes(data, path):
            raise BadInput(str(formats.Problem(path, *kind))) from None
        raise BadInput(f"wrong encoding in {path}: not UTF-8 at byte {error.start}. Convert it to UTF-8") from None
    found = [(line.rstrip("\r"), f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise BadInput(f"no prompts in {path}: the file is empty. Give a prompt a line")
    return [([{"role": "user", "content": line}], where) for line, where in found]


def without_last_answer(messages: list[dict]) -> list[dict]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def is_utf8(text: str) -> bool:
    """Was all of it UTF-8 where it came from? Python marks other bytes by halves of surrogate pairs."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def encode(chat: Chat, limit: int, messages: list[dict], where: str) -> list[int]:
    """The ids of a conversation up to the next answer. Raises BadInput, naming `where`, unless they are below `limit`,
    the positions of the model."""
    if not all(is_utf8(message["content"]) for message in messages):
        raise BadInput(f"wrong encoding in {where}: not UTF-8. Convert it to UTF-8")
    ids = chat.prompt(messages, where)
    if len(ids) >= limit:
        raise BadInput(f"prompt too long in {where}: {len(ids)} tokens, the model has room for {limit}. Shorten it")
    return ids


def unwritable(flag: str, path: Path, *read: str) -> list[str]:
    """Problems with `path`, given by `flag`, as a file for answers; `read` are the files and folders that are read."""
    inputs = [file for name in read for file in ([*Path(name).iterdir()] if Path(name).is_dir() else [Path(name)])]
    found = files.unwritable(flag, path, *inputs)
    if not found and path.is_file() and not holds_answers(path):
        found.append(f"wrong {flag} in {path}: it is there and holds no predictions. Choose another name")
    return found


def holds_answers(path: Path) -> bool:
    """Is the file empty, or its first line a row that generate.py or evaluate.py wrote? Scores are numbers; sides of a
    pair, which have the same keys, are not."""
    with open(path, "rb") as file:
        line = file.readline()
    try:
        row = json.loads(line or b'{"prediction": ""}')
    except ValueError:
        return False
    scores = isinstance(row, dict) and isinstance(row.get("chosen"), float) and row.keys() == {"chosen", "rejected"}
    return scores or (isinstance(row, dict) and not row.keys().isdisjoint({"prediction", "predictions"}))
