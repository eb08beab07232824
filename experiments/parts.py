"""An experiment is a list of parts. A part runs the project's own commands once and leaves results/NAME.json.

A part that has its results is not done again, and one that was stopped goes on from the newest checkpoint of its
training. What is scored, tabled and drawn comes from results/ alone: `--figures` makes it all again without a model.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import torch  # noqa: E402
from show import Found  # noqa: E402

from bench import machine as hardware  # noqa: E402
from lora import (  # noqa: E402
    errors,
    files,
    pretrained,
)
from lora.pretrained import default_model  # noqa: E402

MODEL = default_model.NAME


class Part(NamedTuple):
    """`work` gets a folder, empty or half filled, and returns what to keep; "answers" go to a file of their own."""

    work: Callable[[Path], dict]
    needs: tuple[str, ...] = ()
    leaves: str = ""  # a training run in its folder, which parts that need this one go on from


class Experiment:
    """The parts of a folder of experiments/, what they found, and how that is shown.

    `show(found)` gets what each finished part found, draws the pictures and returns tables, name -> lines; these stand
    in the folder's README.md and in experiments/README.md between `<!-- FOLDER/NAME -->` and `<!-- end -->`.
    """

    def __init__(self, program: str, about: str, show: Callable[[dict[str, dict]], dict[str, list[str]]]):
        self.folder, self.about, self.show = Path(program).resolve().parent, about, show
        self.scratch = ROOT / "weights" / "experiments" / self.folder.name  # adapters, data: what git does not keep
        self.parts: dict[str, Part] = {}

    def add(self, name: str, work: Callable[[Path], dict], *needs: str, leaves: str = "") -> None:
        self.parts[name] = Part(work, needs, leaves)

    def path(self, name: str) -> Path:
        return self.folder / "results" / f"{name}.json"

    def rows(self, name: str) -> Path:
        """The answers that a part found."""
        return self.path(name).with_suffix(".jsonl")

    def done(self, name: str) -> bool:
        return self.path(name).exists()

    def serves(self, name: str) -> bool:
        """It is done and what it leaves is here; in a clone the results are, and adapters are not."""
        run = self.parts[name].leaves
        return self.done(name) and (not run or bool(ended(self.scratch / name / run)))

    def do(self, name: str) -> None:
        """One part, in this process; its answers are written before the file that says that it is done."""
        scratch = self.scratch / name
        scratch.mkdir(parents=True, exist_ok=True)
        self.path(name).parent.mkdir(exist_ok=True)
        with timed(scratch / "seconds.jsonl") as spent:
            found = self.parts[name].work(scratch)
        if answers := found.pop("answers", None):
            files.write_rows(self.rows(name), answers)
        found |= {"seconds": round(spent()), "model": described(), "machine": machine()}
        lines = (f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in found.items())
        files.write_bytes(self.path(name), ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    def do_all(self, names: Iterable[str], jobs: int) -> None:
        """Each part in a process of its own, as soon as those that it needs are done. One that fails stops those that
        need it, and no other."""
        due, running, failed = self._due(names), {}, []
        environment = dict(os.environ, OMP_NUM_THREADS="1") if jobs > 1 else None
        with ThreadPoolExecutor(jobs) as pool:
            while True:
                for name in self._ready(due, running.values())[: jobs - len(running)]:
                    due.remove(name)
                    running[pool.submit(self._alone, name, environment)] = name
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    if problem := future.result():
                        failed.append(problem)
                    else:
                        errors.say(f"done     {self.folder.name}/{name}")
        if due:
            failed.append(f"not done: {', '.join(due)}. They need what is not there")
        if failed:
            raise errors.BadEnvironment(*failed)

    def _due(self, names: Iterable[str]) -> list[str]:
        """Those of these parts that are not done; what they need; and what came of a part that is done again."""
        due = {name for name in names if not self.done(name)}
        while True:
            needed = {need for name in due for need in self.parts[name].needs if not self.serves(need)}
            stale = {name for name, part in self.parts.items() if self.done(name) and not due.isdisjoint(part.needs)}
            if needed | stale <= due:
                return [name for name in self.parts if name in due]
            due |= needed | stale

    def _ready(self, due: list[str], running: Iterable[str]) -> list[str]:
        awaited = {*due, *running}
        needs = {name: self.parts[name].needs for name in due}
        return [name for name in due if awaited.isdisjoint(needs[name]) and all(map(self.serves, needs[name]))]

    def _alone(self, name: str, environment: dict | None) -> str | None:
        """What went wrong, in a line. Raises Stopped where a signal ended it."""
        errors.say(f"part     {self.folder.name}/{name}")
        (self.scratch / name).mkdir(parents=True, exist_ok=True)
        with open(self.scratch / name / "log.txt", "ab") as log:
            words = [sys.executable, self.folder / "run.py", name, "--alone"]
            code = subprocess.run(words, env=environment, stdout=log, stderr=log).returncode
        if code in errors.STOP_CODES.values():
            raise errors.Stopped(code)
        return f"part {name} ended with {code}: see {log.name}. Start it again to go on" if code else None

    def figures(self) -> None:
        """Draw the pictures and lay the tables into the READMEs."""
        found = Found({name: self._found(name) for name in self.parts if self.done(name)})
        for name, lines in {**self.show(found), "made": self._made(found)}.items():
            start, end, laid = f"<!-- {self.folder.name}/{name} -->", "<!-- end -->", False
            for readme in (self.folder / "README.md", self.folder.parent / "README.md"):
                before, mark, rest = readme.read_text().partition(start)
                _, stop, after = rest.partition(end)
                if mark and not stop:
                    raise errors.BadInput(f"no {end} after {start} in {readme}. Add it where the table ends")
                if mark:
                    readme.write_text("\n".join([before + mark, *lines, stop + after]))
                    laid = True
            if not laid:
                raise errors.BadInput(f"no {start} in {readme} or that of its folder. Add it where the table is to be")

    def _made(self, found: dict[str, dict]) -> list[str]:
        """How much of it is done, in what time, of what and on what."""
        minutes = sum(max(f["seconds"], f.get("training", {}).get("training_seconds", 0)) for f in found.values()) / 60
        models = {"{name}: {source}".format(**f["model"]) for f in found.values()}
        form = "{cpu}, {cores} cores, threads a part: {threads}; torch {torch}, Python {python}"
        machines = {form.format(**f["machine"]) for f in found.values()}
        done = f"{len(found)} of {len(self.parts)} parts are done, in {minutes:.0f} minutes, one after the other."
        return [" ".join([done, *(f"{text}." for text in (*sorted(models), *sorted(machines)))])]

    def _found(self, name: str) -> dict:
        found, answers = files.read_json(self.path(name)), self.rows(name)
        return found | ({"answers": read_rows(answers)} if answers.exists() else {})

    # ---- the command line --------------------------------------------------------------------------------------------

    def main(self, argv: Sequence[str] | None = None) -> int:
        return errors.run(self._story, argv)

    def _story(self, argv: Sequence[str] | None) -> int:
        parser = errors.Parser(description=self.about)
        parser.add_argument("parts", nargs="*", metavar="PART", help="only these and what they need; all without it")
        parser.add_argument("--list", action="store_true", help="the parts, and which are done")
        parser.add_argument("--figures", action="store_true", help="only tables and pictures, of what is done")
        parser.add_argument("--again", action="store_true", help="do these parts anew; deletes what is there of them")
        parser.add_argument("--jobs", type=int, default=1, help="parts at once; of several each has one thread")
        parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one part in this process
        args = parser.parse_args(argv)
        wrong = []
        if unknown := [name for name in args.parts if name not in self.parts]:
            wrong.append(f"unknown part in the command line: {', '.join(unknown)}. Use some of {', '.join(self.parts)}")
        if args.again and not args.parts:
            wrong.append("wrong --again in the command line: it deletes results. Name the parts to do anew")
        if args.jobs < 1:
            wrong.append(f"wrong --jobs in the command line: {args.jobs}. Give a number above 0")
        if wrong:
            raise errors.BadInput(*wrong)
        if args.list:
            print("\n".join(f"{'done' if self.done(name) else '-':5}{name}" for name in self.parts))
        elif args.alone:
            self.do(*args.parts)
        else:
            for name in args.parts if args.again else ():
                self.path(name).unlink(missing_ok=True)
                shutil.rmtree(self.scratch / name, ignore_errors=True)
            if not args.figures:
                self.do_all(args.parts or self.parts, args.jobs)
            self.figures()
        return 0


# ---- what parts are made of ------------------------------------------------------------------------------------------


def command(program: str, *words: object) -> int:
    """Run one of the project's programs; returns the most bytes that its process had in memory."""
    process = subprocess.Popen([sys.executable, ROOT / program, *map(str, words)], cwd=ROOT)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:  # Ctrl-C reaches the child as well: it saves, and ends
        process.wait()
        raise
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise errors.BadEnvironment(f"{program} ended with {code}. Its message is above")
    return usage.ru_maxrss * 1024


