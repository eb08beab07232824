"""How RoPE is scaled, in GGUF and in config.json.

    linear      rope.scaling.type, .factor
    llama3      rope_freqs.weight: what each frequency is divided by
    yarn        rope.scaling.type, .factor, .original_context_length, .yarn_beta_fast, .yarn_beta_slow
    longrope    rope_factors_short.weight, rope_factors_long.weight, rope.scaling.original_context_length

cos and sin are multiplied by `rope.scaling.attn_factor`, 1 where it is absent; with YaRN also by what its paper says,
0.1 ln s + 1, or by that over 0.1 m ln s + 1 where `yarn_log_multiplier` m is there. Ministral's queries grow by
`attention.temperature_scale`. Source: `llama_context` and `ggml_rope_yarn` of llama.cpp.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from lora.network.config import ModelConfig, RopeScaling
from lora.network.rope import inverse_frequencies
from lora.network.rope_fields import grows, longrope_grows
from lora.pretrained.gguf_header import Keys
from lora.pretrained.gguf_names import TEMPERATURE, Architecture

FREQS = "rope_freqs.weight"
FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
TENSORS = (FREQS, *FACTORS.values())
LLAMA3_FACTORS = (8.0, 16.0, 32.0)  # of Llama 3.1, EXAONE 4 and Llama 3.2
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TYPE, ORIGINAL, ATTENTION = "rope.scaling.type", "rope.scaling.original_context_length", "rope.scaling.attn_factor"
LOG = "rope.scaling.yarn_log_multiplier"


def short(value: float) -> float:
    """A float32 in as few decimals as tell it apart: 0.1, not 0.10000000149011612."""
    return float(str(np.float32(value)))


def scaling(keys: Keys, arch: Architecture, tensors: Mapping[str, torch.Tensor], size: int) -> dict | None:
    """`rope_scaling` of config.json; `tensors` are those of TENSORS that are there, in float32, and `size` the numbers
    of a head that RoPE turns. Raises BadInput."""
    kind, factor = keys.get(TYPE, str, "linear"), keys.get("rope.scaling.factor", float, 1.0)
    implemented = ("none", "linear", "yarn", *(kind for kind in arch.scalings if kind == "longrope"))
    keys.check(kind in implemented, TYPE, f"{kind[:40]!r}; {', '.join(implemented)} are implemented")
    keys.check(kind == "yarn" or not keys.has(TEMPERATURE), TEMPERATURE, "it is implemented with YaRN only")
    for name in tensors:
        known = arch.scalings and ("llama3" if name == FREQS else "longrope") in arch.scalings and kind != "yarn"
        plain = factor == 1 or kind == "none"
        keys.metadata.check(known and plain, name, "it is not implemented for this architecture, or for its scaling")
    if kind == "longrope" or FACTORS.keys() & {f for f, name in FACTORS.items() if name in tensors}:
        return _longrope(keys, tensors, size)
    if FREQS in tensors:
        return _llama3(keys, tensors[FREQS].numpy(), size)
    if kind == "yarn":
        return _yarn(keys, factor)
    attention = keys.get(ATTENTION, float, 1.0)
    keys.check(attention == 1, ATTENTION, f"{attention:g} is implemented with YaRN and longrope only")
    return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None


def _llama3(keys: Keys, divisors: np.ndarray, size: int) -> dict:
    """The inverse of what the hub's code multiplies frequencies by: a blend over the turns in the old context."""
    right = divisors.shape == (size // 2,)
    exponents = np.arange(0, size, 2) / size
    turns = 8192 / (2 * math.pi) * keys.get("rope.freq_base", float, 10000.0) ** -exponents
    blend = np.clip((turns - 1) / (4 - 1), 0, 1)
    for factor in LLAMA3_FACTORS:
        if right and np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-4, atol=0):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3_SCALING}
    keys.metadata.check(False, FREQS, f"not Llama 3's scaling by {' or '.join(map(str, LLAMA3_FACTORS))}")


