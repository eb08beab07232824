"""Benchmarks in parts: each side of a part in a process of its own, what was found in one file of results.

Processes       starts `program` for a side, a matmul probe before and after it; sides take turns
run             the command line of such a benchmark: which parts, how many processes a side
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine  # noqa: E402
from lora import files, heap  # noqa: E402


def quiet(threads: int) -> dict[str, str]:
    """The environment of a process that is measured. Ours are compiled once, as packages that pip installs are."""
    told = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": ""}
    return os.environ | told | {"OMP_NUM_THREADS": str(threads)}


class Processes:
    """A folder for what the processes exchange, and what all of them are told."""

    program = ""
    peers = ("B0", "B1", "peft")  # sides that do not start as train.py does

    def __init__(self, folder: Path, threads: int, smoke: bool):
        self.folder, self.threads, self.smoke, self.count = folder, threads, smoke, 0
        self.probe_seconds = 0.02 if smoke else 0.5

    def probe(self) -> float:
        return machine.matmul_rate(seconds=self.probe_seconds)

    def job(self, side: str, **more) -> dict:
        """What a process is told."""
        return {"side": side, "threads": self.threads, "smoke": self.smoke} | more

    def command(self, side: str) -> list[str]:
        return [sys.executable, str(ROOT / "bench" / self.program)]

    def start(self, side: str, **more) -> tuple[subprocess.Popen, Path]:
        """A process that begins, and the file that its answer will be in."""
        self.count += 1
        told, answer = (self.folder / f"{self.count}.{name}" for name in ("job", "result"))
        job = self.job(side, **more)
        files.write_json(told, job | {"started": time.time()})
        environ = quiet(job["threads"]) | ({} if side in self.peers else heap.TUNABLES)
        command, pipe = [*self.command(side), str(told), str(answer)], subprocess.PIPE
        with answer.with_suffix(".err").open("w") as errors:
            process = subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, stderr=errors, text=True)
        return process, answer

    def end(self, side: str, process: subprocess.Popen, answer: Path) -> dict:
        """What it answers."""
        process.communicate()
        if process.returncode:
            errors = answer.with_suffix(".err").read_text()
            raise SystemExit(f"{side} ended with {process.returncode}\n{errors}")
        return files.read_json(answer)

    def child(self, side: str, **more) -> dict:
        """One process; what it answers, and how much faster the machine was after it than before."""
        before = self.probe()
        result = self.end(side, *self.start(side, **more))
        result |= {"probe": [before, self.probe()], "load": os.getloadavg()[0]}
        return result | {"drift": result["probe"][1] / before - 1}

    def by_turns(self, jobs: Mapping[str, dict], count: int, first: int = 0) -> dict[str, dict]:
        """A process for each side, which work by turns, so that a machine whose speed changes is as fast for all; who
        begins rotates. Each takes `count` turns, the first as soon as it has started, alone."""
        running = {}
        for side, job in jobs.items():
            running[side] = self.start(side, turns=True, **job)
            wait_for_turn(running[side][0])
        sides = list(jobs)
        for number in range(1, count):
            begins = (first + number) % len(sides)
            for side in sides[begins:] + sides[:begins]:
                process = running[side][0]
                with suppress(BrokenPipeError):  # it has ended, and `end` says why
                    process.stdin.write("\n"), process.stdin.flush()
                wait_for_turn(process)
        return {side: self.end(side, *found) for side, found in running.items()}

    def rounds(self, sides: Sequence[str], count: int, run: Callable[[str], dict]) -> dict[str, list[dict]]:
        """`run(side)` in a process of its own, `count` times a side, the order turned round from round to round."""
        runs = {side: [] for side in sides}
        for number in range(count):
            for side in sides if number % 2 == 0 else reversed(sides):
                runs[side].append(run(side))
        return runs


TURN = "your turn"


def take_turn() -> None:
    """Called by a process that works by turns, before each of its turns but the first."""
    print(TURN, flush=True)
    if not sys.stdin.readline():
        sys.exit("the benchmark has ended")


def wait_for_turn(process: subprocess.Popen) -> None:
    """Until the process waits, or has ended."""
    for line in process.stdout:
        if line.strip() == TURN:
            return


def run(
    doc: str, program: str, parts: Mapping[str, Callable], result: Path, make: Callable, show: Callable, argv=None
) -> None:
    """Run parts, `part(bench, rounds)` each, of which the file keeps those that were not run; `make` makes the bench of
    a folder, threads and smoke."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; all without it")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=result, help="file of results")
    parser.add_argument("--smoke", action="store_true", help="tiny random models: does it run at all?")
    args = parser.parse_args(argv)
    if wrong := set(args.parts) - parts.keys():
        parser.error(f"no such part: {', '.join(sorted(wrong))}")
    torch.set_num_threads(args.threads)
    command = shlex.join(["python", f"bench/{program}", *(sys.argv[1:] if argv is None else argv)])
    head = {"machine": machine.described(), "threads": args.threads, "date": f"{datetime.now():%Y-%m-%d %H:%M}",
            "command": command}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        bench = make(Path(folder), args.threads, args.smoke)
        for part in args.parts or parts:
            found = head | {"load before": os.getloadavg()[0]} | parts[part](bench, args.rounds)
            show(part, found)
            if not args.smoke or args.out != result:
                known = files.read_json(args.out) if args.out.exists() else {}
                files.write_json(args.out, known | {part: found})
