"""How fast is training against PEFT + transformers, and against its own matrix products?   python bench/train_speed.py

Ours, with compiled blocks and without, against PEFT as people run it (B0) and tuned (B1), see bench/train_sides.py: the
same base in bfloat16, the same adapter of rank 16 on all linears to begin with, the same examples in every step, the
same optimizer and loss. A fresh process a side and a round; they take their steps by turns, so that ratios, which are
taken step by step, are of one moment. Their median is given with the quartiles, for compiled blocks where there are.
Losses and first gradients must agree, or there is no speed to speak of: exit 1 and `void`.

Prints tables; bench/results/train_speed.json gets every raw row, those of CPUs with AMX and without side by side, and
keeps what it has of workloads that were not run. With all defaults it takes about an hour on 2 cores.
"""

import argparse
import random
import shlex
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import goals, machine, memory  # noqa: E402
from bench.parts import Processes  # noqa: E402
from lora import (  # noqa: E402
    files,
    pretrained,
)
from lora.adapter import store  # noqa: E402
from lora.adapter.inject import inject, lora_layers  # noqa: E402
from lora.adapter.targets import GROUPS  # noqa: E402
from lora.pretrained import default_model  # noqa: E402
from lora.run.settings import TrainSettings  # noqa: E402

RESULT = ROOT / "bench" / "results" / "train_speed.json"
DEFAULTS = {name: flag.default for name, flag in TrainSettings.flags().items()}
GRID_STEPS = 3
# in bfloat16 the gradients of B0 and B1 have a cosine of 0.999 as a whole, and 0.991 for the tensor that differs most:
# nobody can be nearer to both, so that float32 is the judge, and bfloat16 has to look alike. With AMX norms of B0 and
# B1 were up to 1.9 % apart, and as Adam makes much of rounding, losses 0.5 % after ten steps: their mean counts
MEMORY = {"memory": "B0", "memory B1": "B1"}
BOUNDS = {"float32": {"loss": 1e-5, "norm": 1e-5, "worst tensor": 1e-5},
          "bfloat16": {"mean loss": 5e-3, "norm": 2.5e-2, "1 - cosine": 2e-3, "its worst tensor": 4e-2}}  # fmt: skip


SIDES, OURS = ("ours", "compiled", "B0", "B1"), ("ours", "compiled")


def workload(what, low, high, trained, examples, steps, warm=3, sides=SIDES, micro=(1, 2, 4, 8)):
    """Lengths, the share that is trained, examples a step, a process's timed steps and those before, and examples in a
    micro-batch that B1 chooses from."""
    return SimpleNamespace(**locals())


WORKLOADS = {
    "short": workload("chats", 50, 300, (0.3, 0.5), 8, 8),
    "long": workload("worked answers", 600, 1500, (0.8, 0.9), 4, 3, warm=2),
    "full": workload("documents", 2048, 2048, (1, 1), 1, 2, warm=2),
    "document": workload("document", 8192, 8192, (1, 1), 1, 1, warm=1, sides=("ours",)),
}


def make_steps(shape, text: list[int], count: int, seed: str) -> list[list]:
    """Ids and trained flags of the examples of `count` steps: windows of the text, trained at their end."""
    draw = random.Random(seed)

    def example():
        size, begin = draw.randint(shape.low, shape.high), draw.randrange(len(text))
        trained = round(size * draw.uniform(*shape.trained))
        tokens = [text[i % len(text)] for i in range(begin, begin + size)]
        return tokens, [False] * (size - trained) + [True] * trained

    return [[example() for _ in range(shape.examples)] for _ in range(count)]


def start_adapter(base: Path, folder: Path) -> None:
    """What all sides begin with. B is not zero, so that A has a gradient in the first step, too."""
    torch.manual_seed(0)
    model = pretrained.load_model(str(base))
    inject(model, DEFAULTS["rank"], DEFAULTS["alpha"])
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    store.save(model, folder)


class Bench(Processes):
    """With the default model, an adapter that all sides begin with, and the gradients that they answer with."""

    program = "train_sides.py"

    def __init__(self, folder: Path, threads: int, smoke: bool):
        super().__init__(folder, threads, smoke)
        self.base = folder / "base" if smoke else default_model.folder()
        if smoke:
            self.base.mkdir()
            memory.write_model(memory.run(2, 64, 128, 4, 2), self.base)
        tokenizer = pretrained.load_chat(pretrained.find(str(self.base))).tokenizer
        self.text = tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))
        start_adapter(self.base, folder / "adapter")

    def job(self, side: str, **more) -> dict:
        """What a process is told."""
        same = {name: DEFAULTS[name] for name in ("rank", "alpha", "clip", "weight_decay", "micro_tokens")}
        same |= {"base": str(self.base), "adapter": str(self.folder / "adapter"), "targets": list(GROUPS["all"])}
        same |= {"threads": self.threads, "lr": 0.002, "dtype": "bfloat16", "tuned": side == "B1"}
        same |= {"quant": None, "matmuls": False, "turns": False}
        return same | {"side": side} | more

    def start(self, side: str, **more):
        return super().start(side, gradients=str(self.folder / f"{self.count + 1}.safetensors"), **more)

    def end(self, side: str, process, answer: Path) -> dict:
        gradients = answer.with_suffix(".safetensors")
        return super().end(side, process, answer) | ({"gradients": load_file(gradients)} if gradients.exists() else {})


