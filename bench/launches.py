"""How many kernels does a micro-batch launch on a GPU?   python bench/launches.py [--shape 0.5b 7b] [--tokens 16384]

Counted on `meta`, where operators have shapes but no numbers: each one that is neither a view nor a question about a
tensor launches a kernel. A launch costs a CPU some 5 µs: where a micro-batch takes longer than all of them, the GPU
does not wait for Python. Attention over documents, which has kernels of its own on a GPU, counts as one each way; AdamW
is one fused kernel a step. What a compiler makes of a block is not visible here.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.gpu import SHAPES  # noqa: E402
from lora import ops  # noqa: E402
from lora.adapter.inject import inject  # noqa: E402
from lora.network.config import ModelConfig  # noqa: E402
from lora.network.decoder import Model  # noqa: E402

DOCUMENT = 512  # tokens of each
NONE = ("aten.empty", "aten.detach", "aten._unsafe_view", "aten.new_empty")  # allocate or look, and launch nothing


class Launches(TorchDispatchMode):
    """Counts what runs inside, by the operator's name."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = any(a.alias_info and not a.alias_info.is_write for a in function._schema.arguments)
        if not is_view and not str(function).startswith(NONE):
            self.seen[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Attention(torch.autograd.Function):
    """One kernel each way."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(k, v)
        return q.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone(), *ctx.saved_tensors


def count(name: str, tokens: int) -> dict[str, Counter]:
    with torch.device("meta"):
        model = Model(ModelConfig.from_json(SHAPES[name])).to(torch.bfloat16).requires_grad_(False)
    inject(model, 16, 32)
    model.train()
    ids, lengths = torch.zeros(tokens, dtype=torch.long, device="meta"), [DOCUMENT] * (tokens // DOCUMENT)
    found = {}
    with patch.object(ops, "attention", lambda q, k, v, *_: Attention.apply(q, k, v)):
        with Launches() as found["forward"]:
            hidden = model.trunk(ids, lengths)
        with Launches() as found["loss"]:
            loss = ops.cross_entropy(hidden, model.head_weight, ids)
        with Launches() as found["backward"]:
            loss.backward()
    return {part: launches.seen for part, launches in found.items()}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["0.5b", "7b"])
    parser.add_argument("--tokens", type=int, default=16384, help="of the micro-batch")
    asked = parser.parse_args(argv)
    for name in asked.shape:
        found, layers = count(name, asked.tokens), SHAPES[name]["num_hidden_layers"]
        print(f"{name}, a micro-batch of {asked.tokens:,} tokens")
        for part, seen in found.items():
            a_layer = f", {seen.total() / layers:.0f} a layer" if part in ("forward", "backward") else ""
            print(f"  {part:9} {seen.total():6,}{a_layer}")
        total = sum(seen.total() for seen in found.values())
        print(f"  in all    {total:6,}, about {total * 5e-3:.0f} ms of launching")


if __name__ == "__main__":
    main()
