"""How much memory a training step takes, by the plan's own estimate, for models of usual shapes.   python bench/fits.py

r = 16 on all linears, one document of `--tokens` a step; no weight is read or made. With names, for these of
tests/fixtures/real_configs.json, as `python bench/fits.py Qwen/Qwen3.5-0.8B`. It is the estimate that train.py
prints; `bench/quant.py laptop` measures three of these.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.random_model import LLAMA3, SHAPES, RandomFiles, shape  # noqa: E402
from lora import pretrained  # noqa: E402
from lora.adapter.inject import inject  # noqa: E402
from lora.pretrained import prequantised, wrapped  # noqa: E402
from lora.pretrained.quantised import Quantised  # noqa: E402
from lora.run.settings import TrainSettings  # noqa: E402
from lora.train import memory  # noqa: E402

MORE = {
    "Qwen2.5-0.5B": shape("qwen2", 24, 896, 4864, 14, 2, 151_936, rope_theta=1e6, tie_word_embeddings=True),
    "Llama-3.2-1B": shape("llama", 16, 2048, 8192, 32, 8, 128_256, rope_theta=5e5, rope_scaling=LLAMA3,
                          tie_word_embeddings=True),
    "Qwen2.5-3B": shape("qwen2", 36, 2048, 11_008, 16, 2, 151_936, rope_theta=1e6, tie_word_embeddings=True),
    "Qwen2.5-14B": shape("qwen2", 48, 5120, 13_824, 40, 8, 152_064, rope_theta=1e6),
    "Qwen2.5-32B": shape("qwen2", 64, 5120, 27_648, 40, 8, 152_064, rope_theta=1e6),
}  # fmt: skip

WAYS = ((None, False), ("nf4", False), ("nf4", True))  # packing, activations recomputed


def real(name: str) -> dict:
    """The language model's config of a real file."""
    entries = json.loads((ROOT / "tests" / "fixtures" / "real_configs.json").read_text())
    if name not in entries:
        raise SystemExit(f"error: no model {name!r}. There are {', '.join(entries)}")
    return prequantised.plain(wrapped.text_config(entries[name]["config"]))


def needed(config: dict, quant: str | None, tokens: int, recompute: bool) -> float:
    """Bytes at the peak of a run on a CPU in bfloat16."""
    args = TrainSettings(max_steps=100, dtype="bfloat16", device="cpu", quant=quant, checkpoint_activations=recompute)
    base = RandomFiles(config)
    model = pretrained.empty_model(base).to(torch.bfloat16)
    inject(model, args.rank, args.alpha)
    packings = {quant: memory.PackedSizes.of(Quantised(base, quant))} if quant else {}
    return memory.expected(model.train(), args, [tokens], 1, packings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    usual = {name: config for name, config in {**SHAPES, **MORE}.items() if name != "tiny"}
    shapes = {name: real(name) for name in args.models} or usual
    print("| model | bf16, GB | nf4, GB | nf4, activations recomputed, GB |\n|---|---|---|---|")
    for name in sorted(shapes, key=lambda name: needed(shapes[name], None, 64, True)):
        figures = " | ".join(f"{needed(shapes[name], quant, args.tokens, again) / 1e9:.1f}" for quant, again in WAYS)
        print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