# ---- parity ----------------------------------------------------------------------------------------------------------


def parity(ours: dict, peer: dict) -> dict[str, float]:
    """What two runs differ by: losses of all steps, and their mean; the gradient of the first, its norm, the relative
    error of the tensor that differs most, 1 - cosine of all of it and of the worst tensor."""
    rows = list(zip(ours["rows"], peer["rows"], strict=True))
    pairs = [(ours["gradients"][name].double(), theirs.double()) for name, theirs in peer["gradients"].items()]
    whole = [torch.cat([tensor.flatten() for tensor in side]) for side in zip(*pairs, strict=True)]

    def apart(a, b) -> float:
        return 1 - ((a * b).sum() / (a.norm() * b.norm())).item()

    def worst(values) -> float:
        return torch.tensor(list(values)).max().item()  # unlike Python's max, NaN where one is

    return {
        "loss": worst(abs(a["loss"] / b["loss"] - 1) for a, b in rows),
        "mean loss": abs(sum(a["loss"] for a, _ in rows) / sum(b["loss"] for _, b in rows) - 1),
        "norm": abs(rows[0][0]["norm"] / rows[0][1]["norm"] - 1),
        "worst tensor": worst(((a - b).norm() / b.norm()).item() for a, b in pairs),
        "1 - cosine": apart(*whole),
        "its worst tensor": worst(apart(a, b) for a, b in pairs),
    }


def agree(what: str, dtype: str, runs: dict[str, dict]) -> list[dict]:
    """Print the parity of ours with both peers, and of the peers; SystemExit where ours and one are out of bounds."""
    mine = [side for side in runs if side not in ("B0", "B1")]
    pairs = [(side, peer) for side in mine for peer in ("B0", "B1")] + [("B0", "B1")]
    found = [{"what": what, "dtype": dtype, "sides": pair, **parity(*(runs[side] for side in pair))} for pair in pairs]
    for row in found:
        numbers = ", ".join(f"{name} {value:.1e}" for name, value in list(row.items())[3:])
        print(f"parity    {what} in {dtype}, {' and '.join(row['sides'])}: {numbers}", flush=True)
    for row in found[:-1]:
        for name, bound in BOUNDS[dtype].items():
            if not row[name] < bound:
                sides = " and ".join(row["sides"])
                raise SystemExit(f"void: {what} in {dtype}, {sides}: {name} {row[name]:.1e}, bound {bound:g}")
    return found


# ---- one workload ----------------------------------------------------------------------------------------------------


def measure(name: str, shape, bench: Bench, rounds: int) -> dict:
    warm, steps = shape.warm, make_steps(shape, bench.text, shape.warm + shape.steps, name)
    best, grid = {"ours": 0, "compiled": 0, "B0": shape.examples, "B1": 1}, {}
    for micro in [micro for micro in shape.micro if 1 < shape.examples >= micro and "B1" in shape.sides]:
        rows = bench.child("B1", steps=steps[:GRID_STEPS], micro=micro)["rows"][1:]
        grid[micro] = sum(row["seconds"] for row in rows)
        print(f"grid      {name}: B1 with {micro} a micro-batch, {len(rows)} steps in {grid[micro]:.1f} s", flush=True)
    best["B1"] = min(grid, key=grid.get, default=1)
    runs, found = {side: [] for side in shape.sides}, []
    jobs = {side: {"steps": steps, "micro": best[side], "matmuls": side in OURS} for side in shape.sides}
    for number in range(rounds if len(runs) > 1 else 1):
        for side, run in bench.by_turns(jobs, len(steps), number).items():
            seconds = median(row["seconds"] for row in run["rows"][warm:])
            print(f"run       {name}: {side}, {seconds:.2f} s a step", flush=True)
            runs[side].append(run)
        if number == 0 and len(runs) > 1:
            found = agree(name, "bfloat16", {side: run[0] for side, run in runs.items()})
    for run in (run for side in runs.values() for run in side):
        del run["gradients"]
    timed = {side: [run["rows"][warm:] for run in runs[side]] for side in shape.sides}
    return {"parity": found, "grid s": grid, "micro": best, "runs": runs, "warm-up steps": warm,
            "sides": {side: summary(runs[side], timed[side]) for side in shape.sides},
            "reached": reached(name, runs, timed)}  # fmt: skip


