"""How much memory a run will take, before it takes it, and which flag to lower where that is too much.

Autograd says what it saves for the backward pass: one micro-batch goes through the model on `meta`, where tensors have
shapes but no numbers, so every family and every variant counts itself. What autograd does not see are the few terms of
`parts`; of these only `RUNTIME` and `GROWTH` are fitted, by `bench/memory.py`.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cache, lru_cache
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lora import ops
from lora.device import ROUND
from lora.ops.fast_log_probs import ROWS
from lora.quant.packed import AT_ONCE

# Python, torch with its compiler, a tokenizer, matplotlib, and holes that are there whatever the model's size; a GPU
# counts its tensors only
RUNTIME = {"cpu": 560e6}
GROWTH = {"cpu": 1.06}  # of the activations: what is freed between them leaves holes in the heap; measured with glibc
LONG = 2  # times --micro-tokens: an example that is longer has its activations computed again
NORMS = 3  # times a weight in float32: ΔW, W + ΔW, its squares
ADAPTERS = 4  # the adapter or all masters, their gradients, Adam's two moments
# oneDNN multiplies bf16 on a CPU. It compiles every shape and keeps 1,024 of them; those that it drops for new ones
# leave about as much in holes. Shapes were counted in its log, bytes in the heap:
# https://uxlfoundation.github.io/oneDNN/dev_guide_primitive_cache.html
COMPILED, COMPILED_BYTES, OF_A_BATCH, OF_A_DOCUMENT = 2 * 1024, 0.5e6, 30, 7
DECODING = 6  # bytes a number, codes as indices and what they become in float32, where a weight is decoded at once


class PackedSizes(NamedTuple):
    """Bytes of the weights that --quant packs, and the numbers that they stand for: in all, in the largest block of a
    model, in the largest weight."""

    bytes: int = 0
    numbers: int = 0
    block: int = 0
    weight: int = 0

    @classmethod
    def of(cls, base) -> "PackedSizes":
        """`base` are model files with a `quant`."""
        sizes = {name: prod(shape) for name, (_, shape) in base.header.items() if base.nbytes(name)}
        blocks = Counter()
        for name, size in sizes.items():
            blocks[name.split(".")[2]] += size  # of model.layers.7.mlp.up_proj.weight
        return cls(sum(map(base.nbytes, sizes)), sum(sizes.values()), max(blocks.values()), max(sizes.values()))


def saved(model: nn.Module, documents: Sequence[int], blocks: Sequence[nn.Module]) -> int:
    """Bytes that autograd saves of the loss of documents with these lengths, each storage once, parameters left aside.

    `model` is on `meta`, patched and in training mode; only these of its blocks are run.
    """
    own = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    storages, all_blocks = {}, model.model.layers

    def save(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage  # which lives on, so that no other has its id

    try:
        model.model.layers = nn.ModuleList(blocks)
        tokens = torch.zeros(sum(documents), dtype=torch.long, device="meta")
        with saved_tensors_hooks(save, lambda _: None):
            hidden = model.trunk(tokens, list(documents))  # (T, D)
            ops.cross_entropy(hidden, model.head_weight, tokens, cap=model.config.final_logit_softcapping)
    finally:
        model.model.layers = all_blocks
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


@lru_cache(maxsize=256)
def saved_by_blocks(model: nn.Module, documents: tuple[int, ...]) -> list[int]:
    """`saved` of each block; that of the first which trains includes the loss, and those before it save nothing. Of
    blocks that are alike one is run, behind the first, and behind the one whose keys it uses where that is another."""
    blocks, c = list(model.model.layers), model.config
    sources = c.gemma4.sources if c.gemma4 else range(len(blocks))
    first = next(i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters()))

    @cache
    def run(these: frozenset[int]) -> int:
        return saved(model, documents, [blocks[i] for i in sorted(these)])

    start = frozenset((first, sources[first]))
    kinds = [(str(block), *more) for block, *more in zip(blocks, c.windows, c.ropes, strict=True)]
    behind = {kind: (start | {sources[i]}) - {i} for i, kind in enumerate(kinds) if i > first}
    one_of = {kind: i for i, kind in enumerate(kinds) if i > first}
    added = {kind: run(behind[kind] | {i}) - run(behind[kind]) for kind, i in one_of.items()}
    return [0] * first + [run(start)] + [added[kind] for kind in kinds[first + 1 :]]


def recomputes(tokens: int, args) -> bool:
    """Are the activations of a micro-batch of so many tokens computed again in the backward pass?"""
    return args.checkpoint_activations or tokens > LONG * args.micro_tokens


Packings = Mapping[str, PackedSizes]  # of a base, by what --quant may be


def expected(model: nn.Module, args, lengths: Sequence[int], batch_size: int, packings: Packings) -> float:
    """Bytes at the peak of a run: the sum of `parts`, which see for the arguments."""
    return sum(parts(model, args, lengths, batch_size, packings).values())


def parts(model: nn.Module, args, lengths: Sequence[int], batch_size: int, packings: Packings) -> dict[str, float]:
    """What is held at the peak of a run, in bytes by name.

    `model` is as for `saved`; `args` are the settings of train.py, device and dtype resolved; `lengths` are the tokens
    of every example, of which `batch_size` make a step; `packings` say what --quant packs. Evaluation and the retention
    meter do not count, and loading needs less: one tensor at a time is there twice. Checked on a CPU; CUDA has the same
    terms without a heap to fragment, and was not measured.
    """
    size, (vocabulary, hidden) = getattr(torch, args.dtype).itemsize, model.head_weight.shape
    growth, packed = GROWTH.get(args.device, 1.0), packings.get(args.quant, PackedSizes())

    def activations(documents: list[int]) -> dict[str, float]:
        blocks, tokens, row = saved_by_blocks(model, tuple(documents)), sum(documents), sum(documents) * hidden * size
        chunk = (tokens if ops.is_plain() else min(ROWS, tokens)) * vocabulary  # of logits
        # logits, and beside them in float32 those of a few rows; of a formula as written of all, and logarithms
        each = (10 if ops.is_plain() else size) + 8 * (model.config.final_logit_softcapping is not None)
        # hidden states and their gradient; and the head once more, which oneDNN and MKL lay out anew for a product
        work = chunk * each + 2 * row + vocabulary * hidden * size
        work += args.full * vocabulary * hidden * (4 + size)  # the gradient of the head, scaled and rounded
        again = recomputes(tokens, args)
        numbers = size * (packed.block if again else packed.weight)  # of packed weights, where gradients go through
        numbers += DECODING * packed.weight * (args.device not in AT_ONCE)
        work = max(work, max(blocks) / 2 + numbers)  # gradients on their way through a block
        if again:  # of most blocks only the input is kept
            return {"blocks": row * len(blocks) + max(blocks), "backward or the loss": work}
        kept = size * packed.numbers * ops.is_plain()  # autograd's own gradient of a product needs its factors
        return {"blocks": sum(blocks) + kept, "backward or the loss": work}

    whole = [n for n in lengths if n - 1 <= LONG * args.micro_tokens]  # they may need more than longer ones
    batches = [micro_batch(pool, batch_size, args.micro_tokens) for pool in (lengths, whole) if len(pool)]
    largest = max((activations(batch) for batch in batches), key=lambda found: sum(found.values()))
    largest = {name: growth * value for name, value in largest.items()}
    trained = sum(p.numel() * (4 if args.full else p.itemsize) for p in model.parameters() if p.requires_grad)
    bases = [p for p in model.parameters() if args.full or not p.requires_grad]
    return {
        "runtime": RUNTIME.get(args.device, 0.0),
        "compiled kernels": compiled(args, lengths, batch_size),
        # in float32 a weight is its own master
        "weights": (sum(p.numel() for p in bases) - packed.numbers) * size * (not args.full or size < 4) + packed.bytes,
        "adapter and optimizer": (ADAPTERS + (args.init == "pissa")) * trained,  # PiSSA has its frozen start
        "norms of rows": 4 * NORMS * max(p.numel() for p in model.model.layers.parameters()) if args.dora else 0,
        **largest,
        # from before the step; of all weights another one from after it is too long for the gradients' places
        "copies at the step": max(0, (1 + args.full) * trained - sum(largest.values())),  # where activations were
    }


def in_adapter(model: nn.Module, targets: Mapping[str, int], dora: bool = False) -> int:
    """The number of an adapter's parameters; `targets` are paths with their ranks."""
    shapes = {path: model.get_submodule(path).weight.shape for path in targets}
    return sum(targets[path] * sum(shape) + bool(dora) * shape[0] for path, shape in shapes.items())


