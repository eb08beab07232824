"""Linears that a family stores as one tensor, the rows of each below those of the one before.

Model files offer each under a name of its own, so that loading, adapters and merging know of no such tensor; only a
merged model is written as the family has it.
"""

from collections.abc import Iterable

from lora.network.config import ModelConfig
from lora.network.families import FAMILIES

Header = dict[str, tuple[str, tuple[int, ...]]]


def _parts(config: ModelConfig, name: str) -> list[str]:
    """`...self_attn.qkv_proj.weight` -> `...self_attn.q_proj.weight` and so on; none for any other name."""
    for stem, parts in config.fused:
        block, _ = stem.split(".")
        if f".{stem}." in name:
            return [name.replace(stem, f"{block}.{part}") for part in parts]
    return []


def split(raw: dict, header: Header, where: str) -> tuple[Header, dict[str, tuple[str, int]]]:
    """The header of the model of a raw config.json with every fused tensor in its parts, and where each part lies: its
    tensor, and its first row there. Raises BadInput for a config that is not supported, if its family fuses.

    A tensor that has not as many rows as its parts, or that is there in parts as well, is left as it is.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES or not FAMILIES[kind].fused:
        return header, {}
    config = ModelConfig.from_json(raw, where)
    found, lie = {}, {}
    for name, (dtype, shape) in header.items():
        parts, rows = places(config, name)
        if not parts or shape[:1] != (rows,) or header.keys() & parts.keys():
            found[name] = dtype, shape
            continue
        for part, (first, count) in parts.items():
            found[part] = dtype, (count, *shape[1:])
            lie[part] = name, first
    return found, lie


def places(config: ModelConfig, whole: str) -> tuple[dict[str, tuple[int, int]], int]:
    """The parts of a fused tensor with their first row and how many they have, and the rows of all."""
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    sizes = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    found, row = {}, 0
    for part in _parts(config, whole):
        found[part] = row, sizes.get(part.split(".")[-2], config.intermediate_size)
        row += found[part][1]
    return found, row


def stored(config: ModelConfig, names: Iterable[str]) -> dict[str, list[str]]:
    """How a model's tensors are written: the name of each tensor in a file, and whose rows are in it."""
    if config.written_as:
        return {name: [name] for name in names}
    layout: dict[str, list[str]] = {}
    for name in names:
        layout.setdefault(_whole(config, name), []).append(name)
    return layout


def _whole(config: ModelConfig, name: str) -> str:
    for stem, parts in config.fused:
        block, _ = stem.split(".")
        for part in parts:
            if f".{block}.{part}." in name:
                return name.replace(f"{block}.{part}", stem)
    return name