def _yarn(keys: Keys, factor: float) -> dict:
    ext = keys.get("rope.scaling.yarn_ext_factor", float, 1.0)
    keys.check(ext == 1, "rope.scaling.yarn_ext_factor", f"{ext:g} is not implemented, only 1")
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": keys.get(ORIGINAL)}
    for field, key in ("beta_fast", "rope.scaling.yarn_beta_fast"), ("beta_slow", "rope.scaling.yarn_beta_slow"):
        found |= {field: keys.get(key, float)} if keys.has(key) else {}
    if keys.has(LOG):
        found |= {"mscale": 1.0, "mscale_all_dim": keys.get(LOG, float)}
    attention = keys.get(ATTENTION, float, 1.0)
    if attention != 1:
        theirs = grows(factor) / grows(factor, found.get("mscale_all_dim", 0.0))
        found["attention_factor"] = float(f"{theirs * attention:.7g}")  # as exact as a float32
    return found | ({"llama_4_scaling_beta": keys.get(TEMPERATURE, float)} if keys.has(TEMPERATURE) else {})


def _longrope(keys: Keys, tensors: Mapping[str, torch.Tensor], size: int) -> dict:
    found = {"rope_type": "longrope", "original_max_position_embeddings": keys.get(ORIGINAL)}
    for field, name in FACTORS.items():
        right = name in tensors and tensors[name].shape == (size // 2,)
        keys.metadata.check(right, name, f"it is not {size // 2} numbers, or missing")
        found[field] = [short(value) for value in tensors[name].tolist()]
    attention = keys.get(ATTENTION, float, 1.0)
    original = found["original_max_position_embeddings"]
    usual = longrope_grows(keys.get("context_length") / original, original)
    return found if math.isclose(attention, usual, rel_tol=1e-6) else found | {"attention_factor": attention}


# ---- the other way


def written(
    config: ModelConfig, raw: Mapping, arch: Architecture, refuse: Callable[[str], None]
) -> tuple[dict[str, float | int | str], dict[str, torch.Tensor]]:
    """Keys under the architecture's name, and tensors in float32. What it cannot hold, `refuse` is told."""
    rope = config.rope_scaling
    if rope.kind == "linear":
        return {TYPE: "linear", "rope.scaling.factor": rope.factor}, {}
    if rope.kind == "yarn":
        return _yarn_keys(rope, arch, refuse), {}
    if rope.kind not in ("default", *arch.scalings):
        refuse(f"{rope.kind} scaling")
    if rope.kind == "longrope":
        return _longrope_parts(config, raw, refuse)
    return {}, {FREQS: divisors(config)} if rope.kind == "llama3" else {}


def divisors(config: ModelConfig) -> torch.Tensor:
    """What scaling divides each frequency by. (head_dim/2,)"""
    plain = inverse_frequencies(replace(config, rope_scaling=RopeScaling()), torch.float64)
    return (plain / inverse_frequencies(config, torch.float64)).float()


def _yarn_keys(rope: RopeScaling, arch: Architecture, refuse: Callable[[str], None]) -> dict[str, float | int | str]:
    if not rope.truncate:
        refuse("YaRN whose ramp is not between whole pairs")
    if not arch.yarn and (rope.beta_fast, rope.beta_slow) != (32, 1):
        refuse("YaRN with beta_fast and beta_slow of its own")
    keys = {TYPE: "yarn", "rope.scaling.factor": rope.factor, ORIGINAL: rope.original_max_position_embeddings}
    if arch.yarn:
        keys |= {"rope.scaling.yarn_beta_fast": rope.beta_fast, "rope.scaling.yarn_beta_slow": rope.beta_slow}
    theirs = grows(rope.factor)
    if arch.yarn and rope.attention_factor == 1:
        keys[LOG], theirs = 1.0, 1.0
    if rope.attention_factor != theirs:
        keys[ATTENTION] = rope.attention_factor / theirs
    return keys | ({TEMPERATURE: rope.q_beta} if rope.q_beta else {})


def _longrope_parts(config: ModelConfig, raw: Mapping, refuse: Callable[[str], None]) -> tuple[dict, dict]:
    rope = config.rope_scaling
    long = ((raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})).get("long_factor")
    right = isinstance(long, list) and all(type(x) in (int, float) and 0 < x < 1e6 for x in long)
    if not right or len(long) != len(rope.short_factors):
        refuse("longrope without a long_factor as long as its short_factor")
    factors = dict(zip(FACTORS.values(), (rope.short_factors, long), strict=True))
    keys = {TYPE: "longrope", ORIGINAL: rope.original_max_position_embeddings, ATTENTION: rope.attention_factor}
    return keys, {name: torch.tensor(values, dtype=torch.float32) for name, values in factors.items()}
