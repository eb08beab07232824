"""config.json: real files of the supported families are accepted, everything else is refused by the name of a field."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora.errors import BadInput
from lora.network.config import ModelConfig, RopeScaling
from lora.network.families import FAMILIES, NEUTRAL
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


@mutation(
    "lora/network/families.py",
    "max_position_embeddings=32768, attention_bias=True, o_bias",
    "max_position_embeddings=32768, attention_bias=False, o_bias",
)
@pytest.mark.parametrize("name", REAL)
def test_real_config_files_are_accepted_as_they_are(name):
    raw = REAL[name]["config"]
    config = ModelConfig.from_json(raw)
    for field in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings",
                  "tie_word_embeddings"):  # fmt: skip
        if field in raw:
            assert getattr(config, field) == raw[field], field
    assert config.head_dim == (raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"])
    rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta")}
    assert config.rope_theta == (rope["rope_theta"] or 10000.0)
    assert config.rope_scaling.kind == rope.get("rope_type", rope.get("type", "default"))
    assert config.rope_scaling.factor == rope.get("factor", 1.0)
    assert config.qkv_bias == (raw["model_type"] == "qwen2" or raw.get("attention_bias", False))
    assert config.o_bias == (raw["model_type"] == "llama" and raw.get("attention_bias", False))
    eos = raw["eos_token_id"]
    assert config.eos_token_ids == tuple(eos if isinstance(eos, list) else [eos])


def test_real_config_files_cover_all_families_and_every_kind_of_rope():
    configs = [ModelConfig.from_json(entry["config"]) for entry in REAL.values()]
    assert {config.model_type for config in configs} == set(FAMILIES)
    assert {config.rope_scaling.kind for config in configs} >= {"default", "llama3"}
    assert {config.tie_word_embeddings for config in configs} == {True, False}


def of(name: str) -> ModelConfig:
    return ModelConfig.from_json(REAL[name]["config"])


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


PHI4_MINI = {
    "model_type": "phi3", "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.75, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    "original_max_position_embeddings": 4096, "eos_token_id": 199999, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip


def test_longrope_is_for_documents_of_the_original_length():
    config = ModelConfig.from_json(PHI4_MINI)
    assert config.rope_scaling.kind == "longrope" and config.max_position_embeddings == 4096
    assert config.rope_scaling.short_factors == (1.0,) * 48 and config.rotary_dim == 96


BAICHUAN2 = {**REAL["baichuan-inc/Baichuan-7B"]["config"], "architectures": ["BaichuanForCausalLM"],
             "model_max_length": 4096, "vocab_size": 125696}  # fmt: skip
BAICHUAN_13B = {key: value for key, value in BAICHUAN2.items() if key != "max_position_embeddings"} | {
    "vocab_size": 64000, "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (BAICHUAN2, ("vocab_size", "Baichuan2")),
        (BAICHUAN_13B, ("max_position_embeddings", "ALiBi")),
        ({"model_type": "chatglm", "num_layers": 28, "hidden_size": 4096}, ("model_type", "GLM-4-9B-0414")),
        ({"model_type": "qwen", "num_hidden_layers": 24, "hidden_size": 2048}, ("model_type", "Qwen1.5")),
    ],
    ids=["Baichuan2-7B", "Baichuan-13B", "ChatGLM", "Qwen-1.8B"],
)
def test_real_config_files_of_models_that_compute_otherwise_are_refused_with_the_reason(raw, words):
    with pytest.raises(BadInput) as refused:
        ModelConfig.from_json(raw)
    assert len(refused.value.problems) == 1 and all(word in str(refused.value) for word in words)


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
KEYS = st.sampled_from(["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor",
                        "original_max_position_embeddings", "attention_factor"])  # fmt: skip
KINDS = st.sampled_from(["default", "linear", "llama3", "yarn", "silu", "llama", "qwen2", "full_attention",
                         "sliding_attention"])  # fmt: skip
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=6), KINDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=6),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted({*QWEN2, *NEUTRAL, "rope_scaling", "rope_parameters", "layer_types", "head_dim",
                                 "attention_bias", "mlp_bias",
                                 *(field for family in FAMILIES.values() for field in family.reads)}))  # fmt: skip


@hypothesis_settings(max_examples=300, **CALM)
@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(FIELDS, VALUES, min_size=1, max_size=4))
@example("llama", {"model_type": ["llama"]})
@example("llama", {"hidden_size": 10**400})
@example("qwen2", {"rope_scaling": {"type": "linear", "factor": 10**400}})
def test_any_json_in_any_field_gives_a_config_or_bad_input(family, fields):
    raw = {**LLAMA, "model_type": family, **fields}
    try:
        config = ModelConfig.from_json(raw)
    except BadInput as refused:
        assert all(problem and "\n" not in problem for problem in refused.problems)
        return
    assert isinstance(config, ModelConfig) and config.rotary_dim % 2 == 0 < config.rotary_dim <= config.head_dim
    assert len(config.windows) == len(config.ropes) == config.num_hidden_layers
    assert all(window is None or window > 0 for window in config.windows)
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert math.isfinite(config.rope_theta) and config.rope_theta > 0 and math.isfinite(config.rms_norm_eps)
    assert all(type(getattr(config, name)) is int for name in ("vocab_size", "hidden_size", "head_dim"))
