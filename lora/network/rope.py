"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864): heads turned by angles of positions."""

import math

import torch

from lora.network.config import ModelConfig


def inverse_frequencies(config: ModelConfig, dtype: torch.dtype, device=None, local: bool = False) -> torch.Tensor:
    """Angle per position for each of the d/2 pairs that are turned, (d/2,); `local` RoPE is never scaled."""
    d, scaling = config.rotary_dim, config.rope_scaling
    theta = config.rope_local_theta if local else config.rope_theta
    frequencies = 1.0 / theta ** (torch.arange(0, d, 2, device=device).to(dtype) / d)
    if local:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":  # https://github.com/meta-llama/llama-models, apply_scaling
        # slow pairs (few turns within the original context) are stretched, fast ones kept, between them a blend
        turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)  # rounded as the reference does
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * frequencies / scaling.factor + blend * frequencies
    return frequencies


Rope = tuple[torch.Tensor | None, torch.Tensor | None]  # cos and sin, each (T, d)


def rope_table(config: ModelConfig, positions: torch.Tensor, dtype: torch.dtype, kind: str | None = "global") -> Rope:
    """cos and sin of every position's angles, each (T, d), in `dtype`; formed in float32 or wider. Of RoPE that is not
    there, nothing.

    In float32 the angles are `positions * frequencies`, both float32, as the reference forms them.
    """
    if kind is None:
        return None, None
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = inverse_frequencies(config, wide, positions.device, kind == "local")
    angles = positions.to(wide)[:, None] * frequencies  # (T, d/2)
    angles = (
        angles.repeat_interleave(2, -1) if config.rope_interleaved else torch.cat((angles, angles), dim=-1)
    )  # (T, d)
    return angles.cos().to(dtype), angles.sin().to(dtype)
