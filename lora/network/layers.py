"""From tokens to hidden states, for all families, with the hub's module names; what differs between families are values
of the config. Kinds of layers that few families have stand in files of their own.

Tokens are documents laid end to end: no batch axis and no padding. The formulas are `lora.ops`.
"""

import torch
from torch import nn

from lora import ops
from lora.network.cache import Cache
from lora.network.config import ModelConfig
from lora.network.delta import GatedDeltaNet
from lora.network.named import HubNamed
from lora.network.rope import Rope
from lora.network.short_convolution import ShortConvolution
from lora.ops import wide


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.offset = eps, offset

    @property
    def gain(self) -> torch.Tensor:
        """What the normed are multiplied by, (D,): the weight; or offset + weight, in float32 as the reference does."""
        return self.offset + self.weight.to(wide(self.weight.dtype)) if self.offset else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x / RMS(x) · gain, x (..., D) -> (..., D)"""
        return ops.rms_norm(x, self.gain, self.eps)


class Attention(HubNamed):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__(config.names)
        self.index, self.head_dim = index, config.head_dim
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.output_gate = config.output_gate
        self.q_proj = nn.Linear(config.hidden_size, q_size * (1 + self.output_gate), bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            sizes = (q_size, kv_size) if config.qk_norm == "projection" else (config.head_dim, config.head_dim)
            self.q_norm, self.k_norm = (RMSNorm(size, config.rms_norm_eps, config.norm_offset) for size in sizes)
        self.rope_kind, self.rope_interleaved = config.ropes[index], config.rope_interleaved
        self.window, self.softcap = config.windows[index], config.attn_logit_softcapping
        self.q_scale = (config.head_dim / config.query_pre_attn_scalar) ** 0.5  # attention itself divides by √d

    def group(self) -> list[nn.Module]:
        """The Linears of one input."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def normed(self, what: str, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, normed if that is what the family norms: the whole "projection", each "head" before RoPE,
        or each that RoPE has "turned"."""
        return (self.q_norm(q), self.k_norm(k)) if self.qk_norm == what else (q, k)

    def heads(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, ...]:
        """x (T, D) -> queries (T, H, d), keys and values (T, KV, d), and where outputs are gated a number for each."""
        q, k, v = ops.linears(x, self.group())
        q, k = self.normed("projection", q, k)
        k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (k, v))
        q, *gate = q.unflatten(-1, (-1, self.head_dim * (1 + self.output_gate))).split(self.head_dim, -1)
        q, k = self.normed("head", q, k)
        if self.rope_kind:
            q, k = (ops.rotate(y, rope.cos, rope.sin, self.rope_interleaved) for y in (q, k))
        q, k = self.normed("turned", q, k)
        q = q if rope.growth is None else q * rope.growth
        return (q if self.q_scale == 1 else q * self.q_scale), k, v, *gate

    def mix(self, lengths: list[int], q, k, v, *gate: torch.Tensor, cache: Cache | None = None):
        """softmax(q kᵀ / √d) v within each document, or over what a cache has seen of it, (T, H, d); and the gate."""
        if cache is None:
            return ops.attention(q, k, v, lengths, self.window, self.softcap), *gate
        cache.append(self.index, k, v)
        return cache.attend(self.index, q, self.window, self.softcap), *gate

    def output(self, y: torch.Tensor, *gate: torch.Tensor) -> torch.Tensor:
        """What `mix` gives -> (T, D)"""
        return self.o_proj((y * gate[0].sigmoid() if gate else y).flatten(1))

    def forward(self, x: torch.Tensor, rope: Rope, lengths: list[int], cache: Cache | None = None) -> torch.Tensor:
        """x (T, D) -> (T, D)"""
        return self.output(*self.mix(lengths, *self.heads(x, rope), cache=cache))


MIXERS = {  # the hub's name, the module
    "attention": ("self_attn", Attention), "delta": ("linear_attn", GatedDeltaNet), "conv": ("conv", ShortConvolution),
}  # fmt: skip


class MLP(HubNamed):
    def __init__(self, config: ModelConfig):
        super().__init__(config.names)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = ops.linears(x, [self.gate_proj, self.up_proj])
        return self.down_proj(ops.swiglu(gate, up, self.activation))


class Block(HubNamed):
    """A mixer of positions, attention in most, and an MLP, each added to its input. Families have norms before them,
    after them, or both."""

    mixers = MIXERS

    def __init__(self, config: ModelConfig, index: int):
        super().__init__(config.names)
        self.norms = config.norms  # their names: before and after attention, before and after the MLP
        for name in filter(None, config.norms):
            self.add_module(name, RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset))
        self.mixer, kind = self.mixers[config.mixers[index]]
        self.add_module(self.mixer, kind(config, index))
        self.rope_kind, self.multiplier = config.ropes[index], config.residual_multiplier
        self.mlp = MLP(config)

    def norm(self, place: int, x: torch.Tensor) -> torch.Tensor:
        name = self.norms[place]
        return getattr(self, name)(x) if name else x

    def forward(self, x: torch.Tensor, rope: Rope, lengths: list[int], cache: Cache | None = None) -> torch.Tensor:
        """x (T, D) -> (T, D)"""
        x = x.add(self.norm(1, getattr(self, self.mixer)(self.norm(0, x), rope, lengths, cache)), alpha=self.multiplier)
        return x.add(self.norm(3, self.mlp(self.norm(2, x))), alpha=self.multiplier)


class Trunk(HubNamed):
    """Everything but the head; the hub calls it `model`."""

    block = Block

    def __init__(self, config: ModelConfig):
        super().__init__(config.names)
        # zeros, to be loaded: nn.Embedding's own normal_ on `meta` would import torch's compiler, more than a second
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.zeros(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(self.block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)
        self.scale, self.scale_rounded = config.embedding_scale, config.embedding_scale_rounded
        self.logits_scaling = config.logits_scaling

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (T,) -> (T, D)"""
        x = self.embed_tokens(tokens)
        if self.scale == 1:
            return x
        return x * (torch.tensor(self.scale, dtype=x.dtype) if self.scale_rounded else self.scale)

    def forward(self, tokens, ropes: dict, lengths: list[int], cache: Cache | None = None, recompute: bool = False):
        """tokens (T,) -> (T, D). To `recompute` is to save only the input of each block for the backward pass."""
        x = self.embed(tokens)
        for block in self.layers:
            inputs = x, ropes[block.rope_kind], lengths, cache
            x = ops.recomputed(block, *inputs) if recompute else block(*inputs)
        x = self.norm(x)
        return x if self.logits_scaling == 1 else x / self.logits_scaling  # the head is linear
