"""What GGUF calls a family, its settings and its tensors, beside what the hub calls them."""

import re
from typing import NamedTuple

import torch

from lora.network.families import Family


class Architecture(NamedTuple):
    """How GGUF holds a family."""

    hub_class: str
    model_type: str  # what a file is read as
    written: tuple[str, ...] = ()  # the hub's names of families that are written so; others are only read
    reordered: bool = False  # llama.cpp's RoPE is interleaved where the hub's is not: rows of q and k change places
    rope_freqs: bool = False  # may hold Llama 3's scaling


ARCHITECTURES = {  # which RoPE they have: `llama_model_rope_type` in llama.cpp; GLM-4's is interleaved in both
    "llama": Architecture("LlamaForCausalLM", "llama", ("llama", "mistral"), reordered=True, rope_freqs=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", ("qwen2",)),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", ("qwen3",)),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", reordered=True),
    "glm4": Architecture("Glm4ForCausalLM", "glm4"),
    "phi3": Architecture("Phi3ForCausalLM", "phi3"),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2"),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text"),
}

# Keys under the architecture's name. Any other could change the maths and is refused.
KNOWN_KEYS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
)  # fmt: skip
READ_KEYS = {  # those of families that read the hub's field
    "attention.sliding_window": ("sliding_window", int), "rope.freq_base_swa": ("rope_local_base_freq", float),
    "attention.sliding_window_pattern": ("sliding_window_pattern", int),
    "attn_logit_softcapping": ("attn_logit_softcapping", float),
    "final_logit_softcapping": ("final_logit_softcapping", float),
}  # fmt: skip

HUB_NAMES = {  # each with .weight or .bias; those after the first three are in model.layers.N (blk.N)
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "blk.attn_q": "self_attn.q_proj", "blk.attn_k": "self_attn.k_proj", "blk.attn_v": "self_attn.v_proj",
    "blk.attn_q_norm": "self_attn.q_norm", "blk.attn_k_norm": "self_attn.k_norm",
    "blk.attn_output": "self_attn.o_proj",
    "blk.ffn_gate": "mlp.gate_proj", "blk.ffn_up": "mlp.up_proj", "blk.ffn_down": "mlp.down_proj",
}  # fmt: skip
FUSED_NAMES = {"self_attn.qkv_proj": "blk.attn_qkv", "mlp.gate_up_proj": "blk.ffn_up"}
NORMS = ("blk.attn_norm", "blk.post_attention_norm", "blk.ffn_norm", "blk.post_ffw_norm")  # as `Family.norms`
ROPE_FREQS = "rope_freqs.weight"  # Llama 3's RoPE scaling: one divisor for each frequency
ROTATED = re.compile(r"\.[qk]_proj\.")  # what RoPE turns


def hub_names(family: Family) -> dict[str, str]:
    """The names of a family's tensors in a GGUF file, without layer and .weight or .bias -> those in its hub folder."""
    names = HUB_NAMES | {theirs: ours for theirs, ours in zip(NORMS, family.norms, strict=True) if ours}
    for stem, parts in family.fused:
        if stem in FUSED_NAMES:  # Baichuan's W_pack is three tensors here
            block, _ = stem.split(".")
            names = {theirs: ours for theirs, ours in names.items() if ours not in {f"{block}.{p}" for p in parts}}
            names[FUSED_NAMES[stem]] = stem
    return names


def hub_name(names: dict[str, str], name: str) -> str | None:
    """The hub's name of a tensor in GGUF, by `hub_names`; None where there is none."""
    parts = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,4})\.)?([a-z_]+)\.(weight|bias)", name)
    number, stem, kind = parts.groups() if parts else (None, "", "")
    hub = names.get(f"blk.{stem}" if number else stem)
    return hub and (f"model.layers.{number}." if number else "") + f"{hub}.{kind}"


def gguf_name(names: dict[str, str], name: str) -> str | None:
    """`hub_name` the other way."""
    number, stem, kind = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    theirs = {hub: name for name, hub in names.items() if name.startswith("blk.") == bool(number)}.get(stem)
    return theirs and f"{theirs.replace('blk.', f'blk.{number}.')}.{kind}"


def to_interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head, from the hub's order (RoPE turns i and i + d/2) to llama.cpp's (2i and 2i + 1)."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`to_interleaved` the other way."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
