"""How fast and how large is DPO, beside SFT on the same tokens and beside TRL on the same pairs?

    python bench/preference_speed.py            about 20 minutes on 2 cores; needs the extra `parity`

Sides, each in a process of its own, their order turned round from round to round: `dpo` and `sft` as train.py computes
them, `trl` as people run it on a CPU (a new adapter, bfloat16, its reference formed in every step), `trl tuned` with
its reference formed before. All have an adapter of rank 16 on all linears, AdamW, 8 pairs a step, no recomputation.
Times are of a whole step, after the first two; tokens are those of both sides of the pairs, padding aside.
bench/results/preference_speed.json gets every row.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine  # noqa: E402
from lora import files, heap  # noqa: E402

RESULT = ROOT / "bench" / "results" / "preference_speed.json"
SIDES = ("dpo", "sft", "trl", "trl tuned")
PAIRS, WARM = 8, 2
SETTINGS = {"method": "dpo", "loss": "sigmoid", "beta": 0.1, "margin": 0.0, "label_smoothing": None, "sft_weight": 0.0,
            "micro_tokens": 2048, "checkpoint_activations": False, "lr_ratio_b": 1, "lr": 2e-4, "weight_decay": 0.0,
            "rank": 16, "alpha": 32, "fsdp": False}  # fmt: skip


def pairs(steps: int) -> list[dict]:
    """Questions of the conversations that ship with the project, with their own answer and one to another question;
    each of three answers long, so that a side has about a hundred tokens."""
    rows = [json.loads(line)["messages"] for line in (ROOT / "lora/data/retention.jsonl").read_text().splitlines()]
    asked = [(row[0]["content"], row[1]["content"]) for row in rows if row[0]["role"] == "user"]
    made = []
    for i in range(PAIRS * steps):
        question, _ = asked[i % len(asked)]
        good, bad = (" ".join(asked[(i + n) % len(asked)][1] for n in three) for three in ((0, 1, 2), (7, 8, 9)))
        chat = [{"role": "user", "content": question}]
        made.append({"prompt": chat, "chosen": _said(good), "rejected": _said(bad)})
    return made


def _said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


class Ours:
    """`dpo`, or `sft` on the same documents with the same trained tokens."""

    def __init__(self, side: str, rows: list[dict]):
        import torch

        from lora import methods, pretrained
        from lora.adapter.inject import inject
        from lora.data import batch, encode, formats
        from lora.methods import answers, objective
        from lora.pretrained import default_model
        from lora.run.trainable import make_optimizer
        from lora.train.evaluate import evaluating
        from lora.train.step import train_step

        here = torch.device("cpu")
        heap.keep_memory(here)
        self.args, self.batch, self.train_step = SimpleNamespace(**SETTINGS), batch, train_step
        base = pretrained.find(str(default_model.folder()))
        path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
        files.write_rows(path, rows)
        self.examples = encode.encode(formats.scan([path], kind="pair"), pretrained.load_chat(base), 2048, kind="pair")
        torch.manual_seed(0)
        self.model = pretrained.load_model(base, torch.bfloat16, here)
        inject(self.model, SETTINGS["rank"], SETTINGS["alpha"])
        self.loaded = machine.resident()
        start = time.perf_counter()
        if side == "dpo":
            numbers = []
            with evaluating(self.model), torch.no_grad():
                for row in self.examples:
                    numbers.append(answers.log_probs(self.model, batch.collate([row])).tolist())
            self.examples.known["reference"] = numbers = torch.tensor(numbers).numpy()
        self.before = time.perf_counter() - start
        self.model.train()
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(trained, self.args, here)
        self.objective = objective.Objective(methods.METHODS[side], self.model, self.args)

    def rows(self, steps: int) -> list[dict]:
        found = []
        for step in range(steps):
            items = [self.examples[i] for i in range(PAIRS * step, PAIRS * (step + 1))]
            tokens = self.batch.size_of(items)
            if self.objective.method.KIND == "conversation":
                items = [example for item in items for example in item.examples]
            start = time.perf_counter()
            batches = self.objective.prepare(self.batch.micro_batches(items, self.args.micro_tokens))
            result = self.train_step(self.objective, batches, self.optimizer, self.args.lr, 1.0)
            found.append({"seconds": time.perf_counter() - start, "tokens": tokens, "loss": result.loss})
        return found


class Trl:
    def __init__(self, side: str, rows: list[dict]):
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import DPOConfig, DPOTrainer

        from lora.adapter.targets import GROUPS
        from lora.pretrained import default_model

        seconds, losses = [], []

        class Clock(TrainerCallback):
            def on_step_begin(self, *_, **__):
                self.start = time.perf_counter()

            def on_step_end(self, *_, **__):
                seconds.append(time.perf_counter() - self.start)

            def on_log(self, args, state, control, logs=None, **_):
                losses.extend([logs["loss"]] if "loss" in logs else [])

        folder = str(default_model.folder())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        how = DPOConfig(
            tempfile.mkdtemp(), per_device_train_batch_size=PAIRS, max_steps=len(rows) // PAIRS, logging_steps=1,
            use_cpu=True, gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True,
            learning_rate=SETTINGS["lr"], lr_scheduler_type="constant", max_length=None,
            precompute_ref_log_probs=side == "trl tuned",
        )  # fmt: skip
        adapter = LoraConfig(r=SETTINGS["rank"], lora_alpha=SETTINGS["alpha"], lora_dropout=0.0,
                             target_modules=list(GROUPS["all"]), task_type="CAUSAL_LM")  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder)
        start = time.perf_counter()
        self.trainer = DPOTrainer(model, args=how, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                                  peft_config=adapter, callbacks=[Clock()])  # fmt: skip
        self.before, self.loaded = time.perf_counter() - start, machine.resident()
        self.seconds, self.losses = seconds, losses

    def rows(self, steps: int) -> list[dict]:
        self.trainer.train()
        return [{"seconds": s, "loss": x} for s, x in zip(self.seconds, self.losses, strict=True)]


def child(side: str, steps: int, answer: Path) -> None:
    what = (Trl if side.startswith("trl") else Ours)(side, pairs(steps))
    rows = what.rows(steps)
    files.write_json(answer, {"side": side, "rows": rows, "before": what.before, "loaded": what.loaded,
                              "peak": machine.peak()})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a process, after the first two")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], args.steps, Path(args.child[1]))
    runs = {side: [] for side in args.sides}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for side in args.sides if number % 2 == 0 else reversed(args.sides):
                answer = Path(folder) / "answer.json"
                command = [sys.executable, __file__, "--steps", str(args.steps + WARM), "--child", side, str(answer)]
                quiet = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
                quiet |= {} if side.startswith("trl") else heap.TUNABLES
                done = subprocess.run(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                if done.returncode:
                    raise SystemExit(f"{side} ended with {done.returncode}\n{done.stderr[-3000:]}")
                run = files.read_json(answer)
                runs[side].append(run)
                seconds = median(row["seconds"] for row in run["rows"][WARM:])
                peak, ready, first = run["peak"] / 1e9, run["before"], run["rows"][0]["loss"]
                print(
                    f"{side:10} {seconds:6.2f} s a step, loss {first:.4f}, {peak:.2f} GB, ready in {ready:.0f} s",
                    flush=True,
                )
    print(f"\n{machine.described()['cpu']}, medians of all timed steps")
    step = {side: median(row["seconds"] for run in found for row in run["rows"][WARM:]) for side, found in runs.items()}
    peak = {side: max(run["peak"] for run in found) / 1e9 for side, found in runs.items()}
    for side in args.sides:
        print(f"{side:10} step {step[side]:6.2f} s   tokens/s of dpo over it {step[side] / step['dpo']:5.2f}   "
              f"peak {peak[side]:.2f} GB, dpo's over it {peak['dpo'] / peak[side]:.2f}")  # fmt: skip
    files.write_json(RESULT, {"machine": machine.described(), "command": sys.argv, "runs": runs})


if __name__ == "__main__":
    main()
