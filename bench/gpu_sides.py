"""One side of bench/gpu.py in a process of its own:   python bench/gpu_sides.py JOB.json RESULT.json"""

import importlib.util
import random
import sys
import time
import zlib
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora import files  # noqa: E402
from lora.adapter.inject import inject  # noqa: E402
from lora.adapter.targets import GROUPS  # noqa: E402
from lora.data.batch import micro_batches  # noqa: E402
from lora.methods import sft  # noqa: E402
from lora.network.compiled import compile_blocks  # noqa: E402
from lora.network.config import ModelConfig  # noqa: E402
from lora.network.decoder import Model  # noqa: E402
from lora.text.chat import Example  # noqa: E402
from lora.train.step import train_step  # noqa: E402

RANK, ALPHA, LR, CLIP = 16, 32.0, 1e-4, 1.0
WARM_UP = 3  # steps


def make_steps(workload: dict, vocabulary: int, count: int) -> list[list[Example]]:
    """The examples of each step: random ids, trained at their end."""
    draw = random.Random(0)

    def example():
        size = draw.randint(*workload["lengths"])
        trained = round(size * draw.uniform(*workload["trained"]))
        return Example(draw.choices(range(vocabulary), k=size), [False] * (size - trained) + [True] * trained)

    return [[example() for _ in range(workload["examples"])] for _ in range(count)]


def trained_in(examples: list[Example]) -> int:
    """Tokens that are predicted and trained: the first of an example never is."""
    return sum(sum(e.trained[1:]) for e in examples)


