"""How fast are answers against transformers and PEFT, and against the memory's speed?   python bench/decode_speed.py

Answers of 128 tokens to prompts of 64, greedy, without a stop, one and eight at a time, in bfloat16: a merged model
(the same files for both sides) and an adapter of rank 16 on all linears that is not merged. A fresh process a side and
a round; they answer by turns, so that ratios are of one moment, and the median of these is given. First both sides must
give the same tokens up to near-ties, or there is no speed to speak of: exit 1 and `void`.

Then the time from the start of a process to the first byte of its answer on stdout: `generate.py --adapter` against a
minimal script of transformers and PEFT that does the same.

Prints tables; bench/results/decode_speed.json gets every raw row, those of both kinds of CPU. Six minutes on 2 cores.
"""

import argparse
import importlib.util
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import goals, machine, memory  # noqa: E402
from bench.parts import Processes, quiet  # noqa: E402
from lora import files, pretrained  # noqa: E402
from lora.adapter import passport, store  # noqa: E402
from lora.adapter.inject import inject, lora_layers  # noqa: E402
from lora.pretrained import default_model  # noqa: E402

RESULT = ROOT / "bench" / "results" / "decode_speed.json"
SPEED, START = machine.keyed("speed"), machine.keyed("start")
PROMPT, NEW, ROWS = 64, 128, 8
BATCHES = [1, ROWS] * 4
ALONE = [1] * len(BATCHES)  # of sides that answer one at a time
TIE = 0.5  # logits are about 20, where bfloat16 has steps of 0.125
OURS, OURS_ADAPTER, THEIRS, STATIC, PEFT, LLAMA = (
    "ours, merged", "ours, adapter", "transformers", "its static cache", "PEFT, adapter", "llama.cpp, Q4_1",
)  # fmt: skip
QUESTION = "What is the capital of France?"
PEER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

class Show:
    def __init__(self): self.prompt = True
    def put(self, ids):
        if not self.prompt: print(tokenizer.decode(ids), end="", flush=True)
        self.prompt = False
    def end(self): print()

base, adapter, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
messages = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
model.generate(**inputs, max_new_tokens=64, do_sample=False, streamer=Show())
"""


class Bench(Processes):
    """A folder with what the processes need: base, adapter, and both merged into a plain model."""

    program = "decode_sides.py"
    peers = OURS, OURS_ADAPTER, THEIRS, STATIC, PEFT, LLAMA

    def __init__(self, folder: Path, chosen):
        super().__init__(folder, chosen.threads, chosen.smoke)
        self.chosen = chosen
        self.base = folder / "base" if chosen.smoke else default_model.folder()
        if chosen.smoke:
            self.base.mkdir()
            memory.write_model(memory.run(2, 64, 96, 4, 2), self.base)
        torch.manual_seed(0)
        checkpoint = pretrained.find(str(self.base))
        model = pretrained.load_model(checkpoint, torch.bfloat16)
        inject(model, 16, 32)
        for layer in lora_layers(model).values():  # large enough to change answers, small enough for text
            torch.nn.init.normal_(layer.lora_B, std=0.003)
        self.adapter, self.merged = folder / "adapter", folder / "merged"
        mark = passport.make(checkpoint, lora_layers(model))
        store.save(model, self.adapter, str(self.base), mark, task="CAUSAL_LM")
        layers = lora_layers(model)

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            layer = layers.get(name.removesuffix(".weight"))
            return tensor if layer is None else tensor + layer.delta().detach()

        self.merged.mkdir()
        pretrained.write_model(checkpoint, self.merged, change)
        text = pretrained.load_chat(checkpoint).tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))
        self.prompts = [text[i * PROMPT : (i + 1) * PROMPT] for i in range(ROWS)]

    def sides(self) -> dict[str, dict]:
        """What each side's process is told."""
        merged, base, adapter = str(self.merged), str(self.base), str(self.adapter)
        ours, theirs = {"program": "ours"}, {"program": "transformers", "options": {}}
        found = {
            OURS: ours | {"base": merged, "products": True},
            OURS_ADAPTER: ours | {"base": base, "adapter": adapter},
            THEIRS: theirs | {"base": merged},
            STATIC: theirs | {"base": merged, "options": {"cache_implementation": "static"}, "batches": ALONE},
            PEFT: theirs | {"base": base, "adapter": adapter},
        }
        gguf = next(self.base.glob("*.gguf"), None)
        if gguf and importlib.util.find_spec("xllamacpp"):
            found[LLAMA] = {"program": "llama.cpp", "base": str(gguf), "batches": ALONE}
        return found

    def job(self, side: str, **more) -> dict:
        same = {"adapter": "", "products": False, "batches": BATCHES, "new": self.chosen.new, "prompts": self.prompts}
        return super().job(side) | same | more

    def probe(self) -> float:
        return machine.read_rate(0.02 if self.chosen.smoke else 0.3)

    def first_byte(self, command: list) -> float:
        """Seconds from the start of a process to its first byte on stdout; it runs to its end."""
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], env=quiet(self.threads), cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        assert process.wait() == 0
        return seconds


