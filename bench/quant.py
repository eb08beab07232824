"""What do packed bases cost in speed, and what do they save in memory?   python bench/quant.py [PART ...]

speed     training short chats on the default model in nf4, int8 and its own Q4_1 blocks, beside bfloat16: tokens/s,
          peak memory, and what the four bits cost in loss on text that no step has seen
loss      the main job, a self-introduction by train.py itself, on each of them: its loss on rows that were held out
decode    answering one prompt at a time on each, with an adapter merged into plain Linears or beside packed ones
peers     nf4 against bitsandbytes under PEFT on the same CPU and examples: as people run it (B0), tuned (B1)
laptop    a training step of 512 tokens on models of 1.5 to 8 billion random weights in nf4: what memory it takes
kernels   dequantising alone, weights/s of each format

A fresh process a side and a round, the order turned round from round to round; ratios are taken step by step, and
their median is given with the quartiles. Prints tables; bench/results/quant.json gets every raw row, and keeps what it
has of parts that were not run. `peers` needs the extra `parity`. All of it takes about 25 minutes on 2 cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import parts, train_speed  # noqa: E402
from bench.train_speed import WORKLOADS, make_steps, spread  # noqa: E402
from lora import pretrained  # noqa: E402

RESULT = ROOT / "bench" / "results" / "quant.json"
MODES = ("bf16", "nf4", "keep", "int8")
GOALS = {"nf4": (">=", 0.8), "keep": (">=", 0.8), "loss": ("<=", 0.02), "decode": (">=", 0.7), "peer": (">=", 2.0),
         "peer's memory": ("<=", 0.6)}  # fmt: skip
LAPTOP = {"Qwen2.5-1.5B": 3, "Qwen2.5-7B": 8, "Llama-3.1-8B": None}  # GB at most
PROMPT, PROMPTS, NEW = 64, 3, 64
HELD_OUT = 24  # examples


def conversations(tokenizer) -> list[int]:
    """The text that ships with the project, one turn after another."""
    lines = (ROOT / "lora/data/retention.jsonl").read_text(encoding="utf-8").splitlines()
    return tokenizer.encode("\n".join(turn["content"] for line in lines for turn in json.loads(line)["messages"]))


class Bench(train_speed.Bench):
    program = "quant_sides.py"

    def __init__(self, folder: Path, threads: int, smoke: bool):
        super().__init__(folder, threads, smoke)
        text = conversations(pretrained.load_chat(pretrained.find(str(self.base))).tokenizer)
        self.text, self.held_out = text[: len(text) * 3 // 4], text[len(text) * 3 // 4 :]
        self.gguf = next(self.base.glob("*.gguf"), None)
        self.modes = [mode for mode in MODES if mode != "keep" or self.gguf]

    def packed(self, mode: str) -> dict:
        """What a process is told of a mode."""
        told = {"quant": None if mode == "bf16" else mode}
        return told | {"base": str(self.gguf)} if mode == "keep" else told

    def command(self, *words) -> None:
        """A program of this project."""
        threads = os.environ | {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=threads, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{words[0]} ended with {done.returncode}\n{done.stderr[-3000:]}")


def judged(found: dict, name: str, goal: tuple[str, float] | None) -> dict:
    """`found` with its goal, and whether it is met."""
    if goal is None:
        return found | {"what": name}
    sign, bound = goal
    met = found["value"] >= bound if sign == ">=" else found["value"] <= bound
    return found | {"what": name, "goal": f"{sign} {bound}", "met": met}


def ratios(runs: list[dict], others: list[dict], warm: int) -> dict:
    """How many times as fast the runs are as the others, which made the same steps."""
    pairs = zip(runs, others, strict=True)
    both = [pair for run, other in pairs for pair in zip(run["rows"][warm:], other["rows"][warm:], strict=True)]
    return spread([other["seconds"] / row["seconds"] for row, other in both])


def summary(runs: list[dict], warm: int) -> dict:
    rows = [row for run in runs for row in run["rows"][warm:]]
    found = {
        "tokens/s": median(row["tokens"] / row["seconds"] for row in rows),
        "step s": median(row["seconds"] for row in rows),
        "peak GB": max(run["peak"] for run in runs) / 1e9,
        "loaded GB": max(run["loaded"] for run in runs) / 1e9,
        "first loss": runs[0]["rows"][0]["loss"],
    }
    if "held-out loss" in runs[0]:
        found["held-out loss"] = runs[0]["held-out loss"]
    return found


# ---- the parts -------------------------------------------------------------------------------------------------------


def short_chats(bench: Bench, steps: int, seed: str) -> tuple[list, int]:
    """Examples of `steps` timed steps and some before them; how many those are."""
    shape = WORKLOADS["short"]
    warm = 1 if bench.smoke else shape.warm
    if bench.smoke:
        steps, shape = 1, train_speed.workload("chats", 10, 30, shape.trained, 2, 1)
    return make_steps(shape, bench.text, warm + steps, seed), warm


def speed(bench: Bench, rounds: int) -> dict:
    steps, warm = short_chats(bench, WORKLOADS["short"].steps, "short")
    [held_out] = make_steps(train_speed.workload("chats", 50, 300, (0.3, 0.5), HELD_OUT, 1), bench.held_out, 1, "held")

    def run(mode: str) -> dict:
        told = bench.packed(mode) | {"part": "train", "steps": steps, "held_out": held_out}
        found = bench.child("ours", **told)
        del found["gradients"]
        print(f"run       {mode}: {told_of(summary([found], warm))}, drift {found['drift']:+.1%}", flush=True)
        return found

    runs = bench.rounds(bench.modes, rounds, run)
    sides = {mode: summary(its, warm) for mode, its in runs.items()}
    reached = [
        judged(ratios(runs[mode], runs["bf16"], warm), f"{mode}: tokens/s over bf16's", GOALS.get(mode))
        for mode in bench.modes[1:]
    ]
    return {"warm-up steps": warm, "sides": sides, "reached": reached, "runs": runs}


def loss(bench: Bench, rounds: int) -> dict:
    """One run a mode: it takes as long as the whole of another part."""
    data, sides, runs = bench.folder / "introduction.jsonl", {}, {}
    who = ["--name", "Nimbus", "--author", "the Cloud Lab", "--out", data]
    bench.command("data_gen/self_cognition.py", *who)
    for mode in bench.modes if not bench.smoke else []:  # its random model has no chat template
        out, told = bench.folder / f"run-{mode}", bench.packed(mode)
        words = ["--data", data, "--eval-fraction", 0.1, "--eval-every", 10**6, "--out", out]
        words += ["--model", told.get("base", bench.base), "--quant", told["quant"] or "none"]
        bench.command("train.py", *words)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        runs[mode] = rows
        evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
        speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
        sides[mode] = {"tokens/s": median(speeds), "steps": len(speeds), "loss before": evaluations[0],
                       "loss after": evaluations[-1]}  # fmt: skip
        print(f"run       {mode}: {told_of(sides[mode])}", flush=True)
    reached = []
    for mode in list(sides)[1:]:
        apart = {"value": abs(sides[mode]["loss after"] - sides["bf16"]["loss after"])}
        reached.append(judged(apart, f"{mode}: held-out loss apart from bf16's", GOALS["loss"]))
    return {"sides": sides, "reached": reached, "runs": runs}


def decode(bench: Bench, rounds: int) -> dict:
    new = 8 if bench.smoke else NEW
    prompts = [bench.text[i * PROMPT : (i + 1) * PROMPT] for i in range(PROMPTS)]

    def run(mode: str) -> dict:
        found = bench.child("ours", part="decode", prompts=prompts, new=new, **bench.packed(mode))
        for rows in found["runs"].values():
            for row in rows:
                row["tokens/s"] = (new - 1) / row.pop("rest s")
                del row["answers"]
        its = ", ".join(f"{form} {median(row['tokens/s'] for row in its):.1f}" for form, its in found["runs"].items())
        print(f"run       {mode}: tokens/s of {its}", flush=True)
        return found

    runs, reached, sides = bench.rounds(bench.modes, rounds, run), [], {}
    for form, goal in (("merged", GOALS["decode"]), ("beside", None)):
        rates = {mode: [row["tokens/s"] for one in its for row in one["runs"][form]] for mode, its in runs.items()}
        for mode in bench.modes:
            sides.setdefault(mode, {})[f"{form} tokens/s"] = median(rates[mode])
        for mode in bench.modes[1:]:
            over = spread([a / b for a, b in zip(rates[mode], rates["bf16"], strict=True)])
            reached.append(judged(over, f"{mode}, {form}: tokens/s over bf16's", goal))
    for mode in bench.modes:
        sides[mode]["peak GB"] = max(run["peak"] for run in runs[mode]) / 1e9
    return {"new": new, "sides": sides, "reached": reached, "runs": runs}


def peers(bench: Bench, rounds: int) -> dict:
    steps, warm = short_chats(bench, 4, "peers")
    best = {"ours": 0, "B0": len(steps[0]), "B1": 1}

    def child(side: str, **more) -> dict:
        told = {"part": "train", "quant": "nf4" if side == "ours" else None, "held_out": []}
        return bench.child(side, **told, **{"steps": steps, "micro": best[side]} | more)

    grid = {}
    for micro in (2,) if bench.smoke else (2, 4, 8):
        grid[micro] = sum(row["seconds"] for row in child("B1", steps=steps[:2], micro=micro)["rows"][1:])
        print(f"grid      B1 with {micro} a micro-batch, a step in {grid[micro]:.1f} s", flush=True)
    best["B1"] = min(grid, key=grid.get)

    def run(side: str) -> dict:
        found = child(side)
        print(f"run       {side}: {told_of(summary([found], warm))}, drift {found['drift']:+.1%}", flush=True)
        return found

    runs = bench.rounds(list(best), rounds, run)
    parity = train_speed.agree("nf4", "bfloat16", {side: its[0] for side, its in runs.items()})
    for its in (one for found in runs.values() for one in found):
        del its["gradients"]
    reached = []
    for side, name in (("B0", "bitsandbytes"), ("B1", "bitsandbytes tuned")):
        goals = (GOALS["peer"], GOALS["peer's memory"]) if side == "B0" else (None, None)
        reached.append(judged(ratios(runs["ours"], runs[side], warm), f"tokens/s over {name}'s", goals[0]))
        peaks = [max(run["peak"] for run in runs[one]) for one in ("ours", side)]
        reached.append(judged({"value": peaks[0] / peaks[1]}, f"peak over {name}'s", goals[1]))
    sides = {side: summary(its, warm) for side, its in runs.items()}
    return {"micro": best, "grid s": grid, "warm-up steps": warm, "parity": parity, "sides": sides,
            "reached": reached, "runs": runs}  # fmt: skip


def laptop(bench: Bench, rounds: int) -> dict:
    sides, reached, runs = {}, [], {}
    for name, most in {"tiny": None}.items() if bench.smoke else LAPTOP.items():
        runs[name] = found = bench.child("ours", part="laptop", shape=name, tokens=512)
        row = found["rows"][-1]
        sides[name] = {
            "G weights": found["M parameters"] / 1e3, "packed GB": found["packed"] / 1e9,
            "16 bit GB": found["16 bit"] / 1e9, "load s": found["load s"], "load GB": found["peak of loading"] / 1e9,
            "step s": row["seconds"], "dequantising": row["dequantising s"] / row["seconds"],
            "peak GB": found["peak"] / 1e9,
        }  # fmt: skip
        print(f"run       {name}: {told_of(sides[name])}", flush=True)
        if most:
            reached.append(judged({"value": sides[name]["peak GB"]}, f"{name}: peak, GB", ("<=", most)))
    return {"sides": sides, "reached": reached, "runs": runs}


def kernels(bench: Bench, rounds: int) -> dict:
    size, times = (64, 512) if bench.smoke else (8192, 2048), 3 if bench.smoke else 30
    run = bench.child("ours", part="kernels", shape=size, rounds=times)
    sides = {name: {"G weights/s": run["weights"] / median(its) / 1e9} for name, its in run["seconds"].items()}
    return {"sides": sides, "reached": [], "runs": run}


PARTS = {"speed": speed, "loss": loss, "decode": decode, "peers": peers, "laptop": laptop, "kernels": kernels}


# ---- what is shown ---------------------------------------------------------------------------------------------------


def told_of(row: dict) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in row.items())


def show(part: str, found: dict) -> None:
    heads = list(next(iter(found["sides"].values()), []))
    print(f"\n{part:14}" + "".join(f"{head:>17}" for head in heads))
    for side, row in found["sides"].items():
        print(f"{side:14}" + "".join(f"{row[head]:17.3f}" for head in heads))
    for row in found["reached"]:
        between = f" ({row['from']:.2f} to {row['to']:.2f})" if "from" in row else ""
        goal = f"{row['goal']:>8} {'met' if row['met'] else 'missed'}" if "goal" in row else ""
        print(f"{row['what']:42}{row['value']:8.3f}{between:17}{goal}")
    print(flush=True)


def main(argv=None) -> None:
    parts.run(__doc__, "quant.py", PARTS, RESULT, Bench, show, argv)


if __name__ == "__main__":
    main()
