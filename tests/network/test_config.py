"""config.json: real files of the supported families are accepted, everything else is refused by the name of a field."""

import contextlib
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora.errors import BadInput
from lora.network.config import ModelConfig, RopeScaling
from lora.network.families import FAMILIES, NEUTRAL, OTHERS, WRAPPERS
from lora.network.layer_fields import DeltaSizes, Gemma4Sizes
from lora.network.rope_fields import ROPES
from lora.pretrained import prequantised, wrapped
from tests.mutation import mutation

CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # other work may share the machine
REAL = json.loads((Path(__file__).parents[1] / "fixtures" / "real_configs.json").read_text())

LLAMA = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu", "eos_token_id": 2,
}  # fmt: skip
QWEN2 = {**LLAMA, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 2}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
DROP = object()


def changed(base: dict, **fields) -> dict:
    return {key: value for key, value in {**base, **fields}.items() if value is not DROP}


# ---- accepted --------------------------------------------------------------------------------------------------------


def of(name: str) -> ModelConfig:
    return ModelConfig.from_json(text_of(name))


def text_of(name: str) -> dict:
    """The config of the language model in a real file, its weights as the numbers they stand for."""
    return prequantised.plain(wrapped.text_config(REAL[name]["config"]))


CALLED = {"rms_norm_eps": "norm_eps", "qkv_bias": "use_bias"}  # fields that some families' files call otherwise


