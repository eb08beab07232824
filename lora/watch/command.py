"""`train.py --watch`: the page beside a run, or of runs that are there."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lora import address
from lora.errors import BadEnvironment, BadInput, say
from lora.watch import app, asked


def check_alone(given: Sequence[str]) -> None:
    """Raises BadInput where folders of runs are to be opened and flags say what to train."""
    if others := [name for name in given if name != "watch"]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(others))
        why = f"--watch with folders opens runs without training, and {flags}"
        raise BadInput(f"contradiction in the command line: {why}. Leave one out")


def serve(given: Sequence[str]) -> int:
    """Serve the runs in some folders until Ctrl-C. Raises LoraError where there is none, or the address is taken."""
    if len(found := asked.addresses(given)) > 1:
        raise BadInput(f"contradiction in the command line: {' and '.join(found)} of --watch. Give one address")
    server = app.Server(_listen(given), asked.open_runs(asked.folders(given)))
    say(f"watch    {address.url(server.socket)}  ({', '.join(run.name for run in server.runs)}); Ctrl-C ends it")
    with server:
        server.serve_forever()
    return 0


@contextmanager
def beside(out: Path, given: Sequence[str] | None, resumed: bool, main: bool) -> Iterator[None]:
    """A page of the run that the block makes, where --watch asks for one. Whatever goes wrong with it is a note."""
    process = None
    if given is not None and main:
        try:
            process = _start(out, given, resumed)
        except (BadEnvironment, OSError, ValueError) as error:  # ValueError: a system that hands on no sockets
            why = str(error).partition(". ")[0]
            say(f"note     no page to watch the run: {why}. Training goes on; from another terminal the page opens "
                f"with: python train.py --watch {out}")  # fmt: skip
    try:
        yield
    finally:
        if process:
            with suppress(OSError):
                process.stdin.close()  # by which it knows that the run has ended


def _start(out: Path, given: Sequence[str], resumed: bool) -> subprocess.Popen:
    library = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (library, os.environ.get("PYTHONPATH"))))
    with _listen(given) as listener:
        command = [sys.executable, "-m", app.__name__, str(listener.fileno()), str(out.absolute()), str(not resumed)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
            env={**os.environ, "PYTHONPATH": paths}, pass_fds=(listener.fileno(),), start_new_session=True,
        )  # fmt: skip
        say(f"watch    {address.url(listener)}")
    return process


def _listen(given: Sequence[str]) -> socket.socket:
    """At the first of the addresses that is free. Raises BadEnvironment where none is."""
    *others, last = asked.places(given)
    for host, port in others:
        with suppress(BadEnvironment):
            return address.listen(host, port)
    return address.listen(*last)
