"""Scores of a model whose Linears hold given weights: those of a base in some form, or W' made of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from parts import MODEL

from lora import pretrained
from lora.adapter import store
from lora.adapter.inject import lora_layers
from lora.data import formats
from lora.data.retention import retention_batches
from lora.inference import score
from lora.inference.session import load_chat
from lora.pretrained import default_model
from lora.quant import nf4
from lora.run.measured import Measured
from lora.run.settings import TrainMethod

MICRO = 2048  # tokens in memory at once


def base_of(quant: str) -> tuple[str, str | None]:
    """--model and --quant."""
    if quant == "keep":
        [path] = default_model.folder().glob("*.gguf")
        return str(path), "keep"
    return MODEL, None if quant == "bf16" else quant


def numbers(quant: str) -> dict[str, torch.Tensor]:
    """The weight of each Linear as a base in this form computes with it."""
    base = pretrained.find(*base_of(quant))
    ends = "_proj.weight"
    return {
        name.removesuffix(".weight"): base.read(name, torch.bfloat16) for name in base.header if name.endswith(ends)
    }


class Scored:
    """The bf16 model with the layers of an adapter, its chat, rows whose loss is measured, and what is asked of it."""

    def __init__(self, adapter: Path, rows: Path, asked: Sequence[dict], room: int):
        base, self.asked, self.room = pretrained.find(MODEL), asked, room
        self.model = pretrained.load_model(base, torch.bfloat16, "cpu").eval()
        store.load(self.model, adapter, read=base.read)
        self.layers = lora_layers(self.model)
        chat, limit = load_chat(base, adapter), self.model.config.max_position_embeddings
        unseen = [score.cut(row) for row in formats.read([rows])]
        examples, _ = score.encode_rows(unseen, chat, limit, False)
        prompts = [chat.prompt([{"role": "user", "content": row["prompt"]}]) for row in self.asked]
        batches, _, _ = retention_batches(chat, None, limit, MICRO)
        self.column = score.Column(adapter.name, str(adapter), chat, examples, prompts, batches)

    def score(
        self, base: dict[str, torch.Tensor], merged: dict[str, torch.Tensor], forgetting: bool = True
    ) -> tuple[dict, list[dict]]:
        """Of the model with these merged weights: its loss; what was forgotten, as seen from this base; answers."""
        for path, layer in self.layers.items():
            layer.base.weight = torch.nn.Parameter(base[path], requires_grad=False)
            layer.merged_weight = merged[path]
        column = self.column if forgetting else self.column._replace(retention=[])
        figures = score.losses(self.model, Measured(self.model, column, TrainMethod("sft")), column, MICRO)
        ids = score.likeliest_answers(self.model, self.column, len(self.asked), self.room)
        texts = map(self.column.chat.tokenizer.decode, ids)
        return figures, [row | {"prediction": text} for row, text in zip(self.asked, texts, strict=True)]


def requantised(weight: torch.Tensor) -> torch.Tensor:
    return nf4.pack(tuple(weight.shape), [weight]).dequantise(torch.bfloat16)


def norm(tensors) -> float:
    """The Frobenius norm of all of them together."""
    return float(sum(tensor.double().square().sum() for tensor in tensors) ** 0.5)