@mutation(
    "lora/network/families.py",
    "max_position_embeddings=32768, attention_bias=True, o_bias",
    "max_position_embeddings=32768, attention_bias=False, o_bias",
    case="Qwen/Qwen2-0.5B",
)
@mutation(
    "lora/network/families.py",
    'unused=("attention_dropout",), qk_norm',
    'unused=("attention_drop",), qk_norm',
    case="tencent/Hy-MT2-7B",
)
@pytest.mark.parametrize("name", REAL)
def test_real_config_files_are_accepted_as_they_are(name):
    raw, config = text_of(name), of(name)
    for field in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):  # fmt: skip
        stated = raw.get(field, raw.get(CALLED.get(field)))
        assert stated is None or getattr(config, field) == stated, field
    assert config.head_dim == (raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"])
    rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta")}
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "dynamic":  # which is of another base
        assert config.rope_theta == (rope["rope_theta"] or 10000.0)
        assert config.rope_scaling.kind == kind and config.rope_scaling.factor == (rope.get("factor") or 1.0)
    if "max_position_embeddings" in raw and kind != "longrope":
        assert config.max_position_embeddings == raw["max_position_embeddings"]
    if raw["model_type"] != "lfm2":  # whose files say the width before it is cut
        assert config.intermediate_size == raw["intermediate_size"]
    biased = raw["model_type"] in ("qwen2", "seed_oss") or raw.get("attention_bias", False)
    assert config.qkv_bias == biased
    assert config.o_bias == (raw["model_type"] == "llama" and raw.get("attention_bias", False))
    eos = raw.get("eos_token_id", [])
    assert config.eos_token_ids == tuple(eos if isinstance(eos, list) else [eos])


def test_real_config_files_cover_all_families_and_every_kind_of_rope():
    configs = [of(name) for name in REAL]
    assert {config.model_type for config in configs} == set(FAMILIES)
    assert {config.rope_scaling.kind for config in configs} >= {"default", "llama3", "yarn"}
    assert {config.tie_word_embeddings for config in configs} == {True, False}


def test_what_is_particular_in_real_config_files_is_read():
    assert of("mistralai/Mistral-7B-Instruct-v0.1").windows == (4096,) * 32
    assert of("mistralai/Mistral-7B-Instruct-v0.3").windows == (None,) * 32
    qwen3 = of("Qwen/Qwen3-0.6B")
    assert qwen3.qk_norm and qwen3.windows == (None,) * 28 and not qwen3.qkv_bias
    smollm3 = of("HuggingFaceTB/SmolLM3-3B")
    assert smollm3.ropes == ("global", "global", "global", None) * 9 and smollm3.rope_theta == 5e6
    phi3 = of("microsoft/Phi-3-mini-4k-instruct")
    assert phi3.windows == (2047,) * 32 and [stem for stem, _ in phi3.fused] == [
        "self_attn.qkv_proj",
        "mlp.gate_up_proj",
    ]
    for name, scalar in (("google/gemma-2-2b-it", 256), ("google/gemma-2-27b-it", 144)):
        gemma2 = of(name)
        assert gemma2.windows == (4096, None) * (gemma2.num_hidden_layers // 2)
        assert (gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (50, 30)
        assert gemma2.query_pre_attn_scalar == scalar and gemma2.activation == "gelu_tanh"
        assert gemma2.tie_word_embeddings and gemma2.norm_offset == 1 and not gemma2.qk_norm
        assert gemma2.embedding_scale == gemma2.hidden_size**0.5
    gemma3 = of("google/gemma-3-1b-it")
    assert gemma3.windows == ((512,) * 5 + (None,)) * 4 + (512,) * 2
    assert gemma3.ropes == (("local",) * 5 + ("global",)) * 4 + ("local",) * 2
    assert (gemma3.rope_theta, gemma3.rope_local_theta, gemma3.final_logit_softcapping) == (1e6, 1e4, None)
    glm4 = of("zai-org/GLM-4-9B-0414")
    assert (glm4.rotary_dim, glm4.head_dim, glm4.rope_interleaved, glm4.qkv_bias) == (64, 128, True, False)
    assert of("baichuan-inc/Baichuan-7B").num_key_value_heads == 32


YARN = {"kind": "yarn", "original_max_position_embeddings": 8192}
PARTICULAR = {
    "Qwen/Qwen3.5-0.8B": {
        "mixers": ("delta", "delta", "delta", "attention") * 6, "ropes": (None, None, None, "global") * 6,
        "delta": DeltaSizes(16, 16, 128, 128, 4), "rotary_dim": 64, "rope_theta": 1e7, "output_gate": True,
        "norm_offset": 1.0, "tie_word_embeddings": True, "num_key_value_heads": 2,
    },
    "Qwen/Qwen3.6-27B": {"delta": DeltaSizes(16, 48, 128, 128, 4), "tie_word_embeddings": False, "rotary_dim": 64},
    "mistralai/Ministral-3-3B-Instruct-2512": {
        "rope_scaling": RopeScaling("yarn", 16.0, original_max_position_embeddings=16384, q_beta=0.1),
        "windows": (None,) * 26, "head_dim": 128, "tie_word_embeddings": True,
    },
    "mistralai/Devstral-2-123B-Instruct-2512": {
        "rope_scaling": RopeScaling(
            "yarn", 64.0, original_max_position_embeddings=4096, beta_fast=4.0, attention_factor=1.4158883083359673,
        ),
    },
    "ibm-granite/granite-3.3-8b-instruct": {
        "embedding_scale": 12.0, "embedding_scale_rounded": False, "residual_multiplier": 0.22, "logits_scaling": 16.0,
        "query_pre_attn_scalar": 128.0**2, "fused": (),
    },
    "ibm-granite/granite-4.0-350m": {
        "mixers": ("attention",) * 28, "query_pre_attn_scalar": 64.0**2, "logits_scaling": 4.0,
        "residual_multiplier": 0.263, "fused": (("shared_mlp.input_linear", ("gate_proj", "up_proj")),),
    },
    "LiquidAI/LFM2-1.2B": {
        "mixers": tuple("attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)),
        "conv_size": 3, "intermediate_size": 8192, "qk_norm": "head", "tie_word_embeddings": True,
    },
    "LiquidAI/LFM2.5-350M": {"intermediate_size": 4608, "tie_word_embeddings": True, "conv_size": 3},
    "allenai/OLMo-2-1124-7B-Instruct": {"qk_norm": "projection", "windows": (None,) * 32},
    "allenai/Olmo-3.1-32B-Instruct": {
        "qk_norm": "projection", "windows": (4096, 4096, 4096, None) * 16,
        "ropes": ("local", "local", "local", "global") * 16, "rope_local_theta": 5e5,
        "rope_scaling": RopeScaling(factor=8.0, attention_factor=1.2079441541679836, **YARN),
    },
    "LGAI-EXAONE/EXAONE-4.0-32B": {
        "windows": (4096, 4096, 4096, None) * 16, "ropes": ("global", "global", "global", None) * 16,
        "rope_scaling": RopeScaling("llama3", 16.0), "qk_norm": "head",
    },
    "baidu/ERNIE-4.5-0.3B-PT": {"rope_interleaved": True, "mlp_bias": False, "tie_word_embeddings": True},
    "tencent/Hy-MT2-7B": {"rope_theta": 10000.0 * 1000.0 ** (128 / 126), "qk_norm": "turned"},
    "ByteDance-Seed/Seed-OSS-36B-Instruct": {"qkv_bias": True, "o_bias": False, "head_dim": 128},
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": {
        "rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=32768, attention_factor=1.0),
    },
    "google/gemma-4-E2B-it": {
        "windows": ((512,) * 4 + (None,)) * 7, "ropes": (("local",) * 4 + ("global",)) * 7, "rotary_dim": 512,
        "rope_scaling": RopeScaling("proportional", turned=64), "rope_local_dim": 256, "rope_local_theta": 1e4,
        "eos_token_ids": (1, 106),
        "gemma4": Gemma4Sizes(512, 256, 262144, (*range(15), *([13, 13, 13, 13, 14] * 4)), True),
    },
    "google/gemma-4-E4B-it": {
        "windows": ((512,) * 5 + (None,)) * 7, "num_key_value_heads": 2, "final_logit_softcapping": 30.0,
        "gemma4": Gemma4Sizes(512, 256, 262144, (*range(24), *([22, 22, 22, 22, 22, 23] * 3)), False),
    },
    "openbmb/MiniCPM5-1B": {"rope_theta": 5e6, "head_dim": 128, "eos_token_ids": (1, 130073)},
}  # fmt: skip


@mutation(
    "lora/network/rope_fields.py",
    '* named("attn_factor", 1.0, low=0), low=0)',
    "* 1.0, low=0)",
    case="deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
)
@mutation(
    "lora/network/rope_fields.py",
    "mscale and of_all else (1, 0))",
    "mscale and of_all else (0, 0))",
    case="mistralai/Devstral-2-123B-Instruct-2512",
)
@mutation(
    "lora/network/config.py",
    'self.flag("tie_embedding", tied) if "tie_embedding" in reads',
    'not tied if "tie_embedding" in reads',
    case="LiquidAI/LFM2.5-350M",
)
@mutation("lora/network/layer_fields.py", "int(2 * width / 3)", "int(width / 2)", case="LiquidAI/LFM2-1.2B")
@mutation("lora/network/config.py", "return multiplier**-2", "return multiplier", case="ibm-granite/granite-4.0-350m")
@pytest.mark.parametrize("name", PARTICULAR)
def test_what_is_particular_in_the_files_of_newer_families_is_read(name):
    config = of(name)
    for field, value in PARTICULAR[name].items():
        assert getattr(config, field) == value, (field, getattr(config, field))


def test_longrope_is_for_documents_of_the_original_length():
    config = of("microsoft/Phi-4-mini-instruct")
    assert config.rope_scaling.kind == "longrope" and config.max_position_embeddings == 4096
    assert config.rope_scaling.short_factors == (1.0,) * 48 and config.rotary_dim == 96


BAICHUAN2 = {**REAL["baichuan-inc/Baichuan-7B"]["config"], "architectures": ["BaichuanForCausalLM"],
             "model_max_length": 4096, "vocab_size": 125696}  # fmt: skip
BAICHUAN_13B = {key: value for key, value in BAICHUAN2.items() if key != "max_position_embeddings"} | {
    "vocab_size": 64000, "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}  # fmt: skip

GEMMA4_31B = text_of("google/gemma-4-E4B-it") | {
    "attention_k_eq_v": True, "hidden_size": 5376, "hidden_size_per_layer_input": 0, "intermediate_size": 21504,
    "num_attention_heads": 32, "num_global_key_value_heads": 4, "num_hidden_layers": 60, "num_key_value_heads": 16,
    "num_kv_shared_layers": 0, "sliding_window": 1024, "use_bidirectional_attention": "vision",
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
}  # fmt: skip


@mutation(
    "lora/network/config.py", "if self.problems:  # nothing else", "if False:  # nothing else", case="Gemma-4-31B"
)
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (BAICHUAN2, ("vocab_size", "Baichuan2")),
        (BAICHUAN_13B, ("max_position_embeddings", "ALiBi")),
        ({"model_type": "chatglm", "num_layers": 28, "hidden_size": 4096}, ("model_type", "GLM-4-9B-0414")),
        ({"model_type": "qwen", "num_hidden_layers": 24, "hidden_size": 2048}, ("model_type", "Qwen1.5")),
        (GEMMA4_31B, ("attention_k_eq_v", "gemma-4-E4B-it")),
    ],
    ids=["Baichuan2-7B", "Baichuan-13B", "ChatGLM", "Qwen-1.8B", "Gemma-4-31B"],
)
def test_real_config_files_of_models_that_compute_otherwise_are_refused_with_the_reason(raw, words):
    with pytest.raises(BadInput) as refused:
        ModelConfig.from_json(raw)
    assert len(refused.value.problems) == 1 and all(word in str(refused.value) for word in words)


@mutation("lora/network/families.py", "Use {use}", "Use another", case="qwen3_next")
@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_is_refused_has_a_way_out_among_those_that_are_not(kind):
    with pytest.raises(BadInput) as refused:
        ModelConfig.from_json({"model_type": kind})
    [problem] = refused.value.problems
    found = re.fullmatch(
        rf"unsupported model in config\.json:model_type: '{kind}'\. [^.]+\. Use \S+ \((\w+)\)", problem
    )
    assert found and found[1] in (FAMILIES | WRAPPERS) and kind not in (FAMILIES | WRAPPERS), problem


def test_absent_fields_mean_what_the_family_says():
    small = {key: LLAMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    for family, positions in (("llama", 2048), ("qwen2", 32768)):
        config = ModelConfig.from_json({**small, "model_type": family, "num_attention_heads": 8})
        assert config.max_position_embeddings == positions
        assert config.rms_norm_eps == 1e-6 and config.rope_theta == 10000.0
        assert config.num_key_value_heads == 8 and config.head_dim == 8
        assert config.rope_scaling == RopeScaling() and config.eos_token_ids == ()
        assert not config.tie_word_embeddings and config.qkv_bias == (family == "qwen2")


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "swish"},
        {"attention_dropout": 0.0},
        {"quantization_config": None},
        {"partial_rotary_factor": 1.0},
        {"layer_types": ["full_attention", "full_attention"]},
        {"sliding_window": None},
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"architectures": ["SomethingElse"], "auto_map": {"AutoModel": "evil.py"}, "transformers_version": "9"},
        {"eos_token_id": [2, 5]},
        {"head_dim": 20},
    ],
)
def test_values_that_change_nothing_are_accepted(fields):
    assert ModelConfig.from_json(changed(LLAMA, **fields)).hidden_size == 64


