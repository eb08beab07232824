"""Decoder blocks through `torch.compile`, for training.

Attention stays outside: its documents differ from batch to batch. So a block is compiled as two halves, which see
nothing of documents, once for each number of positions T: all blocks that are patched alike share the code.
"""

from collections.abc import Callable

import torch

from lora import ops, threads
from lora.network.decoder import Model
from lora.network.layers import Block


def compile_blocks(model: Model, **options) -> None:
    """From now on training runs compiled blocks, by `torch.compile` with `options`: made in the first step with `T`
    tokens a micro-batch, and once more, for any T, in the first with another number. Evaluations run as written."""
    threads.unbind()  # the compiler's processes are started from here, as many as there are cores
    halves = torch.compile(before, **options), torch.compile(after, **options)
    for block in model.model.layers:
        block.forward = compiled_forward(block, *halves)


def before(block: Block, x, rope):
    """x (T, D) -> q (T, H, d), k and v (T, KV, d)"""
    return block.self_attn.heads(block.norm(0, x), rope)


def after(block: Block, x, y):
    """The block's input x (T, D) and what attention found, y (T, H·d) -> the block's output (T, D)"""
    x = x.add(block.norm(1, block.self_attn.o_proj(y)), alpha=block.multiplier)
    return x.add(block.norm(3, block.mlp(block.norm(2, x))), alpha=block.multiplier)


def compiled_forward(block: Block, before: Callable, after: Callable) -> Callable:
    as_written, attention = block.forward, block.self_attn

    def forward(x, rope, lengths, cache=None):
        if cache is not None or not torch.is_grad_enabled():
            return as_written(x, rope, lengths, cache)
        if not x.requires_grad:
            x.requires_grad_()  # as the input of every other block: else the first one would be compiled by itself
        q, k, v = before(block, x, rope)
        y = ops.attention(q, k, v, lengths, attention.window, attention.softcap)
        return after(block, x, y.flatten(1))

    return forward
