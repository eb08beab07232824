"""Examples to micro-batches: documents end to end, without padding between them.

A step is a set of examples. How it is cut into micro-batches changes nothing but memory and speed, because the loss is
summed and divided once for the whole step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora.device import ROUND, upload
from lora.text.chat import Example

STEP = 256  # a filled micro-batch over its budget has a multiple of so many tokens


@dataclass
class Batch:
    """Documents end to end, T tokens, N of them trained; the last `padding` tokens belong to no example."""

    tokens: torch.Tensor  # (T,)
    lengths: list[int]  # of the documents; they sum to T
    trained: torch.Tensor  # (N,), the positions whose prediction is trained
    targets: torch.Tensor  # (N,), what each of them should predict
    padding: int = 0


def collate(examples: Sequence[Example], device="cpu", padding: int = 0) -> Batch:
    """Lay examples end to end. The shift happens here and only here: position t predicts token t + 1.

    A last token predicts nothing, so it is left out. `padding` tokens follow the last example as if they were of it:
    what lies behind it changes nothing in it.
    """
    tokens, trained, targets = [], [], []
    for example in examples:
        predicting = [t for t in range(len(example.tokens) - 1) if example.trained[t + 1]]
        trained += [len(tokens) + t for t in predicting]
        targets += [example.tokens[t + 1] for t in predicting]
        tokens += example.tokens[:-1]
    lengths = [len(example.tokens) - 1 for example in examples]
    lengths[-1] += padding
    tokens += [0] * padding
    return Batch(upload(tokens, device), lengths, upload(trained, device), upload(targets, device), padding)


def size_of(examples: Sequence[Example]) -> int:
    """The tokens of a batch of them."""
    return sum(len(example.tokens) - 1 for example in examples)


def filled(examples: Sequence[Example], size: int, device="cpu") -> Batch:
    """A batch of `size` tokens, for compiled code; where the examples have more, of a multiple of STEP. What is missing
    is a document of its own at the end, nothing of it trained."""
    used = size_of(examples)
    padding = size - used if used <= size else -used % STEP
    if not padding:
        return collate(examples, device)
    batch = collate([*examples, Example([0] * (padding + 1), [False] * (padding + 1))], device)
    batch.padding = padding
    return batch


def dummy_batch(device="cpu") -> Batch:
    """One token of padding: for a process that has no examples but must take part."""
    return filled([], 1, device)


def micro_batches(examples: Sequence[Example], micro_tokens: int, device="cpu", fill: bool = False) -> list[Batch]:
    """Cut a step into batches of at most `micro_tokens` tokens; a longer example has a batch of its own. To `fill` is
    to make all of them that long; else they are rounded up to a multiple of ROUND."""
    batches, room = [], 0
    for example in sorted(examples, key=lambda e: len(e.tokens)):  # alike lengths together
        if len(example.tokens) - 1 > room or not batches:
            batches.append([])
            room = micro_tokens
        batches[-1].append(example)
        room -= len(example.tokens) - 1
    if fill:
        return [filled(batch, micro_tokens, device) for batch in batches]
    return [collate(batch, device, -size_of(batch) % ROUND) for batch in batches]
