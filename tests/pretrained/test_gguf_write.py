"""What `merge.py --format gguf` writes is read by the gguf package and by us as what was meant, bit for bit.

test_parity_llama.py lets llama.cpp itself read it.
"""

import errno
import json
import resource
import shutil
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer

import merge as merge_script
from lora import pretrained
from lora.adapter.inject import inject, lora_layers
from lora.adapter.layer import LoRALinear
from lora.errors import BadInput, BadNumbers
from lora.network.config import ModelConfig
from lora.pretrained import gguf_keys, gguf_names, gguf_write
from lora.pretrained.gguf import GGUFFile
from lora.pretrained.gguf_vocab import tokenizer_metadata
from tests import cli
from tests.faults import Blow, Disk
from tests.helpers import close, randomise_adapter, same, snapshot, some_tokens
from tests.mutation import mutation
from tests.pretrained import gguf_converter as converter
from tests.pretrained.test_gguf import PRE, STRINGS, trained  # noqa: F401 (a fixture)

TYPE = GGMLQuantizationType
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.1], "long_factor": [1.0, 2.5, 5.0, 9.0],
            "original_max_position_embeddings": 1024}  # fmt: skip
MINISTRAL = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 16,
             "beta_fast": 2.0, "beta_slow": 0.5, "mscale_all_dim": 1.0, "mscale": 1.0,
             "llama_4_scaling_beta": 0.1}  # fmt: skip
DELTA = {
    "model_type": "qwen3_5_text", "num_hidden_layers": 4, "head_dim": 16, "full_attention_interval": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
}  # fmt: skip
GEMMA = {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
         "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}  # fmt: skip
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25,
               "logits_scaling": 0.5}  # fmt: skip
WINDOWS = {"sliding_window": 6, "num_hidden_layers": 5}
CASES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with wide heads": {"head_dim": 16},
    "llama, one kv head each": {"num_key_value_heads": 4},
    "llama, linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama 3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama with rows to spare": {"vocab_size": 305},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "baichuan": {"model_type": "baichuan"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3, yarn": {"model_type": "qwen3", "head_dim": 8, "rope_scaling": YARN},
    "llama, yarn, attention_factor": {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "llama, longrope": {"rope_scaling": LONGROPE, "max_position_embeddings": 4096},
    "ministral3": {"model_type": "ministral3", "head_dim": 16, "rope_parameters": MINISTRAL},
    "ministral3, another attention_factor": {
        "model_type": "ministral3", "head_dim": 8, "rope_parameters": MINISTRAL | {"attention_factor": 1.2}},
    "ministral3 without yarn": {"model_type": "ministral3", "head_dim": 8, "rope_parameters": {"rope_type": "default"}},
    "qwen3_5": DELTA,
    "qwen3_5, tied": DELTA | {"tie_word_embeddings": True, "linear_num_value_heads": 6},
    "qwen3_5, as many keys": DELTA | {"linear_num_value_heads": 2, "partial_rotary_factor": 0.5},
    "qwen3_5, layers in another order": DELTA | {"layer_types": ["full_attention", "linear_attention"] * 2},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "glm4": {"model_type": "glm4", "head_dim": 16},
    "phi3": {"model_type": "phi3"},
    "phi3, longrope": {
        "model_type": "phi3", "rope_scaling": LONGROPE | {"short_factor": [1.5, 3], "long_factor": [2, 9.5]},
        "max_position_embeddings": 4096, "partial_rotary_factor": 0.5},
    "gemma2": {"model_type": "gemma2", "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0, **GEMMA},
    "gemma3": {"model_type": "gemma3_text", "rope_local_base_freq": 500.0, "sliding_window_pattern": 3,
               "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "final_logit_softcapping": 10.0, **GEMMA},
    "granite": {"model_type": "granite", "attention_bias": True, "mlp_bias": True, **MULTIPLIERS},
    "granite 4": {"model_type": "granitemoehybrid", "shared_intermediate_size": 48, "num_local_experts": 0,
                  "layer_types": ["attention"] * 2, "position_embedding_type": "rope", **MULTIPLIERS},
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3,
             "block_auto_adjust_ff_dim": False, "norm_eps": 1e-5, "tie_word_embeddings": True, "conv_L_cache": 3},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", "rope_scaling": YARN, **WINDOWS},
    "olmo3 that looks back without limit": {"model_type": "olmo3", "layer_types": ["full_attention"] * 2},
    "exaone4": {"model_type": "exaone4", "sliding_window": None, "rope_scaling": LLAMA3 | {"factor": 16.0},
                "rope_theta": 1000000.0},
    "exaone4 of 64 layers": {"model_type": "exaone4", "num_hidden_layers": 64, "sliding_window": 6},
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 16},
    "hunyuan": {"model_type": "hunyuan_v1_dense", "head_dim": 16,
                "rope_scaling": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 16},
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def models_in(tmp_path_factory):
    """Folders of the models of CASES, made when they are asked for."""
    return cache(lambda case: cli.write_model(tmp_path_factory.mktemp("model"), **CASES[case]))


models = pytest.fixture(models_in, scope="module")


def as_is(name, tensor):
    return tensor.float()


def written(folder, path, kind="bf16", change=as_is):
    gguf_write.write_model(pretrained.find(str(folder)), path, change, kind)
    return path


def stored(path):
    """By the gguf package: metadata, and name -> (type, values in float32)."""
    reader = GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {
        tensor.name: (tensor.tensor_type, dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]))
        for tensor in reader.tensors
    }
    return metadata, tensors


