"""What Gemma 4 E2B and E4B add: layers that use the keys and values of an earlier one, heads of two sizes, and numbers
that each token brings to each layer.

The model classes of transformers are the source; there is no paper.
"""

from collections import UserDict
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from lora import ops
from lora.network.cache import Cache
from lora.network.config import ModelConfig
from lora.network.layers import MLP, Block, RMSNorm, Trunk
from lora.network.rope import Rope

# layer -> keys and values of the micro-batch, (T, KV, d); FSDP would give each block a copy of a dict
Shared = UserDict[int, tuple[torch.Tensor, torch.Tensor]]


class Gemma4Attention(nn.Module):
    """Scores are q · k, undivided; values are normed, too."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index, self.source, self.eps = index, config.gemma4.sources[index], config.rms_norm_eps
        self.window = config.windows[index]
        d = self.head_dim = config.head_dim if self.window else config.gemma4.global_head_dim
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, heads * d, bias=config.qkv_bias)
        self.q_norm = RMSNorm(d, self.eps)
        if self.source == index:
            self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * d, bias=config.qkv_bias) for _ in range(2))
            self.k_norm = RMSNorm(d, self.eps)
        self.o_proj = nn.Linear(heads * d, width, bias=config.o_bias)

    def group(self) -> list[nn.Module]:
        """The Linears of one input."""
        return [self.q_proj, self.k_proj, self.v_proj] if self.source == self.index else [self.q_proj]

    def forward(self, x: torch.Tensor, rope: Rope, lengths: list[int], cache: Cache | None, shared: Shared):
        """x (T, D) -> (T, D)"""
        q, *own = (y.unflatten(-1, (-1, self.head_dim)) for y in ops.linears(x, self.group()))
        q = ops.rotate(self.q_norm(q), rope.cos, rope.sin) * self.head_dim**0.5  # attention itself divides by √d
        if own:
            k = ops.rotate(self.k_norm(own[0]), rope.cos, rope.sin)
            shared[self.index] = k, ops.rms_norm(own[1], own[1].new_ones(self.head_dim), self.eps)
            if cache:
                cache.append(self.index, *shared[self.index])
        if cache:
            y = cache.attend(self.source, q, self.window)
        else:
            y = ops.attention(q, *shared[self.source], lengths, self.window)
        return self.o_proj(y.flatten(1))


class Gemma4Block(Block):
    mixers: ClassVar = {"attention": ("self_attn", Gemma4Attention)}

    def __init__(self, config: ModelConfig, index: int):
        super().__init__(config, index)
        width, inputs, self.activation = config.hidden_size, config.gemma4.inputs, config.activation
        if config.gemma4.double_wide and config.gemma4.sources[index] != index:
            self.mlp = MLP(replace(config, intermediate_size=2 * config.intermediate_size))
        self.per_layer_input_gate = nn.Linear(width, inputs, bias=False)
        self.per_layer_projection = nn.Linear(inputs, width, bias=False)
        self.post_per_layer_input_norm = RMSNorm(width, config.rms_norm_eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, x, rope: Rope, lengths: list[int], cache: Cache | None, shared: Shared, inputs: torch.Tensor):
        """x (T, D), the tokens' inputs to this layer (T, P) -> (T, D)"""
        x = x + self.norm(1, self.self_attn(self.norm(0, x), rope, lengths, cache, shared))
        x = x + self.norm(3, self.mlp(self.norm(2, x)))
        brought = ops.swiglu(self.per_layer_input_gate(x), inputs, self.activation)
        return (x + self.post_per_layer_input_norm(self.per_layer_projection(brought))) * self.layer_scalar


class Gemma4Trunk(Trunk):
    block = Gemma4Block

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.inputs, layers = config.gemma4.inputs, config.num_hidden_layers
        self.embed_tokens_per_layer = nn.Embedding.from_pretrained(
            torch.zeros(config.gemma4.inputs_vocab_size, layers * self.inputs), freeze=False
        )
        self.per_layer_model_projection = nn.Linear(config.hidden_size, layers * self.inputs, bias=False)
        self.per_layer_projection_norm = RMSNorm(self.inputs, config.rms_norm_eps)

    def layer_inputs(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What tokens (T,) with embeddings x (T, D) bring to layers: (E'[token] √P + norm(W x / √D)) / √2, (T, L, P)"""
        brought = self.embed_tokens_per_layer(tokens)
        brought = brought * torch.tensor(self.inputs**0.5, dtype=x.dtype)  # rounded, as all of its embeddings
        seen = self.per_layer_model_projection(x) * x.shape[-1] ** -0.5
        brought, seen = (y.unflatten(-1, (-1, self.inputs)) for y in (brought, seen))
        return (self.per_layer_projection_norm(seen) + brought) * 2**-0.5

    def forward(self, tokens, ropes: dict, lengths: list[int], cache: Cache | None = None, recompute: bool = False):
        """`Trunk.forward`"""
        x, shared = self.embed(tokens), Shared()
        inputs = self.layer_inputs(tokens, x).unbind(1)
        for block in self.layers:
            given = x, ropes[block.rope_kind], lengths, cache, shared, inputs[block.self_attn.index]
            x = ops.recomputed(block, *given) if recompute else block(*given)
        return self.norm(x)
