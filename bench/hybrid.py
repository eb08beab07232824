"""How fast are models whose layers are mostly Gated DeltaNet?   python bench/hybrid.py [PART ...]

Qwen3.5 of 0.8 billion random weights in bfloat16, beside a Llama of as many weights, layers, width and words, both
ours; and beside PEFT + transformers on the same Qwen3.5, with the kernels that PyTorch has. An adapter of rank 16 on
all linears, the same tokens of the same examples in every step, the same optimizer.

short     steps of 8 chats of 50 to 300 tokens; PEFT pads them on the right, in micro-batches of the best size
512       steps of two documents of 512 tokens; 2048: of one document of 2,048
memory    one step of a document of 1,024, 2,048 and 4,096 tokens, in a process each: the peak, and bytes a token more
decode    32 tokens after a prompt of 64, one row and eight, with the adapter merged

A fresh process a side and a round, the order turned round from round to round; ratios are taken step by step, and their
median is given with the quartiles. Prints tables; bench/results/hybrid.json gets every raw row, and keeps what it has
of parts that were not run. `peft` takes most of the time: with `--rounds 1` all of it is half an hour on 2 cores.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine  # noqa: E402
from bench.quant import judged, ratios, show, told_of  # noqa: E402
from bench.train_speed import make_steps, spread, workload  # noqa: E402
from lora import files  # noqa: E402

RESULT = ROOT / "bench" / "results" / "hybrid.json"
SIDES = ("ours", "llama", "peft")
WORKLOADS = {
    "short": workload("chats", 50, 300, (0.3, 0.5), 8, 3, warm=1, micro=(4, 8)),
    "512": workload("documents", 512, 512, (1, 1), 2, 3, warm=1, micro=(1, 2)),
    "2048": workload("documents", 2048, 2048, (1, 1), 1, 2, warm=1, micro=(1,)),
}
LENGTHS, PROMPT, NEW, ROWS = (1024, 2048, 4096), 64, 32, (1, 8)
GOALS = {"llama": (">=", 0.67), "peft": (">=", 1.5)}


class Bench:
    """A folder for what the processes exchange."""

    def __init__(self, folder: Path, threads: int, smoke: bool):
        self.folder, self.threads, self.smoke, self.count = folder, threads, smoke, 0

    def child(self, side: str, part: str, **more) -> dict:
        """One process, a matmul probe before and after it."""
        self.count += 1
        told, answer = (self.folder / f"{self.count}.{name}" for name in ("job", "result"))
        before, job = machine.matmul_rate(), {"side": side, "part": part, "threads": self.threads, "smoke": self.smoke}
        files.write_json(told, job | more)
        quiet = {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(ROOT / "bench" / "hybrid_sides.py"), str(told), str(answer)]
        done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{side} ended with {done.returncode}\n{done.stderr[-3000:]}")
        return files.read_json(answer) | {"drift": machine.matmul_rate() / before - 1, "load": os.getloadavg()[0]}

    def rounds(self, count: int, run) -> dict[str, list[dict]]:
        """`run(side)` for every side, `count` times, by turns."""
        runs = {side: [] for side in SIDES}
        for number in range(count):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                runs[side].append(found := run(side))
                print(f"run       {side}: drift {found['drift']:+.1%}, load {found['load']:.1f}", flush=True)
        return runs


# ---- the parts -------------------------------------------------------------------------------------------------------


def training(name: str, bench: Bench, rounds: int) -> dict:
    shape = WORKLOADS[name]
    if bench.smoke:
        shape = workload(shape.what, 20, 90, shape.trained, 2, 1, warm=1, micro=(1, 2))
    steps = make_steps(shape, list(range(400 if bench.smoke else 5000)), shape.warm + shape.steps, name)
    grid = {}
    for micro in shape.micro if len(shape.micro) > 1 else ():
        rows = bench.child("peft", "train", steps=steps[:1], micro=micro)["rows"]
        grid[micro] = sum(row["seconds"] for row in rows)
        print(f"grid      {name}: peft with {micro} a micro-batch, a step in {grid[micro]:.1f} s", flush=True)
    best = min(grid, key=grid.get, default=1)
    runs = bench.rounds(rounds, lambda side: bench.child(side, "train", steps=steps, micro=best))
    sides = {side: summary(its, shape.warm) for side, its in runs.items()}
    reached = [
        judged(ratios(runs["ours"], runs[side], shape.warm), f"{name}: tokens/s over {side}'s", GOALS[side])
        for side in SIDES[1:]
    ]
    reached.append(judged({"value": sides["ours"]["peak GB"] / sides["peft"]["peak GB"]}, "peak over peft's", None))
    apart = abs(sides["ours"]["first loss"] / sides["peft"]["first loss"] - 1)  # of the same weights
    reached.append(judged({"value": apart}, "first loss apart from peft's", ("<=", 0.01)))
    told = {"micro": best, "grid s": grid, "warm-up steps": shape.warm}
    return told | {"sides": sides, "reached": reached, "runs": runs}


def summary(runs: list[dict], warm: int) -> dict:
    rows = [row for run in runs for row in run["rows"][warm:]]
    return {
        "M weights": runs[0]["weights"] / 1e6,
        "tokens/s": median(row["tokens"] / row["seconds"] for row in rows),
        "step s": median(row["seconds"] for row in rows),
        "peak GB": max(run["peak"] for run in runs) / 1e9,
        "loaded GB": max(run["loaded"] for run in runs) / 1e9,
        "first loss": runs[0]["rows"][0]["loss"],
    }


def memory(bench: Bench, rounds: int) -> dict:
    sides, runs, reached = {}, {}, []
    for side in SIDES[:2]:
        runs[side] = []
        for length in (128, 256, 512) if bench.smoke else LENGTHS:
            shape = workload("document", length, length, (1, 1), 1, 1)
            steps = make_steps(shape, list(range(400 if bench.smoke else 5000)), 2, "memory")
            runs[side].append({"length": length} | bench.child(side, "train", steps=steps, micro=1))
        points = [(run["length"], run["peak"]) for run in runs[side]]
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) / 1e3 for a, b in pairwise(points)]
        sides[side] = {f"{length}: GB": peak / 1e9 for length, peak in points}
        sides[side] |= {f"kB a token {i}": slope for i, slope in enumerate(slopes, 1)}
        print(f"run       {side}: {told_of(sides[side])}", flush=True)
        goal = ("<=", 1.15) if side == "ours" else None
        reached.append(judged({"value": slopes[1] / slopes[0]}, f"{side}: second slope over the first", goal))
    return {"sides": {side: dict(zip(sides["ours"], row.values(), strict=True)) for side, row in sides.items()},
            "reached": reached, "runs": runs}  # fmt: skip


def decode(bench: Bench, rounds: int) -> dict:
    told = {"rows": ROWS, "prompt": 8 if bench.smoke else PROMPT, "new": 8 if bench.smoke else NEW}
    runs = bench.rounds(rounds, lambda side: bench.child(side, "decode", **told))
    rates = {side: {n: [run["tokens/s"][str(n)] for run in its] for n in ROWS} for side, its in runs.items()}
    sides = {side: {f"{n} rows, tokens/s": median(row[n]) for n in ROWS} for side, row in rates.items()}
    reached = [
        judged(spread([a / b for a, b in zip(rates["ours"][n], rates[side][n], strict=True)]),
               f"{n} rows: tokens/s over {side}'s", None)
        for side in SIDES[1:] for n in ROWS
    ]  # fmt: skip
    return {**told, "sides": sides, "reached": reached, "runs": runs}


PARTS = {
    **{name: lambda bench, rounds, name=name: training(name, bench, rounds) for name in WORKLOADS},
    "memory": memory, "decode": decode,
}  # fmt: skip


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all without it")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT, help="file of results")
    parser.add_argument("--smoke", action="store_true", help="tiny random models: does it run at all?")
    args = parser.parse_args(argv)
    if wrong := set(args.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(wrong))}")
    torch.set_num_threads(args.threads)
    command = shlex.join(["python", "bench/hybrid.py", *(sys.argv[1:] if argv is None else argv)])
    head = {"machine": machine.described() | {"instructions": torch.backends.cpu.get_cpu_capability(),
            "amx": "amx_bf16" in machine._read("/proc/cpuinfo")}, "threads": args.threads,
            "date": f"{datetime.now():%Y-%m-%d %H:%M}", "command": command}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.threads, args.smoke)
        for part in args.parts or PARTS:
            found = head | {"load before": os.getloadavg()[0]} | PARTS[part](bench, args.rounds)
            show(part, found)
            if not args.smoke or args.out != RESULT:
                known = files.read_json(args.out) if args.out.exists() else {}
                files.write_json(args.out, known | {part: found})


if __name__ == "__main__":
    main()
