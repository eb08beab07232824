"""One side of bench/quant.py in a process of its own:   python bench/quant_sides.py JOB.json RESULT.json

`train` steps through examples, ours or bitsandbytes under PEFT; `decode` answers prompts; `laptop` loads a large model
with random weights and makes two training steps; `kernels` dequantises one weight in every format.
"""

import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import decode_sides, machine, random_model, train_sides  # noqa: E402
from lora import device, files, heap, pretrained  # noqa: E402
from lora.adapter import store  # noqa: E402
from lora.adapter.inject import inject  # noqa: E402
from lora.data import batch  # noqa: E402
from lora.inference import generate, unpacked  # noqa: E402
from lora.methods import objective, sft  # noqa: E402
from lora.pretrained.quantised import Quantised  # noqa: E402
from lora.quant import gguf, int8, nf4  # noqa: E402
from lora.quant.packed import Packed  # noqa: E402
from lora.run.trainable import make_optimizer  # noqa: E402
from lora.text.chat import Example  # noqa: E402
from lora.train.step import train_step  # noqa: E402

HERE = torch.device("cpu")


# ---- train -----------------------------------------------------------------------------------------------------------


class Bitsandbytes(train_sides.Peer):
    """NF4 with double quantisation under PEFT. As people run it, `prepare_model_for_kbit_training` makes norms,
    embeddings and head float32 and has activations computed again; tuned, neither."""

    def load(self, from_pretrained):
        import peft
        import transformers

        how = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        model = from_pretrained(self.job.base, dtype=torch.bfloat16, quantization_config=how)
        return model if self.job.tuned else peft.prepare_model_for_kbit_training(model)


def train(job) -> dict:
    """Rows of steps, and the loss of held-out examples after them."""
    side = (train_sides.Ours if job.side == "ours" else Bitsandbytes)(job)
    found = train_sides.work(job, side)
    if job.held_out:
        batches = side.cut([Example(*example) for example in job.held_out])
        found["held-out loss"] = objective.measure(sft, side.model, batches, job)["loss"]
    return found


# ---- decode ----------------------------------------------------------------------------------------------------------


def decode(job) -> dict:
    """One prompt at a time with an adapter: beside the base as it is packed, as where memory is short; then merged into
    plain Linears, as everywhere else."""
    model, runs = pretrained.load_model(pretrained.find(job.base, job.quant), torch.bfloat16), {}
    store.load(model, job.adapter)

    def answer(prompts, new, note):
        return generate.generate(model, prompts, {-1}, new, on_token=lambda *_: note())

    side = SimpleNamespace(generate=answer)
    for form in ("beside", "merged"):
        if form == "merged":
            unpacked.unpack(model, device.free_memory(HERE))
        decode_sides.timed(side, job.prompts[:1], 4)
        runs[form] = [decode_sides.timed(side, [prompt], job.new) for prompt in job.prompts]
    return {"runs": runs, "peak": machine.peak()}


# ---- laptop ----------------------------------------------------------------------------------------------------------


@contextmanager
def dequantising(spent: list[float]):
    """Inside the block every dequantisation adds its seconds."""
    dequantise = Packed.dequantise

    def timed(*args):
        start = time.perf_counter()
        numbers = dequantise(*args)
        spent.append(time.perf_counter() - start)
        return numbers

    Packed.dequantise = timed
    try:
        yield
    finally:
        Packed.dequantise = dequantise


def laptop(job) -> dict:
    """Load in NF4, adapt all linears, two steps of one document with its activations computed again."""
    base = Quantised(random_model.RandomFiles(random_model.SHAPES[job.shape]), "nf4")
    started, tidy = machine.resident(), heap.keep_memory(HERE, sparing=True)
    start = time.perf_counter()
    model = pretrained.load_model(base, torch.bfloat16)
    loading, loaded, highest = time.perf_counter() - start, machine.resident(), machine.peak()
    inject(model, job.rank, job.alpha)
    model.train()
    job.checkpoint_activations, job.lr_ratio_b = True, 1
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(trained, job, HERE)
    goal, rows = objective.Objective(sft, model, job), []
    ids = torch.randint(len(model.head_weight), (job.tokens + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    for _ in range(2):
        spent, start = [], time.perf_counter()
        with dequantising(spent):
            batches = [batch.collate([Example(ids, [True] * len(ids))])]
            loss = train_step(goal, batches, optimizer, job.lr, job.clip).loss
        tidy()
        rows.append({"seconds": time.perf_counter() - start, "dequantising s": sum(spent), "dequantised": len(spent),
                     "loss": loss, "peak": machine.peak()})  # fmt: skip
    packed = sum(module.nbytes for module in model.modules() if isinstance(module, Packed))
    return {
        "M parameters": sum(torch.Size(size).numel() for _, size in base.header.values()) / 1e6,
        "trained": sum(p.numel() for p in trained.values()), "packed": packed,
        "16 bit": sum(p.nbytes for p in model.parameters() if not p.requires_grad), "before": started,
        "load s": loading, "loaded": loaded, "peak of loading": highest, "rows": rows, "peak": machine.peak(),
    }  # fmt: skip


# ---- kernels ---------------------------------------------------------------------------------------------------------


def formats(shape: tuple[int, int]) -> dict[str, Packed]:
    """A random weight in every format."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    found = {"nf4": nf4.pack(shape, [weight]), "int8": int8.pack(shape, [weight])}
    for name, kind in gguf.TYPES.items():
        data = torch.randint(256, (weight.numel() // kind.block, kind.bytes), dtype=torch.uint8)
        for at in kind.scales:  # a float16 of any bits may be infinite
            data[:, at : at + 2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
        found[name] = gguf.Blocks(shape, data, name)
    return found


def kernels(job) -> dict:
    """Seconds of every call, the formats taking turns."""
    packed, device_memory = formats(tuple(job.shape)), heap.keep_memory(HERE)
    seconds = {name: [] for name in packed}
    for _ in range(job.rounds):
        for name, weight in packed.items():
            start = time.perf_counter()
            weight.dequantise(torch.bfloat16)
            seconds[name].append(time.perf_counter() - start)
    device_memory()
    return {"weights": job.shape[0] * job.shape[1], "seconds": seconds}


if __name__ == "__main__":
    job = SimpleNamespace(**files.read_json(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    files.write_json(
        sys.argv[2], {"train": train, "decode": decode, "laptop": laptop, "kernels": kernels}[job.part](job)
    )
