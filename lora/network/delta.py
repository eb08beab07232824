"""Gated DeltaNet: attention that keeps a state of fixed size in place of all keys and values.

The state maps keys to values. Each position fades it, and corrects what it says of the position's own key:

    S_t = αₜ S_{t-1} + kₜ βₜ (vₜ - αₜ S_{t-1}ᵀ kₜ)ᵀ        oₜ = S_tᵀ qₜ / √d

Yang et al. 2024, https://arxiv.org/abs/2412.06464; names, gates and the norm as in Qwen3-Next and Qwen3.5.
"""

import torch
from torch import nn
from torch.nn import functional as F

from lora import ops
from lora.network.cache import Cache
from lora.network.config import ModelConfig
from lora.ops import wide


class Kernel(nn.Module):
    """The weights of a convolution over positions, channel by channel, as the hub's Conv1d has them: (C, 1, K)."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, size))


class Gain(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class GatedDeltaNet(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        d, width = config.delta, config.hidden_size
        self.index, self.eps = index, config.rms_norm_eps
        self.sizes = d.key_heads * d.key_dim, d.key_heads * d.key_dim, d.value_heads * d.value_dim
        self.key_dim, self.value_dim = d.key_dim, d.value_dim
        self.in_proj_qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.in_proj_z = nn.Linear(width, self.sizes[2], bias=False)
        self.in_proj_b = nn.Linear(width, d.value_heads, bias=False)
        self.in_proj_a = nn.Linear(width, d.value_heads, bias=False)
        self.conv1d = Kernel(sum(self.sizes), d.kernel)
        self.A_log = nn.Parameter(torch.zeros(d.value_heads))
        self.dt_bias = nn.Parameter(torch.ones(d.value_heads))
        self.norm = Gain(d.value_dim)
        self.out_proj = nn.Linear(self.sizes[2], width, bias=False)

    def group(self) -> list[nn.Module]:
        """The large Linears of one input."""
        return [self.in_proj_qkv, self.in_proj_z]

    def heads(self, x: torch.Tensor, rope) -> tuple[torch.Tensor, ...]:
        """x (T, D) -> queries, keys and values (T, C), the gate of outputs (T, H·d), log α and β (T, H). There is no
        RoPE: positions are told apart by what came before them."""
        qkv, z = ops.linears(x, self.group())
        rate = F.softplus(self.in_proj_a(x).to(wide(x.dtype)) + self.dt_bias)
        return qkv, z, -self.A_log.to(rate.dtype).exp() * rate, self.in_proj_b(x).sigmoid()

    def mix(self, lengths: list[int], qkv, z, decay, beta, cache: Cache | None = None) -> tuple[torch.Tensor, ...]:
        """What `heads` gives -> what was found, (T, H, d), and its gate"""
        before, states = cache.recall(self.index) if cache else (None, None)
        kernel = self.conv1d.weight[:, 0]  # (C, K)
        mixed = F.silu(ops.short_convolution(qkv, kernel, lengths, before))
        q, k, v = mixed.split(self.sizes, -1)
        q, k = (y.unflatten(-1, (-1, self.key_dim)) for y in (q, k))  # (T, KH, d)
        v = v.unflatten(-1, (-1, self.value_dim))  # (T, H, d)
        y, states = ops.gated_delta(q, k, v, decay, beta, lengths, states)
        if cache:
            cache.remember(self.index, ops.last_inputs(qkv, lengths, kernel.shape[1] - 1, before), states)
        return y, z

    def output(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """What `mix` gives -> (T, D)"""
        y = ops.rms_norm(y, self.norm.weight, self.eps)
        return ops.gated_linear(z, y.flatten(1), "silu", self.out_proj)

    def forward(self, x: torch.Tensor, rope, lengths: list[int], cache: Cache | None = None) -> torch.Tensor:
        """x (T, D) -> (T, D)"""
        return self.output(*self.mix(lengths, *self.heads(x, rope), cache=cache))
