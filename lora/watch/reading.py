"""A run's folder as JSON for the page. Only the files that are named here are read, a bounded part of each at a time.

The standard library alone: the server's process has no torch to load, and takes nothing from the run beside it.
"""

import json
import os
import re
import zlib
from pathlib import Path

METRICS, SETTINGS, PREVIEW, REPORT = "metrics.jsonl", "settings.json", "preview.json", "report.md"
ENDED = "ended"  # in settings.json: why the run ended
PIECE = 2**20  # bytes of metrics.jsonl an answer
LIMIT = 16 * 2**20  # bytes of any other file
MARKED = 4096  # bytes before an offset, by which a file is known again
CELL = re.compile(r"(?<!\\)\|")


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (SETTINGS, METRICS)) or _locked_by(path) is not None


class Run:
    """One run's folder. `replaces`: what is in it now is of an earlier run, which the one that begins will replace."""

    def __init__(self, path: Path, replaces: bool = False):
        self.path, self.name = path, path.name or str(path)
        self.earlier = self._version() if replaces else None

    def _version(self) -> tuple[int, int] | None:
        """Another one for each settings.json: it is renamed into its place."""
        try:
            found = os.stat(self.path / SETTINGS)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _begun(self) -> bool:
        return self.earlier is None or self._version() not in (None, self.earlier)

    def about(self) -> dict:
        """What stands still while the run goes on: its settings and size; of one that has ended, what changed."""
        settings = self._json(SETTINGS)
        return {
            "name": self.name,
            "total": _number(self._json(PREVIEW).get("total")),
            "settings": {str(key): value for key, value in settings.items() if key != ENDED},
            "ended": settings.get(ENDED),
            "changed": self._changed(),
        }

    def data(self) -> dict:
        """The first examples token by token, as `--preview` shows them, and the numbers of the data."""
        return self._json(PREVIEW)

    def rows(self, start: int, mark: int) -> dict:
        """The whole rows from byte `start` on. `mark` is the checksum of what stood before it: where that has changed,
        the file is another one (a resumed run cuts rows, a new run replaces them) and is read from its beginning."""
        found = {"rows": [], "next": 0, "mark": 0, "reset": start > 0, "more": False, **self._state()}
        if not self._begun():
            return found
        try:
            with open(self.path / METRICS, "rb") as file:
                if start and (start > os.fstat(file.fileno()).st_size or _mark(file, start) != mark):
                    start = 0
                file.seek(start)
                piece = file.read(PIECE)
                whole = piece.rfind(b"\n") + 1  # a line that is being written has no end yet
                if not whole and len(piece) == PIECE:
                    whole = PIECE  # no row of ours is as long
                found |= {"next": start + whole, "reset": found["reset"] and start == 0}
                found |= {"mark": _mark(file, start + whole), "more": len(piece) == PIECE}
        except OSError:
            return found
        rows = (_parse(line) for line in piece[:whole].splitlines())
        return found | {"rows": [row for row in rows if isinstance(row, dict)]}

    def _state(self) -> dict:
        """`version` changes with what `about` says."""
        pid, ended = _locked_by(self.path), self._json(SETTINGS).get(ENDED)
        state = "running" if pid is not None and is_alive(pid) else "ended" if ended else "stopped"
        if state == "running" and not (self._begun() and (self.path / METRICS).exists()):
            state = "starting"
        return {"state": state, "version": str((self._version(), (self.path / REPORT).exists(), self._begun()))}

    def _json(self, name: str) -> dict:
        """A JSON object of the run; an empty one where there is none, or it makes no sense."""
        found = _parse(self._read(name))
        return found if isinstance(found, dict) else {}

    def _read(self, name: str) -> bytes:
        if not self._begun():
            return b""
        try:
            with open(self.path / name, "rb") as file:
                return file.read(LIMIT)
        except OSError:
            return b""

    def _changed(self) -> list[list[str]]:
        """[question, answer before, answer after] of the report."""
        _, _, after = self._read(REPORT).decode(errors="replace").partition("\n## What changed\n")
        lines = [line for line in after.partition("\n## ")[0].splitlines() if line.startswith("|")][2:]
        cells = ([cell.strip().replace("\\|", "|") for cell in CELL.split(line)[1:-1]] for line in lines)
        return [row for row in cells if len(row) == 3]


def _parse(text: bytes) -> object:
    """JSON, its NaN and infinities as null, which no page could read; None for anything else."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None


def _number(value: object) -> int | None:
    return value if type(value) is int else None


def _mark(file, end: int) -> int:
    """The checksum of what stands before a byte of a file."""
    begin = max(0, end - MARKED)
    file.seek(begin)
    return zlib.crc32(file.read(end - begin))


def _locked_by(path: Path) -> int | None:
    """The process that writes the run, as the lock beside the folder names it (`folders.locked`)."""
    try:
        text = path.with_name(f".{path.name}.lock").read_text(errors="replace")[:20]
    except (OSError, ValueError):
        return None
    return int(text) if text.isascii() and text.isdecimal() else None


def is_alive(pid: int) -> bool:
    """Is there such a process? Where the system would end it for the question (Windows), it is believed to be."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
