"""One side of bench/hybrid.py in a process of its own:   python bench/hybrid_sides.py JOB.json RESULT.json

`ours` and `llama` are this library on both shapes, by the functions that train.py calls; `peft` is PEFT tuned, as in
bench/train_sides.py, on transformers' model of the first shape with the same weights.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import decode_sides, machine, random_model, train_sides  # noqa: E402
from lora import device, files, heap, pretrained  # noqa: E402
from lora.adapter.inject import inject, lora_layers  # noqa: E402
from lora.inference import generate, unpacked  # noqa: E402
from lora.methods import sft  # noqa: E402
from lora.methods.objective import Objective  # noqa: E402
from lora.run.trainable import make_optimizer  # noqa: E402
from lora.text.chat import Example  # noqa: E402

HERE = torch.device("cpu")
SETTINGS = {"rank": 16, "alpha": 32, "clip": 1.0, "lr": 1e-3, "weight_decay": 0.0, "micro_tokens": 2048,
            "lr_ratio_b": 1, "checkpoint_activations": False, "tuned": True}  # fmt: skip
WORDS = 248_320
# Qwen3.5-0.8B by its public config.json; what it does not say is what Qwen3_5TextConfig of transformers says
QWEN = random_model.shape(
    "qwen3_5_text", 24, 1024, 3584, 8, 2, WORDS, head_dim=256, tie_word_embeddings=True,
    full_attention_interval=4, linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128,
    linear_value_head_dim=128, linear_conv_kernel_dim=4,
    rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
)  # fmt: skip
LLAMA = random_model.shape("llama", 24, 1024, 5904, 16, 4, WORDS, tie_word_embeddings=True, rope_theta=1e7)
SMALL = {"num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 512}
SMALL_QWEN = SMALL | {"intermediate_size": 96, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
                      "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
                      "linear_value_head_dim": 16}  # fmt: skip


def config(side: str, smoke: bool) -> dict:
    if side == "llama":
        return LLAMA | (SMALL | {"intermediate_size": 192, "num_attention_heads": 4} if smoke else {})
    return QWEN | (SMALL_QWEN if smoke else {})


class Files(random_model.RandomFiles):
    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decays as they are at the start of training (Qwen3_5 of transformers), or states would hardly fade."""
        if name.endswith("A_log"):
            return torch.linspace(0.01, 16, self.header[name][1][0])[start:stop].log().to(dtype or torch.bfloat16)
        found = super().read_rows(name, start, stop, dtype)
        return found + 1 if name.endswith("dt_bias") else found


def loaded(job) -> torch.nn.Module:
    return pretrained.load_model(Files(config(job.side, job.smoke)), torch.bfloat16)


def targets(model: torch.nn.Module) -> list[str]:
    """The last names of what `inject` patched."""
    return sorted({path.rsplit(".", 1)[-1] for path in lora_layers(model)})


class Ours(train_sides.Ours):
    def __init__(self, job):
        from lora.data import batch
        from lora.train.step import train_step

        self.job, self.train_step, self.batch = job, train_step, batch
        heap.keep_memory(HERE)
        self.model = loaded(job)
        self.weights = sum(p.numel() for p in self.model.parameters())
        inject(self.model, job.rank, job.alpha)
        self.model.train()
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters, self.objective = trainable, Objective(sft, self.model, job)
        self.optimizer = make_optimizer(trainable, job, HERE)


def peers_model(job):
    """transformers' model with the weights of ours, and what to patch in it."""
    import transformers

    model = loaded(job)
    transformers.logging.set_verbosity_error()
    peer = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config(job.side, job.smoke)), dtype=torch.bfloat16
    )
    missing, extra = peer.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not extra and missing == ["lm_head.weight"]
    peer.tie_weights()
    inject(model, job.rank, job.alpha)
    return peer, targets(model)


class Peer(train_sides.Peer):
    def __init__(self, job):
        import peft

        self.job = job
        base, names = peers_model(job)
        self.weights = sum(p.numel() for p in base.parameters())
        adapter = peft.LoraConfig(
            r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM"
        )
        self.model = peft.get_peft_model(base, adapter, autocast_adapter_dtype=False).train()
        self.inner = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = self.copies = {name: p.detach().float() for name, p in self.inner.items()}
        self.optimizer = torch.optim.AdamW(self.copies.values(), lr=job.lr, weight_decay=0.0, fused=True)


def train(job) -> dict:
    side = (Peer if job.side == "peft" else Ours)(job)
    started, rows = machine.resident(), []
    for examples in [[Example(*example) for example in step] for step in job.steps]:
        start = time.perf_counter()
        loss, norm = side.step(examples)
        rows.append({"seconds": time.perf_counter() - start, "loss": loss, "norm": norm,
                     "tokens": sum(len(example.tokens) for example in examples)})  # fmt: skip
    trained = sum(p.numel() for p in side.parameters.values())
    return {"weights": side.weights, "trained": trained, "loaded": started, "peak": machine.peak(), "rows": rows}


class Answering(decode_sides.Transformers):
    def __init__(self, job):
        self.model, self.options = peers_model(job)[0].eval(), {"do_sample": False, "pad_token_id": 0}
        self.model.generation_config.eos_token_id = None


def decode(job) -> dict:
    """Tokens a second after the first, for each number of rows."""
    if job.side == "peft":
        side = Answering(job)
    else:
        model = loaded(job)
        inject(model, job.rank, job.alpha)
        unpacked.unpack(model, device.free_memory(HERE))

        def answer(prompts, new, note):
            last = len(prompts) - 1
            return generate.generate(
                model, prompts, {-1}, new, on_token=lambda row, token: note() if row == last else None
            )

        side = SimpleNamespace(generate=answer)
    prompts = torch.randint(400, (max(job.rows), job.prompt), generator=torch.Generator().manual_seed(0)).tolist()
    decode_sides.timed(side, prompts[:1], 4)
    runs = {rows: decode_sides.timed(side, prompts[:rows], job.new) for rows in job.rows}
    rates = {rows: rows * (job.new - 1) / run["rest s"] for rows, run in runs.items()}
    return {"tokens/s": rates, "runs": list(runs.values()), "peak": machine.peak()}


if __name__ == "__main__":
    job = SimpleNamespace(**SETTINGS | files.read_json(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    files.write_json(sys.argv[2], {"train": train, "decode": decode}[job.part](job))
