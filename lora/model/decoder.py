"""One decoder for the Llama and Qwen2 families, with the hub's module names; family differences are config values.

Tokens are documents laid end to end: no batch axis and no padding. A tied model owns no `lm_head`.
RMSNorm: https://arxiv.org/abs/1910.07467. RoPE: https://arxiv.org/abs/2104.09864. SwiGLU: https://arxiv.org/abs/2002.05202.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora.model.attention import attend
from lora.model.cache import Cache
from lora.model.config import ModelConfig
from lora.model.linear import together


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: what norms, softmax, angles and losses are computed in."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(wide(x.dtype))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)  # rounded before the weight, as the reference does


def inverse_frequencies(config: ModelConfig, dtype: torch.dtype, device=None) -> torch.Tensor:
    """Angle per position for each of the head_dim/2 pairs, with the config's scaling. (d/2,)"""
    d, scaling = config.head_dim, config.rope_scaling
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, device=device).to(dtype) / d)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":  # https://github.com/meta-llama/llama-models, apply_scaling
        # slow pairs (few turns within the original context) are stretched, fast ones kept, between them a blend
        turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)  # rounded as the reference does
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * frequencies / scaling.factor + blend * frequencies
    return frequencies


def rope_table(config: ModelConfig, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position's angles, each (T, d), in `dtype`; formed in float32 or wider.

    In float32 the angles are `positions * frequencies`, both float32, as the reference forms them.
    """
    angles = positions.to(wide(dtype))[:, None] * inverse_frequencies(config, wide(dtype), positions.device)  # (T, d/2)
    angles = torch.cat((angles, angles), dim=-1)  # (T, d)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on x (T, heads, d): dimension i is paired with i + d/2, as in the hub's checkpoints."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)

    def forward(self, x, cos, sin, lengths: list[int], cache: Cache | None = None) -> torch.Tensor:
        T, d = x.shape[0], self.head_dim
        q, k, v = (y.view(T, -1, d) for y in together(x, [self.q_proj, self.k_proj, self.v_proj]))  # (T, heads, d)
        if cache is None:
            y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, lengths)  # (T, H, d)
        else:  # a few positions: fewer operations count for more than a copy
            q, k = rotate(torch.cat((q, k), 1), cos, sin).split((q.shape[1], k.shape[1]), 1)
            y = cache.attend(self.index, q, k, v)
        return self.o_proj(y.reshape(T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = together(x, [self.gate_proj, self.up_proj])
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, lengths, cache=None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, lengths, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything but the head; the hub calls it `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # zeros, to be loaded: nn.Embedding's own normal_ on `meta` would import torch's compiler, more than a second
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.zeros(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Model(nn.Module):
    """A causal language model: `logits = head(trunk(tokens, ...))`.

    With `checkpoint_activations` only the input of every block is kept for the backward pass, which computes the rest
    again (Chen et al. 2016, https://arxiv.org/abs/1604.06174): the same numbers, dropout included.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpoint_activations = config, False
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def head_weight(self) -> torch.Tensor:
        """The vocabulary projection, (V, D): the embedding itself where it is tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def trunk(self, tokens, lengths: list[int] | None = None, positions=None, cache: Cache | None = None):
        """tokens (T,): documents of `lengths` end to end, or the next tokens of a cache's rows -> hidden states (T, D).

        `positions` (T,) default to 0, 1, ... in each document, and go on where the cache stands.
        """
        lengths = lengths or [len(tokens)]
        if positions is None:
            starts = cache.lengths if cache else [0] * len(lengths)
            positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
        cos, sin = rope_table(self.config, positions.to(tokens.device), self.dtype)
        if cache:
            cache.begin(lengths)
        x = self.model.embed_tokens(tokens)  # (T, D)
        again = self.checkpoint_activations and torch.is_grad_enabled() and cache is None
        for block in self.model.layers:
            if again:
                x = checkpoint(block, x, cos, sin, lengths, use_reentrant=False)
            else:
                x = block(x, cos, sin, lengths, cache)
        if cache:
            cache.advance()
        return self.model.norm(x)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (T, D) -> logits (T, V)."""
        return F.linear(hidden, self.head_weight) if self.config.tie_word_embeddings else self.lm_head(hidden)

    def forward(self, tokens, lengths=None, positions=None, cache=None) -> torch.Tensor:
        return self.head(self.trunk(tokens, lengths, positions, cache))

    def groups(self):
        """Lists of Linears of one input, for `linear.prepared`."""
        for block in self.model.layers:
            attention, mlp = block.self_attn, block.mlp
            yield [attention.q_proj, attention.k_proj, attention.v_proj]
            yield [attention.o_proj]
            yield [mlp.gate_proj, mlp.up_proj]
            yield [mlp.down_proj]

    def new_cache(self, rows: int, room: int) -> Cache:
        c = self.config
        return Cache(c.num_hidden_layers, rows, c.num_key_value_heads, room, c.head_dim, self.dtype, self.device)
