"""Reward functions that the run does not trust to end, each in a process of its own: `worker.py`.

A function of the user's own is called as TRL calls it: `prompts`, `completions` and every other column of the rows by
keyword, lists of equal length. Prompts are texts where rows have a text under "prompt", and then completions are texts;
else both are lists of messages.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lora import files, threads
from lora.errors import BadInput
from lora.rewards.part import Asked, Part, Row
from lora.rewards.spec import Spec

WORKER = Path(__file__).with_name("worker.py")
LEAST_TO_START = 30.0  # seconds that a file has for its imports, however short --reward-timeout is
LEAVE = 2.0  # seconds that a worker has to end by itself
GIVEN = ("prompts", "completions")  # by the run, whatever the columns are
GO_ON = "; --resume goes on from the last checkpoint"


class Worker:
    """A process that answers lines of JSON. Whatever ends it, and however, becomes one line that names `what`."""

    def __init__(self, what: str, where: str, timeout: float):
        self.what, self.where, self.timeout, self.late, self.process = what, where, timeout, False, None

    def start(self, *argv: str) -> None:
        """Begin; what the function takes is the first `reply`."""
        with threads.unbound():  # the cores of this thread are not those of the function's
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=2,
                start_new_session=True,  # Ctrl-C does not reach it, and what it starts is ended with it
            )  # fmt: skip

    def ask(self, columns: dict) -> list[float | None]:
        return self.reply(self.timeout, columns, GO_ON)["values"]

    def reply(self, seconds: float, columns: dict | None = None, fix: str = "") -> dict:
        """The next reply. Raises BadInput where there is none within so many seconds, or it says what is wrong."""
        timer, line = threading.Timer(seconds, self._end_late), b""
        timer.start()
        try:
            with suppress(OSError):  # it is gone
                if columns is not None:
                    self.process.stdin.write(json.dumps(columns).encode() + b"\n")
                    self.process.stdin.flush()
                line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if self.late:
            raise self._wrong(f"it took more than {seconds:g} s. Make it faster, or raise --reward-timeout{fix}")
        if not line.endswith(b"\n"):
            raise self._wrong(f"its process {self._ended()}. Repair it{fix}")
        answer = json.loads(line)
        if "wrong" in answer:
            raise self._wrong(answer["wrong"] + fix, answer.get("place"))
        return answer

    def _end_late(self) -> None:
        self.late = True
        self.kill()

    def _ended(self) -> str:
        code = self.process.wait()
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def _wrong(self, why: str, place: tuple[str, int] | None = None) -> BadInput:
        file, line = place or (None, None)
        where = f"{self.where if file == os.path.abspath(self.where) else file}:{line}" if file else self.where
        return BadInput(f"wrong --reward in {where}: {self.what}: {why}")

    def kill(self) -> None:
        """End the process and those that it started, whatever they are doing."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self.process.kill()

    def close(self) -> None:
        """Let the function end by itself, if it does so soon."""
        if self.process is None:
            return
        with suppress(OSError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(LEAVE if not self.late else 0)
        self.kill()
        self.process.wait()
        self.process.stdout.close()


class InWorker(Part):
    """A reward that has a worker, and columns of its own choice."""

    def __init__(self, spec: Spec, what: str, where: str, timeout: float):
        super().__init__(spec)
        self.worker = Worker(what, where, timeout)

    def start(self) -> None:
        raise NotImplementedError

    def columns(self, asked: Sequence[Asked]) -> dict[str, list]:
        raise NotImplementedError

    def score(self, asked: Sequence[Asked]) -> list[float | None]:
        return self.worker.ask(self.columns(asked)) if asked else []

    def close(self) -> None:
        self.worker.close()


class Format(InWorker):
    """1.0 where the regular expression finds anything, else 0.0. It may backtrack for ever, so it has a worker, too."""

    def __init__(self, spec: Spec, timeout: float):
        super().__init__(spec, f"format:{spec.target}", "the command line", timeout)
        self.regex = spec.target

    def start(self) -> None:
        self.worker.start(self.regex)

    def problems(self, rows: Sequence[Row]) -> Iterable[str]:
        self.worker.reply(LEAST_TO_START)
        return ()

    def columns(self, asked: Sequence[Asked]) -> dict[str, list]:
        return {"completions": [one.text for one in asked]}


class Function(InWorker):
    """FILE.py:FUNCTION."""

    def __init__(self, spec: Spec, timeout: float):
        self.file, _, self.function = spec.target.rpartition(":")
        super().__init__(spec, self.function, self.file, timeout)
        self.taken: list[str] = []

    def start(self) -> None:
        if not files.is_regular(Path(self.file)):
            raise BadInput(f"wrong --reward in {self.file}: there is no such Python file. Give FILE.py:FUNCTION")
        self.worker.start(self.file, self.function)

    def problems(self, rows: Sequence[Row]) -> Iterator[str]:
        """A line for each row without a column that the function needs. Raises BadInput for a wrong function."""
        if self.worker.process is None:  # there is no such file
            return
        takes = self.worker.reply(max(LEAST_TO_START, self.worker.timeout))
        needed, columns = [name for name in takes["needs"] if name not in GIVEN], {}
        for row in rows:
            columns |= dict.fromkeys(row.row)
            for name in needed:
                if name not in row.row:
                    fix = "Add it, or give the parameter a default"
                    yield f"no column {name!r} in {row.where}: {self.function} of {self.file} needs it. {fix}"
            for name in GIVEN:
                if name in row.row:
                    why = f"a reward function is given {name} by the run"
                    yield f"wrong column {name!r} in {row.where}: {why}. Give the column another name"
        self.taken = [name for name in columns if name != "prompt" and (takes["any"] or name in takes["takes"])]

    def columns(self, asked: Sequence[Asked]) -> dict[str, list]:
        columns = {name: [one.row.get(name) for one in asked] for name in self.taken}
        plain = [isinstance(one.row.get("prompt"), str) for one in asked]
        columns["prompts"] = [one.row["prompt"] if p else one.messages for one, p in zip(asked, plain, strict=True)]
        said = [[{"role": "assistant", "content": one.text}] for one in asked]
        columns["completions"] = [one.text if p else m for one, m, p in zip(asked, said, plain, strict=True)]
        return columns
