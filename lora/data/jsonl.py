"""A file becomes JSON values, each with its line: objects in lines (several on one line are several rows) or a list.

Plain or gzip, UTF-8. What a file is, its bytes say, not its name. What is wrong becomes a Problem with its line.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lora import files
from lora.data import file_kinds

LIMIT = 4 * 2**30  # bytes of one file, unpacked
LINE_LIMIT = 64 * 2**20  # bytes of one line
LIST_LIMIT = 512 * 2**20  # bytes of a list: it is read as a whole
WHAT = {"BROKEN": "broken JSON", "ENCODING": "wrong encoding", "UNKNOWN": "unknown row", "FILE": "wrong file"}


class Problem(NamedTuple):
    """What is wrong with a row: `text` is why, and how to mend it."""

    where: str
    code: str
    text: str

    def __str__(self) -> str:
        return f"{WHAT.get(self.code, 'wrong row')} in {self.where}: {self.text}"


Rows = Iterator[tuple[str, object] | Problem]  # `file:line` and value


def read_rows(path: Path, progress: Callable[[int], object]) -> Rows:
    """Every row of a file as it is read; `progress` hears how many bytes have been read since it last heard."""
    with files.open_regular(path, LIMIT) as raw:
        start = raw.peek(file_kinds.START)
        stream = gzip.GzipFile(fileobj=raw) if start.startswith(b"\x1f\x8b") else raw
        try:
            start = stream.peek(file_kinds.START)[: file_kinds.START]
            if found := file_kinds.of_bytes(start, path.name):
                yield Problem(str(path), *found)
                return
            done = 0
            for count, row in enumerate(_rows(stream, str(path))):
                broken = row.code in ("BROKEN", "ENCODING") if isinstance(row, Problem) else _is_plain(row[1])
                if broken and not count and (found := file_kinds.of_text(start, path.name)):
                    yield Problem(str(path), *found)
                    return
                yield row
                if (here := raw.tell()) > done:
                    progress(here - done)
                    done = here
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield Problem(str(path), "FILE", f"damaged gzip: {str(error).rstrip('.')}. Pack it again")


def _is_plain(value: object) -> bool:
    return not isinstance(value, (dict, list))  # a line of text may begin with a number


def _rows(stream: BinaryIO, path: str) -> Rows:
    """Lines end at \\n only: U+2028 is text. A list, or objects that spread over several lines, are read as a whole."""
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
            yield from _parse(line + stream.read(LIST_LIMIT), path, number, listed=True)
            return
        values = list(_parse(line.rstrip(b" \t\r\n"), path, number))  # errors at its end are of this line
        if first and isinstance(values[0], Problem):  # perhaps objects that spread over several lines
            rest = stream.read(LIST_LIMIT)
            spread = list(_parse(line + rest, path, number))
            if not any(isinstance(row, Problem) for row in spread):
                yield from spread
                return
            stream = BytesIO(rest)
        first = False
        yield from values
        if isinstance(values[-1], Problem) and values[-1].code == "ENCODING":
            return  # it would be every line


def _parse(data: bytes, path: str, number: int, listed: bool = False) -> Rows:
    """Values one after another, or the elements of a list, each with the line it begins on; `number` is the first."""
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
    counted, comma, place = 0, False, _skip(text, 0)
    try:
        if listed:
            place = _skip(text, place + 1)
        while place < len(text) and not (listed and text[place] == "]" and not comma):
            value, end = DECODER.raw_decode(text, place)
            number += text.count("\n", counted, place)
            counted, place = place, _skip(text, end)
            yield f"{path}:{number}", value
            comma = listed and text.startswith(",", place)
            if comma:
                place = _skip(text, place + 1)
            elif listed and place < len(text) and text[place] != "]":
                raise ValueError("expected a comma or the end of the list")
        if listed and place == len(text):
            raise ValueError("the list does not end")
        if listed and (place := _skip(text, place + 1)) < len(text):
            raise ValueError("there is more after the list")
        return
    except json.JSONDecodeError as error:
        why, place = error.msg, error.pos
    except (RecursionError, ValueError) as error:
        why = str(error)
    line, column = number + text.count("\n", counted, place), place - text.rfind("\n", 0, place)
    yield Problem(f"{path}:{line}", "BROKEN", f"{why} at column {column}. Repair the {'list' if listed else 'line'}")


def _skip(text: str, place: int) -> int:
    """Where the white space that begins there ends."""
    return BLANK.match(text, place).end()


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


BLANK = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder(parse_constant=_no_constant)
