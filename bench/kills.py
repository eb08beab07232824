"""Kill training again and again, go on each time, and compare the end with that of a run that was left alone.

    python bench/kills.py [--kills 1000] [--method sft] [--minutes M] [--out bench/results/kills.jsonl] [--seed N]

A run is 60 steps of a tiny model, with dropout unless it samples its answers, a checkpoint every 3 and, in half of the
runs, an evaluation every 10. It is killed (SIGKILL) up to four times, at a random time or before, within or after a
random operation on a file, and gone on with by --resume, or started again where there was no checkpoint yet. At its end
every file must be there with the same bytes as without kills, but for the times in metrics.jsonl. Each run adds a row
to the results; started again, the count of its method goes on. A run that differs leaves its folder. Exit 1 where one
did.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from lora import files  # noqa: E402
from lora.methods import METHODS, samples  # noqa: E402
from lora.train import run_state  # noqa: E402
from tests import cli  # noqa: E402
from tests.faults import Blow, Disk  # noqa: E402

STEPS, MOST_KILLS, WORKERS = 60, 4, 2
START = 0.2  # of a run's time: about what comes before the first step
END = 40  # operations after the last step, about
AT_AN_OPERATION, PARTS = 0.6, ("before", "half", "after")  # of all kills
TIMES = ("seconds", "tokens_per_second")  # in metrics.jsonl; all else must be the same
REWARD = """
def vowels(completions, **columns):
    texts = [turns[-1]["content"] for turns in completions]
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]
"""
SECONDS = 120  # a run that takes longer hangs


def evaluated(number: int) -> bool:
    return number % 2 == 1


def data(method: str, place: Path) -> Path:
    """Ten rows that a method learns from."""
    rows = [json.loads(line)["messages"] for line in cli.data_file().read_text().splitlines()]
    asked = [(row[:-1], row[-1]["content"]) for row in rows]
    path = place / f"{method}.jsonl"
    made = []
    for i, (prompt, good) in enumerate(asked):
        bad = asked[i - 1][1] + " Or not."
        judged = {"completion": [{"role": "assistant", "content": bad if i % 2 else good}], "label": i % 2 == 0}
        made.append({"prompt": prompt, **(judged if method == "kto" else {"chosen": good, "rejected": bad})})
    files.write_rows(path, made)
    return cli.data_file() if method == "sft" else path


def flags(evaluated: bool, method: str, place: Path) -> list[str]:
    """The flags of the two runs that are made again and again. Ten examples in fours: epochs end within the run."""
    words = f"--max-steps {STEPS} --batch-size 4 --save-every 3 --keep 2 --dropout 0.1 --rank 4 --lr 0.02"
    held_out = "--eval-fraction 0.2 --eval-every 10" if evaluated else ""
    inputs = ["--model", str(cli.model_folder()), "--data", str(data(method, place)), "--method", method]
    if samples(method):
        files.write_bytes(place / "own.py", REWARD.encode())  # whole at any time: the other worker may be reading it
        words += f" --dropout 0 --group 2 --max-new-tokens 6 --reward {place / 'own.py'}:vowels length:3:0.5 --kl 0.1"
    return [*inputs, "--out", "out", *cli.ON_CPU, *words.split(), *held_out.split()]


def train(folder: Path, argv: list[str], before: Callable | None = None, seconds: float = SECONDS) -> int:
    """The exit code of train.py in folder/work, in a child that runs `before` first and is killed after `seconds`."""
    cli.warm()
    (folder / "work").mkdir(exist_ok=True)
    with open(os.devnull, "rb") as nothing, open(folder / "log", "ab") as log:
        child = os.fork()
        if child == 0:
            cli._child("train", argv, folder / "work", {}, (nothing, log, log), before)
    return cli.wait(child, seconds)[0]


def outcome(work: Path) -> dict[str, str]:
    """Everything below a folder, by the hash of its bytes; of metrics.jsonl without times."""
    found, metrics = cli.tree(work), work / "out/metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    lines = [json.dumps({key: value for key, value in row.items() if key not in TIMES}) for row in rows]
    return found | {"out/metrics.jsonl": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


class Alone(NamedTuple):
    """A run without kills: what is left of it, its time, the number of its operations on files."""

    outcome: dict[str, str]
    seconds: float
    operations: int


def alone(place: Path, method: str, evaluated: bool) -> Alone:
    folder = Path(tempfile.mkdtemp(dir=place))

    def watch() -> None:
        disk, end = Disk(folder / "work").__enter__(), os._exit
        os._exit = lambda code: ((folder / "count").write_text(str(len(disk.ops))), end(code))

    start = time.monotonic()
    code = train(folder, flags(evaluated, method, place), watch)
    assert code == 0, (folder / "log").read_text()
    return Alone(outcome(folder / "work"), time.monotonic() - start, int((folder / "count").read_text()))


def killed(place: Path, number: int, seed: int, method: str, expected: Alone) -> dict:
    """Run `number`, with its kills: the row of the results."""
    chosen, argv = random.Random(f"{seed}/{number}"), flags(evaluated(number), method, place)
    folder = Path(tempfile.mkdtemp(dir=place, prefix=f"run{number}-"))
    wanted, how, began, again = chosen.randint(1, MOST_KILLS), [], [], []
    while True:
        path, _ = run_state.newest(folder / "work/out")
        began.append(int(path.name) if path else 0)
        to_do = 1 - began[-1] / STEPS
        what, before, seconds = "", None, SECONDS
        if len(how) == wanted:
            pass
        elif chosen.random() < AT_AN_OPERATION:
            at, part = chosen.randrange(END + int(to_do * expected.operations)), chosen.choice(PARTS)
            what, before = f"{part} operation {at}", Disk(folder / "work", Blow(at, part)).__enter__
        else:
            seconds = chosen.uniform(0, expected.seconds * (START + (1 - START) * to_do))
            what = f"after {seconds:.3f} s"
        code = train(folder, argv + again, before, seconds)
        if code != -signal.SIGKILL or not what:
            break
        how.append(what)
        again = ["--resume" if run_state.newest(folder / "work/out")[0] else "--overwrite"]
    found = outcome(folder / "work")
    names = expected.outcome.keys() | found.keys()
    differs = sorted(name for name in names if expected.outcome.get(name) != found.get(name))
    differs += [f"exit code {code}"] if code else []
    row = {
        "run": number,
        "method": method,
        "seed": seed,
        "kills": len(how),
        "how": how,
        "from": began[1:],
        "same": not differs,
    }
    if differs:
        row |= {"differs": differs, "folder": str(folder)}
    else:
        shutil.rmtree(folder)
    return row | {"torch": torch.__version__, "code": commit()}


@cache
def commit() -> str | None:
    """The short hash of the code that runs."""
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or None


def start_worker() -> None:
    tqdm.set_lock(threading.RLock())  # else all processes share one, which a killed one would hold for ever


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--method", default="sft", choices=METHODS)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/kills.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many")
    args = parser.parse_args(argv)
    rows, began = [row for row in read(args.out) if row.get("method", "sft") == args.method], time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    cli.warm(), cli.model_folder(), cli.data_file(), commit()
    numbers = count(max((row["run"] for row in rows), default=-1) + 1)
    with (
        ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork"), start_worker) as workers,
        tqdm(total=args.kills, initial=sum(row["kills"] for row in rows), unit="kill", desc="killing") as bar,
    ):
        expected = list(workers.map(alone, [place] * 2, [args.method] * 2, [False, True]))
        running = set()
        while running or bar.n < args.kills:
            more = bar.n < args.kills and time.monotonic() - began < 60 * args.minutes
            while more and len(running) < WORKERS:
                number = next(numbers)
                running.add(workers.submit(killed, place, number, args.seed, args.method, expected[evaluated(number)]))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for row in (task.result() for task in done):
                files.append_row(args.out, row)
                rows.append(row)
                bar.update(row["kills"])
    total, different = sum(row["kills"] for row in rows), [row for row in rows if not row["same"]]
    for row in different:
        print(f"run {row['run']} differs: {', '.join(row['differs'])}; {row['folder']}")
    if not any(row["folder"].startswith(str(place)) for row in different):
        shutil.rmtree(place)
    bound = f"95 % bound on the failure rate 3/N = {3 / max(1, total):.2g}"
    print(f"{total} kills in {len(rows)} runs, {len(different)} differences; {bound}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