def test_an_inactive_sliding_window_is_none():
    config, plain = ModelConfig.from_json(QWEN2), ModelConfig.from_json({**LLAMA, "model_type": "qwen2"})
    assert config == plain


@mutation(
    "lora/network/rope_fields.py", '("rope_parameters", new) if new else ("rope_scaling", old)', '("rope_scaling", old)'
)
@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_new_rope_parameters_mean_what_the_old_fields_mean(theta, scaling):
    old = changed(LLAMA, rope_theta=theta, rope_scaling=scaling)
    older = changed(old, rope_scaling={"type" if k == "rope_type" else k: v for k, v in scaling.items()})
    new = changed(LLAMA, rope_theta=DROP, rope_parameters={**scaling, "rope_theta": theta})
    config = ModelConfig.from_json(new)
    assert config == ModelConfig.from_json(old) == ModelConfig.from_json(older)
    assert config.rope_theta == theta and config.rope_scaling.kind == scaling["rope_type"]
    assert config.rope_scaling.factor == scaling.get("factor", 1.0)


# ---- refused ---------------------------------------------------------------------------------------------------------

REFUSED = [
    # field the message must name, changed fields, base
    ("model_type", {"model_type": "mixtral"}),
    ("model_type", {"model_type": "qwen3_moe"}),
    ("model_type", {"model_type": "Llama"}),
    ("model_type", {"model_type": DROP}),
    ("model_type", {"model_type": 3}),
    ("model_type", {"model_type": ["llama"]}),
    ("rope_scaling", {"rope_scaling": {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 128}}),
    ("rope_scaling", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("rope_scaling", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}),
    ("rope_scaling", {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}),
    ("rope_scaling", {"rope_scaling": {"factor": 2.0}}),
    ("rope_scaling", {"rope_scaling": "linear"}),
    ("rope_scaling", {"rope_scaling": [2.0]}),
    ("rope_parameters", {"rope_theta": DROP, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}),
    ("rope_parameters", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ("rope_parameters", {"rope_parameters": 5}),
    ("factor", {"rope_scaling": {"rope_type": "linear"}}),
    ("factor", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}),
    ("factor", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}),
    ("factor", {"rope_scaling": {"rope_type": "linear", "factor": math.inf}}),
    ("low_freq_factor", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}),
    ("low_freq_factor", {"rope_scaling": {**LLAMA3, "low_freq_factor": 0}}),
    ("high_freq_factor", {"rope_scaling": {**LLAMA3, "high_freq_factor": None}}),
    ("original_max_position_embeddings", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}}),
    ("rope_theta", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("rope_theta", {"rope_theta": 0}),
    ("rope_theta", {"rope_theta": "10000"}),
    ("rope_theta", {"rope_theta": math.nan}),
    ("rope_theta", {"rope_theta": 10**400}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("hidden_act", {"hidden_act": "relu"}),
    ("attention_dropout", {"attention_dropout": 0.1}),
    ("num_key_value_heads", {"num_key_value_heads": 3}),
    ("num_key_value_heads", {"num_key_value_heads": 16}),
    ("num_key_value_heads", {"num_key_value_heads": 0}),
    ("num_attention_heads", {"num_attention_heads": 7, "num_key_value_heads": 7}),
    ("num_attention_heads", {"num_attention_heads": 0}),
    ("num_attention_heads", {"num_attention_heads": 8.0}),
    ("head_dim", {"head_dim": 5}),
    ("head_dim", {"hidden_size": 24}),
    ("head_dim", {"head_dim": -8}),
    ("hidden_size", {"hidden_size": "64"}),
    ("hidden_size", {"hidden_size": -64}),
    ("hidden_size", {"hidden_size": 0}),
    ("hidden_size", {"hidden_size": 10**12}),
    ("hidden_size", {"hidden_size": 10**400}),
    ("hidden_size", {"hidden_size": True}),
    ("hidden_size", {"hidden_size": DROP}),
    ("hidden_size", {"hidden_size": [64]}),
    ("vocab_size", {"vocab_size": 1e12}),
    ("vocab_size", {"vocab_size": 32000.5}),
    ("intermediate_size", {"intermediate_size": None}),
    ("num_hidden_layers", {"num_hidden_layers": 10**12}),
    ("num_hidden_layers", {"num_hidden_layers": {}}),
    ("max_position_embeddings", {"max_position_embeddings": -1}),
    ("rms_norm_eps", {"rms_norm_eps": math.nan}),
    ("rms_norm_eps", {"rms_norm_eps": -1e-6}),
    ("rms_norm_eps", {"rms_norm_eps": "1e-6"}),
    ("rms_norm_eps", {"rms_norm_eps": 2}),
    ("tie_word_embeddings", {"tie_word_embeddings": "false"}),
    ("attention_bias", {"attention_bias": 1}),
    ("mlp_bias", {"mlp_bias": "no"}),
    ("eos_token_id", {"eos_token_id": "</s>"}),
    ("eos_token_id", {"eos_token_id": [2, -1]}),
    ("eos_token_id", {"eos_token_id": True}),
    ("use_sliding_window", {"use_sliding_window": True}),
    ("use_sliding_window", {"model_type": "qwen2", "use_sliding_window": 1}),
    ("max_window_layers", {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1}),
    ("sliding_window", {"sliding_window": 4096}),
    ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("layer_types", {"layer_types": "full_attention"}),
    ("quantization_config", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("num_local_experts", {"num_local_experts": 8}),
    ("final_logit_softcapping", {"final_logit_softcapping": 30.0}),
    ("embedding_multiplier", {"embedding_multiplier": 12.0}),
    ("use_mrope", {"use_mrope": True}),
]  # fmt: skip


@mutation(
    "lora/network/config.py",
    "if not isinstance(activation, str) or activation not in ACTIVATIONS:",
    'if activation not in (*ACTIVATIONS, "gelu", "relu"):',
)
@mutation("lora/network/families.py", '    "sliding_window": (None,),', '    "sliding_window": (None, 4096),')
@mutation("lora/network/rope_fields.py", "if any(theta != thetas[0] for theta in thetas):", "if False:")
@mutation("lora/network/config.py", "        if heads % kv_heads:", "        if False:")
@pytest.mark.parametrize(("field", "fields"), REFUSED, ids=lambda x: str(x)[:40])
def test_a_config_that_would_compute_something_else_is_refused_by_field(field, fields):
    with pytest.raises(BadInput) as refused:
        ModelConfig.from_json(changed(LLAMA, **fields), "some/config.json")
    assert f"in some/config.json:{field}:" in str(refused.value) or (
        f"in some/config.json:rope_scaling: {field} " in str(refused.value)
    ), str(refused.value)


QWEN35, LFM2, GRANITE = "Qwen/Qwen3.5-0.8B", "LiquidAI/LFM2-1.2B", "ibm-granite/granite-3.3-8b-instruct"
GRANITE4, HUNYUAN, EXAONE4 = "ibm-granite/granite-4.0-350m", "tencent/Hy-MT2-7B", "LGAI-EXAONE/EXAONE-4.0-32B"
OLMO3, ERNIE, PHI4 = "allenai/Olmo-3.1-32B-Instruct", "baidu/ERNIE-4.5-0.3B-PT", "microsoft/Phi-4-mini-instruct"
GEMMA4 = "google/gemma-4-E2B-it"
R1, MINISTRAL = "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "mistralai/Ministral-3-3B-Instruct-2512"
ROPE_OF = {name: text_of(name).get("rope_parameters") or text_of(name).get("rope_scaling") for name in REAL}
WRONG_NUMBERS = (0, -1, math.nan, math.inf, "12", True, [1])
NEWER_REFUSED = [
    # a real file, the field that the message must name, changed fields
    (QWEN35, "layer_types", {"layer_types": ["linear_attention"] * 23}),
    (QWEN35, "layer_types", {"layer_types": ["linear_attention"] * 23 + ["sliding_attention"]}),
    (QWEN35, "layer_types", {"layer_types": ["linear_attention"] * 23 + [None]}),
    (QWEN35, "layer_types", {"layer_types": ["linear_attention"] * 23 + [["full_attention"]]}),
    (QWEN35, "layer_types", {"layer_types": {"0": "linear_attention"}}),
    (QWEN35, "full_attention_interval", {"layer_types": DROP, "full_attention_interval": -4}),
    (QWEN35, "full_attention_interval", {"layer_types": DROP, "full_attention_interval": "4"}),
    (QWEN35, "attn_output_gate", {"attn_output_gate": False}),
    (QWEN35, "output_gate_type", {"output_gate_type": "sigmoid"}),
    (QWEN35, "hidden_act", {"hidden_act": "gelu_pytorch_tanh"}),
    (QWEN35, "linear_num_key_heads", {"linear_num_key_heads": 3}),
    (QWEN35, "linear_num_key_heads", {"linear_num_key_heads": 32}),
    (QWEN35, "linear_conv_kernel_dim", {"linear_conv_kernel_dim": 1}),
    *((QWEN35, field, {field: value}) for value in (0, -1, "4", 4.5, True, 10**6) for field in (
        "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
        "linear_conv_kernel_dim")),
    (QWEN35, "rope_parameters", {"rope_parameters": ROPE_OF[QWEN35] | {"rope_type": "mrope"}}),
    (QWEN35, "partial_rotary_factor", {"rope_parameters": ROPE_OF[QWEN35] | {"partial_rotary_factor": 1.5}}),
    (QWEN35, "num_experts", {"num_experts": 128}),
    (LFM2, "layer_types", {"layer_types": ["conv"] * 15 + ["short_conv"]}),
    (LFM2, "layer_types", {"layer_types": ["conv"] * 15}),
    (LFM2, "full_attn_idxs", {"full_attn_idxs": "2,5"}),
    (LFM2, "full_attn_idxs", {"full_attn_idxs": [2, 16]}),
    (LFM2, "full_attn_idxs", {"full_attn_idxs": [2, "5"]}),
    (LFM2, "conv_bias", {"conv_bias": True}),
    (LFM2, "hidden_act", {"hidden_act": "gelu_pytorch_tanh"}),  # transformers computes silu, whatever is there
    (LFM2, "use_pos_enc", {"use_pos_enc": False}),
    (LFM2, "block_use_swiglu", {"block_use_swiglu": False}),
    (LFM2, "block_auto_adjust_ff_dim", {"block_auto_adjust_ff_dim": "yes"}),
    (LFM2, "tie_embedding", {"tie_embedding": 1}),
    (LFM2, "norm_eps", {"norm_eps": "1e-5"}),
    *((LFM2, field, {field: value}) for value in (0, -1, "3", math.nan, True, [3]) for field in (
        "conv_L_cache", "block_ff_dim", "block_multiple_of", "block_ffn_dim_multiplier")),
    (LFM2, "conv_L_cache", {"conv_L_cache": 1}),
    *((base, field, {field: value}) for value in WRONG_NUMBERS for base in (GRANITE, GRANITE4) for field in (
        "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")),
    (GRANITE, "num_local_experts", {"num_local_experts": 40}),
    (GRANITE4, "num_local_experts", {"num_local_experts": 8}),
    (GRANITE4, "num_local_experts", {"num_local_experts": DROP}),
    (GRANITE4, "position_embedding_type", {"position_embedding_type": "nope"}),
    (GRANITE4, "position_embedding_type", {"position_embedding_type": DROP}),
    (GRANITE4, "layer_types", {"layer_types": ["mamba"] * 27 + ["attention"]}),
    (GRANITE4, "layer_types", {"layer_types": ["attention"] * 27}),
    (GRANITE4, "shared_intermediate_size", {"shared_intermediate_size": 0}),
    (HUNYUAN, "use_qk_norm", {"use_qk_norm": False}),
    (HUNYUAN, "use_cla", {"use_cla": True}),
    (HUNYUAN, "use_rotary_pos_emb", {"use_rotary_pos_emb": False}),
    (HUNYUAN, "num_experts", {"num_experts": 64}),
    (HUNYUAN, "rope_scaling", {"rope_scaling": {"type": "dynamic", "factor": 1.0}}),
    *((HUNYUAN, "alpha", {"rope_scaling": {"type": "dynamic", "alpha": value}}) for value in WRONG_NUMBERS),
    (EXAONE4, "sliding_window_pattern", {"layer_types": DROP, "sliding_window_pattern": "LGLG"}),
    (EXAONE4, "sliding_window_pattern", {"layer_types": DROP, "sliding_window_pattern": "lllg"}),
    (EXAONE4, "sliding_window_pattern", {"layer_types": DROP, "sliding_window_pattern": -1}),
    (EXAONE4, "sliding_window", {"sliding_window": "4096"}),
    (EXAONE4, "layer_types", {"layer_types": ["chunked_attention"] * 64}),
    (OLMO3, "layer_types", {"layer_types": ["sliding_attention"] * 63}),
    (OLMO3, "clip_qkv", {"clip_qkv": 8.0}),
    (GEMMA4, "layer_types", {"layer_types": ["sliding_attention"] * 35}),
    (GEMMA4, "layer_types", {"layer_types": ["full_attention", ["sliding_attention"]]}),
    (GEMMA4, "enable_moe_block", {"enable_moe_block": True, "num_experts": 128}),
    (GEMMA4, "enable_moe_block", {"enable_moe_block": 2}),
    (GEMMA4, "attention_k_eq_v", {"attention_k_eq_v": True}),
    (GEMMA4, "num_kv_shared_layers", {"num_kv_shared_layers": 35}),
    (GEMMA4, "num_kv_shared_layers", {"num_kv_shared_layers": 34}),
    (GEMMA4, "use_bidirectional_attention", {"use_bidirectional_attention": "all"}),
    (GEMMA4, "vocab_size_per_layer_input", {"vocab_size_per_layer_input": 1000}),
    (GEMMA4, "use_double_wide_mlp", {"use_double_wide_mlp": "yes"}),
    *((GEMMA4, field, {field: value}) for value in (-1, "2", math.nan, True) for field in (
        "num_kv_shared_layers", "global_head_dim", "hidden_size_per_layer_input", "vocab_size_per_layer_input",
        "sliding_window")),
    (GEMMA4, "per_layer_config", {"per_layer_config": {"4": {"head_dim": 512}}}),
    (GEMMA4, "rope_parameters", {"rope_parameters": {
        "full_attention": ROPE_OF[GEMMA4]["full_attention"], "sliding_attention": {"rope_type": "yarn"}}}),
    (GEMMA4, "factor", {"rope_parameters": ROPE_OF[GEMMA4] | {
        "full_attention": ROPE_OF[GEMMA4]["full_attention"] | {"factor": 8.0}}}),
    (ERNIE, "use_bias", {"use_bias": "no"}),
    (ERNIE, "moe_num_experts", {"moe_num_experts": 64}),
    (R1, "original_max_position_embeddings", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    (R1, "original_max_position_embeddings", {"original_max_position_embeddings": 4096}),
    (R1, "mscaling", {"rope_scaling": ROPE_OF[R1] | {"mscaling": 0.7}}),
    (R1, "short_factor", {"rope_scaling": ROPE_OF[R1] | {"short_factor": [1.0]}}),
    *((R1, field, {"rope_scaling": ROPE_OF[R1] | {field: value}}) for value in (-1, math.nan, "1", [1]) for field in (
        "factor", "attn_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "original_max_position_embeddings")),
    (R1, "truncate", {"rope_scaling": ROPE_OF[R1] | {"truncate": "no"}}),
    (MINISTRAL, "llama_4_scaling_beta", {"rope_parameters": ROPE_OF[MINISTRAL] | {"llama_4_scaling_beta": -0.1}}),
    (PHI4, "short_factor", {"rope_scaling": ROPE_OF[PHI4] | {"short_factor": [1.0] * 47}}),
    (PHI4, "short_factor", {"rope_scaling": ROPE_OF[PHI4] | {"short_factor": [1.0] * 47 + [0]}}),
    (PHI4, "short_factor", {"rope_scaling": ROPE_OF[PHI4] | {"short_factor": [1.0] * 47 + [math.nan]}}),
    (PHI4, "short_factor", {"rope_scaling": ROPE_OF[PHI4] | {"short_factor": None}}),
    (PHI4, "original_max_position_embeddings", {"original_max_position_embeddings": DROP}),
    (PHI4, "original_max_position_embeddings", {
        "rope_scaling": ROPE_OF[PHI4] | {"original_max_position_embeddings": 8192}}),
    (PHI4, "original_max_position_embeddings", {"original_max_position_embeddings": 0}),
    (PHI4, "factor", {"rope_scaling": ROPE_OF[PHI4] | {"factor": "32"}}),
    (PHI4, "long_mscale", {"rope_scaling": ROPE_OF[PHI4] | {"long_mscale": 1.2}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "field", "fields"), NEWER_REFUSED, ids=lambda x: str(x)[:50])
def test_a_real_config_file_that_is_changed_is_refused_by_field(name, field, fields):
    with pytest.raises(BadInput) as refused:
        ModelConfig.from_json(changed(text_of(name), **fields), "some/config.json")
    for problem in refused.value.problems:
        assert problem.startswith("unsupported model in some/config.json:") and "\n" not in problem
        assert re.search(r"\. [A-Z][^.]*$", problem) and len(problem) < 250, problem  # what to do
    assert any(re.search(rf":{field}: |: {field} ", problem) for problem in refused.value.problems), str(refused.value)


QUANTISED = {  # a name -> of what it was made
    "unsloth/Llama-3.2-1B-bnb-4bit": "unsloth/Llama-3.2-1B",
    "unsloth/gemma-3-1b-it-unsloth-bnb-4bit": "unsloth/gemma-3-1b-it",
    "Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4": "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct-AWQ": "Qwen/Qwen2.5-7B-Instruct",
    "owner/Llama-3.2-1B-Instruct-FP8-dynamic": "owner/Llama-3.2-1B-Instruct",
    "owner/Llama-3.2-3B-Instruct-quantized.w8a8": "owner/Llama-3.2-3B-Instruct",
    "owner/Qwen2.5-0.5B-Instruct-4bit": "owner/Qwen2.5-0.5B-Instruct",
    "/models/Llama-3.2-1B-bnb-4bit": "Llama-3.2-1B",
    "Qwen/Qwen3-4B": "",
}


@mutation(
    "lora/network/families.py",
    "(bnb[-_.]?[48]bit|gptq|",
    "(gptq|",
    case="quantization_config-unsloth/Llama-3.2-1B-bnb-4bit",
)
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("field", ["quantization_config", "quantization"])
def test_a_quantised_model_is_refused_with_the_name_of_the_one_it_was_made_from(name, field):
    value = {"quant_method": "bitsandbytes", "load_in_4bit": True} if field[12:] else {"group_size": 64, "bits": 4}
    with pytest.raises(BadInput) as refused:
        ModelConfig.from_json(LLAMA | {field: value}, f"{name}/config.json")
    [problem] = refused.value.problems
    plain = QUANTISED[name]
    by = "bitsandbytes" if field[12:] else "MLX"
    why = f"its weights are quantised by {by}, which is not implemented. Give the model that it was made from"
    assert problem == f"unsupported model in {name}/config.json:{field}: {why}{f', {plain}' if plain else ''}"
    if not plain:
        raw = LLAMA | {field: value, "_name_or_path": "Qwen/Qwen3-4B-Base"}
        with pytest.raises(BadInput, match=r"made from, Qwen/Qwen3-4B-Base$"):
            ModelConfig.from_json(raw, f"{name}/config.json")


@mutation("lora/network/families.py", 'unused=("attn_logit_softcapping",),', "")
@mutation(
    "lora/network/families.py",
    'reads=(*READ_BY_GEMMA, "rope_local_base_freq", "sliding_window_pattern"), unused',
    'reads=(*READ_BY_GEMMA, "attn_logit_softcapping", "rope_local_base_freq", "sliding_window_pattern"), unused',
)
def test_gemma_3_stores_a_cap_of_its_attention_that_nobody_computes_with():
    raw = REAL["google/gemma-3-1b-it"]["config"] | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    config = ModelConfig.from_json(raw)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (None, 30)
    assert ModelConfig.from_json(raw | {"model_type": "gemma2"}).attn_logit_softcapping == 50


def test_every_field_that_is_not_implemented_has_a_refused_value():
    for field, neutral in NEUTRAL.items():
        ModelConfig.from_json(changed(LLAMA, **{field: neutral[0]}))
        with pytest.raises(BadInput, match=f":{field}: "):
            ModelConfig.from_json(changed(LLAMA, **{field: 0.37}))


def test_all_problems_are_named_at_once():
    raw = changed(LLAMA, hidden_act="gelu", vocab_size="1000", rms_norm_eps=math.nan, quantization_config={})
    with pytest.raises(BadInput) as refused:
        ModelConfig.from_json(raw)
    assert len(refused.value.problems) == 4
    for field in ("hidden_act", "vocab_size", "rms_norm_eps", "quantization_config"):
        assert sum(f":{field}:" in problem for problem in refused.value.problems) == 1


# ---- anything at all -------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 10**12, 10**400]))
KEYS = st.sampled_from(
    sorted({"rope_type", "type", "rope_theta", "full_attention", "sliding_attention", "llama_4_scaling_beta",
            "mrope_section", *(key for keys in ROPES.values() for key in keys)})
)  # fmt: skip
KINDS = st.sampled_from(
    [*ROPES, *FAMILIES, *WRAPPERS, "silu", "full_attention", "sliding_attention", "linear_attention", "conv",
     "attention", "mamba", "LLLG"]
)  # fmt: skip
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=6), KINDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=6),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted({*QWEN2, *NEUTRAL, "rope_scaling", "rope_parameters", "layer_types", "head_dim",
                                 "attention_bias", "mlp_bias", *(field for name in REAL for field in text_of(name)),
                                 *(field for family in FAMILIES.values() for field in family.reads)}))  # fmt: skip
BASES = [{**LLAMA, "model_type": family} for family in sorted(FAMILIES)] + [text_of(name) for name in PARTICULAR]


@mutation("lora/network/layer_fields.py", "any(kind not in [*words] for", "any(kind not in words for")
@hypothesis_settings(max_examples=400, **CALM)
@given(st.sampled_from(BASES), st.dictionaries(FIELDS, VALUES, min_size=1, max_size=4))
@example(LLAMA, {"model_type": ["llama"]})
@example(LLAMA, {"hidden_size": 10**400})
@example(LLAMA, {"rope_parameters": {"a\nb": "c\nd"}})
@example(QWEN2, {"rope_scaling": {"type": "linear", "factor": 10**400}})
@example(BASES[-2], {"max_position_embeddings": "131072"})
@example({**LLAMA, "model_type": "lfm2"}, {"layer_types": [["conv"], {}]})
def test_any_json_in_any_field_gives_a_config_or_bad_input(base, fields):
    raw = {**base, **fields}
    try:
        config = ModelConfig.from_json(raw)
    except BadInput as refused:
        assert all(problem and "\n" not in problem for problem in refused.problems)
        return
    widest = max(config.head_dim, config.gemma4.global_head_dim if config.gemma4 else 0)
    assert isinstance(config, ModelConfig) and config.rotary_dim % 2 == 0 < config.rotary_dim <= widest
    assert len(config.windows) == len(config.ropes) == config.num_hidden_layers
    assert all(window is None or window > 0 for window in config.windows)
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert math.isfinite(config.rope_theta) and config.rope_theta > 0 and math.isfinite(config.rms_norm_eps)
    assert all(type(getattr(config, name)) is int for name in ("vocab_size", "hidden_size", "head_dim"))


@hypothesis_settings(max_examples=200, **CALM)
@given(st.sampled_from(sorted(WRAPPERS)), VALUES, st.dictionaries(FIELDS, VALUES, max_size=3))
@example("qwen3_5", {"model_type": ["qwen3_5_text"]}, {"quantization_config": []})
def test_any_json_as_the_language_model_of_a_larger_one_gives_a_config_or_bad_input(kind, text, fields):
    with contextlib.suppress(BadInput):
        ModelConfig.from_json(
            prequantised.plain(wrapped.text_config(fields | {"model_type": kind, "text_config": text}))
        )
