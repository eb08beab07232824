"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864): heads turned by angles of positions."""

import math
from typing import NamedTuple

import torch

from lora.network.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, dtype: torch.dtype, device=None, local: bool = False) -> torch.Tensor:
    """Angle per position for each of the d/2 pairs that are turned, (d/2,); `local` RoPE is never scaled."""
    d, scaling = config.rope_local_dim if local else config.rotary_dim, config.rope_scaling
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
    if scaling.kind == "proportional":
        return frequencies * (torch.arange(d // 2, device=device) < scaling.turned)
    if scaling.kind == "yarn":  # Peng et al. 2023, https://arxiv.org/abs/2309.00071, sections 3.2 and 3.3
        keep = 1 - yarn_ramp(scaling, d, theta).to(frequencies)
        return frequencies / scaling.factor * (1 - keep) + frequencies * keep
    if scaling.kind == "longrope":  # Ding et al. 2024, https://arxiv.org/abs/2402.13753
        return frequencies / torch.tensor(scaling.short_factors, device=device).to(dtype)
    return frequencies


def yarn_ramp(scaling: RopeScaling, d: int, theta: float) -> torch.Tensor:
    """How much of the stretching each pair takes, (d/2,): none of those that turn `beta_fast` times in the original
    length, all of those that turn `beta_slow` times, in between a ramp."""

    def pair(turns: float) -> float:
        """Which pair turns so often."""
        return d * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    high += 0.001 * (low == high)
    return ((torch.arange(d // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


class Rope(NamedTuple):
    """cos and sin, each (T, d), or none where a layer has no RoPE; what queries grow by, (T, 1, 1), where they do."""

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    growth: torch.Tensor | None = None


def rope_table(config: ModelConfig, positions: torch.Tensor, dtype: torch.dtype, kind: str | None = "global") -> Rope:
    """cos and sin of every position's angles, each (T, d), in `dtype`; formed in float32 or wider. Of RoPE that is not
    there, nothing.

    In float32 the angles are `positions * frequencies`, both float32, as the reference forms them.
    """
    if kind is None:
        return Rope()
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = inverse_frequencies(config, wide, positions.device, kind == "local")
    angles = positions.to(wide)[:, None] * frequencies  # (T, d/2)
    angles = (
        angles.repeat_interleave(2, -1) if config.rope_interleaved else torch.cat((angles, angles), dim=-1)
    )  # (T, d)
    scaling, growth = config.rope_scaling, None
    if scaling.q_beta and kind != "local":
        turns = torch.floor(positions.to(wide) / scaling.original_max_position_embeddings)
        growth = (1 + scaling.q_beta * torch.log(1 + turns)).to(dtype)[:, None, None]
    by = 1.0 if kind == "local" else scaling.attention_factor
    return Rope((angles.cos() * by).to(dtype), (angles.sin() * by).to(dtype), growth)
