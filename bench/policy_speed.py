"""How fast does GRPO sample, beside the rest of its step and beside TRL, and what memory does it need beside SFT?

    python bench/policy_speed.py            about 15 minutes on 2 cores; needs the extra `parity`
    python bench/policy_speed.py --quick    does it run? A few short answers; no result is written

Sides, each in a process of its own, their order turned round from round to round: `grpo` as train.py computes it, `sft`
on as many documents with as many trained tokens, and TRL's `GRPOTrainer` as people run it on a CPU (bfloat16, PEFT, its
own generation; its default recomputation of activations switched off). A step has 4 prompts and 8 answers to each, of
64 tokens: no token counts as an end, so that all sides sample, and train, equally many. `grpo` and `trl` begin with
the same adapter, of rank 16 on all linears, whose B is not zero: to merge it is real work, and their first entropies
have to agree. Sampling is what it takes to get the answers: with us merging and laying out batches among it, with TRL
`_generate_single_turn` alone. bench/results/policy_speed.json gets every row.
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

RESULT = ROOT / "bench" / "results" / "policy_speed.json"
SIDES = ("grpo", "sft", "trl")
SETTINGS = {
    "method": "grpo", "loss": "dapo", "scale": "group", "group": 8, "temperature": 1.0, "max_new_tokens": 64,
    "kl": 0.0, "epsilon": 0.2, "epsilon_high": 0.2, "updates": 1, "seed": 0, "micro_tokens": 2048, "rank": 16,
    "alpha": 32, "checkpoint_activations": False, "lr": 1e-5, "lr_ratio_b": 1, "weight_decay": 0.0, "fsdp": False,
}  # fmt: skip
GOALS = {"sampling / step": 0.6, "tokens/s / TRL's": 3.0, "peak / sft's": 1.3}


def questions(count: int) -> list[str]:
    """Of the conversations that ship with the project."""
    lines = (ROOT / "lora/data/retention.jsonl").read_text(encoding="utf-8").splitlines()
    first = [json.loads(line)["messages"][0] for line in lines]
    asked = [turn["content"] for turn in first if turn["role"] == "user"]
    return [asked[i % len(asked)] for i in range(count)]


def vowels(text: str) -> float:
    """A reward that costs nothing, and differs from answer to answer."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


class Ours:
    """`grpo`, or `sft` on documents of the same prompts and lengths, which need not be sampled."""

    def __init__(self, job):
        import torch

        from lora import methods, pretrained
        from lora.adapter import store
        from lora.data import encode, formats
        from lora.errors import StopFlag
        from lora.methods import objective
        from lora.run.rollouts import Rollouts
        from lora.run.trainable import make_optimizer
        from lora.train.distributed import DistContext

        here = torch.device("cpu")
        heap.keep_memory(here)
        self.job, self.args = job, SimpleNamespace(**job.settings)
        base = pretrained.find(job.base)
        chat, path = pretrained.load_chat(base), Path(tempfile.mkdtemp()) / "prompts.jsonl"
        files.write_rows(path, [{"prompt": text} for text in questions(job.prompts * job.steps)])
        self.examples = encode.encode(formats.scan([path], kind="prompt"), chat, 1024, kind="prompt")
        self.text = chat.tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))
        self.model = pretrained.load_model(base, torch.bfloat16, here)
        store.load(self.model, job.adapter)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(trained, self.args, here)
        self.objective = objective.Objective(methods.METHODS[job.side], self.model, self.args)
        self.processes = DistContext(0, 1, here)
        rewards = SimpleNamespace(
            load=lambda model: None,
            score=lambda asked: {"vowels": [vowels(one.text) for one in asked]},
            total=lambda parts: parts["vowels"],
        )
        plan = SimpleNamespace(
            rewards=rewards, examples=self.examples, method=methods.METHODS[job.side],
            chat=SimpleNamespace(stops={-1}, tokenizer=chat.tokenizer),
        )  # fmt: skip
        self.rollouts = Rollouts(self.model, plan, self.args, self.processes, {}, StopFlag())
        self.model.train()

    def rows(self) -> list[dict]:
        from lora.train.step import train_step

        found = []
        for step in range(self.job.steps):
            indices = range(self.job.prompts * step, self.job.prompts * (step + 1))
            start = time.perf_counter()
            batches = self._batches(indices, step)
            sampling = time.perf_counter() - start
            batches = self.objective.prepare(batches)
            result = train_step(
                self.objective, batches, self.optimizer, self.args.lr, 1.0, self.objective.count_in(batches)
            )
            row = {"seconds": time.perf_counter() - start, "tokens": result.trained_tokens, "loss": result.loss}
            if self.job.side == "grpo":
                figures = self.rollouts.figures()
                row |= {"sampling": sampling, "entropy": figures["entropy"], "reward": figures["reward"]}
            found.append(row)
        return found

    def _batches(self, indices: range, step: int) -> list:
        from lora.data.batch import micro_batches
        from lora.text.chat import Example

        if self.job.side == "grpo":
            return self.rollouts.micro_batches(indices, step + 1)
        prompts = [self.examples[i].tokens for i in indices for _ in range(self.args.group)]
        answer = self.text[: self.args.max_new_tokens]
        documents = [Example([*ids, *answer], [False] * len(ids) + [True] * len(answer)) for ids in prompts]
        return micro_batches(documents, self.args.micro_tokens)


