"""Supervised fine-tuning: learn the answers that the data gives."""

import torch

from lora.data.batch import Batch
from lora.network.decoder import Model
from lora.ops import cross_entropy

KIND, FIGURES, SETTINGS = "conversation", {}, ()
LABEL, RATE, EPOCHS = "loss (nats per trained token)", 1.0, 3


def loss(model: Model, batch: Batch, args=None) -> tuple[torch.Tensor, int, dict]:
    """-Σ log p(target) over the N trained tokens, and N."""
    hidden = model.trunk(batch.tokens, batch.lengths)[batch.trained]  # (N, D)
    total = cross_entropy(hidden, model.head_weight, batch.targets, cap=model.config.final_logit_softcapping)
    return total, len(batch.targets), {}
