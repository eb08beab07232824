"""What GGUF calls a family, its settings and its tensors, beside what the hub calls them."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from lora.network.families import Family


class Architecture(NamedTuple):
    """How GGUF holds a family."""

    hub_class: str
    model_type: str  # what a file is read as
    written: tuple[str, ...] = ()  # the hub's names of families that are written so; others are only read
    reordered: bool = False  # llama.cpp's RoPE is interleaved where the hub's is not: rows of q and k change places
    scalings: tuple[str, ...] = ()  # of RoPE, beside linear and YaRN's
    yarn_betas: bool = False  # llama.cpp reads where YaRN's ramp begins and ends
    names: Mapping[str, str] = MappingProxyType({})  # of tensors that others have not, or call otherwise
    windows: bool = False  # llama.cpp has sliding windows in all layers but one in so many
    biases: tuple[str, ...] = ()  # the Linears that may have one in llama.cpp
    head: bool | None = None  # whether it has one beside the embedding, where llama.cpp knows only one of the two
    square: bool = False  # it knows only heads that are as wide together as the model


DELTA_NAMES = {
    "blk.post_attention_norm": "post_attention_layernorm",
    "blk.attn_qkv": "linear_attn.in_proj_qkv", "blk.attn_gate": "linear_attn.in_proj_z",
    "blk.ssm_beta": "linear_attn.in_proj_b", "blk.ssm_alpha": "linear_attn.in_proj_a",
    "blk.ssm_conv1d": "linear_attn.conv1d", "blk.ssm_norm": "linear_attn.norm", "blk.ssm_out": "linear_attn.out_proj",
    "blk.ssm_a.": "linear_attn.A_log.", "blk.ssm_dt.bias.": "linear_attn.dt_bias.",
}  # fmt: skip
QKV = ("q_proj", "k_proj", "v_proj")
LINEARS = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
GEMMA_27B = (46, 62)  # layers; llama.cpp knows these by them, the files do not say by what attention divides
ARCHITECTURES = {  # which RoPE they have: `llama_model_rope_type` in llama.cpp; GLM-4's is interleaved in both
    "llama": Architecture(
        "LlamaForCausalLM",
        "llama",
        ("llama", "mistral", "baichuan"),
        reordered=True,
        scalings=("llama3", "longrope"),
        biases=LINEARS,
    ),
    "mistral3": Architecture("Ministral3ForCausalLM", "ministral3", ("ministral3",), reordered=True, yarn_betas=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", ("qwen2",), biases=QKV, square=True),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", ("qwen3",)),
    "qwen35": Architecture("Qwen3_5ForCausalLM", "qwen3_5_text", ("qwen3_5_text",), names=DELTA_NAMES),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", ("smollm3",), reordered=True),
    "glm4": Architecture("Glm4ForCausalLM", "glm4", ("glm4",), biases=QKV),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", ("phi3",), scalings=("longrope",), square=True),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2", ("gemma2",), windows=True, head=False),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text", ("gemma3_text",), windows=True),
}

# Keys under the architecture's name. Any other could change the maths and is refused.
KNOWN_KEYS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_attn_factor",  # llama.cpp computes its own in its place
)  # fmt: skip
DELTA_KEYS = {  # of Gated DeltaNet: its sizes, and layers that guess further tokens
    "ssm.conv_kernel": ("linear_conv_kernel_dim", int), "ssm.state_size": ("linear_key_head_dim", int),
    "ssm.group_count": ("linear_num_key_heads", int), "ssm.time_step_rank": ("linear_num_value_heads", int),
}  # fmt: skip
READ_KEYS = {  # those of families that read the hub's field
    "attention.sliding_window": ("sliding_window", int), "rope.freq_base_swa": ("rope_local_base_freq", float),
    "attn_logit_softcapping": ("attn_logit_softcapping", float),
    "final_logit_softcapping": ("final_logit_softcapping", float),
    "full_attention_interval": ("full_attention_interval", int), **DELTA_KEYS,
}  # fmt: skip
OTHER_KEYS = {  # key -> the field that a family reads whose files have it; read by code, not by this table
    "attention.temperature_scale": "llama_4_scaling_beta", "rope.scaling.yarn_log_multiplier": "llama_4_scaling_beta",
    "rope.dimension_sections": "mrope_section", "ssm.inner_size": "linear_value_head_dim",
    "attention.sliding_window_pattern": "layer_types",
    "nextn_predict_layers": "full_attention_interval", "attention.recurrent_layers": "full_attention_interval",
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


def hub_names(arch: Architecture, family: Family) -> dict[str, str]:
    """The names of a family's tensors in a GGUF file, without layer and .weight or .bias -> those in its hub folder.
    Names that end in a dot have neither."""
    names = HUB_NAMES | {theirs: ours for theirs, ours in zip(NORMS, family.norms, strict=True) if ours}
    for stem, parts in family.fused:
        if stem in FUSED_NAMES:  # Baichuan's W_pack is three tensors here
            block, _ = stem.split(".")
            names = {theirs: ours for theirs, ours in names.items() if ours not in {f"{block}.{p}" for p in parts}}
            names[FUSED_NAMES[stem]] = stem
    return {theirs: ours for theirs, ours in names.items() if ours not in arch.names.values()} | {**arch.names}


def hub_name(names: dict[str, str], name: str) -> str | None:
    """The hub's name of a tensor in GGUF, by `hub_names`; None where there is none."""
    parts = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,4})\.)?(([a-z0-9_]+)(?:\.(weight|bias))?)", name)
    number, whole, stem, kind = parts.groups() if parts else (None, "", "", "")
    block = "blk." if number else ""
    found = names.get(f"{block}{whole}.") or (kind and f"{names.get(block + stem, '')}.{kind}")
    known = found and not found.startswith(".")
    return (f"model.layers.{number}." if number else "") + found.removesuffix(".") if known else None


def gguf_name(names: dict[str, str], name: str) -> str | None:
    """`hub_name` the other way."""
    number, whole = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)", name).groups()
    stem, kind = whole.rsplit(".", 1)
    own = {hub: theirs for theirs, hub in names.items() if theirs.startswith("blk.") == bool(number)}
    theirs = own[f"{whole}."].removesuffix(".") if f"{whole}." in own else stem in own and f"{own[stem]}.{kind}"
    return theirs.replace("blk.", f"blk.{number}.", 1) if theirs else None
