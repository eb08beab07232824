"""How well a model predicts examples that it does not learn from."""

from collections.abc import Callable, Iterable

import torch


@torch.no_grad()
def mean_loss(objective: Callable[..., torch.Tensor], batches: Iterable) -> float:
    """Summed loss over count of all trained tokens, however they are batched; `objective` as for `train_step`."""
    total, count = 0.0, 0
    for batch in batches:
        total += objective(batch).item()
        count += int(batch.trained.sum())
    return total / count
