"""The whole command, from start to saved adapter, over a plain script of PEFT and transformers.   python bench/whole.py

64 steps of 8 short chats (50 to 300 tokens), which both read from one file: `train.py` with its defaults, so with its
answers before and after, its report and what it says of a run, and bench/whole_peer.py. A fresh process a side, one
after the other, the order turned round from round to round; their mean losses have to be alike, or it is `void`.

Prints seconds and their ratio; bench/results/whole.json gets every raw figure. A quarter of an hour a round.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine, parts, train_speed  # noqa: E402
from lora import files, pretrained  # noqa: E402
from lora.pretrained import default_model  # noqa: E402
from lora.run.plan import LR_TIMES_WIDTH  # noqa: E402

RESULT = ROOT / "bench" / "results" / "whole.json"
STEPS = 64
APART = 0.05  # relative, of the mean losses: the order of examples and the schedule are each side's own
LR = LR_TIMES_WIDTH / 576  # of the default model, as train.py chooses it
SHORT = train_speed.WORKLOADS["short"]


class Bench(parts.Processes):
    """A file of chats, and the two commands."""

    def __init__(self, folder: Path, threads: int, smoke: bool):
        super().__init__(folder, threads, smoke)
        self.base, self.steps = default_model.folder(), 3 if smoke else STEPS
        chat = pretrained.load_chat(pretrained.find(str(self.base)))
        text = chat.tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))
        self.data, self.tokens = folder / "chats.jsonl", 0
        rows, draw = [], random.Random("whole")
        while len(rows) < SHORT.examples * self.steps:
            size, begin = draw.randint(SHORT.low, SHORT.high), draw.randrange(len(text) - SHORT.high)
            answer = round(size * draw.uniform(*SHORT.trained))
            words = [text[begin : begin + size - answer], text[begin + size - answer : begin + size]]
            roles = zip(("user", "assistant"), map(chat.tokenizer.decode, words), strict=True)
            messages = [{"role": role, "content": words.strip()} for role, words in roles]
            if all(message["content"] for message in messages):
                [encoded] = chat.tokenize(messages)
                if SHORT.low <= len(encoded.tokens) <= SHORT.high:
                    rows.append({"messages": messages})
                    self.tokens += len(encoded.tokens)
        files.write_rows(self.data, rows)

    def child(self, side: str) -> dict:
        """Seconds of a process from its start to its end, and its losses."""
        self.count += 1
        out = self.folder / f"{self.count}"
        if side == "ours":
            command = ["train.py", "--data", self.data, "--max-steps", self.steps, "--out", out]
        else:
            command = ["bench/whole_peer.py", self.base, self.data, self.steps, LR, out]
        quiet = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        if side != "ours":
            quiet["OMP_NUM_THREADS"] = str(self.threads)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | quiet,
                              capture_output=True, text=True)  # fmt: skip
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{side} ended with {done.returncode}\n{done.stderr}")
        assert (out / "adapter_model.safetensors").exists()
        log = (out / "metrics.jsonl").read_text() if side == "ours" else done.stdout
        losses = [row["loss"] for row in map(json.loads, log.splitlines()) if "loss" in row]
        print(f"run       {side}: {seconds:.1f} s, loss {mean(losses):.3f}", flush=True)
        return {"seconds": seconds, "losses": losses}


def whole(bench: Bench, rounds: int) -> dict:
    runs = bench.rounds(("ours", "PEFT"), rounds, bench.child)
    ours, peer = (mean(mean(run["losses"]) for run in runs[side]) for side in ("ours", "PEFT"))
    if not (abs(ours / peer - 1) < APART or bench.smoke):
        raise SystemExit(f"void: mean losses {ours:.3f} and {peer:.3f}, bound {APART}")
    pairs = zip(runs["ours"], runs["PEFT"], strict=True)
    ratio = median(mine["seconds"] / theirs["seconds"] for mine, theirs in pairs)
    return {"runs": runs, "tokens": bench.tokens, "steps": bench.steps, "reached": {"over PEFT's": {"value": ratio}}}


def show(part: str, found: dict) -> None:
    print(f"\n{found['steps']} steps, {found['tokens']:,} tokens, from start to saved adapter")
    for side, runs in found["runs"].items():
        print(f"{side:6}" + "".join(f"{run['seconds']:8.1f} s" for run in runs))
    ratio = found["reached"]["over PEFT's"]["value"]
    print(f"ours over PEFT's: {ratio:.2f}")


def main(argv=None) -> None:
    parts.run(__doc__, "whole.py", {machine.keyed("whole"): whole}, RESULT, Bench, show, argv)


if __name__ == "__main__":
    main()
