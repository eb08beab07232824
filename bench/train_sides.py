"""One side of bench/train_speed.py in a process of its own:   python bench/train_sides.py JOB.json RESULT.json

`ours` trains with the functions that train.py calls, `compiled` as it does in long runs. `B0` is PEFT as people run it:
one micro-batch a step, padded on the right, adapters that PEFT casts to float32. `B1` is PEFT tuned: no cast, a step
sorted by length and cut into micro-batches of the best size. Both leave the choice of attention to transformers (SDPA)
and use what its Trainer uses by default, the fused AdamW and no cache of keys and values; no Trainer, no checkpointing.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine  # noqa: E402
from bench.parts import take_turn  # noqa: E402
from lora import files  # noqa: E402
from lora.text.chat import Example  # noqa: E402

PAD = 2  # any id: what it predicts is not trained, and nobody attends to it


def trained_in(examples: list[Example]) -> int:
    """Tokens that are predicted and trained: the first of an example never is."""
    return sum(sum(example.trained[1:]) for example in examples)


class Ours:
    def __init__(self, job):
        from lora import heap, pretrained
        from lora.adapter import store
        from lora.adapter.inject import inject
        from lora.data import batch
        from lora.methods import sft
        from lora.methods.objective import Objective
        from lora.run.trainable import make_optimizer
        from lora.train.step import train_step

        self.job, self.train_step, self.batch = job, train_step, batch
        job.checkpoint_activations, job.lr_ratio_b = False, 1
        here = torch.device("cpu")
        heap.keep_memory(here, sparing=job.quant is not None)
        self.model = pretrained.load_model(pretrained.find(job.base, job.quant), getattr(torch, job.dtype))
        inject(self.model, job.rank, job.alpha)
        store.restore(self.model, job.adapter)
        self.model.train()
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = {f"{store.PREFIX}{name}.weight": p for name, p in trainable.items()}
        self.objective = Objective(sft, self.model, job)
        self.optimizer = make_optimizer(trainable, job, here)
        if job.side == "compiled":
            from lora.run.compiling import compile_model

            compile_model(self.model, asked=True)

    def cut(self, examples: list[Example]) -> list:
        return self.batch.micro_batches(examples, self.job.micro_tokens)

    def computed(self, examples: list[Example]) -> int:
        return sum(len(b.tokens) for b in self.cut(examples))

    def step(self, examples: list[Example]) -> tuple[float, float]:
        job = self.job
        result = self.train_step(self.objective, self.cut(examples), self.optimizer, job.lr, job.clip)
        return result.loss, result.grad_norm


class Peer:
    """PEFT on transformers' model. `job.micro` examples make a micro-batch; with `job.tuned` they are sorted first."""

    def __init__(self, job):
        import peft
        import transformers
        from safetensors.torch import load_file

        self.job = job
        base = self.load(transformers.AutoModelForCausalLM.from_pretrained)
        config = peft.LoraConfig(
            r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, target_modules=job.targets, task_type="CAUSAL_LM"
        )
        self.model = peft.get_peft_model(base, config, autocast_adapter_dtype=not job.tuned).train()
        start = load_file(Path(job.adapter) / "adapter_model.safetensors")
        left = peft.set_peft_model_state_dict(self.model, start)
        named = {name.replace(".default", ""): p for name, p in self.model.named_parameters() if p.requires_grad}
        assert not left.unexpected_keys and named.keys() == start.keys()
        # without its cast PEFT makes adapters of the base's dtype: the optimizer then works on float32 copies, so that
        # both do the same work and no update is rounded away
        self.copies = {name: start[name].float() for name in named} if job.tuned else {}
        self.parameters, self.inner = self.copies or named, named
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=job.lr, weight_decay=job.weight_decay, fused=True
        )

    def load(self, from_pretrained):
        return from_pretrained(self.job.base, dtype=getattr(torch, self.job.dtype))

    def cut(self, examples: list[Example]) -> list[list[Example]]:
        if self.job.tuned:
            examples = sorted(examples, key=lambda example: len(example.tokens))
        return [examples[i : i + self.job.micro] for i in range(0, len(examples), self.job.micro)]

    def computed(self, examples: list[Example]) -> int:
        return sum(len(part) * max(len(example.tokens) for example in part) for part in self.cut(examples))

    def step(self, examples: list[Example]) -> tuple[float, float]:
        trained, loss = torch.tensor(trained_in(examples)), 0.0
        for part in self.cut(examples):
            output = self.model(**padded(part), num_items_in_batch=trained, use_cache=False)
            output.loss.backward()
            loss += output.loss.item()
        for name, copy in self.copies.items():
            copy.grad = self.inner[name].grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.job.clip).item()
        self.optimizer.step()
        with torch.no_grad():
            for name, copy in self.copies.items():
                self.inner[name].copy_(copy)
        self.model.zero_grad()
        return loss, norm


def padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    """What transformers wants: ids, mask and labels, each (B, T)."""
    longest = max(len(example.tokens) for example in examples)
    ids, labels = torch.full((len(examples), longest), PAD), torch.full((len(examples), longest), -100)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        size, tokens = len(example.tokens), torch.tensor(example.tokens)
        ids[row, :size], mask[row, :size] = tokens, 1
        labels[row, :size] = torch.where(torch.tensor(example.trained), tokens, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def matmul_seconds(side: Ours, examples: list[Example]) -> float:
    """Seconds of a step's frozen products alone, no more of them than a step needs: x Wᵀ and G W for every adapted
    Linear, after the last attention for the trained positions only, and the head's two in the loss's chunks. No
    gradient goes beyond the first layer's q, k and v."""
    from lora.adapter.inject import lora_layers
    from lora.ops.fast_log_probs import ROWS

    head = side.model.head_weight
    weights, spent = [layer.base.weight for layer in lora_layers(side.model).values()], 0.0
    for b in side.cut(examples):
        T, N = len(b.tokens), len(b.targets)
        widths = {size for weight in weights for size in weight.shape}
        rows = {size: torch.randn(T, size).to(head.dtype) for size in widths}
        products = [(weight, T) for weight in weights[:-4]] + [(weight, N) for weight in weights[-4:]]
        hidden, logits = (torch.randn(N, head.shape[1]).to(head.dtype), torch.randn(ROWS, len(head)).to(head.dtype))
        start = time.perf_counter()
        with torch.no_grad():
            for weight, count in products:
                torch.nn.functional.linear(rows[weight.shape[1]][:count], weight)
            for part in hidden.split(ROWS):
                part @ head.T
                logits[: len(part)] @ head
            for weight, count in reversed(products[3:]):
                rows[weight.shape[0]][:count] @ weight
        spent += time.perf_counter() - start
    return spent


def work(job, side) -> dict:
    """Steps through `job.steps`, the ids and trained flags of each step's examples; what was seen on the way."""
    loaded, gradients, rows = machine.resident(), {}, []

    def keep(*_):
        if not gradients:
            gradients.update({name: p.grad.clone() for name, p in side.parameters.items()})

    side.optimizer.register_step_pre_hook(keep)
    steps = [[Example(*example) for example in step] for step in job.steps]
    for step in steps:
        if rows and job.turns:
            take_turn()
        start = time.perf_counter()
        loss, norm = side.step(step)
        rows.append({"seconds": time.perf_counter() - start, "loss": loss, "norm": norm,
                     "tokens": sum(len(example.tokens) for example in step), "computed": side.computed(step),
                     "trained": trained_in(step)})  # fmt: skip
        if len(rows) == 1:
            first = time.time() - job.started
        if job.matmuls:
            rows[-1]["matmul seconds"] = matmul_seconds(side, step)
    result = {"side": job.side, "first step s": first, "loaded": loaded, "peak": machine.peak(), "rows": rows}
    files.write_tensors(job.gradients, gradients)
    return result


if __name__ == "__main__":
    job = SimpleNamespace(**files.read_json(sys.argv[1]))
    torch.set_num_threads(job.threads)
    files.write_json(sys.argv[2], work(job, (Ours if job.side in ("ours", "compiled") else Peer)(job)))
