"""Is the memory that train.py expects what it takes?   python bench/memory.py [NAME ...] [--fit]

Every run is a real `train.py` in a fresh process, on a model with random weights and rows of random lengths. `FITTED`
are the runs by which the two constants of lora/train/memory.py were chosen (`--fit` runs these), `HELD_OUT` those that
they are judged by. Prints a table; a run of all of them writes bench/results/memory.json.
"""

import argparse
import json
import platform
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora import files  # noqa: E402
from lora.network.config import ModelConfig  # noqa: E402
from lora.network.decoder import Model  # noqa: E402
from lora.pretrained import default_model  # noqa: E402

RESULT = ROOT / "bench" / "results" / "memory.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
STEPS = 16


def run(
    layers, hidden, inner, heads, kv, *, vocab=49152, family="llama", tied=True, words=(20, 120), steps=STEPS, flags=""
):
    """A model's shape, how many words its rows have, and the steps and flags of its training."""
    return SimpleNamespace(**locals())


FITTED = {
    "20M": run(6, 256, 768, 4, 4, steps=60),
    "smollm": run(30, 576, 1536, 9, 3),
    "smollm, fp32, attention": run(30, 576, 1536, 9, 3, flags="--dtype float32 --target attention"),
    "wide": run(4, 1280, 3456, 20, 4, flags="--micro-tokens 512"),
    "large vocabulary": run(8, 768, 2048, 12, 2, vocab=151936, family="qwen2", flags="--rank 64 --batch-size 4"),
    "deep, checkpointed": run(48, 512, 1408, 8, 8, flags="--checkpoint-activations --batch-size 6"),
}
HELD_OUT = {
    "narrow and deep": run(40, 384, 1024, 6, 2, words=(10, 200), flags="--batch-size 4"),
    "qwen2, fp32": run(16, 896, 2432, 14, 2, vocab=100_000, family="qwen2", flags="--dtype float32 --batch-size 4"),
    "700M": run(
        18, 1536, 6144, 24, 8, vocab=64_000, tied=False, words=(10, 40), flags="--rank 32 --target mlp --batch-size 3"
    ),
    "long rows": run(20, 640, 1792, 10, 5, words=(100, 600), flags="--micro-tokens 1024 --batch-size 3"),
    "checkpointed, fp32": run(24, 640, 1728, 10, 10, flags="--checkpoint-activations --dtype float32 --batch-size 4"),
}


def write_model(shape, folder: Path) -> None:
    """A folder as of the hub, its weights N(0, 0.02²) in bf16; tokenizer and template are the default model's."""
    heads, kv = shape.heads, shape.kv
    config = {
        "model_type": shape.family, "num_hidden_layers": shape.layers, "hidden_size": shape.hidden,
        "intermediate_size": shape.inner, "num_attention_heads": heads, "num_key_value_heads": kv,
        "vocab_size": shape.vocab, "tie_word_embeddings": shape.tied, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "eos_token_id": 2,
    }  # fmt: skip
    files.write_json(folder / "config.json", config)
    for name in TOKENIZER:
        files.write_bytes(folder / name, files.read_bytes(default_model.folder() / name))
    with torch.device("meta"):
        empty = Model(ModelConfig.from_json(config)).state_dict()
    random = torch.Generator().manual_seed(0)

    def read(name: str) -> torch.Tensor:
        if empty[name].dim() == 1:
            return torch.full(empty[name].shape, float("norm" in name), dtype=torch.bfloat16)
        return torch.empty(empty[name].shape, dtype=torch.bfloat16).normal_(std=0.02, generator=random)

    header = {name: ("BF16", tuple(tensor.shape)) for name, tensor in empty.items()}
    files.write_safetensors(folder / "model.safetensors", header, read)


def write_rows(low: int, high: int, path: Path, count: int = 96) -> None:
    draw = random.Random(0)
    words = [word for word in (ROOT / "LICENSE").read_text(encoding="utf-8").split() if word.isalpha()]
    rows = (
        {"question": "Go on.", "answer": " ".join(draw.choices(words, k=draw.randint(low, high)))} for _ in range(count)
    )
    files.write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def measure(name: str, shape, held_out: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        base, data = Path(folder) / "base", Path(folder) / "rows.jsonl"
        base.mkdir()
        write_model(shape, base)
        write_rows(*shape.words, data)
        command = [sys.executable, ROOT / "train.py", "--model", base, "--data", data, "--out", Path(folder) / "out",
                   "--device", "cpu", "--max-steps", str(shape.steps), *shape.flags.split()]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{name}: train.py ended with {done.returncode}\n{done.stderr}")
    expected, peak = (float(re.search(rf"{word} (?:about )?([\d.]+) GB", done.stderr)[1])
                      for word in (r"memory  ", "peak memory"))  # fmt: skip
    parameters = float(re.search(r"base +([\d.,]+) M", done.stderr)[1].replace(",", ""))
    row = {"run": name, "held out": held_out, "M parameters": parameters, "steps": shape.steps, "flags": shape.flags,
           "expected GB": expected, "peak GB": peak, "ratio": round(expected / peak, 3)}  # fmt: skip
    widths = (24, 6, 6, 4, 60, 6, 6, 6)
    print("  ".join(f"{value!s:{width}}" for value, width in zip(row.values(), widths, strict=True)), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only runs whose name contains this")
    parser.add_argument("--fit", action="store_true", help="only the runs that the constants are fitted on")
    chosen = parser.parse_args()
    lists = {False: FITTED} if chosen.fit else {False: FITTED, True: HELD_OUT}
    rows = [
        measure(name, shape, held_out)
        for held_out, shapes in lists.items()
        for name, shape in shapes.items()
        if not chosen.names or any(word in name for word in chosen.names)
    ]
    if not chosen.names and not chosen.fit:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        machine = {"cpu": model[1] if model else platform.machine(), "torch": torch.__version__,
                   "python": platform.python_version(), "libc": " ".join(platform.libc_ver())}  # fmt: skip
        files.write_json(RESULT, {"machine": machine, "runs": rows})
    worst = max(abs(1 - row["ratio"]) for row in rows)
    print(f"the furthest estimate is {100 * worst:.0f} % off")


if __name__ == "__main__":
    main()