class Trl:
    def __init__(self, job):
        import torch
        from datasets import Dataset
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        rows, args = [], SimpleNamespace(**job.settings)

        class Timed(GRPOTrainer):
            def _generate_single_turn(self, *given, **named):
                start = time.perf_counter()
                found = super()._generate_single_turn(*given, **named)
                rows.append({"sampling": time.perf_counter() - start, "tokens": sum(map(len, found[0]))})
                return found

        class Clock(TrainerCallback):
            def on_step_begin(self, *_, **__):
                self.start = time.perf_counter()

            def on_step_end(self, *_, **__):
                rows[-1]["seconds"] = time.perf_counter() - self.start

            def on_log(self, args, state, control, logs=None, **_):
                if "loss" in logs:
                    rows[-1] |= {name: logs[name] for name in ("loss", "entropy", "reward")}

        base = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.bfloat16)
        model = PeftModel.from_pretrained(base, job.adapter, is_trainable=True)
        how = GRPOConfig(
            tempfile.mkdtemp(), per_device_train_batch_size=job.prompts * args.group, num_generations=args.group,
            max_completion_length=args.max_new_tokens, temperature=args.temperature, beta=args.kl,
            loss_type=args.loss, scale_rewards=args.scale, max_steps=job.steps, logging_steps=1, use_cpu=True,
            gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
            learning_rate=args.lr, lr_scheduler_type="constant",
        )  # fmt: skip
        chats = [[{"role": "user", "content": text}] for text in questions(job.prompts * job.steps)]
        self.trainer = Timed(
            model, lambda completions, **_: [vowels(turns[0]["content"]) for turns in completions], how,
            Dataset.from_list([{"prompt": chat} for chat in chats]),
            processing_class=AutoTokenizer.from_pretrained(job.base), callbacks=[Clock()],
        )  # fmt: skip
        self.trainer.eos_token_ids = [-1]  # nothing ends an answer
        self.trainer.generation_config.eos_token_id = self.trainer.generation_kwargs["eos_token_id"] = None
        self.found = rows

    def rows(self) -> list[dict]:
        self.trainer.train()
        return self.found


def child(told: str, answer: str) -> None:
    job = SimpleNamespace(**files.read_json(Path(told)))
    what = (Trl if job.side == "trl" else Ours)(job)
    loaded, rows = machine.resident(), what.rows()
    expected = job.prompts * job.settings["group"] * job.settings["max_new_tokens"]
    assert [row["tokens"] for row in rows] == [expected] * job.steps
    files.write_json(Path(answer), {"rows": rows, "loaded": loaded, "peak": machine.peak()})


