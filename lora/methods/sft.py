"""Supervised fine-tuning: learn the answers that the data gives."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from lora.data.batch import Batch
from lora.data.sources import Sources, read_sources
from lora.network.decoder import Model
from lora.ops import cross_entropy
from lora.pretrained import hub
from lora.text.chat import Chat
from lora.train.evaluate import Total, mean_loss


def examples(args, chat: Chat, generated_rows: Sequence[dict] | None = None, most: int | None = None) -> Sources:
    """The conversations of all files, of which answers are trained; the model takes `most` tokens. Raises BadInput."""
    return read_sources(args, chat, hub.dataset_file, generated_rows, most)


def loss(model: Model, batch: Batch) -> tuple[torch.Tensor, int]:
    """-Σ log p(target) over the N trained tokens, and N."""
    hidden = model.trunk(batch.tokens, batch.lengths)[batch.trained]  # (N, D)
    total = cross_entropy(hidden, model.head_weight, batch.targets, cap=model.config.final_logit_softcapping)
    return total, len(batch.targets)


def measure(model: Model, batches: Iterable[Batch], total: Total = list) -> dict[str, float]:
    """`total` adds numbers over all processes."""
    return {"eval_loss": mean_loss(partial(loss, model), batches, total)}
