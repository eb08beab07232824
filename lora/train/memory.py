"""How much memory a run will take, before it takes it, and which flag to lower where that is too much.

The terms are counted from what the code keeps; only `RUNTIME` and `GROWTH` are fitted, by `bench/memory.py`.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from math import ceil

import torch
from torch import nn

from lora.device import ROUND
from lora.ops.fast_cross_entropy import ROWS

RUNTIME = {"cpu": 300e6}  # Python, torch, a tokenizer; a GPU counts its tensors only
AGAIN = {"cpu": 80e6}  # torch's compiler, which torch.utils.checkpoint imports
GROWTH = {"cpu": 1.2}  # of the activations: the heap fragments as the sizes of micro-batches vary; measured with glibc
# on a CPU attention goes by so many queries at a time, and keeps weights up to so many bytes: `lora.ops.fast_attention`
QUERIES, WEIGHTS = 128, {"cpu": 8 * 2**20}
LONG = 2  # times --micro-tokens: an example that is longer has its activations computed again
NORMS = 3  # times a weight in float32: ΔW, W + ΔW, its squares
ADAPTERS = 5  # the adapter or all masters, their gradients, Adam's two moments, and a copy from before the step
# oneDNN multiplies bf16 on a CPU. It compiles every shape and keeps 1,024 of them; those that it drops for new ones
# leave about as much in holes. Shapes were counted in its log, bytes in the heap:
# https://uxlfoundation.github.io/oneDNN/dev_guide_primitive_cache.html
COMPILED, COMPILED_BYTES, OF_A_BATCH, OF_A_DOCUMENT = 2 * 1024, 0.58e6, 24, 7


def expected(model: nn.Module, targets: Mapping[str, int], s, lengths: Sequence[int], batch_size: int) -> float:
    """Bytes at the peak of a run: the sum of `parts`, which see for the arguments."""
    return sum(parts(model, targets, s, lengths, batch_size).values())


def recomputes(tokens: int, s) -> bool:
    """Are the activations of a micro-batch of so many tokens computed again in the backward pass?"""
    return s.checkpoint_activations or tokens > LONG * s.micro_tokens


def in_adapter(model: nn.Module, targets: Mapping[str, int], dora: bool = False) -> int:
    """The number of an adapter's parameters; `targets` are paths with their ranks."""
    shapes = {path: model.get_submodule(path).weight.shape for path in targets}
    return sum(targets[path] * sum(shape) + bool(dora) * shape[0] for path, shape in shapes.items())


def parts(model: nn.Module, targets: Mapping[str, int], s, lengths: Sequence[int], batch_size: int) -> dict[str, float]:
    """What is held at the peak of a run, in bytes by name.

    `model` may be on `meta`; `targets` are the paths of its patched Linears with their ranks; `s` are the settings of
    train.py, device and dtype resolved; `lengths` are the tokens of every example, of which `batch_size` make a step.
    Evaluation and the retention meter do not count, and loading needs less: one tensor at a time is there twice.
    Checked on a CPU; CUDA has the same terms without a heap to fragment, and was not measured.
    """
    c, size = model.config, getattr(torch, s.dtype).itemsize
    growth = GROWTH.get(s.device, 1.0)

    def activations(documents: list[int]) -> dict[str, float]:
        tokens, blocks = sum(documents), kept(c, targets, s, documents)
        row = tokens * c.hidden_size * size
        backward = 2 * tokens * c.intermediate_size * size + 2 * row  # gradients on their way through an MLP
        logits = min(ROWS, tokens) * c.vocab_size * ((10 if size == 2 else 8) + 4 * (tokens > ROWS))
        loss = 3 * row + logits  # hidden states, the trained ones, their gradient
        loss += s.full * c.vocab_size * c.hidden_size * (4 + 4 + size)  # gradient of the head: sum, scaled, rounded
        if recomputes(tokens, s):  # a whole block is there only after the loss
            return {"blocks": row * len(blocks), "backward or the loss": max(max(blocks) + backward, loss)}
        return {"blocks": sum(blocks), "backward or the loss": max(backward, loss)}

    whole = [n for n in lengths if n - 1 <= LONG * s.micro_tokens]  # they may need more than longer ones
    batches = [micro_batch(pool, batch_size, s.micro_tokens) for pool in (lengths, whole) if len(pool)]
    largest = max((activations(batch) for batch in batches), key=lambda found: sum(found.values()))
    again = s.checkpoint_activations or len(whole) < len(lengths)
    base = sum(p.numel() for p in model.parameters())
    trained = base * 4 if s.full else in_adapter(model, targets, s.dora) * getattr(torch, s.adapter_dtype).itemsize
    return {
        "runtime": RUNTIME.get(s.device, 0.0) + again * AGAIN.get(s.device, 0.0),
        "compiled kernels": compiled(s, lengths, batch_size),
        "weights": base * size * (not s.full or size < 4),  # in float32 a weight is its own master
        # PiSSA has its frozen start; of all weights a copy from after the step is too long for the gradients' places
        "adapter and optimizer": (ADAPTERS + s.full + (s.init == "pissa")) * trained,
        "norms of rows": 4 * NORMS * max(model.get_submodule(path).weight.numel() for path in targets) if s.dora else 0,
        **{name: growth * value for name, value in largest.items()},
    }


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


