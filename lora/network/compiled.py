"""Decoder blocks through `torch.compile`, for training.

What mixes positions, as attention does, stays outside: its documents differ from batch to batch. So a block is compiled
as two halves, which see nothing of documents: all blocks that are patched alike share the code. On a CPU it is for any
number of positions T, on a GPU for each.
"""

from collections.abc import Callable

import torch

from lora.errors import BadInput
from lora.network.decoder import Model
from lora.network.layers import Block


def is_compilable(model: Model) -> bool:
    """Do its blocks share nothing but their output?"""
    return all(type(block) is Block for block in model.model.layers)


def compile_blocks(model: Model, **options) -> None:
    """From now on training runs compiled blocks, by `torch.compile` with `options`, made in the first pass. Evaluations
    run as written. Raises BadInput for blocks that share more than their output."""
    if not is_compilable(model):
        kind = model.config.model_type
        why = "--compile is not for layers that share keys and values"
        raise BadInput(f"unsupported {kind} in the command line: {why}. Leave it out")
    options.setdefault("dynamic", model.device.type == "cpu" or None)
    halves = torch.compile(before, **options), torch.compile(after, **options)
    for block in model.model.layers:
        block.forward = compiled_forward(block, *halves)


def as_written(model: Model) -> None:
    """Take `compile_blocks` back."""
    for block in model.model.layers:
        vars(block).pop("forward", None)


def before(block: Block, x, rope):
    """x (T, D) -> what positions are mixed by: attention's q (T, H, d), k and v (T, KV, d)"""
    return getattr(block, block.mixer).heads(block.norm(0, x), rope)


def after(block: Block, x, *found):
    """The block's input x (T, D) and what mixing found, attention's (T, H, d) -> the block's output (T, D)"""
    x = x.add(block.norm(1, getattr(block, block.mixer).output(*found)), alpha=block.multiplier)
    return x.add(block.norm(3, block.mlp(block.norm(2, x))), alpha=block.multiplier)


def compiled_forward(block: Block, before: Callable, after: Callable) -> Callable:
    written, mixer = block.forward, getattr(block, block.mixer)

    def forward(x, rope, lengths, cache=None):
        if cache is not None or not torch.is_grad_enabled():
            return written(x, rope, lengths, cache)
        if not x.requires_grad:
            x.requires_grad_()  # as the input of every other block: else the first one would be compiled by itself
        return after(block, x, *mixer.mix(lengths, *before(block, x, rope)))

    return forward
