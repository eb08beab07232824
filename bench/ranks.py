"""Two processes of one thread each against one of two threads, and what a sharded base takes.   python bench/ranks.py

speed    steps of short chats, as in bench/train_speed.py, by one process and by two ranks that torchrun starts; the
         share of a step in which a rank waits for the other, and in which gradients are summed
memory   how much a rank of two grows when it loads a sharded base and makes a step of a few tokens, beside base / N,
         the head and one block

Prints a table; bench/results/ranks.json keeps what it has of parts that were not run. Three minutes on 2 cores.
"""

import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine, memory, parts, train_speed  # noqa: E402

RESULT = ROOT / "bench" / "results" / "ranks.json"
SPARE = 35e6  # bytes that a rank may take besides its share, the head and a block


class Bench(train_speed.Bench):
    program = "rank_sides.py"

    def __init__(self, folder: Path, threads: int, smoke: bool):
        super().__init__(folder, threads, smoke)
        self.small = folder / "small"
        self.small.mkdir()
        memory.write_model(memory.run(2, 64, 128, 4, 2, vocab=1000), self.small)

    def command(self, side: str) -> list[str]:
        python = super().command(side)
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.threads)]
        return python if side == "one" else [python[0], *ranks, *python[1:]]

    def job(self, side: str, **more) -> dict:
        return super().job(side, **more) | {"threads": self.threads if side == "one" else 1, "small": str(self.small)}


def speed(bench: Bench, rounds: int) -> dict:
    shape = SimpleNamespace(**vars(train_speed.WORKLOADS["short"]))
    if bench.smoke:
        shape.low, shape.high, shape.warm, shape.steps = 10, 20, 1, 2
    steps = train_speed.make_steps(shape, bench.text, shape.warm + shape.steps, "ranks")
    runs = bench.rounds(("one", "two"), rounds, lambda side: bench.child(side, what="speed", steps=steps))
    timed = {side: [row for run in found for row in run["rows"][shape.warm :]] for side, found in runs.items()}
    pairs = zip(timed["one"], timed["two"], strict=True)
    reached = {"speed": train_speed.spread([one["seconds"] / two["seconds"] for one, two in pairs])}
    for name, field in (("waiting", "waited"), ("summing", "summed")):
        reached[name] = train_speed.spread([row[field] / row["seconds"] for row in timed["two"]])
    peaks = {side: max(run["peak"] for run in found) / 1e9 for side, found in runs.items()}
    tokens = {side: median(row["tokens"] / row["seconds"] for row in rows) for side, rows in timed.items()}
    return {"runs": runs, "tokens/s": tokens, "peak GB": peaks, "reached": reached}


def sharded(bench: Bench, rounds: int) -> dict:
    found, mega = bench.child("two", what="memory"), 1e6
    share = found["base"] / bench.threads
    bound = share + found["block"] + found["head"] + SPARE
    most = max(phase["most"] for phase in found["phases"].values())
    reached = {"the bound, MB": bound / mega, "most, MB": most / mega, "over the bound": most / bound}
    return {"measured": found, "reached": {name: {"value": value} for name, value in reached.items()}}


def show(part: str, found: dict) -> None:
    print(f"\n{part}")
    for name, value in found.get("tokens/s", {}).items():
        print(f"  {name}: {value:.0f} tokens/s, peak of a process {found['peak GB'][name]:.2f} GB")
    if measured := found.get("measured"):
        for name in ("base", "head", "block", "adapter"):
            print(f"  {name}: {measured[name] / 1e6:.1f} MB")
        for name, phase in measured["phases"].items():
            print(f"  {name}: {phase['now'] / 1e6:.1f} MB, at most {phase['most'] / 1e6:.1f} MB")
    for name, row in found["reached"].items():
        between = f" ({row['from']:.2f} to {row['to']:.2f})" if "from" in row else ""
        print(f"  {name}: {row['value']:.3g}{between}")


def main(argv=None) -> None:
    each = {machine.keyed("speed"): speed, machine.keyed("memory"): sharded}
    parts.run(__doc__, "ranks.py", each, RESULT, Bench, show, argv)


if __name__ == "__main__":
    main()
