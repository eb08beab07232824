"""The table of supported model families: what the fields of a `config.json` mean in each where they are absent."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Q_K_V, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
GEMMA_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
NORMS_AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
GLM4_NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


@dataclass(frozen=True)
class Family:
    """How a family differs from the first Llama: what its absent fields mean, and which fields it reads beside those
    that all have. Sources: the configuration and model classes of transformers; for Baichuan its own."""

    reads: tuple[str, ...] = ()
    called: Mapping[str, str] = field(default_factory=dict)  # fields that its files call otherwise
    required: Mapping = field(default_factory=dict)  # field -> the one value that is implemented, what absent means
    names: Mapping[str, str] = field(default_factory=dict)  # modules that the hub calls otherwise
    unused: tuple[str, ...] = ()  # fields that its configuration has and nobody computes with, the reference neither
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    num_key_value_heads: int | None = None  # as many as there are heads
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    o_bias: bool = True  # has o_proj one where they have?
    rope_theta: float = 10000.0
    rope_parameters: Mapping | None = None  # where neither they nor their old form are there
    rope_local: bool = False  # layers with a sliding window have RoPE of their own, never scaled
    rope_local_base_freq: float | None = None  # its base, where that differs
    rope_in_windows_only: bool = False
    partial_rotary_factor: float = 1.0
    rope_interleaved: bool = False  # RoPE turns (2i, 2i + 1), not (i, i + d/2)
    no_rope_layer_interval: int | None = None  # every so many layers one is without RoPE
    sliding_window: int | None = None
    max_window_layers: int = 0  # the first ones look back without limit
    sliding_window_pattern: int | None = None  # and one in so many
    last_is_full: bool = False  # whatever the pattern says
    qk_norm: str | None = (
        None  # of queries and keys: of the whole "projection", each "head", or each after RoPE, "turned"
    )
    norms: tuple[str | None, ...] = ("input_layernorm", None, "post_attention_layernorm", None)
    norm_offset: float = 0.0  # what norms add to their weight
    embedding_scaled: bool = False  # by the square root of hidden_size
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None  # of scores, in the place of 1/√d
    logits_scaling: float = 1.0  # divides
    activation: tuple[str, str] = ("hidden_act", "silu")  # the field that says it, and its default
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    output_gate: bool = False  # q_proj has a gate for each of attention's outputs beside each query
    mixer: str = "attention"  # what layers have in its place, where `full_attention_interval` or layer_types says so
    full_attention_interval: int | None = None  # one layer in so many attends
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()  # what is stored as one tensor
    written_as: str | None = None  # another family, of which it is a copy under another name


GEMMA = {
    "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256.0,
    "sliding_window": 4096, "norms": GEMMA_NORMS, "norm_offset": 1.0, "embedding_scaled": True,
    "activation": ("hidden_activation", "gelu_pytorch_tanh"),
}  # fmt: skip
READ_BY_GEMMA = (
    "attention_bias", "sliding_window", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping",
)  # fmt: skip
# of Gated DeltaNet; the parts of RoPE for a picture's height and width, which text has none of
DELTA = (
    "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
    "linear_num_value_heads",
)  # fmt: skip
MINISTRAL_ROPE = {
    "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")  # Granite's
GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
MROPE = ("mrope_section", "mrope_interleaved")
READ_BY_QWEN = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

FAMILIES = {
    "llama": Family(reads=("attention_bias", "mlp_bias")),
    "mistral": Family(
        reads=("sliding_window",), max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096
    ),
    "ministral3": Family(
        reads=("llama_4_scaling_beta", "max_position_embeddings", "sliding_window"), max_position_embeddings=262144,
        rms_norm_eps=1e-5, num_key_value_heads=8, head_dim=128, rope_theta=1000000.0, rope_parameters=MINISTRAL_ROPE,
    ),
    "baichuan": Family(fused=(("self_attn.W_pack", Q_K_V),), written_as="llama"),
    "qwen2": Family(
        reads=READ_BY_QWEN, max_position_embeddings=32768, attention_bias=True, o_bias=False,
        sliding_window=4096, max_window_layers=28,
    ),
    "qwen3": Family(
        reads=(*READ_BY_QWEN, "attention_bias"), max_position_embeddings=32768, head_dim=128, qk_norm="head",
        sliding_window=4096, max_window_layers=28,
    ),
    "qwen3_5_text": Family(
        reads=("attention_bias", "partial_rotary_factor", "layer_types", "full_attention_interval", "attn_output_gate",
               *MROPE, *DELTA),
        required={"attn_output_gate": (True, True)},
        max_position_embeddings=32768, num_key_value_heads=4, head_dim=256, qk_norm="head", norm_offset=1.0,
        partial_rotary_factor=0.25,
        output_gate=True, mixer="delta", full_attention_interval=4,
    ),
    "granite": Family(reads=("attention_bias", "mlp_bias", *MULTIPLIERS), attention_multiplier=1.0),
    "granitemoehybrid": Family(  # those of Granite 4 that are dense, and attend in every layer
        reads=("attention_bias", "layer_types", "num_local_experts", *MULTIPLIERS), attention_multiplier=1.0,
        mixer="mamba", called={"intermediate_size": "shared_intermediate_size"},
        required={"num_local_experts": (0, 8), "position_embedding_type": ("rope", None)},
        names={"mlp": "shared_mlp", "down_proj": "output_linear"}, fused=(("shared_mlp.input_linear", GATE_UP),),
    ),
    "lfm2": Family(
        reads=("layer_types", "full_attn_idxs", "tie_embedding"), called={"rms_norm_eps": "norm_eps"},
        max_position_embeddings=128000,
        rms_norm_eps=1e-5, num_key_value_heads=8, tie_word_embeddings=True, rope_theta=1000000.0, qk_norm="head",
        mixer="conv", norms=("operator_norm", None, "ffn_norm", None),
        required={"conv_bias": (False, False), "hidden_act": ("silu", "silu")},  # which no file says
        names={"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm", "mlp": "feed_forward",
               "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "norm": "embedding_norm"},
    ),
    "olmo2": Family(reads=("attention_bias",), rms_norm_eps=1e-5, qk_norm="projection", norms=NORMS_AFTER),
    "olmo3": Family(
        reads=("attention_bias", "sliding_window", "layer_types"), rms_norm_eps=1e-5, rope_theta=500000.0,
        rope_local=True, sliding_window=4096, sliding_window_pattern=4, qk_norm="projection", norms=NORMS_AFTER,
    ),
    "exaone4": Family(
        reads=("sliding_window", "sliding_window_pattern", "layer_types"), rms_norm_eps=1e-5, num_key_value_heads=32,
        sliding_window=4096, sliding_window_pattern=4, rope_in_windows_only=True, qk_norm="head", norms=NORMS_AFTER,
    ),
    "ernie4_5": Family(
        reads=("attention_bias", "mlp_bias"), called={"attention_bias": "use_bias", "mlp_bias": "use_bias"},
        max_position_embeddings=131072, rms_norm_eps=1e-5, num_key_value_heads=2, head_dim=128,
        tie_word_embeddings=True, rope_theta=500000.0, rope_interleaved=True,
    ),
    "hunyuan_v1_dense": Family(
        reads=("attention_bias", "alpha", "use_qk_norm"), required={"use_qk_norm": (True, True)}, rms_norm_eps=1e-5,
        unused=("attention_dropout",), qk_norm="turned", names={"q_norm": "query_layernorm", "k_norm": "key_layernorm"},
    ),
    "seed_oss": Family(  # its dropout, like Hunyuan's, was that of its pretraining
        reads=("attention_bias", "o_bias", "mlp_bias"), called={"o_bias": "attention_out_bias"},
        unused=("attention_dropout", "residual_dropout"), max_position_embeddings=524288, num_key_value_heads=8,
        head_dim=128, attention_bias=True,
    ),
    "smollm3": Family(
        reads=("attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"),
        max_position_embeddings=32768, num_key_value_heads=4, tie_word_embeddings=True, rope_theta=2000000.0,
        no_rope_layer_interval=4,
    ),
    "phi3": Family(
        reads=("sliding_window", "partial_rotary_factor"), max_position_embeddings=4096, rms_norm_eps=1e-5,
        fused=(("self_attn.qkv_proj", Q_K_V), ("mlp.gate_up_proj", GATE_UP)),
    ),
    "gemma2": Family(
        reads=(*READ_BY_GEMMA, "attn_logit_softcapping"), max_position_embeddings=8192, sliding_window_pattern=2,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, **GEMMA,
    ),
    "gemma3_text": Family(
        reads=(*READ_BY_GEMMA, "rope_local_base_freq", "sliding_window_pattern"), unused=("attn_logit_softcapping",),
        max_position_embeddings=131072, sliding_window_pattern=6, rope_theta=1000000.0, rope_local=True,
        rope_local_base_freq=10000.0,
        qk_norm="head", **GEMMA,
    ),
    "gemma4_text": Family(
        reads=("attention_bias", "sliding_window", "layer_types", "final_logit_softcapping", "partial_rotary_factor",
               "use_bidirectional_attention", "global_head_dim", "per_layer_config"),
        norms=GEMMA_NORMS, required={"attention_k_eq_v": (False, False), "enable_moe_block": (False, False)},
        max_position_embeddings=131072, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True,
        sliding_window=512, sliding_window_pattern=6, last_is_full=True, rope_local=True,
        rope_parameters=GEMMA4_ROPE, qk_norm="head", embedding_scaled=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
    ),
    "glm4": Family(
        reads=("attention_bias", "partial_rotary_factor"), max_position_embeddings=131072, rms_norm_eps=1.5625e-7,
        num_key_value_heads=2, head_dim=128, attention_bias=True, o_bias=False, partial_rotary_factor=0.5,
        rope_interleaved=True, norms=GLM4_NORMS, fused=(("mlp.gate_up_proj", GATE_UP),),
    ),
}  # fmt: skip

# Models that also see or hear: of their folders the language model is read, and written as a model of its own, which
# the hub's code calls so.
WRAPPERS = {
    "qwen3_5": {"qwen3_5_text": "Qwen3_5ForCausalLM"},
    "gemma3": {"gemma3_text": "Gemma3ForCausalLM"},
    "gemma4": {"gemma4_text": "Gemma4ForCausalLM"},
    "mistral3": {"ministral3": "Ministral3ForCausalLM", "mistral": "MistralForCausalLM"},
}

# Models that people ask for and that are refused: why, and what to use.
OWN_CODE = "it computes by code that comes with the model, which is never run"
EXPERTS = "its MLPs are mixtures of experts, which are not implemented"
SEES = "it sees as well, and its language model is not taken out of it"
OLDER = "it computes otherwise than the later ones"
OTHERS = {
    kind: f"{why}. Use {use}"
    for why, use, kinds in (
        (OWN_CODE, "GLM-4-9B-0414 (glm4)", ("chatglm",)),
        (OWN_CODE, "Qwen1.5 (qwen2)", ("qwen",)),
        (OWN_CODE, "EXAONE-4.0-1.2B (exaone4)", ("exaone",)),
        (OWN_CODE, "MiniCPM5-1B (llama)", ("minicpm", "minicpm3")),
        (EXPERTS, "Qwen3.5-9B (qwen3_5)", ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")),
        (EXPERTS, "Qwen3-8B (qwen3)", ("qwen3_moe", "qwen2_moe", "qwen3_vl_moe")),
        (EXPERTS, "DeepSeek-R1-0528-Qwen3-8B (qwen3)", ("deepseek_v2", "deepseek_v3")),
        (EXPERTS, "granite-3.3-8b-instruct (granite)", ("granitemoe", "granitemoeshared")),
        (EXPERTS, "LFM2-1.2B (lfm2)", ("lfm2_moe",)),
        (EXPERTS, "ERNIE-4.5-0.3B-PT (ernie4_5)", ("ernie4_5_moe",)),
        (EXPERTS, "Hunyuan-7B-Instruct (hunyuan_v1_dense)", ("hunyuan_v1_moe",)),
        (EXPERTS, "Ministral-3-3B-Instruct-2512 (mistral3)", ("mistral4",)),
        (EXPERTS, "Mistral-7B-Instruct-v0.3 (mistral)", ("mixtral",)),
        (EXPERTS, "GLM-4-9B-0414 (glm4)", ("glm4_moe",)),
        (EXPERTS, "OLMo-2-0425-1B (olmo2)", ("olmoe",)),
        (EXPERTS, "Llama-3.1-8B-Instruct (llama)", ("llama4", "llama4_text")),
        (SEES, "Qwen3-8B (qwen3)", ("qwen3_vl",)),
        (SEES, "Qwen2.5-7B-Instruct (qwen2)", ("qwen2_5_vl", "qwen2_vl")),
        (SEES, "LFM2-1.2B (lfm2)", ("lfm2_vl",)),
        (OLDER, "OLMo-2-0425-1B (olmo2)", ("olmo",)),
        (OLDER, "GLM-4-9B-0414 (glm4)", ("glm",)),
        (OLDER, "Phi-4-mini-instruct (phi3)", ("phi",)),
        (OLDER, "gemma-2-2b-it (gemma2)", ("gemma",)),
        (OLDER, "gemma-4-E2B-it (gemma4)", ("gemma3n", "gemma3n_text")),
    )
    for kind in kinds
}
# How the names of quantised models end, whose weights are not read.
QUANTISED = re.compile(
    r"([-_.](unsloth|dynamic|quantized))*[-_.](bnb[-_.]?[48]bit|gptq|awq|fp8|nf4|mxfp4|[48][-_.]?bit|int[48]|w\d+a\d+)"
    r"([-_.](int[48]|[48]bit|dynamic|marlin|g?\d+|mlx))*$",
    re.IGNORECASE,
)


def quantised(raw: Mapping, name: str) -> tuple[str, str]:
    """What quantised a model, and what to give in its place: the model that it was made from, by one of its names."""
    said = raw.get("quantization_config") or raw.get("quantization") or raw.get("compression_config")
    method = (
        said.get("quant_method") or ("MLX" if "group_size" in said else None) if isinstance(said, Mapping) else None
    )
    named = [str(raw.get("_name_or_path") or ""), name.rsplit("/", 1)[-1] if name.startswith("/") else name]
    plain = next((QUANTISED.sub("", other) for other in named if QUANTISED.search(other)), named[0])
    fix = f"Give the model that it was made from{f', {plain}' if plain else ''}"
    return f"its weights are quantised{f' by {method}' if method else ''}, which is not implemented", fix


# One model_type, another architecture: field, value, why.
TRAPS = {
    "baichuan": (
        ("max_position_embeddings", None, "Baichuan-13B has ALiBi in the place of RoPE", "Give Baichuan-7B"),
        ("vocab_size", 125696, "Baichuan2 normalises the rows of its head", "Give Baichuan-7B"),
    ),
    "gemma4_text": (
        ("enable_moe_block", True, EXPERTS, "Give gemma-4-E4B-it"),
        ("attention_k_eq_v", True, "values that are keys are not implemented", "Give gemma-4-E4B-it"),
    ),
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# Fields that would change the maths of a family that does not read them, and the values with which they change nothing.
NEUTRAL = {
    "attention_dropout": (0, None),
    "resid_pdrop": (0, None),
    "embd_pdrop": (0, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "use_bidirectional_attention": (False, None),
    "no_rope_layers": (None,),
    "quantization_config": (None,),
    "quantization": (None,),  # MLX's
    "compression_config": (None,),
    "partial_rotary_factor": (1, None),
    "use_mrope": (False, None),
    "use_rotary_pos_emb": (True, None),  # Hunyuan's
    "use_pos_enc": (True, None),  # LFM2's
    "use_cla": (False, None),  # layers of Hunyuan that share keys and values
    "output_gate_type": ("swish", "silu", None),  # of Gated DeltaNet
    "block_use_swiglu": (True, None),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "moe_num_experts": (None, 0),
    "is_causal": (True, None),
    "per_layer_config": (None, {}),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
}
