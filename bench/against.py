"""Is a training step slower than in another checkout of this project?   python bench/against.py OTHER

Both run the `ours` side of bench/train_sides.py on the same steps, a fresh process each, in an order that rotates. The
other checkout needs the default model in its weights/, and the Python packages of this environment have to serve both.
Prints the median step of every process, and the median ratio over steps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[1]


def one(tree: Path, workload: str) -> None:
    """Seconds of each timed step and peak memory of a process of `tree`, as JSON on stdout."""
    sys.path.insert(0, str(tree))
    os.chdir(tree)
    from bench import train_speed

    shape = train_speed.WORKLOADS[workload]
    with tempfile.TemporaryDirectory() as folder:
        bench = train_speed.Bench(Path(folder), 2, False)
        tokenizer = train_speed.pretrained.load_chat(train_speed.pretrained.find(str(bench.base))).tokenizer
        text = tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))  # the same in both
        steps = train_speed.make_steps(shape, text, shape.warm + shape.steps, workload)
        run = bench.child("ours", steps=steps, micro=0)
    seconds = [row["seconds"] for row in run["rows"][shape.warm :]]
    print(json.dumps({"seconds": seconds, "peak GB": run["peak"] / 1e9}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--workload", default="short")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each checkout")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        return one(asked.other.resolve(), asked.workload)
    trees, runs = [ROOT, asked.other.resolve()], {ROOT: [], asked.other.resolve(): []}
    for number in range(asked.rounds):
        for tree in trees if number % 2 == 0 else reversed(trees):
            command = [sys.executable, __file__, str(tree), "--workload", asked.workload, "--one"]
            environment = os.environ | {"PYTHONPATH": str(tree)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            run = json.loads(done.stdout.splitlines()[-1])
            runs[tree].append(run)
            name = "this" if tree == ROOT else "other"
            print(f"{name:6} {median(run['seconds']):.2f} s a step, peak {run['peak GB']:.2f} GB", flush=True)
    pairs = zip(runs[ROOT], runs[trees[1]], strict=True)
    ratios = [a / b for mine, theirs in pairs for a, b in zip(mine["seconds"], theirs["seconds"], strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    print(f"step time here over there: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
