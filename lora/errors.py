"""Everything that can end a program: error classes with their exit codes, signals, and the wrapper round every script.

A problem is one line, `<what> in <file>[:<line>]: <why>. <fix>`. Problems are collected and raised together.
"""

import argparse
import difflib
import errno
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress

from lora import threads

MOST_LINES = 20


class LoraError(Exception):
    """One or more problems, each a whole line without the leading `error:`. Exit code 1: a bug."""

    code = 1

    def __init__(self, *problems: str):
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class BadInput(LoraError):
    """Data, model, adapter or flags are wrong."""

    code = 2


class BadEnvironment(LoraError):
    """Disk, network, memory or permissions; the same command may work later."""

    code = 3


class BadNumbers(LoraError):
    """The numbers went wrong: diverged, or beyond a stated tolerance."""

    code = 4


class Refused(LoraError):
    """Not done for reasons of security."""

    code = 5


class Stopped(BaseException):
    """SIGINT (130) or SIGTERM (143)."""

    def __init__(self, code: int, note: str = ""):
        super().__init__(code)
        self.code, self.note = code, note


def one_line(text: str) -> str:
    """Text with control characters escaped: nothing a file contains can move the cursor or start a new line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """Lines for people. Answers go to stdout; everything else goes to stderr."""
    print("\n".join(map(one_line, text.split("\n"))), file=sys.stderr, flush=True)


def report(problems: Sequence[str]) -> None:
    for problem in problems[:MOST_LINES]:
        say(f"error: {one_line(problem)}")
    if len(problems) > MOST_LINES:
        say(f"error: and {len(problems) - MOST_LINES} more")


@contextmanager
def collecting(problems: list[str]):
    """Add what is wrong inside the block to `problems`; the program goes on behind the block."""
    try:
        yield
    except BadInput as error:
        problems += error.problems


# ---- signals ---------------------------------------------------------------------------------------------------------

STOP_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def _exit_now(number, frame):
    os.write(2, b"\nstopped\n")
    os._exit(STOP_CODES[number])


def _raise_stopped(number, frame):
    raise Stopped(STOP_CODES[number])


@contextmanager
def signals(handler):
    """SIGINT and SIGTERM go to `handler` inside the block. Outside the main thread nothing changes."""
    try:
        before = {number: signal.signal(number, handler) for number in STOP_CODES}
    except ValueError:  # signal.signal works in the main thread only
        before = {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def before_imports(name: str, waiting: dict[str, str] = threads.WAITING) -> None:
    """Called first by a script with its `__name__`, before torch is imported: its threads get cores of their own,
    where they wait for each other as `waiting` says, garbage is not looked for, as imports make none, and Ctrl-C
    meanwhile prints one line, exit 130."""
    if name == "__main__":
        threads.bind(waiting)
        gc.disable()
        for number in STOP_CODES:
            signal.signal(number, _exit_now)


class StopFlag:
    """Set by the first signal, so that a loop can finish its step; a second signal ends the process at once."""

    code: int | None = None
    when = 0.0

    def _on_signal(self, number, frame):
        if self.code is not None:
            # Ctrl-C in a terminal reaches torchrun as well, which then sends a signal of its own to every process
            if time.monotonic() - self.when > 3.0 or "TORCHELASTIC_RUN_ID" not in os.environ:
                _exit_now(number, frame)
            return
        self.code, self.when = STOP_CODES[number], time.monotonic()
        with suppress(OSError, ValueError):  # not `say`: the signal may have come while something was being printed
            os.write(sys.stderr.fileno(), b"\nstopping after this step (again to stop at once)\n")

    @contextmanager
    def listening(self):
        with signals(self._on_signal):
            yield self


# ---- the wrapper -----------------------------------------------------------------------------------------------------

ENVIRONMENT_ERRNOS = {
    errno.ENOSPC: "the disk is full. Free some space",
    errno.EDQUOT: "the disk quota is used up. Free some space",
    errno.EFBIG: "the file would be larger than the limit. Raise the limit",
    errno.EROFS: "the file system is read-only. Choose another folder",
    errno.EACCES: "permission denied. Choose another folder or change its permissions",
    errno.EPERM: "the operation is not permitted. Choose another folder or change its permissions",
    errno.EIO: "the device reported an input/output error. Try another disk",
    errno.ENOMEM: "out of memory. Lower --micro-tokens or --max-len",
    errno.EMFILE: "too many open files. Raise the limit (ulimit -n)",
}


def _of_os_error(error: OSError) -> LoraError:
    where = f" in {error.filename or 'this run'}"
    if error.errno in ENVIRONMENT_ERRNOS:
        return BadEnvironment(f"file operation failed{where}: {ENVIRONMENT_ERRNOS[error.errno]}")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST):
        return BadInput(f"wrong path{where}: {(error.strerror or str(error)).lower()}. Check the spelling")
    return BadEnvironment(f"file operation failed{where}: {error.strerror or error}. Try again")


def _of_bug(error: BaseException) -> LoraError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"
    if os.environ.get("LORA_DEBUG"):
        traceback.print_exception(error)
    what = f"{type(error).__name__}: {error}"[:400]
    return LoraError(f"internal in {where}: {what}. This is a bug; LORA_DEBUG=1 shows the trace")


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own error, torch's for a GPU, or torch's for the CPU, which is a RuntimeError like any other."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def out_of_memory(error: BaseException, fix: str) -> BadEnvironment:
    why = (str(error).splitlines() or ["nothing is left"])[0].rstrip(".")
    return BadEnvironment(f"out of memory in this run: {why}. {fix}")


def _mend_streams() -> None:
    """A closed stream (`>&-`) is an empty one, and no text fails for an encoding that does not know its characters."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        with suppress(AttributeError, OSError):  # not a file, or read from already
            stream.reconfigure(errors=errors)


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Call a script's `main` and return its exit code; whatever goes wrong is one line per problem on stderr."""
    _mend_streams()
    gc.freeze()  # what was imported stays: no collection goes through it again
    gc.enable()
    try:
        with signals(_raise_stopped):
            try:
                code = main(argv) or 0
                sys.stdout.flush()
                return code
            except LoraError:
                raise
            except BrokenPipeError:  # `| head`: the reader has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0
            except OSError as error:
                raise _of_os_error(error) from error
            except Exception as error:
                if is_out_of_memory(error):
                    raise out_of_memory(error, "Lower --micro-tokens, --batch-size or --max-len") from error
                raise _of_bug(error) from error
    except LoraError as error:
        report(error.problems)
        return error.code
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except Stopped as stop:
        say(stop.note or "\nstopped")
        return stop.code
    except SystemExit as end:  # argparse after --help
        return end.code if isinstance(end.code, int) else 0


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults, but no "(default: None)"; and a description's own lines."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with the nearest flag; abbreviations are refused, they break scripts later."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str):
        raise BadInput(f"wrong arguments in the command line: {message}. Run {self.prog} --help")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return parsed
        flags = [flag for action in self._actions for flag in action.option_strings]
        problems = []
        for before, word in zip([None, *unknown], unknown):  # noqa: B905 (pairwise, with a first None)
            if not word.startswith("-") and before and before.startswith("-") and "=" not in before:
                continue  # what an unknown flag was given
            name = word.split("=")[0]
            near = [flag for flag in flags if len(name) > 3 and flag.startswith(name)]
            near = near or difflib.get_close_matches(name, flags, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Run {self.prog} --help"
            problems.append(f"unknown argument {word!r} in the command line: no such flag. {hint}")
        raise BadInput(*problems)
