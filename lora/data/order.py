"""Which examples make each step: a pure function of the seed, so that a resumed run needs no generator's state."""

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from math import ceil, floor


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