@torch.no_grad()
def fill(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Values that depend on a parameter's name and shape alone."""
    for name, p in parameters.items():
        random_ = torch.Generator(p.device).manual_seed(zlib.crc32(name.encode()))
        if name.endswith("norm.weight"):
            p.fill_(1.0)
        else:
            p.copy_(torch.randn(p.shape, generator=random_, device=p.device, dtype=torch.float32).mul_(0.02))


class Ours:
    """As train.py trains."""

    def __init__(self, job):
        with torch.device("meta"):
            model = Model(ModelConfig.from_json(job.config))
        self.job, self.model = job, model.to(job.dtype).to_empty(device=job.device)
        fill(dict(self.model.named_parameters()))
        inject(self.model, RANK, ALPHA)
        if job.side == "compiled":
            compile_blocks(self.model, **job.compiler)
        self.model.train()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        fill(self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LR, weight_decay=0.0, fused=True)

    def objective(self, b) -> torch.Tensor:
        return sft.loss(self.model, b)[0]

    def step(self, examples: list[Example], budget: int) -> tuple[float, float]:
        batches = micro_batches(examples, budget, self.job.device, fill=self.job.side == "compiled")
        result = train_step(self.objective, batches, self.optimizer, LR, CLIP)
        return result.loss, result.grad_norm


class Peer:
    """PEFT on transformers' model, without a Trainer."""

    def __init__(self, job):
        import peft
        import transformers

        self.job, tuned = job, job.side != "B0"
        config = transformers.AutoConfig.for_model(**job.config)
        how = "flash_attention_2" if tuned and job.device == "cuda" and has("flash_attn") else "sdpa"
        if job.side == "B2" and job.device == "cuda" and has("liger_kernel"):
            from liger_kernel.transformers import apply_liger_kernel_to_qwen2

            apply_liger_kernel_to_qwen2()
            how += ", Liger"
        torch.set_default_dtype(job.dtype)
        with torch.device(job.device):
            base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=how.split(",")[0])
        torch.set_default_dtype(torch.float32)
        base.tie_weights()
        fill(dict(base.named_parameters()))
        adapter = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(GROUPS["all"]), task_type="CAUSAL_LM"
        )
        self.model = peft.get_peft_model(base, adapter, autocast_adapter_dtype=not tuned).train()
        trainable = {ours(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        # adapters in the base's dtype get float32 copies for the optimizer: else small updates would be rounded away
        self.copies = {name: p.detach().float() for name, p in trainable.items()} if tuned else {}
        self.inner, self.parameters = trainable, self.copies or trainable
        fill(self.parameters)
        self.refresh()
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LR, weight_decay=0.0, fused=True)
        if job.side == "B2":
            self.model = torch.compile(self.model, **job.compiler)
        self.how = how

    @torch.no_grad()
    def refresh(self) -> None:
        for name, copy in self.copies.items():
            self.inner[name].copy_(copy)

    def cut(self, examples: list[Example], budget: int) -> list[list[Example]]:
        """Micro-batches of at most so many padded tokens, or of one example."""
        if self.job.side == "B0":  # people set a number of examples
            count = max(1, budget // max(len(e.tokens) for e in examples))
            return [examples[i : i + count] for i in range(0, len(examples), count)]
        parts = []
        for example in sorted(examples, key=lambda e: len(e.tokens)):
            if not parts or len(example.tokens) * (len(parts[-1]) + 1) > budget:
                parts.append([])
            parts[-1].append(example)
        return parts

    def step(self, examples: list[Example], budget: int) -> tuple[float, float]:
        device = self.job.device
        trained, loss = torch.tensor(trained_in(examples), device=device), 0.0
        for part in self.cut(examples, budget):
            inputs = {name: tensor.to(device) for name, tensor in padded(part).items()}
            found = self.model(**inputs, num_items_in_batch=trained, use_cache=False).loss
            found.backward()
            loss = loss + found.detach()
        for name, copy in self.copies.items():
            copy.grad = self.inner[name].grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        self.optimizer.step()
        self.refresh()
        self.model.zero_grad()
        return float(loss), float(norm)


def ours(name: str) -> str:
    """PEFT's name of a parameter in our words."""
    return name.removeprefix("base_model.model.").removesuffix(".default.weight")


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    """What transformers wants: ids, mask and labels, each (B, T), padded on the right."""
    longest = max(len(e.tokens) for e in examples)

    def rows(values, pad):
        return torch.tensor([row + [pad] * (longest - len(row)) for row in values])

    labels = ([t if trained else -100 for t, trained in zip(e.tokens, e.trained, strict=True)] for e in examples)
    return {
        "input_ids": rows((e.tokens for e in examples), 0),
        "attention_mask": rows(([1] * len(e.tokens) for e in examples), 0),
        "labels": rows(labels, -100),
    }


def work(told: dict) -> dict:
    """Warm up and step until the time or the steps are over; what was seen on the way."""
    started = time.perf_counter()
    job = SimpleNamespace(**told)
    job.dtype = getattr(torch, job.dtype)
    cuda = job.device == "cuda"
    side = (Ours if job.side in ("plain", "compiled") else Peer)(job)
    gradients, rows, budget = {}, [], job.micro_tokens

    def keep(*_):
        if not gradients:
            gradients.update({name: p.grad.float().cpu() for name, p in side.parameters.items()})

    side.optimizer.register_step_pre_hook(keep)
    for examples in make_steps(job.workload, job.config["vocab_size"], job.steps):
        begin, fits = time.perf_counter(), False
        while not fits:
            with suppress(torch.OutOfMemoryError) if budget > 512 else nullcontext():
                loss, norm = side.step(examples, budget)
                fits = True
            if not fits:  # what the error held on to is free by now
                side.model.zero_grad()
                torch.cuda.empty_cache()
                torch.compiler.reset()  # what is compiled next has one length, too
                budget, begin = budget // 2, time.perf_counter()
        if cuda:
            torch.cuda.synchronize()
        rows.append({"seconds": time.perf_counter() - begin, "loss": loss, "norm": norm})
        if len(rows) == 1:
            first = time.perf_counter() - started
        if len(rows) > WARM_UP and sum(row["seconds"] for row in rows[WARM_UP:]) > job.seconds:
            break
    files.write_tensors(job.gradients, gradients)
    peak = {"peak GB": torch.cuda.max_memory_allocated() / 1e9, "reserved GB": torch.cuda.max_memory_reserved() / 1e9}
    return {"rows": rows, "first step s": first, "micro tokens": budget, "how": getattr(side, "how", ""), **peak}


if __name__ == "__main__":
    files.write_json(sys.argv[2], work(files.read_json(sys.argv[1])))