def micro_batch(lengths: Sequence[int], batch_size: int, micro_tokens: int) -> list[int]:
    """The documents of about the largest micro-batch of a run, the longest first, the last cut so that they fit.

    Of 160 steps of random examples one has more tokens than the mean and 2.5 standard deviations.
    """
    documents = torch.as_tensor(lengths, dtype=torch.float64) - 1  # a last token predicts nothing
    likely = batch_size * documents.mean() + 2.5 * batch_size**0.5 * documents.std(correction=0)
    longest = documents.sort(descending=True).values[:batch_size].tolist()
    room, chosen = max(longest[0], min(micro_tokens, likely.item())), []
    for length in longest:
        chosen.append(int(min(length, room - sum(chosen))))
    return [length for length in chosen if length > 0]


def compiled(args, lengths: Sequence[int], batch_size: int) -> float:
    """Bytes of machine code for the shapes of a run: those of micro-batches, of the trained rows of the last block, and
    of documents. All are rounded up, so that many are alike."""
    if (args.device, args.dtype) != ("cpu", "bfloat16"):
        return 0.0
    steps = args.max_steps or args.epochs * ceil(len(lengths) / batch_size)
    batches = steps * ceil(batch_size * sum(lengths) / len(lengths) / args.micro_tokens)
    spread = 5 * batch_size**0.5 * torch.as_tensor(lengths, dtype=torch.float64).std(correction=0).item()
    sizes = min(batches, 1 + ceil(min(spread, args.micro_tokens) / ROUND))
    documents = min(4 * len({int(n) // 16 for n in lengths}), steps * batch_size)  # up to about four in a rectangle
    return COMPILED_BYTES * min(COMPILED, 2 * OF_A_BATCH * sizes + OF_A_DOCUMENT * documents)


def warning(free: int | None, model, args, lengths, batch_size, packings: Packings) -> str | None:
    """One line where a run is expected to need more than is free: how much, and what to change. Else None, also where
    nobody knows what is free. Arguments as for `parts`."""
    needed = expected(model, args, lengths, batch_size, packings)
    if free is None or needed <= free:
        return None
    fix = advice(free, model, args, lengths, batch_size, packings)
    return f"little memory: about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free. {fix}"


def advice(free: float, model, args, lengths, batch_size, packings: Packings) -> str:
    """Which flag to change, and to what, so that a run fits into `free` bytes. Arguments as for `parts`.

    Asked after memory ran out where the estimate fits, it was too low: then four fifths of it have to do.
    """

    def needed(**changes) -> float:
        changed = copy(args)
        vars(changed).update(changes)
        limit = changes.get("max_len", max(lengths))
        fitting = [min(n, limit) for n in lengths if n <= limit or args.overlong in ("truncate", "split")]
        return expected(model, changed, fitting, batch_size, packings) if fitting else float("inf")

    def largest(below: int, changes) -> int:
        """The largest multiple of 64 below `below` with which it fits; 0 where none does."""
        return 64 * bisect_right(range(64, below, 64), room, key=lambda n: needed(**changes(n)))

    room = min(free, 0.8 * needed())
    if n := largest(args.micro_tokens, lambda n: {"micro_tokens": n}):
        return f"Lower --micro-tokens to {n}"
    fixes = []
    if n := largest(int(max(lengths)), lambda n: {"max_len": n, "micro_tokens": min(n, args.micro_tokens)}):
        fixes.append(f"lower --max-len to {n}" + f" and --micro-tokens to {n}" * (n < args.micro_tokens))
    if not args.checkpoint_activations:
        if needed(checkpoint_activations=True) <= room:
            fixes.append("add --checkpoint-activations")
        elif n := largest(args.micro_tokens, lambda n: {"micro_tokens": n, "checkpoint_activations": True}):
            fixes.append(f"add --checkpoint-activations and lower --micro-tokens to {n}")
    smaller = "take a smaller model" + ", or leave out --full" * args.full
    for quant in packings.keys() - {args.quant}:
        if needed(quant=quant) <= room:
            fixes.append(f"add --quant {quant}")
    text = ", or ".join(fixes) or smaller
    return text[0].upper() + text[1:]
