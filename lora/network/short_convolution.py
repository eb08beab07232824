"""LFM2's gated short convolution: each position sees itself and the K - 1 before it, channel by channel.

    y = W_out (C ⊙ conv(B ⊙ x̃)),    B, C, x̃ = W_in x

Both gates are linear (Liquid AI 2025, https://arxiv.org/abs/2511.23404).
"""

import torch
from torch import nn

from lora import ops
from lora.network.cache import Cache
from lora.network.config import ModelConfig
from lora.network.delta import Kernel


class ShortConvolution(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index = index
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.conv = Kernel(config.hidden_size, config.conv_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def group(self) -> list[nn.Module]:
        """The Linears of one input."""
        return [self.in_proj]

    def heads(self, x: torch.Tensor, rope) -> tuple[torch.Tensor, ...]:
        """x (T, D) -> what is mixed, and its gate, (T, D) each; it has no RoPE."""
        b, c, x = self.in_proj(x).chunk(3, -1)
        return b * x, c

    def mix(self, lengths: list[int], x, c, cache: Cache | None = None) -> tuple[torch.Tensor, ...]:
        """What `heads` gives -> the mixed, and its gate"""
        kernel = self.conv.weight[:, 0]  # (D, K)
        (before,) = cache.recall(self.index, 1) if cache else (None,)
        if cache:
            cache.remember(self.index, ops.last_inputs(x, lengths, kernel.shape[1] - 1, before))
        return ops.short_convolution(x, kernel, lengths, before), c

    def output(self, y: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """What `mix` gives -> (T, D)"""
        return self.out_proj(c * y)

    def forward(self, x: torch.Tensor, rope, lengths: list[int], cache: Cache | None = None) -> torch.Tensor:
        """x (T, D) -> (T, D)"""
        return self.output(*self.mix(lengths, *self.heads(x, rope), cache=cache))