def train(out: Path, *words: object) -> dict:
    """`train.py words --out out`; what the run's files say of it. A run that was begun with the same words and the same
    files goes on from its newest checkpoint, or is over."""
    peaks, begun = (out.with_name(f"{out.name}.{name}") for name in ("peaks.jsonl", "begun.json"))
    made_from = {word: fingerprint(word) for word in relative(words)}
    same = begun.exists() and files.read_json(begun) == made_from
    if not (same and ended(out)):
        again = same and any((out / "checkpoints").glob("[0-9]*"))
        if not again:
            peaks.unlink(missing_ok=True)
            files.write_json(begun, made_from)
        peak = command("train.py", *(("--resume",) if again else (*words, "--overwrite")), "--out", out)
        files.append_row(peaks, {"peak": peak})
    rows = read_rows(out / "metrics.jsonl")
    steps = [row for row in rows if "tokens_per_second" in row]
    kept = ("step", "eval_", "retention_")
    return {
        "command": relative(words),
        "ended": ended(out),
        "steps": len(steps),
        "tokens": sum(row["tokens"] for row in steps),
        "training_seconds": round(sum(row["tokens"] / row["tokens_per_second"] for row in steps), 1),
        "tokens_per_second": median(row["tokens_per_second"] for row in steps),
        "peak_bytes": max((row["peak"] for row in read_rows(peaks)), default=0) if peaks.exists() else 0,
        "result_bytes": max(path.stat().st_size for path in out.glob("*.safetensors")),
        "losses": [float(f"{row['loss']:.4g}") for row in steps],
        "unchanged": [round(row["unchanged"], 5) for row in steps],
        "evaluations": [{k: v for k, v in row.items() if k.startswith(kept)} for row in rows if "retention_kl" in row],
    }