def summary(runs: list[dict], timed: list[list[dict]]) -> dict:
    """A side's row of the table."""
    rows = [row for run in timed for row in run]
    return {
        "tokens/s": median(row["tokens"] / row["seconds"] for row in rows),
        "trained/s": median(row["trained"] / row["seconds"] for row in rows),
        "step s": median(row["seconds"] for row in rows),
        "computed/real": sum(row["computed"] for row in rows) / sum(row["tokens"] for row in rows),
        "peak GB": max(run["peak"] for run in runs) / 1e9,
        "loaded GB": max(run["loaded"] for run in runs) / 1e9,
        "first step s": median(run["first step s"] for run in runs),
    }


def reached(workload: str, runs, timed) -> dict[str, dict]:
    """By the goals' names: what was reached, the quartiles of what varies, and whether the goal is met."""
    mine = "compiled" if "compiled" in runs else "ours"
    rows = {side: [row for run in timed[side] for row in run] for side in runs}
    peaks = {side: max(run["peak"] for run in runs[side]) / 1e9 for side in runs}
    found = {"matmuls": spread([row["seconds"] / row["matmul seconds"] for row in rows[mine]])}
    found["peak GB"] = {"value": peaks["ours"]}
    for side in list(runs)[1:]:
        pairs = zip(rows[mine], rows["ours" if side == mine else side], strict=True)
        found[side] = spread([b["seconds"] / a["seconds"] for a, b in pairs])
    found |= {name: {"value": peaks[mine] / peaks[side]} for name, side in MEMORY.items() if side in peaks}
    for name, row in found.items():
        row |= goals.judged("train_speed", workload, name, row["value"], machine.with_amx())
    return found


def spread(values: list[float]) -> dict:
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"value": middle, "from": low, "to": high}


MEANINGS = {
    "compiled": "tokens/s compiled over not", "B0": "tokens/s over B0", "B1": "tokens/s over B1",
    "matmuls": "step time over matmul-only time", "memory": "peak memory over B0's", "memory B1": "… over B1's",
    "peak GB": "peak memory not compiled, GB",
}  # fmt: skip


def show(name: str, shape, result: dict) -> None:
    rows = [row for row in result["runs"]["ours"][0]["rows"][result["warm-up steps"] :]]
    real, trained = (f"{sum(row[key] for row in rows):,}" for key in ("tokens", "trained"))
    print(f"\n{name}: {len(rows)} steps of {shape.examples} {shape.what}, {real} tokens, {trained} trained; "
          f"B1 with {result['micro']['B1']} a micro-batch")  # fmt: skip
    heads = list(result["sides"]["ours"])
    print("        " + "".join(f"{head:>14}" for head in heads))
    for side, row in result["sides"].items():
        print(f"{side:8}" + "".join(f"{row[head]:14.2f}" for head in heads))
    print(f"{'':36}{'goal':>10}  reached")
    for key, row in result["reached"].items():
        between = f"  ({row['from']:.2f} to {row['to']:.2f})" if "from" in row else ""
        print(f"{MEANINGS[key]:36}{row.get('goal', ''):>10}  {row['value']:.2f}{between}")
    print(flush=True)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="all without it")
    parser.add_argument("--steps", type=int, help="timed steps, instead of each workload's own")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT, help="file of results")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny random model, short rows, nothing compiled: does it run at all?"
    )
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    given = sys.argv[1:] if argv is None else argv
    head = {"machine": machine.described(), "threads": chosen.threads, "date": f"{datetime.now():%Y-%m-%d %H:%M}",
            "command": shlex.join(["python", "bench/train_speed.py", *given])}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), chosen.threads, chosen.smoke)
        small = workload("chats", 20, 80, (0.3, 0.5), 4, 2)
        steps = make_steps(small, bench.text, small.steps, "parity")
        micro = {"ours": 0, "compiled": 0, "B0": 4, "B1": 2}
        sides = tuple(side for side in SIDES if not (chosen.smoke and side == "compiled"))  # code takes half a minute
        exact = {side: bench.child(side, steps=steps, micro=micro[side], dtype="float32") for side in sides}
        in_float32 = agree("small", "float32", exact)
        for name in chosen.workload or (("short", "document") if chosen.smoke else WORKLOADS):
            shape = SimpleNamespace(**vars(WORKLOADS[name]))
            shape.steps = chosen.steps or shape.steps
            if chosen.smoke:
                shape.sides = tuple(side for side in shape.sides if side in sides)
                shape.low, shape.high, shape.micro = shape.low // 20, shape.high // 20, (2,)
                shape.examples, shape.warm, shape.steps = min(2, shape.examples), 1, 2
            result = head | {"float32": in_float32} | measure(name, shape, bench, chosen.rounds)
            show(name, shape, result)
            if not chosen.smoke or chosen.out != RESULT:
                known = files.read_json(chosen.out) if chosen.out.exists() else {}
                files.write_json(chosen.out, known | {machine.keyed(name): result})


if __name__ == "__main__":
    main()
