"""Is the memory that train.py expects what it takes?   python bench/memory.py [NAME ...]

Every run is a real `train.py` in a fresh process, on a model with random weights and rows of random lengths. Prints a
table and writes bench/results/memory.json, in which other runs stay as they were.
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


LEAST, MOST = 0.9, 1.25  # expected over measured: too little warns nobody, too much warns everybody


def run(layers=30, hidden=576, inner=1536, heads=9, kv=3, vocab=49152, words=(20, 120), steps=8, flags="", **config):
    """A model's shape, the default model's unless it is given, how many words its rows have, and the steps and flags of
    its training. `config` are more fields of its config."""
    return SimpleNamespace(**locals())


DOCUMENTS = "--max-len 2048 --overlong truncate --batch-size 2"
RUNS = {
    "short chats": run(),
    "long answers": run(words=(250, 500), steps=4, flags="--batch-size 4"),
    "documents of 2,048 tokens": run(words=(1500, 1600), steps=3, flags=DOCUMENTS),
    "every weight": run(flags="--full"),
    "DoRA": run(flags="--dora"),
    "checkpointed": run(words=(250, 500), steps=4, flags="--checkpoint-activations --batch-size 4"),
    "gemma2, windows and caps": run(
        8, 512, 2048, 8, 4, vocab=100_000, words=(100, 400), steps=4, flags="--dtype float32 --batch-size 4",
        model_type="gemma2", head_dim=64, query_pre_attn_scalar=64, sliding_window=128, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh",
    ),
    "qwen2, 494M, dropout": run(
        24, 896, 4864, 14, 2, vocab=151_936, words=(90, 120), steps=4, flags="--dropout 0.1 --batch-size 4",
        model_type="qwen2",
    ),
    "a large vocabulary, checkpointed": run(
        6, 384, 1024, 6, 3, vocab=150_000, words=(250, 500), steps=3,
        flags="--dtype float32 --checkpoint-activations --batch-size 8 --micro-tokens 4096",
    ),
    "every weight, a large vocabulary": run(
        6, 384, 1024, 6, 3, vocab=150_000, words=(90, 120), steps=3, flags="--full",
    ),
}  # fmt: skip


def write_model(shape, folder: Path) -> None:
    """A folder as of the hub, its weights N(0, 0.02²) in bf16; tokenizer and template are the default model's."""
    heads, kv = shape.heads, shape.kv
    config = {
        "model_type": "llama", "num_hidden_layers": shape.layers, "hidden_size": shape.hidden,
        "intermediate_size": shape.inner, "num_attention_heads": heads, "num_key_value_heads": kv,
        "vocab_size": shape.vocab, "tie_word_embeddings": True, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "eos_token_id": 2, **shape.config,
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


def measure(name: str, shape) -> dict:
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
    row = {"run": name, "M parameters": parameters, "steps": shape.steps, "flags": shape.flags,
           "expected GB": expected, "peak GB": peak, "ratio": round(expected / peak, 3)}  # fmt: skip
    widths = (26, 6, 4, 60, 6, 6, 6)
    print("  ".join(f"{value!s:{width}}" for value, width in zip(row.values(), widths, strict=True)), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only runs whose name contains this")
    chosen = parser.parse_args().names
    rows = [measure(name, s) for name, s in RUNS.items() if not chosen or any(word in name for word in chosen)]
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = {"cpu": model[1] if model else platform.machine(), "torch": torch.__version__,
               "python": platform.python_version(), "libc": " ".join(platform.libc_ver())}  # fmt: skip
    before = {row["run"]: row for row in json.loads(RESULT.read_text())["runs"]} if RESULT.exists() else {}
    found = before | {row["run"]: row for row in rows}
    files.write_json(RESULT, {"machine": machine, "runs": [found[name] for name in RUNS if name in found]})
    if wrong := [row["run"] for row in rows if not LEAST <= row["ratio"] <= MOST]:
        raise SystemExit(f"further off than {LEAST} to {MOST}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
