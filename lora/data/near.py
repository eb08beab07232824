"""Pairs of texts that are nearly the same: 90 % or more of their 5-grams of characters, as sets, are shared (Jaccard).

Candidates come from MinHash signatures cut into bands (Broder 1997; Leskovec et al.,
"Mining of Massive Datasets", chapter 3): a pair of similarity s shares a band with probability 1 - (1 - s^r)^b, for
r = 12 hashes in each of b = 22 bands 0.9993 at s = 0.9, 0.28 at 0.7 and 0.005 at 0.5. Every candidate is then compared
exactly, so what is reported is true. Work is linear in the rows: in a band a row is compared with the first row and the
NEAREST ones that have it too, rows of one group are not compared again, and after TRIES comparisons in vain a row is
left alone. So only where more than NEAREST + 1 rows share a band without being near-duplicates may one be overlooked.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

GRAM = 5  # characters
BANDS, ROWS = 22, 12
NEAREST, TRIES = 8, 4
LIKELY = 0.82  # share of equal hashes: 4 standard deviations, of sqrt(0.9 * 0.1 / 264) each, below 0.9
CHUNK = 2**17  # characters that are hashed at once; its arrays fit into the cache


def near_pairs(texts: Sequence[str], split: int = 0) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), i < j, of near texts that join each group of them; with `split`, only pairs with i < split <= j."""
    places = [place for place, text in enumerate(texts) if len(text) >= GRAM]  # a shorter one has no 5-gram
    long = [texts[place] for place in places]
    group, vain = list(range(len(long))), Counter()

    def leader(member: int) -> int:
        while group[member] != member:
            group[member] = member = group[group[member]]
        return member

    for one, other in _candidates(long, bisect_left(places, split)):
        ours, theirs = leader(one), leader(other)
        if ours == theirs or vain[other] >= TRIES:
            continue
        if is_near(long[one], long[other]):
            group[max(ours, theirs)] = min(ours, theirs)
            yield places[one], places[other]
        else:
            vain[other] += 1


@lru_cache(maxsize=1024)
def _grams(text: str) -> set[str]:
    return {text[start : start + GRAM] for start in range(len(text) - GRAM + 1)}


def is_near(one: str, other: str) -> bool:
    """Two texts are near if the Jaccard similarity of their 5-grams is 0.9 or more, computed in whole numbers."""
    ours, theirs = _grams(one), _grams(other)
    if 10 * min(len(ours), len(theirs)) < 9 * max(len(ours), len(theirs)):
        return False
    shared = len(ours & theirs)
    return 10 * shared >= 9 * (len(ours) + len(theirs) - shared) > 0


def _candidates(texts: Sequence[str], split: int) -> Iterator[tuple[int, int]]:
    """Pairs that share a band and most of their hashes, the likeliest first."""
    if len(texts) < 2:
        return
    keys, hashes = _signatures(texts)
    pairs = [np.empty(0, np.int64)]
    for band in range(BANDS):
        order = np.lexsort([keys[:, (band + turn) % BANDS] for turn in (2, 1, 0)])  # in a band, by the next ones
        starts = np.flatnonzero(np.diff(keys[order, band], prepend=keys[order[0], band] ^ 1) != 0)
        sizes = np.diff(starts, append=len(order))
        start = np.repeat(starts, sizes)
        many = np.flatnonzero(np.repeat(sizes, sizes) > 1)
        ends = [(order[many], np.repeat(np.minimum.reduceat(order, starts), sizes)[many])]
        for step in range(1, NEAREST + 1):
            near = many[many - step >= start[many]]
            ends.append((order[near], order[near - step]))
        one, other = (np.concatenate(side) for side in zip(*ends, strict=True))
        one, other = np.minimum(one, other), np.maximum(one, other)
        keep = (one < split) & (split <= other) if split else one < other
        pairs.append(one[keep] * len(texts) + other[keep])
    both = np.sort(np.concatenate(pairs))
    both = both[np.diff(both, prepend=-1) > 0]
    likely = np.empty(len(both), np.float32)
    for at in range(0, len(both), CHUNK):
        one, other = np.divmod(both[at : at + CHUNK], len(texts))
        likely[at : at + CHUNK] = (hashes[one] == hashes[other]).mean(axis=1)
    both, likely = both[likely >= LIKELY], likely[likely >= LIKELY]
    for pair in both[np.argsort(-likely, kind="stable")]:
        yield divmod(int(pair), len(texts))


def _signatures(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """MinHash: a key for each band, uint64 (texts, BANDS), and the low byte of every hash, uint8 (texts, BANDS * ROWS).

    A 5-gram is a random 32-bit number x; hash i of a text is the least a_i x + c_i mod 2^32, a_i odd, over its 5-grams.
    """
    count = BANDS * ROWS
    keys, low = np.empty((len(texts), BANDS), np.uint64), np.empty((len(texts), count), np.uint8)
    factors, terms = (_mix(np.arange(1, 2 * count + 1, dtype=np.uint64)) >> 32).astype(np.uint32).reshape(2, count)
    factors |= np.uint32(1)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    total, at = np.cumsum(lengths), 0
    while at < len(texts):
        end = max(at + 1, int(np.searchsorted(total, total[at] - lengths[at] + CHUNK)))
        codes = np.frombuffer("".join(texts[at:end]).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        grams = np.zeros(len(codes) - GRAM + 1, np.uint64)
        for place in range(GRAM):
            grams = grams * PRIME + codes[place : place + len(grams)]
        ends = total[at:end] - total[at] + lengths[at]
        whole = np.ones(len(codes), bool)
        for place in range(1, GRAM):
            whole[ends - place] = False  # begins in one text and ends in the next
        grams = (_mix(grams) >> 32).astype(np.uint32)[whole[: len(grams)]]
        starts = ends - lengths[at:end] - (GRAM - 1) * np.arange(end - at)
        least, hashed = np.empty((count, end - at), np.uint32), np.empty_like(grams)
        for number in range(count):
            np.multiply(grams, factors[number], out=hashed)
            np.add(hashed, terms[number], out=hashed)
            np.minimum.reduceat(hashed, starts, out=least[number])
        low[at:end] = least.T.astype(np.uint8)
        key = np.zeros((BANDS, end - at), np.uint64)
        for row in least.reshape(BANDS, ROWS, -1).transpose(1, 0, 2):
            key = _mix(key * PRIME + row)
        keys[at:end] = key.T
        at = end
    return keys, low


PRIME = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): 64 bits that depend on all bits of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