def compiled(s, lengths: Sequence[int], batch_size: int) -> float:
    """Bytes of machine code for the shapes of a run: those of micro-batches, of the trained rows of the last block, and
    of documents. All are rounded up, so that many are alike."""
    if (s.device, s.dtype) != ("cpu", "bfloat16"):
        return 0.0
    steps = s.max_steps or s.epochs * ceil(len(lengths) / batch_size)
    batches = steps * ceil(batch_size * sum(lengths) / len(lengths) / s.micro_tokens)
    spread = 5 * batch_size**0.5 * torch.as_tensor(lengths, dtype=torch.float64).std(correction=0).item()
    sizes = min(batches, 1 + ceil(min(spread, s.micro_tokens) / ROUND))
    documents = min(4 * len({int(n) // 16 for n in lengths}), steps * batch_size)  # up to about four in a rectangle
    return COMPILED_BYTES * min(COMPILED, 2 * OF_A_BATCH * sizes + OF_A_DOCUMENT * documents)


def attention(c, s, documents: list[int]) -> float:
    """Bytes that one block's attention keeps beside q, k and v: its output, and while they are few the weights; on a
    GPU a log-sum in their place."""
    size, heads = getattr(torch, s.dtype).itemsize, c.num_attention_heads
    output = sum(documents) * heads * c.head_dim * size
    if s.device != "cpu":
        return output + sum(documents) * heads * 4
    few = sum(n * n for n in documents) * heads * size <= WEIGHTS["cpu"]
    rounded = [ceil(n / 16) * 16 for n in documents]
    return output + few * sum(n * (n + min(n, QUERIES)) / 2 for n in rounded) * heads * size


def kept(c, targets: Mapping[str, int], s, documents: list[int]) -> list[float]:
    """Bytes that autograd keeps of each block's forward pass for a micro-batch; nothing before the first target."""
    size, tokens = getattr(torch, s.dtype).itemsize, sum(documents)
    factor = 1 + (s.init == "pissa")  # it computes with its frozen start as well
    hidden, inner = c.hidden_size, c.intermediate_size
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    norm = tokens * (hidden * size + 4)  # its result before the weight, and 1 / RMS
    halves = {  # what is kept whatever is patched, and the inputs of Linears: is one kept for them alone?
        "self_attn": (
            tokens * size * (heads + 2 * kv) + attention(c, s, documents),
            ((hidden, True, ("q_proj", "k_proj", "v_proj")), (heads, False, ("o_proj",))),  # that is attention's output
        ),
        "mlp": (  # gate, silu(gate) and up
            tokens * size * 3 * inner,
            ((hidden, True, ("gate_proj", "up_proj")), (inner, False, ("down_proj",))),  # that is formed again
        ),
    }
    widths = {"q_proj": heads, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
    widths |= {"gate_proj": inner, "up_proj": inner, "down_proj": hidden}
    blocks, started = [], s.full
    for index in range(c.num_hidden_layers):
        blocks.append(0.0)
        for half, (always, inputs) in halves.items():
            prefix = f"model.layers.{index}.{half}."
            ranks = [[targets[prefix + n] for n in names if prefix + n in targets] for *_, names in inputs]
            if not started and not any(ranks):
                continue
            blocks[-1] += always + norm * started
            started = True
            for (width, own, _), its in zip(inputs, ranks, strict=True):
                copies = 2 * len(its) if s.dropout else own * min(len(its), 1)  # noise and product of each Linear
                blocks[-1] += tokens * size * (copies * width + factor * sum(its))
            if s.dora:  # the result before its rows are scaled; with dropout, that of each product
                outs = sum(out for name, out in widths.items() if prefix + name in targets)
                blocks[-1] += tokens * size * outs * (1 + bool(s.dropout))
    return blocks


def warning(free: int | None, model, targets, s, lengths, batch_size) -> str | None:
    """One line where a run is expected to need more than is free: how much, and what to change. Else None, also where
    nobody knows what is free. Arguments as for `parts`."""
    needed = expected(model, targets, s, lengths, batch_size)
    if free is None or needed <= free:
        return None
    fix = advice(free, model, targets, s, lengths, batch_size)
    return f"little memory: about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free. {fix}"


def advice(free: float, model, targets, s, lengths, batch_size) -> str:
    """Which flag to change, and to what, so that a run fits into `free` bytes. Arguments as for `parts`.

    Asked after memory ran out where the estimate fits, it was too low: then four fifths of it have to do.
    """

    def needed(**changes) -> float:
        changed = copy(s)
        vars(changed).update(changes)
        limit = changes.get("max_len", max(lengths))
        fitting = [min(n, limit) for n in lengths if n <= limit or s.overlong == "truncate"]
        return expected(model, targets, changed, fitting, batch_size) if fitting else float("inf")

    def largest(below: int, changes) -> int:
        """The largest multiple of 64 below `below` with which it fits; 0 where none does."""
        return 64 * bisect_right(range(64, below, 64), room, key=lambda n: needed(**changes(n)))

    room = min(free, 0.8 * needed())
    if n := largest(s.micro_tokens, lambda n: {"micro_tokens": n}):
        return f"Lower --micro-tokens to {n}"
    fixes = []
    if n := largest(int(max(lengths)), lambda n: {"max_len": n, "micro_tokens": min(n, s.micro_tokens)}):
        fixes.append(f"lower --max-len to {n}" + f" and --micro-tokens to {n}" * (n < s.micro_tokens))
    if not s.checkpoint_activations:
        if needed(checkpoint_activations=True) <= room:
            fixes.append("add --checkpoint-activations")
        elif n := largest(s.micro_tokens, lambda n: {"micro_tokens": n, "checkpoint_activations": True}):
            fixes.append(f"add --checkpoint-activations and lower --micro-tokens to {n}")
    smaller = "take a smaller model" + ", or leave out --full" * s.full
    return (", or ".join(fixes) or smaller).capitalize()
