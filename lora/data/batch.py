"""Examples to micro-batches: which examples make a step, and how a step is laid out in memory.

A step is a set of examples; the order is a pure function of the seed. How a step is cut into micro-batches changes
nothing but memory and speed, because the loss is summed and divided once for the whole step.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil, floor

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


def order(count: int, seed: int | str, epoch: int) -> list[int]:
    """A permutation of range(count): indices sorted by a hash, so that it is the same on every machine and version."""

    def key(index: int) -> bytes:
        return blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest()

    return sorted(range(count), key=key)


def _endless(count: int, seed: int | str) -> Iterator[int]:
    """Indices without repetition until all were there, then again in another order."""
    for epoch in itertools.count():
        yield from order(count, seed, epoch)


def _epochs(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """All indices, epoch after epoch; an epoch's last step may be short."""
    for epoch in itertools.count():
        indices = order(count, seed, epoch)
        yield from (indices[start : start + batch_size] for start in range(0, count, batch_size))


def _mixed(sizes: Sequence[int], weights: Sequence[float], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Steps whose every example comes from a source drawn by weight; a source keeps its own order."""
    starts, sources = [sum(sizes[:i]) for i in range(len(sizes))], []
    for i, size in enumerate(sizes):
        sources.append(_endless(size, f"{seed}/source {i}"))
    limits = [*itertools.accumulate(weight / sum(weights) for weight in weights)]
    for step in itertools.count():
        indices = []
        for place in range(batch_size):
            drawn = int.from_bytes(blake2b(f"{seed}/draw/{step}/{place}".encode(), digest_size=8).digest()) / 2**64
            i = min(bisect_right(limits, drawn), len(sizes) - 1)  # rounding may leave the last limit below 1
            indices.append(starts[i] + next(sources[i]))
        yield indices


def steps(
    sizes: Sequence[int],
    batch_size: int,
    seed: int,
    total: int,
    weights: Sequence[float] | None = None,
    replays: Sequence[tuple[int, float]] = (),
) -> Iterator[list[int]]:
    """The example indices of each of `total` steps: a pure function of the arguments.

    The examples of all sources lie one after another, `sizes` of them, then those to replay. Without `weights` every
    example comes once an epoch; with them each is drawn from source i with probability weights[i] / sum. On top of
    that come replays (size, share): share * batch_size examples a step, or where that is no whole number, on average.
    """
    main = _mixed(sizes, weights, batch_size, seed) if weights else _epochs(sum(sizes), batch_size, seed)
    extras, start = [], sum(sizes)
    for i, (size, share) in enumerate(replays):
        extras.append((start, _endless(size, f"{seed}/replay {i}"), share * batch_size))
        start += size
    for step, indices in enumerate(itertools.islice(main, total)):
        for start, source, rate in extras:
            count = floor(rate * (step + 1)) - floor(rate * step)
            indices = [*indices, *(start + index for index in itertools.islice(source, count))]
        yield indices


def tokens_per_step(
    lengths: Sequence[Sequence[int]],
    batch_size: int,
    weights: Sequence[float] | None = None,
    replays: Sequence[tuple[Sequence[int], float]] = (),
) -> int:
    """The tokens that a step of `steps` has on average; `lengths` are those of each source's examples."""
    extra = sum(share * sum(source) / len(source) for source, share in replays) * batch_size
    if weights is None:
        count = sum(map(len, lengths))
        return round(sum(map(sum, lengths)) / ceil(count / batch_size) + extra)
    means = sum(weight * sum(source) / len(source) for weight, source in zip(weights, lengths, strict=True))
    return round(batch_size * means / sum(weights) + extra)
