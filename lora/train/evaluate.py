"""How well a model predicts examples that it does not learn from, and what it forgot of what its base knew.

Forgetting is the mean of KL(p_base || p_adapted) = Σ_v p_base(v) (log p_base(v) - log p_adapted(v)) over all next-token
positions of ordinary conversations, in nats.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from lora import ops
from lora.ops.fast_log_probs import ROWS

Total = Callable[[list[float]], list[float]]  # adds numbers over processes; `list` where there is one process


def means(sums: Mapping[str, tuple[float, float]], total: Total = list) -> dict[str, float]:
    """Name -> mean, of (sum, count) by name, added up over all processes; of what did not occur there is none."""
    if not sums:
        return {}
    added = iter(total([number for pair in sums.values() for number in pair]))
    return {name: value / count for name, value, count in zip(sums, added, added, strict=True) if count}


@contextmanager
def evaluating(model: nn.Module):
    """Inside the block the model is in eval mode: no dropout. Afterwards every module is in the mode it was in."""
    before = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in before.items():
            module.training = training


class Retained(NamedTuple):
    """Nats per next-token position: KL(p_base || p_adapted), the base's loss, and the loss now."""

    kl: float
    loss_before: float
    loss: float


class Retention:
    """The meter of forgetting: call it, as often as wanted, and it says how far the model is from its base now.

    `trunk(batch)` gives the hidden states of a batch's trained positions (N, D), and those of the base inside `base()`;
    `batch.targets` (N,) is what they should predict; `head_weight()` (V, D) is frozen, or the base's while the meter is
    made. Of the base only hidden states are kept, and a head that trains: fewer numbers than its logits from N > D on.
    So a call costs one pass forward, and never a second model.
    """

    @torch.no_grad()
    def __init__(
        self,
        trunk: Callable[..., torch.Tensor],
        head_weight: Callable[[], torch.Tensor],
        batches: Sequence,
        base: Callable[[], AbstractContextManager],
        cap: float | None = None,
    ):
        self.trunk, self.head_weight, self.batches, self.cap = trunk, head_weight, batches, cap
        with base():
            self.of_base = [trunk(batch) for batch in batches]  # (N, D) each
            head = head_weight()
        own = head_weight()  # of an adapter on the head, merged, another than the base's
        self.head_of_base = head.clone() if head.requires_grad else head if own is not head else None

    @torch.no_grad()
    def __call__(self, total: Total = list) -> Retained:
        sums = [0.0, 0.0, 0.0]
        for batch, of_base in zip(self.batches, self.of_base, strict=True):
            hidden = self.trunk(batch)
            heads = {"head": self.head_weight(), "head_of_base": self.head_of_base}
            found = divergence(of_base, hidden, targets=batch.targets, cap=self.cap, **heads)
            sums = [a + b for a, b in zip(sums, found, strict=True)]
        *sums, count = total([*sums, sum(map(len, self.of_base))])
        return Retained(*(value / count for value in sums))


def plain_divergence(of_base, hidden, head, targets, head_of_base: torch.Tensor | None = None, cap=None):
    """Hidden states of base and model (N, D), head (V, D), targets (N,), the base's head where it is another, the soft
    cap of logits -> sums over all N positions, in float32 or wider: KL(p_base || p_adapted), the base's loss, the
    model's loss."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    pairs = (of_base, head if head_of_base is None else head_of_base), (hidden, head)
    base, now = (F.log_softmax(ops.logits(states, weight, cap), -1, dtype=wide) for states, weight in pairs)  # (N, V)
    losses = (-scores.gather(1, targets[:, None]).sum() for scores in (base, now))
    return ((base.exp() * (base - now)).sum().item(), *(loss.item() for loss in losses))


def divergence(of_base, hidden, head, targets, rows: int = ROWS, head_of_base=None, cap=None) -> list[float]:
    """`plain_divergence` with the logits of `rows` positions at a time."""
    parts = zip(*(tensor.split(rows) for tensor in (of_base, hidden, targets)), strict=True)
    sums = [plain_divergence(base, now, head, answers, head_of_base, cap) for base, now, answers in parts]
    return [sum(column) for column in zip(*sums, strict=True)]
