"""Every goal of speed and memory on a CPU, and how far we got.   python bench/goals.py [--run] [PART ...]

The table is made of bench/results/, of the last runs on CPUs with AMX and without; what is met is bold, what is empty
was not measured. `--run` runs the benchmarks first, all or those named, one after the other: an hour on 2 cores that
nobody else uses.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora import files  # noqa: E402

RUNS = {
    "train_speed": "train_speed.py --rounds 1",
    "whole": "whole.py --rounds 1",
    "beside": "beside.py --rounds 2",
    "decode_speed": "decode_speed.py",
    "ranks": "ranks.py",
}


class Goal(NamedTuple):
    """`name` is what the part of a benchmark calls the value; the goals are for CPUs without AMX and with it."""

    what: str
    run: str
    part: str
    name: str
    sign: str
    without: float | None
    with_amx: float | None

    def number(self, amx: bool) -> float | None:
        return self.with_amx if amx else self.without

    def is_met(self, value: float, amx: bool) -> bool | None:
        """None where there is no goal."""
        number = self.number(amx)
        return None if number is None else value >= number if self.sign == ">=" else value <= number


GOALS = [
    Goal("tokens/s, short chats, over B0", "train_speed", "short", "B0", ">=", 3.0, 4.5),
    Goal("… over B1", "train_speed", "short", "B1", ">=", 2.2, 3.0),
    Goal("tokens/s, long answers, over B0", "train_speed", "long", "B0", ">=", 2.6, 3.0),
    Goal("… over B1", "train_speed", "long", "B1", ">=", 1.6, 2.0),
    Goal("tokens/s, documents of 2,048 tokens, over B0", "train_speed", "full", "B0", ">=", 2.0, 2.5),
    Goal("… over B1", "train_speed", "full", "B1", ">=", 1.6, 2.0),
    Goal("peak memory, short chats, over B0's", "train_speed", "short", "memory", "<=", 0.33, 0.33),
    Goal("… over B1's", "train_speed", "short", "memory B1", "<=", None, 0.7),
    Goal("… one document of 8,192 tokens, GB", "train_speed", "document", "peak GB", "<=", 6, 6),
    Goal("step over its matrix products, short chats", "train_speed", "short", "matmuls", "<=", 1.5, 2.5),
    Goal("the whole command, 64 steps, over PEFT's", "whole", "whole", "over PEFT's", "<=", 0.33, 0.33),
    Goal("beside a busy process, share of the speed alone", "beside", "beside", "share", ">=", 0.4, 0.4),
    Goal("answers, merged, one, over transformers", "decode_speed", "speed", "ours, merged over transformers",
         ">=", 2.4, 2.4),
    Goal("… an adapter beside the weights", "decode_speed", "speed", "ours, adapter over transformers", ">=", 1.7, 1.7),
    Goal("… merged, eight at once over one", "decode_speed", "speed", "ours, merged, 8 rows over 1", ">=", 4, 4),
    Goal("first token of generate.py --adapter, s", "decode_speed", "start", "generate.py to its first byte, s",
         "<=", 2.2, 2.2),
    Goal("… over transformers + PEFT's", "decode_speed", "start", "generate.py over transformers + peft",
         "<=", 0.4, 0.4),
    Goal("two ranks over one process of two threads", "ranks", "speed", "speed", ">=", 0.9, 0.9),
    Goal("… share of a step in which gradients are summed", "ranks", "speed", "summing", "<=", 0.05, 0.05),
    Goal("rank of a sharded base over base/N + block + head + 35 MB", "ranks", "memory", "over the bound", "<=", 1, 1),
]  # fmt: skip


def judged(run: str, part: str, name: str, value: float, amx: bool) -> dict:
    """A value of a benchmark with its goal, and whether it is met; without, where it has none."""
    for goal in GOALS:
        if (goal.run, goal.part, goal.name) == (run, part, name) and goal.number(amx) is not None:
            return {"value": value, "goal": f"{goal.sign} {goal.number(amx):g}", "met": goal.is_met(value, amx)}
    return {"value": value}


def cell(goal: Goal, amx: bool) -> str:
    """What was reached on a kind of CPU, bold where the goal is met."""
    path = ROOT / "bench" / "results" / f"{goal.run}.json"
    found = (files.read_json(path) if path.exists() else {}).get(goal.part + " with AMX" * amx)
    if not found:
        return ""
    try:
        value = found["reached"][goal.name]["value"]
    except KeyError:  # of before this goal
        return ""
    shown = f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
    return f"**{shown}**" if goal.is_met(value, amx) else shown


def table() -> list[str]:
    """A line of Markdown for each goal, behind two of head."""
    lines = ["| | goal without AMX | reached | goal with AMX | reached |", "|---|---|---|---|---|"]
    for goal in GOALS:
        sign = goal.sign.replace(">=", "≥").replace("<=", "≤")
        wanted = ["" if number is None else f"{sign} {number:g}" for number in map(goal.number, (False, True))]
        lines.append(f"| {goal.what} | {wanted[0]} | {cell(goal, False)} | {wanted[1]} | {cell(goal, True)} |")
    return lines


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(RUNS)}; all without it")
    parser.add_argument("--run", action="store_true", help="run the benchmarks first")
    asked = parser.parse_args(argv)
    if wrong := set(asked.parts) - RUNS.keys():
        parser.error(f"no such part: {', '.join(sorted(wrong))}")
    for name in (asked.parts or RUNS) if asked.run else ():
        program, *flags = RUNS[name].split()
        print(f"== python bench/{RUNS[name]}", flush=True)
        if code := subprocess.run([sys.executable, ROOT / "bench" / program, *flags], cwd=ROOT).returncode:
            print(f"== it ended with {code}: no new figures of {name}", flush=True)
    print(*table(), sep="\n")


if __name__ == "__main__":
    main()