def by_step(out: Path, *names: str) -> dict[str, list[float]]:
    """What a method measured in each step of a run."""
    steps = [row for row in read_rows(out / "metrics.jsonl") if "tokens_per_second" in row]
    return {name: [float(f"{row[name]:.4g}") for row in steps] for name in names}


def fingerprint(word: str) -> str | None:
    """Of the file, or of a folder's weights, that a word of a command names, as PATH or PATH:SHARE."""
    path = ROOT / re.sub(r":[0-9.]+$", "", word)
    read = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in read)).hexdigest() if read else None


@contextmanager
def timed(path: Path) -> Iterator[Callable[[], float]]:
    """The seconds of the block, and of its earlier attempts, which `path` keeps."""
    start, before = time.monotonic(), sum(row["seconds"] for row in read_rows(path)) if path.exists() else 0
    try:
        yield lambda: before + time.monotonic() - start
    except BaseException:
        files.append_row(path, {"seconds": time.monotonic() - start})
        raise


def relative(words: Iterable[object]) -> list[str]:
    """A command's words as they are typed in the project's folder."""
    return [str(word).replace(f"{ROOT}/", "") for word in words]


def ended(out: Path) -> str | None:
    """Why a run ended, if nobody stopped it."""
    settings = out / "settings.json"
    why = files.read_json(settings).get("ended") if settings.exists() else None
    return None if why and why.startswith("stopped by a signal") else why


def ask(scratch: Path, rows: Sequence[dict], adapter: Path | None, *words: object, model: object = MODEL) -> list[str]:
    """The likeliest answers to conversations that end with a question; those of `model` without an adapter."""
    prompts, out = scratch / "prompts.jsonl", scratch / "answered.jsonl"
    files.write_rows(prompts, rows)
    who = ("--adapter", adapter) if adapter else ("--model", model)
    command("generate.py", *who, "--prompts", prompts, "--out", out, *words)
    return [row["prediction"] for row in read_rows(out)]


def question(text: str, *before: tuple[str, str]) -> dict:
    """A row for `ask`, after earlier pairs of question and answer."""
    turns = [turn for asked, answered in before for turn in (("user", asked), ("assistant", answered))]
    return {"messages": [{"role": role, "content": said} for role, said in (*turns, ("user", text))]}


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def described() -> dict[str, str]:
    found = pretrained.find(MODEL)
    return {"name": found.name, "source": found.described}


def machine() -> dict[str, Any]:
    return hardware.described() | {"threads": torch.get_num_threads()}
