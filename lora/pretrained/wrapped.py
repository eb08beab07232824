"""The language model in a folder of a larger one, which sees or hears as well: its config, and its tensors' own names.

config.json     {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", …}, "vision_config": …}
tensors         model.language_model.layers.0.…, or language_model.model.layers.0.…    -> model.layers.0.…
                lm_head.weight, or language_model.lm_head.weight                       -> lm_head.weight
                all others are left out: towers, projectors, heads that guess further tokens, and what Gemma 4's
                files have and nothing uses
"""

import re
from collections.abc import Iterable, Mapping

from lora.network.families import WRAPPERS

SHARED = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id", "torch_dtype", "dtype",
          "quantization_config")  # fmt: skip
PART = "language_model."
HEAD = "lm_head.weight"


def is_wrapped(raw: Mapping) -> bool:
    return isinstance(raw.get("model_type"), str) and raw["model_type"] in WRAPPERS and "text_config" in raw


def text_config(raw: dict) -> dict:
    """The config of the language model alone, as a folder of its own would have it."""
    if not is_wrapped(raw) or not isinstance(raw["text_config"], dict):
        return raw
    outer = {key: raw[key] for key in SHARED if raw.get(key) is not None}
    kind = raw["text_config"].get("model_type")
    named = {"architectures": [WRAPPERS[raw["model_type"]][kind]]} if kind in WRAPPERS[raw["model_type"]] else {}
    return outer | raw["text_config"] | named


def own_names(raw: Mapping, stored: Iterable[str]) -> dict[str, str]:
    """The language model's tensors: its own name -> the folder's."""
    if not is_wrapped(raw):
        own = {name: name for name in stored if not name.startswith("mtp.")}
    else:
        own = {name.replace(PART, "", 1): name for name in stored if PART in name or name == HEAD}
    return {name: there for name, there in own.items() if not is_idle(text_config(raw), name)}


def is_idle(raw: Mapping, name: str) -> bool:
    """Does it stand in a file of Gemma 4, in a layer that uses the keys and values of another?"""
    shared, layers = raw.get("num_kv_shared_layers"), raw.get("num_hidden_layers")
    found = re.fullmatch(r"model\.layers\.(\d{1,5})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.\w+", name)
    if raw.get("model_type") != "gemma4_text" or not found or type(shared) is not int or type(layers) is not int:
        return False
    return int(found[1]) >= layers - shared


def left_out(stored: Iterable[str]) -> str:
    """What stays behind, in words."""
    parts = {}
    for name in stored:
        part = ".".join(name.split(".")[: 2 if name.startswith("model.") else 1])
        parts[part] = parts.get(part, 0) + 1
    return ", ".join(f"{part} ({count} tensors)" for part, count in sorted(parts.items()))
