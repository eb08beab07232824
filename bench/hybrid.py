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

import sys
from itertools import pairwise
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import parts  # noqa: E402
from bench.quant import judged, ratios, show, told_of  # noqa: E402
from bench.train_speed import make_steps, spread, workload  # noqa: E402

RESULT = ROOT / "bench" / "results" / "hybrid.json"
SIDES = ("ours", "llama", "peft")
WORKLOADS = {
    "short": workload("chats", 50, 300, (0.3, 0.5), 8, 3, warm=1, micro=(4, 8)),
    "512": workload("documents", 512, 512, (1, 1), 2, 3, warm=1, micro=(1, 2)),
    "2048": workload("documents", 2048, 2048, (1, 1), 1, 2, warm=1, micro=(1,)),
}
LENGTHS, PROMPT, NEW, ROWS = (1024, 2048, 4096), 64, 32, (1, 8)
GOALS = {"llama": (">=", 0.67), "peft": (">=", 1.5)}


class Bench(parts.Processes):
    program = "hybrid_sides.py"

    def rounds(self, count: int, run) -> dict[str, list[dict]]:
        """Of every side, each process told of as it ends."""

        def told(side: str) -> dict:
            found = run(side)
            print(f"run       {side}: drift {found['drift']:+.1%}, load {found['load']:.1f}", flush=True)
            return found

        return super().rounds(SIDES, count, told)


# ---- the parts -------------------------------------------------------------------------------------------------------


def training(name: str, bench: Bench, rounds: int) -> dict:
    shape = WORKLOADS[name]
    if bench.smoke:
        shape = workload(shape.what, 20, 90, shape.trained, 2, 1, warm=1, micro=(1, 2))
    steps = make_steps(shape, list(range(400 if bench.smoke else 5000)), shape.warm + shape.steps, name)
    grid = {}
    for micro in shape.micro if len(shape.micro) > 1 else ():
        rows = bench.child("peft", part="train", steps=steps[:1], micro=micro)["rows"]
        grid[micro] = sum(row["seconds"] for row in rows)
        print(f"grid      {name}: peft with {micro} a micro-batch, a step in {grid[micro]:.1f} s", flush=True)
    best = min(grid, key=grid.get, default=1)
    runs = bench.rounds(rounds, lambda side: bench.child(side, part="train", steps=steps, micro=best))
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
            runs[side].append({"length": length} | bench.child(side, part="train", steps=steps, micro=1))
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
    runs = bench.rounds(rounds, lambda side: bench.child(side, part="decode", **told))
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
    parts.run(__doc__, "hybrid.py", PARTS, RESULT, Bench, show, argv)


if __name__ == "__main__":
    main()
