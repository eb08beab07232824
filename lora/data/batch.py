"""Examples to micro-batches: documents end to end, without padding between them.

A step is a set of examples. How it is cut into micro-batches changes nothing but memory and speed, because the loss is
summed and divided once for the whole step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lora.device import ROUND, upload, widest
from lora.text.chat import Example

STEP = 256  # a filled micro-batch over its budget has a multiple of so many tokens


class Linked(NamedTuple):
    """Examples that stay in one micro-batch, as the sides of a pair, and by name a number that is known of each. Of a
    sampled answer, numbers of each trained token."""

    examples: tuple[Example, ...]
    known: dict[str, tuple[float, ...]]
    per_token: Mapping[str, Sequence[float]] = MappingProxyType({})


@dataclass
class Batch:
    """Documents end to end, T tokens, N of them trained; the last `padding` tokens belong to no example."""

    tokens: Tensor  # (T,)
    lengths: list[int]  # of the documents; they sum to T
    trained: Tensor  # (N,), the positions whose prediction is trained
    targets: Tensor  # (N,), what each of them should predict
    padding: int = 0
    counts: list[int] = field(default_factory=list)  # trained positions of each example; they sum to N
    known: dict[str, Tensor] = field(default_factory=dict)  # of linked examples, (examples,) each
    linked: int = 0  # how many `Linked` these are
    per_token: dict[str, Tensor] = field(default_factory=dict)  # of sampled answers, (N,) each

    @property
    def count(self) -> int:
        """What the sum of its loss is a mean of: trained tokens, or linked examples as one."""
        return self.linked or len(self.targets)

    def sums(self, values: Tensor) -> Tensor:
        """The sum of each example's values (N,) -> (examples,), in float64 where there is one: float32 numbers between
        256 and 512 nats are 3e-5 apart."""
        values = values.to(widest(values.device))
        return torch.stack([part.sum() for part in values.split(self.counts)]) if self.counts else values[:0]

    def every(self, step: int, start: int) -> "Batch":
        """The batch of every `step`th example from `start` on."""
        if not self.linked:  # padding alone
            return self
        ends, kept = [0, *accumulate(self.lengths)], range(start, len(self.counts), step)
        lengths = [self.lengths[i] for i in kept]
        starts = [0, *accumulate(lengths)]
        trained, targets = self.trained.split(self.counts), self.targets.split(self.counts)
        return Batch(
            torch.cat([self.tokens[ends[i] : ends[i + 1]] for i in kept]),
            lengths,
            torch.cat([trained[i] + (at - ends[i]) for i, at in zip(kept, starts, strict=False)]),
            torch.cat([targets[i] for i in kept]),
            self.padding if kept[-1] == len(self.lengths) - 1 else 0,
            [self.counts[i] for i in kept],
            {name: numbers[start::step] for name, numbers in self.known.items()},
            linked=self.linked,
        )


def parts(item: Example | Linked) -> tuple[Example, ...]:
    return item.examples if isinstance(item, Linked) else (item,)


def collate(items: Sequence[Example | Linked], device="cpu", padding: int = 0) -> Batch:
    """Lay examples end to end. The shift happens here and only here: position t predicts token t + 1.

    A last token predicts nothing, so it is left out. `padding` tokens follow the last example as if they were of it:
    what lies behind it changes nothing in it.
    """
    tokens, trained, targets, lengths, counts = [], [], [], [], []
    for example in (example for item in items for example in parts(item)):
        predicting = [t for t in range(len(example.tokens) - 1) if example.trained[t + 1]]
        trained += [len(tokens) + t for t in predicting]
        targets += [example.tokens[t + 1] for t in predicting]
        tokens += example.tokens[:-1]
        lengths.append(len(example.tokens) - 1)
        counts.append(len(predicting))
    lengths[-1] += padding
    tokens += [0] * padding
    linked = [item for item in items if isinstance(item, Linked)]
    known = {name: [x for item in linked for x in item.known[name]] for name in (linked[0].known if linked else ())}
    known = {name: upload(numbers, device, widest(device)) for name, numbers in known.items()}
    names = linked[0].per_token if linked else ()
    each = {name: [x for item in linked for x in item.per_token[name]] for name in names}
    each = {name: upload(numbers, device, torch.float32) for name, numbers in each.items()}
    tokens, trained, targets = (upload(numbers, device) for numbers in (tokens, trained, targets))
    return Batch(tokens, lengths, trained, targets, padding, counts, known, len(linked), each)


def size_of(items: Sequence[Example | Linked]) -> int:
    """The tokens of a batch of them."""
    return sum(len(example.tokens) - 1 for item in items for example in parts(item))


def filled(items: Sequence[Example | Linked], size: int, device="cpu") -> Batch:
    """A batch of `size` tokens, for compiled code; where the examples have more, of a multiple of STEP. What is missing
    is a document of its own at the end, nothing of it trained."""
    used = size_of(items)
    padding = size - used if used <= size else -used % STEP
    if not padding:
        return collate(items, device)
    batch = collate([*items, Example([0] * (padding + 1), [False] * (padding + 1))], device)
    batch.padding = padding
    batch.counts.pop()
    return batch


def dummy_batch(device="cpu") -> Batch:
    """One token of padding: for a process that has no examples but must take part."""
    return filled([], 1, device)


def micro_batches(
    items: Sequence[Example | Linked], micro_tokens: int, device="cpu", fill: bool = False
) -> list[Batch]:
    """Cut a step into batches of at most `micro_tokens` tokens; what is longer has a batch of its own. To `fill` is to
    make all of them that long; else they are rounded up to a multiple of ROUND."""
    batches, room = [], 0
    for item in sorted(items, key=lambda item: size_of([item])):  # alike lengths together
        size = size_of([item])
        if size > room or not batches:
            batches.append([])
            room = micro_tokens
        batches[-1].append(item)
        room -= size
    if fill:
        return [filled(batch, micro_tokens, device) for batch in batches]
    return [collate(batch, device, -size_of(batch) % ROUND) for batch in batches]
