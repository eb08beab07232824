"""Examples to micro-batches: which examples make a step, and how a step is laid out in memory.

A step is a set of examples; the order is a pure function of the seed. How a step is cut into micro-batches changes
nothing but memory and speed, because the loss is summed and divided once for the whole step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from lora.model.template import Example

IGNORE = -100  # a target that is not trained


@dataclass
class Batch:
    """Documents end to end: `tokens` (T,), `lengths` of the documents (they sum to T), and what each position should
    predict, `targets` (T,), IGNORE where nothing is trained."""

    tokens: torch.Tensor
    lengths: list[int]
    targets: torch.Tensor

    @property
    def trained(self) -> torch.Tensor:
        """Positions that are trained, (T,) bool."""
        return self.targets != IGNORE


def lay_out(examples: Sequence[Example], device="cpu") -> Batch:
    """The shift happens here and only here: position t predicts token t + 1. A last token predicts nothing: it is left
    out."""
    tokens, targets = [], []
    for example in examples:
        tokens += example.tokens[:-1]
        answers = zip(example.tokens[1:], example.trained[1:], strict=True)
        targets += [token if trained else IGNORE for token, trained in answers]
    lengths = [len(example.tokens) - 1 for example in examples]
    return Batch(torch.tensor(tokens, device=device), lengths, torch.tensor(targets, device=device))


def micro_batches(examples: Sequence[Example], micro_tokens: int, device="cpu") -> list[Batch]:
    """Cut a step into batches of at most `micro_tokens` tokens; a longer example has a batch of its own."""
    batches, room = [], 0
    for example in sorted(examples, key=lambda e: len(e.tokens)):  # alike lengths together
        if len(example.tokens) - 1 > room or not batches:
            batches.append([])
            room = micro_tokens
        batches[-1].append(example)
        room -= len(example.tokens) - 1
    return [lay_out(batch, device) for batch in batches]


def order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count): indices sorted by a hash, so that it is the same on every machine and version."""

    def key(index: int) -> bytes:
        return blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest()

    return sorted(range(count), key=key)


def steps(count: int, batch_size: int, seed: int, total: int) -> Iterator[list[int]]:
    """The example indices of each of `total` steps, epoch after epoch; an epoch's last step may be short."""
    epoch = done = 0
    while True:
        indices = order(count, seed, epoch)
        for start in range(0, count, batch_size):
            if done == total:
                return
            yield indices[start : start + batch_size]
            done += 1
        epoch += 1