# ---- a whole model ---------------------------------------------------------------------------------------------------


def test_the_gguf_package_finds_every_key(models, tmp_path):
    metadata, _ = stored(written(models("llama"), tmp_path / "a.gguf"))
    tokenizer = json.loads((models("llama") / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), 300)]
    assert metadata == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "a",
        "general.file_type": 32,
        "general.quantization_version": 2,
        "llama.vocab_size": 300,
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(vocabulary) - 3) + [5] * (300 - len(vocabulary)),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": cli.CHATML,
    }


@pytest.mark.parametrize(
    "case, keys",
    [
        ("llama with wide heads", {"llama.attention.key_length": 16, "llama.attention.value_length": 16,
                                   "llama.rope.dimension_count": 16}),
        ("llama, linear scaling", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
        ("qwen2", {"general.architecture": "qwen2", "qwen2.attention.head_count_kv": 2, "qwen2.rope.freq_base": 1e4}),
    ],
)  # fmt: skip
def test_keys_follow_the_config(models, tmp_path, case, keys):
    assert keys.items() <= stored(written(models(case), tmp_path / "a.gguf"))[0].items()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def rounded(values, kind):
    """Float32 values as a type of GGUF holds them: by numpy, torch and the gguf package."""
    if kind == "f16":
        return values.astype(np.float16).astype(np.float32)
    if kind == "bf16":
        return torch.from_numpy(values).bfloat16().float().numpy()
    return values if kind == "f32" else dequantize(quantize(values, TYPE.Q8_0), TYPE.Q8_0)


@mutation(
    "lora/pretrained/gguf_write.py",
    "layout.stored(name, change(name, base.read(name, base.widest)))",
    "change(name, base.read(name, base.widest))",
)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@every_case
def test_every_tensor_is_there_once_under_its_name_in_llama_cpps_row_order_rounded_once(models, tmp_path, case, kind):
    folder = models(case)
    state, config = load_file(folder / "model.safetensors"), config_of(folder)
    state = {name: tensor.float() * (1 + 2**-20) for name, tensor in state.items()}  # bf16 does not hold them
    _, tensors = stored(written(folder, tmp_path / "a.gguf", kind, lambda name, tensor: state[name]))
    state = converter.as_on_the_hub(config, state)
    expected = dict(converter.stored(name, tensor, config) for name, tensor in state.items())
    expected |= converter.rope(config)[1]
    if "rope_freqs.weight" in expected:
        (kind_of, divisors), truth = tensors.pop("rope_freqs.weight"), expected.pop("rope_freqs.weight")
        assert kind_of == TYPE.F32 and np.allclose(divisors, truth, rtol=1e-6, atol=0)
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        own = (
            "f32"
            if values.ndim == 1 or name.endswith(("conv.weight", "conv1d.weight"))
            else "f16"
            if kind == "q8_0" and values.shape[-1] % 32
            else kind
        )
        assert tensors[name][0].name.lower() == own and tensors[name][1].shape == values.shape, name
        assert np.array_equal(tensors[name][1], rounded(values, own)), name


OTHERWISE = {
    "mistral": "llama",
    "baichuan": "llama",
    "ministral3": "llama",
    "granitemoehybrid": "granite",
    "olmo3": "olmo2",
}  # what a family may be read as


def same_model(ours, theirs) -> bool:
    """The same numbers, bit for bit, in another family's names where a file is read so."""
    kind, a, b = theirs.config.model_type, vars(ours.config), vars(theirs.config)
    assert a["model_type"] in (kind, OTHERWISE.get(kind))
    named = {"model_type", "names", "fused", "written_as", "rope_theta", "rope_local_theta"}
    assert {key: value for key, value in a.items() if key not in named} == {
        key: value for key, value in b.items() if key not in named
    }
    assert np.float32(a["rope_theta"]) == np.float32(b["rope_theta"])
    found, expected = snapshot(ours), {}
    for name, tensor in snapshot(theirs).items():  # Granite 4's names are read as Granite's
        expected[name.replace("shared_mlp", "mlp").replace("output_linear", "down_proj")] = tensor
    return same(found, expected)


@every_case
def test_a_bf16_model_read_back_is_the_same_bit_for_bit(models, tmp_path, case):
    folder = models(case)
    back, there = GGUFFile(written(folder, tmp_path / "a.gguf")), pretrained.find(str(folder))
    ours, theirs = (pretrained.load_model(base, torch.bfloat16) for base in (back, there))
    assert same_model(ours, theirs)
    assert torch.equal(ours(some_tokens(vocab=290)), theirs(some_tokens(vocab=290)))


def test_rows_that_are_not_whole_blocks_are_said(models, tmp_path, capsys):
    written(models("llama"), tmp_path / "a.gguf", "q8_0")
    assert "note     f16 in place of q8_0" in (said := capsys.readouterr().err) and "2 tensors, blk.0.ffn_down" in said
    written(models("llama"), tmp_path / "b.gguf", "bf16")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind, largest", [("f16", 65504), ("bf16", 3.38e38), ("q8_0", 127 * 65504)])
def test_a_value_too_large_for_the_type_is_refused_by_name(models, tmp_path, kind, largest):
    def change(name, tensor):
        return tensor.float().index_fill(1, torch.tensor([3]), value) if name == "lm_head.weight" else tensor.float()

    value = largest
    written(models("llama"), tmp_path / "a.gguf", kind, change)
    value = -largest * 1.005
    with pytest.raises(BadNumbers, match=rf"not finite in output\.weight: .*{kind}") as caught:
        written(models("llama"), tmp_path / "b.gguf", kind, change)
    assert "\n" not in str(caught.value) and [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_a_family_without_a_row_is_refused_by_name(models, tmp_path, monkeypatch):
    monkeypatch.delitem(gguf_names.ARCHITECTURES, "qwen2")
    with pytest.raises(BadInput, match="qwen2 as GGUF is not implemented, only llama"):
        written(models("qwen2"), tmp_path / "a.gguf")


REFUSED = {  # what llama.cpp does not compute so
    "qwen2 in llama.cpp has no llama3 scaling": {"model_type": "qwen2", "rope_scaling": LLAMA3},
    "llama in llama.cpp has no such sliding windows": {"model_type": "mistral", "sliding_window": 8},
    "olmo2 in llama.cpp has no such sliding windows": {
        "model_type": "olmo3", "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
    "exaone4 in llama.cpp has no sliding windows, but has them in 64 layers": {"model_type": "exaone4", **WINDOWS},
    "olmo2 in llama.cpp has no RoPE of another base in sliding windows": {
        "model_type": "olmo3", **WINDOWS, "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}},
    "qwen2 in llama.cpp has no 4 heads of 16 beside 32 channels": {"model_type": "qwen2", "head_dim": 16},
    "olmo2 in llama.cpp has no head that is the embedding": {"model_type": "olmo2", "tie_word_embeddings": True},
    "gemma2 in llama.cpp has no head of its own": {"model_type": "gemma2", **GEMMA, "tie_word_embeddings": False},
    "gemma2 in llama.cpp has no query_pre_attn_scalar 16": {
        "model_type": "gemma2", **GEMMA, "query_pre_attn_scalar": 16},
    "gemma2 in llama.cpp has no model without attn_logit_softcapping": {
        "model_type": "gemma2", **GEMMA, "attn_logit_softcapping": None},
    "smollm3 in llama.cpp has no RoPE in such layers only": {"model_type": "smollm3", "no_rope_layers": [0, 1]},
    "qwen3 in llama.cpp has no activation gelu_tanh": {
        "model_type": "qwen3", "head_dim": 8, "hidden_act": "gelu_pytorch_tanh"},
    "qwen35 in llama.cpp has no keys and values of different sizes": DELTA | {"linear_value_head_dim": 8},
    "qwen3 in llama.cpp has no YaRN with beta_fast and beta_slow of its own": {
        "model_type": "qwen3", "head_dim": 8, "rope_scaling": YARN | {"beta_fast": 8.0}},
    "llama in llama.cpp has no YaRN whose ramp is not between whole pairs": {
        "rope_scaling": YARN | {"truncate": False}},
    "phi3 in llama.cpp has no longrope without a long_factor as long as its short_factor": {
        "model_type": "phi3", "rope_scaling": LONGROPE | {"long_factor": [1.0]}, "max_position_embeddings": 4096},
    "qwen3 in llama.cpp has no longrope scaling": {
        "model_type": "qwen3", "head_dim": 8, "rope_scaling": LONGROPE, "max_position_embeddings": 4096},
    "layers.0.self_attn.q_proj.bias: GGUF has no place for it": {
        "model_type": "qwen3", "head_dim": 8, "attention_bias": True},
}  # fmt: skip


@mutation("lora/pretrained/gguf_keys.py", "if row.square and heads * size != width:", "if False:",
          case="qwen2 in llama.cpp has no 4 heads of 16 beside 32 channels")  # fmt: skip
@mutation("lora/pretrained/gguf_write.py", 'stem.rsplit(".", 1)[-1] not in row.biases', "False",
          case="layers.0.self_attn.q_proj.bias: GGUF has no place for it")  # fmt: skip
@pytest.mark.parametrize("words", REFUSED)
def test_what_llama_cpp_does_not_compute_so_is_refused_by_name_with_the_way_out(tmp_path, words):
    folder = cli.write_model(tmp_path / "model", **REFUSED[words])
    with pytest.raises(BadInput) as caught:
        written(folder, tmp_path / "a.gguf")
    assert len(caught.value.problems) == 1 and words in str(caught.value) and "\n" not in str(caught.value)
    assert "Write a model folder" in str(caught.value) and not (tmp_path / "a.gguf").exists()


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


@pytest.fixture
def with_tokenizer(tmp_path):
    """Makes a folder of a tokenizer.json, its size being the model's, and settings."""

    def make(data, size=420, settings=None, **config):
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        save_file({}, folder / "model.safetensors")
        (folder / "tokenizer.json").write_text(data if isinstance(data, str) else json.dumps(data))
        sizes = cli.SIZES | {"model_type": "llama", "vocab_size": size} | config
        (folder / "config.json").write_text(json.dumps(sizes))
        settings = {"eos_token": "<|im_end|>", "chat_template": cli.CHATML} if settings is None else settings
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return pretrained.find(str(folder))

    return make


@pytest.mark.parametrize("pre", PRE)
def test_a_tokenizer_read_back_gives_the_ids_of_the_one_that_was_written(with_tokenizer, tmp_path, trained, pre):  # noqa: F811
    reference = FastTokenizer.from_str(trained[pre][0].to_str())
    base = with_tokenizer(reference.to_str())
    metadata = tokenizer_metadata(base)
    assert metadata["tokenizer.ggml.pre"] == pre and len(metadata["tokenizer.ggml.tokens"]) == 420
    tensors = {"token_embd.weight": gguf_write.Planned(TYPE.F32, (420, 32), lambda: torch.zeros(420, 32))}
    sizes = gguf_keys.sizes(ModelConfig.from_json(base.config), base.config, gguf_names.ARCHITECTURES["llama"])
    sizes = {f"llama.{key}": value for key, value in sizes.items()} | metadata
    gguf_write._write(tmp_path / "a.gguf", "llama", "model", sizes, tensors, "f32")
    back = FastTokenizer.from_str(GGUFFile(tmp_path / "a.gguf").files()["tokenizer.json"].decode())
    for text in STRINGS:
        ids = reference.encode(text).ids
        assert back.encode(text).ids == ids, text
        assert back.decode(ids, skip_special_tokens=False) == reference.decode(ids, skip_special_tokens=False)
        assert back.decode(ids) == reference.decode(ids)
    kinds = {token.content: token.special for token in back.get_added_tokens_decoder().values()}
    assert kinds == {token.content: token.special for token in reference.get_added_tokens_decoder().values()}


def bytes_level(**change):
    """A tokenizer.json, its parts replaced."""
    data = json.loads((cli.model_folder() / "tokenizer.json").read_text())
    return data | change


def model_part(**change):
    return bytes_level(model=bytes_level()["model"] | change)


def first_added(**change):
    added = bytes_level()["added_tokens"]
    return bytes_level(added_tokens=[added[0] | change, *added[1:]])


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
AROUND = {"type": "TemplateProcessing", "pair": [], "special_tokens": {"<|im_start|>": {
    "id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}}  # fmt: skip
START, TEXT = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
STRANGE = {
    "a prefix space": (bytes_level(pre_tokenizer=BYTES | {"add_prefix_space": True}), "ByteLevel"),
    "words at spaces": (bytes_level(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    "lower case": (bytes_level(normalizer={"type": "Lowercase"}), "Lowercase"),
    "NFC without Qwen's way to cut": (bytes_level(normalizer={"type": "NFC"}), "NFC"),
    "words that need no merges": (model_part(ignore_merges=True), "none of the known ways smollm, gpt-2"),
    "byte fallback": (model_part(byte_fallback=True), "SentencePiece"),
    "dropout": (model_part(dropout=0.1), "dropout 0.1"),
    "a suffix of words": (model_part(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "a token that eats spaces": (first_added(lstrip=True), "lstrip of the token '<|endoftext|>'"),
    "a token that is a whole word": (first_added(single_word=True), "single_word of the token"),
    "a token after the text": (
        bytes_level(post_processor=AROUND | {"single": [TEXT, START]}), "more than a token before"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_a_tokenizer_that_gguf_cannot_name_is_refused_with_the_reason(with_tokenizer, name):
    data, words = STRANGE[name]
    with pytest.raises(BadInput, match=r"unsupported tokenizer in .*tokenizer\.json") as caught:
        tokenizer_metadata(with_tokenizer(data))
    assert words in str(caught.value) and "\n" not in str(caught.value) and "--adapter-only" in str(caught.value)


@mutation(
    "lora/pretrained/gguf_vocab.py",
    '"tokenizer.ggml.add_bos_token": bos is not None,',
    '"tokenizer.ggml.add_bos_token": False,',
)
def test_a_token_before_every_text_is_the_bos_that_is_added(with_tokenizer):
    metadata = tokenizer_metadata(with_tokenizer(bytes_level(post_processor=AROUND | {"single": [START, TEXT]})))
    assert metadata["tokenizer.ggml.add_bos_token"] is True and metadata["tokenizer.ggml.bos_token_id"] == 1


@mutation(
    "lora/pretrained/gguf_vocab.py",
    'chat.tokenizer.id(Spoken.of(chat).eos_token or ""), chat.end_of_turn, ',
    "",
    case="settings5-config5-ids5",
)
@pytest.mark.parametrize(
    "settings, config, ids",
    [
        ({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}, {},
         {"bos": 1, "eos": 2, "padding": 0, "unknown": 0}),
        ({"eos_token": {"content": "<|im_end|>"}}, {"bos_token_id": None}, {"eos": 2}),
        ({"eos_token": "<|im_end|>"}, {"eos_token_id": [0, 2]}, {"bos": 1, "eos": 2, "eot": 0}),
        ({"eos_token": "<|im_end|>"}, {"eos_token_id": [0, 1, 2]}, {"bos": 1, "eos": 2, "eot": 0, "eom": 1}),
        ({}, {"eos_token_id": 2}, {"bos": 1, "eos": 2}),
        ({"eos_token": "<|endoftext|>"}, {"eos_token_id": 0}, {"bos": 1, "eos": 2, "eot": 0}),  # the template's end
    ],
)  # fmt: skip
def test_ids_of_special_tokens_are_the_settings_then_the_configs(with_tokenizer, settings, config, ids):
    base = with_tokenizer(bytes_level(), settings=settings | {"chat_template": cli.CHATML}, **config)
    metadata = tokenizer_metadata(base)
    found = {key.split(".")[2].removesuffix("_token_id"): value for key, value in metadata.items() if "_id" in key}
    assert found == ids


def test_a_base_model_without_a_template_is_written_without_one(models, with_tokenizer, capsys):
    metadata = tokenizer_metadata(with_tokenizer(bytes_level(), settings={"eos_token": "<|im_end|>"}))
    assert not metadata["tokenizer.chat_template"]
    assert "note     the file has no chat template: no chat template in" in capsys.readouterr().err


# ---- merge.py --------------------------------------------------------------------------------------------------------


def merge(cwd, *argv, adapter=None, **how):
    return cli.call("merge", "--adapter", adapter or cli.adapter_folder(), *argv, cwd=cwd, **how)


def done(result):
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The adapter merged into a folder, bf16 as its base and float32, and into GGUF files."""
    place = tmp_path_factory.mktemp("merged")
    done(merge(place, "--out", "folder"))
    done(merge(place, "--out", "wide", "--dtype", "float32"))
    for kind in ("f16", "bf16", "q8_0"):
        done(merge(place, "--out", f"{kind}.gguf", "--format", "gguf", "--gguf-type", kind))
    done(merge(place, "--out", "adapter.gguf", "--format", "gguf", "--adapter-only"))
    return place


def test_a_merged_bf16_gguf_computes_the_logits_of_the_merged_folder_bit_for_bit(merged):
    ours, theirs = (pretrained.load_model(str(merged / name)) for name in ("bf16.gguf", "folder"))
    assert torch.equal(ours(some_tokens(vocab=290)), theirs(some_tokens(vocab=290)))


@mutation("merge.py", "changer(layers, torch.float32, bar, base)", "changer(layers, None, bar, base)")
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_merged_gguf_holds_the_sum_in_float32_rounded_once(merged, kind):
    sums, config = load_file(merged / "wide/model.safetensors"), config_of(merged / "wide")
    _, tensors = stored(merged / f"{kind}.gguf")
    twice = 0
    for name, values in (converter.stored(name, tensor, config) for name, tensor in sums.items()):
        own = tensors[name][0].name.lower()
        assert np.array_equal(tensors[name][1], rounded(values, own)), name
        twice += not np.array_equal(tensors[name][1], rounded(rounded(values, "bf16"), own))
    assert twice > 10  # it would show if the sum went through bf16


def test_a_merged_gguf_answers_and_asks_as_the_merged_folder(merged):
    for argv in (("--prompt", "What is 2 and 3?"), ("--prompt", "Hello.")):
        answers = {done(cli.ask("--model", name, *argv, cwd=merged)).out for name in ("bf16.gguf", "folder")}
        assert len(answers) == 1


def test_the_template_is_the_adapters(tmp_path, merged):
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "passport.json"):
        (adapter / name).write_bytes((cli.adapter_folder() / name).read_bytes())
    (adapter / "chat_template.jinja").write_text(template)
    done(merge(tmp_path, "--out", "a.gguf", "--format", "gguf", adapter=adapter))
    assert stored(tmp_path / "a.gguf")[0]["tokenizer.chat_template"] == template
    alone = done(merge(tmp_path, "--out", "b.gguf", "--format", "gguf", "--adapter-only", adapter=adapter))
    assert f"--chat-template-file {adapter / 'chat_template.jinja'}" in alone.err
    alone = done(merge(tmp_path, "--out", "c.gguf", "--format", "gguf", "--adapter-only"))
    assert "template" not in alone.err  # it is the base's own


def test_a_gguf_base_gives_the_file_that_its_folder_gives(merged, tmp_path):
    argv = ("--format", "gguf", "--gguf-type", "bf16", "--out", "bf16.gguf")
    done(merge(tmp_path, "--model", cli.gguf_file(), *argv))
    ours, theirs = stored(tmp_path / "bf16.gguf"), stored(merged / "bf16.gguf")
    assert ours[1].keys() == theirs[1].keys()
    assert all(np.array_equal(ours[1][name][1], theirs[1][name][1]) for name in theirs[1])
    assert ours[0] == theirs[0]


def test_without_a_type_a_model_is_f16_and_an_adapter_f32(merged, tmp_path):
    done(merge(tmp_path, "--out", "f16.gguf", "--format", "gguf"))
    assert (tmp_path / "f16.gguf").read_bytes() == (merged / "f16.gguf").read_bytes()
    assert {kind for kind, _ in stored(merged / "adapter.gguf")[1].values()} == {TYPE.F32}


# ---- an adapter alone ------------------------------------------------------------------------------------------------


def applied(base, adapter):
    """llama.cpp's sum for every tensor of the base: W + alpha / r B A, r being the columns of lora_b, in float64."""
    (_, weights), (metadata, maps) = stored(base), stored(adapter)
    sums = {name: values.astype(np.float64) for name, (_, values) in weights.items()}
    for name in {name.rsplit(".", 1)[0] for name in maps}:
        A, B = (maps[f"{name}.lora_{end}"][1].astype(np.float64) for end in "ab")
        sums[name] += metadata["adapter.lora.alpha"] / B.shape[1] * B @ A
    return sums


def near(ours, theirs, tol):
    assert ours.keys() == theirs.keys()
    return all(close(torch.from_numpy(ours[name]), torch.from_numpy(theirs[name]), tol) for name in ours)


def test_the_adapter_file_says_what_it_is(merged):
    metadata, maps = stored(merged / "adapter.gguf")
    alpha = metadata.pop("adapter.lora.alpha")
    assert alpha == json.loads((cli.adapter_folder() / "adapter_config.json").read_text())["lora_alpha"]
    assert metadata == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "adapter",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "adapter.type": "lora",
    }
    assert len(maps) == 28
    assert maps["blk.1.ffn_down.weight.lora_a"][1].shape == (4, 48)  # (r, in)
    assert maps["blk.1.ffn_down.weight.lora_b"][1].shape == (32, 4)  # (out, r)


@mutation(
    "lora/pretrained/gguf_layout.py",
    "return (A, order.moved(B)) if order.dim == 0 else",
    "return (A, B) if order.dim == 0 else",
)
def test_the_base_and_the_adapter_file_sum_to_the_merged_file(merged, tmp_path):
    written(cli.model_folder(), tmp_path / "base.gguf", "f32")
    done(merge(tmp_path, "--out", "f32.gguf", "--format", "gguf", "--gguf-type", "f32"))
    sums, whole = applied(tmp_path / "base.gguf", merged / "adapter.gguf"), stored(tmp_path / "f32.gguf")[1]
    assert near(sums, {name: values.astype(np.float64) for name, (_, values) in whole.items()}, 1e-6)


@mutation("lora/pretrained/gguf_write.py", "B.float() * (s * len(A) / alpha))", "B.float())")
@mutation("lora/pretrained/gguf_write.py", "rank += len(one)", "rank += 0", case="phi3")
@pytest.mark.parametrize("case", ["llama", "llama with biases", "llama with wide heads", "qwen2", "phi3", "glm4",
                                  "qwen3_5, tied", "lfm2", "granite 4"])  # fmt: skip
def test_ranks_and_scales_that_differ_are_folded_into_b(models, tmp_path, case):
    """As rsLoRA and rank patterns have them: layer i has rank 2 + i and counts 0.3 (1 + i) times."""
    base_file = written(models(case), tmp_path / "base.gguf", "f32")
    base = pretrained.find(str(models(case)))
    model = pretrained.load_model(base, torch.float32)
    generator = torch.Generator().manual_seed(3)
    maps, sums = {}, {}
    targets = [path for path, module in model.named_modules() if type(module) is torch.nn.Linear]
    if case == "phi3":  # of one tensor with three parts, one has no map
        targets.remove("model.layers.1.self_attn.k_proj")
    for i, path in enumerate(targets):
        weight = model.get_submodule(path).weight
        A, B = torch.randn(2 + i, weight.shape[1], generator=generator), torch.randn(len(weight), 2 + i)
        maps[path] = 0.3 * (1 + i), A, B
        sums[f"{path}.weight"] = (weight.double() + 0.3 * (1 + i) * B.double() @ A.double()).float()
    gguf_write.write_adapter(base.config, tmp_path / "adapter.gguf", maps)
    config = config_of(models(case))
    whole = converter.as_on_the_hub(config, model.state_dict() | sums)
    expected = dict(converter.stored(name, tensor, config) for name, tensor in whole.items())
    assert near(applied(base_file, tmp_path / "adapter.gguf"), expected, 1e-6)


def test_the_types_of_an_adapter_file_are_those_asked_for(merged, tmp_path, capsys):
    maps = {"model.layers.0.mlp.up_proj": (2.0, torch.randn(64, 32), torch.randn(48, 64)),
            "model.layers.0.mlp.down_proj": (2.0, torch.randn(4, 48), torch.randn(32, 4))}  # fmt: skip
    gguf_write.write_adapter(config_of(cli.model_folder()), tmp_path / "a.gguf", maps, "q8_0")
    kinds = {name: kind.name for name, (kind, _) in stored(tmp_path / "a.gguf")[1].items()}
    assert kinds == {
        "blk.0.ffn_up.weight.lora_a": "Q8_0", "blk.0.ffn_up.weight.lora_b": "Q8_0",
        "blk.0.ffn_down.weight.lora_a": "F16", "blk.0.ffn_down.weight.lora_b": "F16",
    }  # fmt: skip


@mutation("merge.py", "if not is_low_rank(layer):", "if False:")
def test_a_layer_that_is_more_than_a_low_rank_map_is_refused_with_the_way_out(models):
    class More(LoRALinear):
        def delta(self):
            return 2 * super().delta()

    model = pretrained.load_model(str(models("llama")))
    inject(model, 2, 4)
    layers = lora_layers(randomise_adapter(model))
    maps = merge_script.low_rank_maps(layers, "adapter")
    assert all(torch.equal(s * B @ A, layers[path].delta()) for path, (s, A, B) in maps.items())
    path, layer = next(iter(layers.items()))
    layers[path] = More(layer.base, 2, 4)
    with pytest.raises(BadInput, match=rf"More at {path} is more than a low-rank map.* leave out --adapter-only"):
        merge_script.low_rank_maps(layers, "adapter")


# ---- the file --------------------------------------------------------------------------------------------------------

GGUF = ("--format", "gguf")


@mutation("lora/pretrained/gguf_write.py", 'ours = file.read(4) == b"GGUF"', "ours = True")
@pytest.mark.parametrize(
    "argv, words",
    [
        (("--out", "a.gguf"), "wrong --out in the command line: a folder is to be written"),
        (("--out", "a", *GGUF), "wrong --out in a: a GGUF file has a name that ends in .gguf. Call it a.gguf"),
        (("--out", "a", "--gguf-type", "f16"), "wrong --gguf-type in the command line: only GGUF files"),
        (("--out", "a", "--adapter-only"), "wrong --adapter-only in the command line: its folder is there already"),
        (("--out", "a.gguf", *GGUF, "--dtype", "float32"), "wrong --dtype in the command line: a GGUF file has types"),
        (("--out", "a.gguf", *GGUF, "--gguf-type", "q4_0"), "one of f32, f16, bf16, q8_0"),
        (("--out", "no/a.gguf", *GGUF), "wrong --out in no/a.gguf: there is no folder no. Make it first"),
        (("--out", "folder.gguf", *GGUF), "wrong --out in folder.gguf: it is not a regular file"),
        (("--out", "there.gguf", *GGUF), "wrong --out in there.gguf: the file is there already."),
        (("--out", "other.gguf", *GGUF, "--overwrite"), "wrong --out in other.gguf: it is no GGUF file"),
        (("--out", "base.gguf", *GGUF, "--overwrite", "--model", "base.gguf"), "wrong --out in base.gguf: it holds"),
    ],
)
def test_flags_and_names_that_do_not_go_together_are_one_line_and_nothing_is_written(tmp_path, argv, words):
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "there.gguf").write_bytes(b"GGUF and so on")
    (tmp_path / "other.gguf").write_bytes(b"a diary")
    (tmp_path / "base.gguf").write_bytes(cli.gguf_file().read_bytes())
    before = cli.tree(tmp_path)
    result = merge(tmp_path, *argv)
    assert result.code == 2 and len(result.errors) == 1 and words in result.errors[0], result.err
    assert cli.tree(tmp_path) == before


@pytest.mark.parametrize("alone", [(), ("--adapter-only",)], ids=["model", "adapter"])
def test_overwrite_replaces_an_earlier_gguf_file(tmp_path, merged, alone):
    (tmp_path / "f16.gguf").write_bytes(b"GGUF and so on")
    done(merge(tmp_path, "--out", "f16.gguf", *GGUF, "--overwrite", *alone))
    assert [path.name for path in tmp_path.iterdir()] == ["f16.gguf"]
    assert stored(tmp_path / "f16.gguf")[0]["general.type"] == ("adapter" if alone else "model")


def test_a_disk_that_is_full_is_one_line_and_leaves_no_file(tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    result = merge(tmp_path, "--out", "a.gguf", *GGUF, before=small_files)
    assert result.code == 3 and len(result.errors) == 1 and "larger than the limit" in result.errors[0]
    assert list(tmp_path.iterdir()) == []

    def little_room():
        shutil.disk_usage = lambda path: SimpleNamespace(free=40_000)

    result = merge(tmp_path, "--out", "a.gguf", *GGUF, before=little_room)
    assert result.code == 3 and len(result.errors) == 1 and "disk full in a.gguf" in result.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_an_operation_that_fails_or_is_stopped_leaves_what_was_there(models, tmp_path):
    path = tmp_path / "out" / "a.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF and so on")
    with Disk(path.parent) as disk:
        written(models("llama"), path)
    count, whole = len(disk.ops), path.read_bytes()
    assert count > 10 and {op.kind for op in disk.ops} == {"open", "write", "fsync", "rename"}
    path.write_bytes(b"GGUF and so on")
    for at in range(count - 1):  # the last one syncs the folder, when the file is there
        with pytest.raises(OSError), Disk(path.parent, Blow(at, "half", errno.ENOSPC)):
            written(models("llama"), path)
        assert [p.name for p in path.parent.iterdir()] == ["a.gguf"] and path.read_bytes() == b"GGUF and so on", at

    def stopped(name, tensor):
        if name == "lm_head.weight":
            raise KeyboardInterrupt
        return tensor.float()

    with pytest.raises(KeyboardInterrupt):
        written(models("llama"), path, change=stopped)
    assert [p.name for p in path.parent.iterdir()] == ["a.gguf"] and path.read_bytes() == b"GGUF and so on"
    assert written(models("llama"), path).read_bytes() == whole


def test_a_tensor_is_asked_for_when_all_before_it_are_in_the_file(models, tmp_path):
    """So the writer needs no more memory than one tensor takes."""
    sizes = []

    def change(name, tensor):
        sizes.append(next(tmp_path.glob(".*.partial")).stat().st_size)
        return tensor.float()

    size = written(models("llama"), tmp_path / "a.gguf", "f32", change).stat().st_size
    assert len(sizes) == 21 and sizes == sorted(sizes) and sizes[-1] > 0.5 * size