# ---- the same tokens? ------------------------------------------------------------------------------------------------


def agreement(bench: Bench, ours: dict, theirs: dict, adapter: bool) -> dict:
    """How many tokens of how many are the same until two answers part, and how near in float32 the two tokens are with
    which they part, at most."""
    model = pretrained.load_model(str(bench.base if adapter else bench.merged))
    if adapter:
        store.load(model, bench.adapter)
    same, gaps = 0, [0.0]
    mine, other = (next(run["answers"] for run in side["runs"] if run["rows"] == ROWS) for side in (ours, theirs))
    for prompt, a, b in zip(bench.prompts, mine, other, strict=True):
        n = next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a))
        same += n
        if n < len(a):
            with torch.inference_mode():
                logits = model.head(model.trunk(torch.tensor(prompt + a[:n]))[-1:])[0]
            gaps.append((logits[a[n]] - logits[b[n]]).abs().item())
    return {"same": same, "of": sum(map(len, mine)), "parted": len(gaps) - 1, "largest gap": max(gaps)}


# ---- speed -----------------------------------------------------------------------------------------------------------


def measure(bench: Bench) -> dict:
    sides, runs, found = bench.sides(), {}, {}
    for number in range(bench.chosen.rounds):
        rate_before = bench.probe()
        results = bench.by_turns(sides, 1 + len(BATCHES), number)
        for side, result in results.items():
            runs.setdefault(side, []).append(result | {"read rate": [rate_before, bench.probe()]})
            shown = ", ".join(f"{rate(run, bench.chosen.new):.0f} tok/s ({run['rows']})" for run in result["runs"])
            print(f"run       {side}: {shown}", flush=True)
        if number == 0:
            for name, ours, theirs in (("merged", OURS, THEIRS), ("adapter", OURS_ADAPTER, PEFT)):
                found[name] = agreement(bench, runs[ours][0], runs[theirs][0], name == "adapter")
                print(f"parity    {name}: {found[name]}", flush=True)
                if not found[name]["largest gap"] <= TIE:
                    raise SystemExit(f"void: {name}: tokens differ that are {found[name]['largest gap']:.2f} apart")
    for run in (run for results in runs.values() for result in results for run in result["runs"]):
        run.pop("answers", None)
    size = sum(file.stat().st_size for file in bench.merged.glob("*.safetensors"))
    return {"parity": found, "runs": runs, "bytes a token": size, "new": bench.chosen.new,
            "reached": reached(runs, bench.chosen.new)}  # fmt: skip


def rate(run: dict, new: int) -> float:
    """Tokens a second of all rows after the first token."""
    return run["rows"] * (new - 1) / run["rest s"]


def rates(results: list[dict], rows: int, new: int) -> list[float]:
    return [rate(run, new) for result in results for run in result["runs"] if run["rows"] == rows]


def pairs_of(results: list[dict], rows: int, others: list[dict], other_rows: int, new: int) -> list[tuple]:
    """Rates of two sides in the same turn; or, of other rows, each with the turn before."""
    pairs = []
    for mine, theirs in zip(results, others, strict=True):
        shift = int(rows != other_rows)
        for a, b in zip(mine["runs"][shift:], theirs["runs"], strict=False):
            if (a["rows"], b["rows"]) == (rows, other_rows):
                pairs.append((rate(a, new), rate(b, new)))
    return pairs


def reached(runs: dict[str, list], new: int) -> dict[str, dict]:
    found = {}
    for side, other, rows, other_rows in (
        (OURS, THEIRS, 1, 1), (OURS_ADAPTER, THEIRS, 1, 1), (OURS, OURS, ROWS, 1), (OURS, STATIC, 1, 1),
        (OURS_ADAPTER, PEFT, 1, 1), (OURS, THEIRS, ROWS, ROWS), (OURS_ADAPTER, PEFT, ROWS, ROWS),
    ):  # fmt: skip
        pairs = pairs_of(runs[side], rows, runs[other], other_rows, new)
        name = f"{side}, {rows} rows over {other_rows}" if side == other else f"{side} over {other}"
        name += f", {rows} rows" * (side != other and rows > 1)
        value = median(a / b for a, b in pairs)
        found[name] = goals.judged("decode_speed", "speed", name, value, machine.with_amx())
    return found


