"""What GGUF calls a family, its settings and its tensors, beside what the hub calls them."""

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from lora.network.config import ModelConfig
from lora.network.families import Family

NOTHING = MappingProxyType({})
QKV = ("q_proj", "k_proj", "v_proj")
LINEARS = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")


class Architecture(NamedTuple):
    """How GGUF holds a family, and what llama.cpp computes of it."""

    hub_class: str
    model_type: str  # what a file is read as
    written: tuple[str, ...] = ()  # the hub's names of families that are written so; others are only read
    other: tuple[str, str, str] | None = None  # a key, and what a file is read as where it is there
    names: Mapping[str, str] = NOTHING  # of tensors that others have not, or call otherwise
    keys: Mapping[str, tuple[str, type] | None] = NOTHING  # as READ_KEYS; None are those that are read by code
    reordered: bool = False  # llama.cpp's RoPE is interleaved where the hub's is not: rows of q and k change places
    scalings: tuple[str, ...] = ()  # of RoPE, beside linear and YaRN's
    yarn: bool = False  # it reads where YaRN's ramp begins and ends, and the log multiplier
    windows: bool = False  # sliding windows in all layers but one in so many
    biases: tuple[str, ...] = ()  # the Linears that may have one
    head: bool | None = None  # whether there is one beside the embedding, where only one of the two is known
    square: bool = False  # heads must be as wide together as the model


WINDOW, TEMPERATURE = "attention.sliding_window", "attention.temperature_scale"
PATTERN = "attention.sliding_window_pattern"
DELTA_NAMES = {
    "blk.post_attention_norm": "post_attention_layernorm",
    "blk.attn_qkv": "linear_attn.in_proj_qkv", "blk.attn_gate": "linear_attn.in_proj_z",
    "blk.ssm_beta": "linear_attn.in_proj_b", "blk.ssm_alpha": "linear_attn.in_proj_a",
    "blk.ssm_conv1d": "linear_attn.conv1d", "blk.ssm_norm": "linear_attn.norm", "blk.ssm_out": "linear_attn.out_proj",
    "blk.ssm_a.": "linear_attn.A_log.", "blk.ssm_dt.bias.": "linear_attn.dt_bias.",
}  # fmt: skip
DELTA_KEYS = {
    "ssm.conv_kernel": ("linear_conv_kernel_dim", int), "ssm.state_size": ("linear_key_head_dim", int),
    "ssm.group_count": ("linear_num_key_heads", int), "ssm.time_step_rank": ("linear_num_value_heads", int),
    "full_attention_interval": ("full_attention_interval", int), "attention.recurrent_layers": None,
    "ssm.inner_size": None, "nextn_predict_layers": None,
    "rope.dimension_sections": None,  # for a picture's height and width, which text has none of
}  # fmt: skip
GRANITE_KEYS = {
    "attention.scale": ("attention_multiplier", float), "embedding_scale": ("embedding_multiplier", float),
    "residual_scale": ("residual_multiplier", float), "logit_scale": ("logits_scaling", float),
    # of hybrid Granite, in files of those that are not
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_feed_forward_length", *DELTA_KEYS)),
}  # fmt: skip
LFM2_NAMES = {"token_embd_norm": "model.embedding_norm"} | {
    f"blk.shortconv.{name}": f"conv.{name}" for name in ("conv", "in_proj", "out_proj")
}
ARCHITECTURES = {  # which RoPE they have: `llama_model_rope_type` in llama.cpp; GLM-4's and ERNIE's is so in both
    "llama": Architecture(
        "LlamaForCausalLM", "llama", ("llama", "mistral", "baichuan"), reordered=True, biases=LINEARS,
        scalings=("llama3", "longrope"),
    ),
    "mistral3": Architecture(
        "LlamaForCausalLM", "llama", ("ministral3",), (TEMPERATURE, "Ministral3ForCausalLM", "ministral3"),
        reordered=True, yarn=True, keys=dict.fromkeys((TEMPERATURE, "rope.scaling.yarn_log_multiplier")),
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", ("qwen2",), biases=QKV, square=True),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", ("qwen3",)),
    "qwen35": Architecture(
        "Qwen3_5ForCausalLM", "qwen3_5_text", ("qwen3_5_text",), names=DELTA_NAMES, keys=DELTA_KEYS
    ),
    "granite": Architecture(
        "GraniteForCausalLM", "granite", ("granite", "granitemoehybrid"), reordered=True, biases=LINEARS,
        scalings=("llama3", "longrope"), keys=GRANITE_KEYS,
    ),
    "lfm2": Architecture(
        "Lfm2ForCausalLM", "lfm2", ("lfm2",), names=LFM2_NAMES, keys={"shortconv.l_cache": ("conv_L_cache", int)}
    ),
    "olmo2": Architecture(
        "Olmo2ForCausalLM", "olmo2", ("olmo2", "olmo3"), (WINDOW, "Olmo3ForCausalLM", "olmo3"), windows=True, head=True,
        square=True,
    ),
    "exaone4": Architecture("Exaone4ForCausalLM", "exaone4", ("exaone4",), scalings=("llama3",), windows=True),
    "ernie4_5": Architecture("Ernie4_5ForCausalLM", "ernie4_5", ("ernie4_5",)),
    "hunyuan-dense": Architecture("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", ("hunyuan_v1_dense",)),
    "seed_oss": Architecture(
        "SeedOssForCausalLM", "seed_oss", ("seed_oss",), biases=QKV,
        names={"blk.post_attention_norm": "post_attention_layernorm"},
    ),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", ("smollm3",), reordered=True),
    "glm4": Architecture("Glm4ForCausalLM", "glm4", ("glm4",), biases=QKV),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", ("phi3",), scalings=("longrope",), square=True),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2", ("gemma2",), windows=True, head=False),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text", ("gemma3_text",), windows=True),
}  # fmt: skip
GEMMA_27B = (46, 62)  # layers; llama.cpp knows these by them, the files do not say by what attention divides
EXAONE_32B = 64  # layers; the one EXAONE 4 that llama.cpp gives sliding windows

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
READ_KEYS = {  # those of families that read the hub's field
    "attention.sliding_window": ("sliding_window", int), "rope.freq_base_swa": ("rope_local_base_freq", float),
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


def hub_names(arch: Architecture, family: Family) -> dict[str, str]:
    """The names of a family's tensors in a GGUF file, without layer and .weight or .bias -> those in its hub folder.
    Names that end in a dot have neither."""
    names = {theirs: ".".join(family.names.get(p, p) for p in ours.split(".")) for theirs, ours in HUB_NAMES.items()}
    names |= {theirs: ours for theirs, ours in zip(NORMS, family.norms, strict=True) if ours}
    for stem, parts in family.fused:
        if stem in FUSED_NAMES:  # Baichuan's W_pack and Granite's input_linear are several tensors here
            block, _ = stem.split(".")
            names = {theirs: ours for theirs, ours in names.items() if ours not in {f"{block}.{p}" for p in parts}}
            names[FUSED_NAMES[stem]] = stem
    return {theirs: ours for theirs, ours in names.items() if ours not in arch.names.values()} | {**arch.names}


def held(config: ModelConfig) -> ModelConfig:
    """A model whose fused tensors are those that GGUF has fused as well."""
    return replace(config, fused=tuple(one for one in config.fused if one[0] in FUSED_NAMES))


def hub_name(names: dict[str, str], name: str) -> str | None:
    """The hub's name of a tensor in GGUF, by `hub_names`; None where there is none."""
    parts = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,4})\.)?((?!blk\.)([a-z0-9_.]+?)(?:\.(weight|bias))?)", name)
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
