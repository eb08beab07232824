"""The language model in a folder of a larger one, which sees or hears as well: its config, and its tensors' own names.

config.json     {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", …}, "vision_config": …}
tensors         model.language_model.layers.0.…, or language_model.model.layers.0.…    -> model.layers.0.…
                lm_head.weight, or language_model.lm_head.weight                       -> lm_head.weight
                those of OTHER_PARTS are left out: towers, projectors, heads that guess further tokens, and what
                Gemma 4's files have and nothing uses
                all others keep their names, and are refused as those of no model
"""

import re
from collections.abc import Iterable, Mapping

from lora.errors import BadInput
from lora.network.families import WRAPPERS

# where both configs say it, the larger model's counts
OUTER = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id", "torch_dtype", "dtype",
         "quantization_config", "quantization")  # fmt: skip
PART = re.compile(r"^(model\.)?language_model\.(model\.)?")
OTHER_PARTS = re.compile(
    r"(model\.)?(visual|vision_tower|vision_embedder|audio_tower|multi_modal_projector|embed_vision|embed_audio)\.|mtp\."
)
HEAD = "lm_head.weight"


def is_wrapped(raw: Mapping) -> bool:
    return (
        isinstance(raw.get("model_type"), str)
        and raw["model_type"] in WRAPPERS
        and isinstance(raw.get("text_config"), Mapping)
    )


def text_config(raw: dict) -> dict:
    """The config of the language model alone, as a folder of its own would have it."""
    if not is_wrapped(raw):
        return raw
    text = raw["text_config"]
    outer = {key: raw[key] for key in OUTER if raw.get(key) is not None}
    classes, kind = WRAPPERS[raw["model_type"]], text.get("model_type")
    named = {"architectures": [classes[kind]]} if isinstance(kind, str) and kind in classes else {}
    return text | outer | named


def own_names(raw: Mapping, stored: Iterable[str], where: object) -> dict[str, str]:
    """The language model's tensors: its own name -> the folder's. Raises BadInput for one that is there twice."""
    names: dict[str, str] = {}
    larger, config = is_wrapped(raw), text_config(raw)
    for name in stored:
        if OTHER_PARTS.match(name) if larger else name.startswith("mtp."):
            continue
        part = PART.match(name) if larger else None
        rest = name[part.end() :] if part else name
        own = rest if not part or rest.startswith("lm_head.") else f"model.{rest}"
        if is_idle(config, own):
            continue
        if own in names:
            raise BadInput(f"broken model in {where}:{name}: it is there as {names[own]}, too. Download it again")
        names[own] = name
    return names


def files_of(raw: Mapping, weight_map: Mapping[str, str], where: object) -> set[str]:
    """The files of an index that have tensors of the language model."""
    return {weight_map[name] for name in own_names(raw, weight_map, where).values()}


def tied(raw: Mapping, config: dict, header: Mapping) -> dict:
    """Mistral 3's config ties the head to the embedding where it says nothing, unless the file has a head."""
    silent = is_wrapped(raw) and raw["model_type"] == "mistral3" and config.get("tie_word_embeddings") is None
    return config | {"tie_word_embeddings": HEAD not in header} if silent else config


def is_idle(raw: Mapping, name: str) -> bool:
    """Does it stand in a file of Gemma 4, in a layer that uses the keys and values of another?"""
    shared, layers = raw.get("num_kv_shared_layers"), raw.get("num_hidden_layers")
    if raw.get("model_type") != "gemma4_text" or type(shared) is not int or type(layers) is not int:
        return False
    found = re.fullmatch(r"model\.layers\.(\d{1,5})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.\w+", name)
    return bool(found) and int(found[1]) >= layers - shared


def left_out(stored: Iterable[str]) -> str:
    """What stays behind, in words."""
    parts: dict[str, int] = {}
    for name in stored:
        found = OTHER_PARTS.match(name)
        part = found[0].rstrip(".") if found else "keys and values that no layer uses"
        parts[part] = parts.get(part, 0) + 1
    return ", ".join(f"{part} ({count} tensors)" for part, count in sorted(parts.items()))