def show(result: dict) -> None:
    new, size = result["new"], result["bytes a token"]
    print(f"\nprompts of {PROMPT} tokens, {new} new ones; medians")
    print(f"{'':18}{'first ms':>10}{'prefill/s':>11}{'decode/s':>10}{'of bound':>10}"
          f"{f'first ms, {ROWS}':>13}{f'prefill/s, {ROWS}':>14}{f'decode/s, {ROWS}':>13}")  # fmt: skip
    for side, results in result["runs"].items():
        bound = median(rate for run in results for rate in run["read rate"]) / size
        cells = ""
        for rows in (1, ROWS):
            first = [run["first s"] for one in results for run in one["runs"] if run["rows"] == rows]
            if first:
                speed = median(rates(results, rows, new))
                cells += f"{median(first) * 1e3:{10 if rows == 1 else 13}.0f}"
                cells += f"{rows * PROMPT / median(first):{11 if rows == 1 else 14}.0f}"
                cells += f"{speed:{10 if rows == 1 else 13}.1f}"
                cells += f"{speed / bound:10.0%}" if rows == 1 and side != LLAMA else " " * 10 if rows == 1 else ""
        print(f"{side:18}{cells}")
    for rows in ("1", str(ROWS)):
        alone = median(run["products s"][rows] for run in result["runs"][OURS])
        print(f"matrix products alone, {rows} rows: {int(rows) / alone:.0f} tokens/s")
    print_goals(result["reached"])


def print_goals(rows: dict[str, dict]) -> None:
    for name, row in rows.items():
        goal = f"goal {row['goal']}, {'met' if row['met'] else 'missed'}" if "goal" in row else ""
        print(f"{name:52}{row['value']:8.2f}  {goal}")
    print(flush=True)


def start_up(bench: Bench) -> dict:
    commands = {
        "generate.py": ["generate.py", "--model", bench.base, "--adapter", bench.adapter, "--prompt", QUESTION,
                        "--max-new-tokens", 64],
        "transformers + peft": ["-c", PEER, bench.base, bench.adapter, QUESTION],
    }  # fmt: skip
    seconds = {side: [] for side in commands}
    for side in commands:  # once before, so that all files are in memory
        bench.first_byte(commands[side])
    for number in range(bench.chosen.starts):
        for side in commands if number % 2 == 0 else reversed(commands):
            seconds[side].append(bench.first_byte(commands[side]))
    ours, theirs = seconds.values()
    values = {
        "generate.py to its first byte, s": median(ours), "transformers + peft, s": median(theirs),
        "generate.py over transformers + peft": median(a / b for a, b in zip(ours, theirs, strict=True)),
    }  # fmt: skip
    amx = machine.with_amx()
    found = {name: goals.judged("decode_speed", "start", name, value, amx) for name, value in values.items()}
    return {"seconds": seconds, "reached": found}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("speed", "start"), help="both without it")
    parser.add_argument("--rounds", type=int, default=1, help="processes a side")
    parser.add_argument("--starts", type=int, default=4, help="starts of each program")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT, help="file of results")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, short answers: does it run at all?")
    chosen = parser.parse_args(argv)
    chosen.new = 8 if chosen.smoke else NEW
    torch.set_num_threads(chosen.threads)
    command = shlex.join(["python", "bench/decode_speed.py", *(sys.argv[1:] if argv is None else argv)])
    head = {"machine": machine.described(), "threads": chosen.threads, "date": f"{datetime.now():%Y-%m-%d %H:%M}"}
    with tempfile.TemporaryDirectory() as folder:
        bench, found = Bench(Path(folder), chosen), {}
        if chosen.part != "start":
            found[SPEED] = head | {"command": command} | measure(bench)
            show(found[SPEED])
        if chosen.part != "speed" and not chosen.smoke:  # its random model has no chat template
            found[START] = head | {"command": command} | start_up(bench)
            print_goals(found[START]["reached"])
    if not chosen.smoke:
        files.write_json(chosen.out, (files.read_json(chosen.out) if chosen.out.exists() else {}) | found)


if __name__ == "__main__":
    main()
