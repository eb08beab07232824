"""How much memory a run will take, before it takes it."""

from collections.abc import Sequence

import torch
from torch import nn

from lora.train.loss import ROWS

RUNTIME = 450e6  # bytes of Python, torch and its buffers before a model is there
GROWTH = 1.7  # the heap fragments as the sizes of micro-batches vary; measured over a hundred steps with glibc


def expected(model: nn.Module, targets: Sequence[str], s, lengths: Sequence[int], batch_size: int) -> float:
    """Bytes at the peak: weights, adapter with its gradients and Adam's two moments, activations of the largest
    micro-batch, and the logits of one chunk. `model` may be on `meta`; `s` are the settings, dtype resolved; `lengths`
    are those of all examples, of which `batch_size` make a step."""
    c, size = model.config, getattr(torch, s.dtype).itemsize
    base = sum(p.numel() for p in model.parameters()) * size
    adapter = sum(s.rank * sum(model.get_submodule(path).weight.shape) for path in targets) * 4 * 4
    longest, step = int(max(lengths)), int(sum(sorted(lengths)[-batch_size:]))
    tokens = max(longest, min(s.micro_tokens, step))
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    # per token and layer: two norms in float32 and their outputs, q/k/v twice (before and after RoPE), the residuals,
    # gate, up, silu and product, and x A of every target
    width = 8 * c.hidden_size + 3 * heads + 4 * kv + 4 * c.intermediate_size + 7 * s.rank
    wide = 2 * 2 * c.hidden_size * 4
    per_token = c.num_hidden_layers * (width * size + wide)
    attention = c.num_hidden_layers * c.num_attention_heads * min(longest, 512) * (size + 4) * tokens
    logits = min(ROWS, tokens) * c.vocab_size * (4 + 2 * size)
    return RUNTIME + base + adapter + GROWTH * (tokens * per_token + attention) + logits