def summary(runs: dict[str, list[dict]], warm: int) -> dict[str, dict]:
    """Medians over the timed steps of all rounds, and the highest peak, of each side."""
    found = {}
    for side, its in runs.items():
        rows = [row for run in its for row in run["rows"][warm:]]
        found[side] = {
            "step s": median(row["seconds"] for row in rows),
            "peak GB": max(run["peak"] for run in its) / 1e9,
        }
        if side != "sft":
            found[side] |= {
                "sampling s": median(row["sampling"] for row in rows),
                "sampling / step": median(row["sampling"] / row["seconds"] for row in rows),
                "tokens/s": median(row["tokens"] / row["sampling"] for row in rows),
            }
    return found


def ratios(found: dict[str, dict]) -> dict[str, float]:
    """What GOALS are about, as far as the sides were measured."""
    ours, made = found["grpo"], {"sampling / step": found["grpo"]["sampling / step"]}
    if "trl" in found:
        made["tokens/s / TRL's"] = ours["tokens/s"] / found["trl"]["tokens/s"]
        made["step, TRL's / ours"] = found["trl"]["step s"] / ours["step s"]
        made["peak / TRL's"] = ours["peak GB"] / found["trl"]["peak GB"]
    if "sft" in found:
        made["peak / sft's"] = ours["peak GB"] / found["sft"]["peak GB"]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a process, after the first")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--quick", action="store_true", help="one round of one step with 2 x 2 answers of 8 tokens")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    from bench.train_speed import start_adapter
    from lora.pretrained import default_model

    warm, runs, settings, prompts = 1, {side: [] for side in args.sides}, SETTINGS, 4
    if args.quick:
        args.rounds, args.steps, prompts = 1, 1, 2
        settings = SETTINGS | {"group": 2, "max_new_tokens": 8}
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, told, answer = default_model.folder(), *(Path(folder) / n for n in ("adapter", "job", "answer"))
        start_adapter(base, adapter)
        for number in range(args.rounds):
            for side in args.sides if number % 2 == 0 else reversed(args.sides):
                job = {"side": side, "base": str(base), "adapter": str(adapter), "settings": settings,
                       "prompts": prompts, "steps": args.steps + warm}  # fmt: skip
                files.write_json(told, job)
                quiet = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
                quiet |= {} if side == "trl" else heap.TUNABLES
                command = [sys.executable, __file__, "--child", str(told), str(answer)]
                done = subprocess.run(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                if done.returncode:
                    raise SystemExit(f"{side} ended with {done.returncode}\n{done.stderr[-3000:]}")
                runs[side].append(files.read_json(answer))
                print(f"{side:5} {told_of(summary({side: runs[side][-1:]}, warm)[side], runs[side][-1])}", flush=True)
    print(f"\n{machine.described()['cpu']}, medians of all timed steps")
    found = summary(runs, warm)
    for side, its in found.items():
        print(f"{side:5} {told_of(its, runs[side][0])}")
    made = ratios(found) if "grpo" in found else {}
    for name, ratio in made.items():
        print(f"{name:20} {ratio:5.2f}{f'   goal {GOALS[name]:g}' if name in GOALS else ''}")
    if not args.quick:
        told = {"command": sys.argv, "settings": settings, "prompts": prompts, "warm": warm}
        found = {"machine": machine.described(), **told, "medians": found, "ratios": made, "runs": runs}
        files.write_json(RESULT, found)


def told_of(its: dict[str, float], run: dict) -> str:
    first = run["rows"][0]
    entropy = f", first entropy {first['entropy']:.3f}" if "entropy" in first else ""
    return ", ".join(f"{name} {value:.2f}" for name, value in its.items()) + entropy


if __name__ == "__main__":
    main()
