"""lora.pretrained.gguf: a GGUF file as config, tokenizer and hub-named tensors, and no trust in what the file says.

The files are written by the gguf package's writer, or byte by byte where they lie.
"""

import itertools
import json
import math
import os
import random
import string
import struct
import time
import tracemalloc
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import QuantError, dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from lora.adapter import passport
from lora.adapter.merge import merged_weight
from lora.errors import BadInput
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from lora.network.rope import inverse_frequencies
from lora.pretrained import ModelFolder, gguf, gguf_header, load_chat, load_model, write_model
from lora.pretrained.gguf import GGUFFile
from tests.helpers import far, same, snapshot
from tests.mutation import mutation
from tests.pretrained.gguf_converter import llama3_divisors, permuted

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 32, 4, 2, 8, 64, 2
SIZES = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": INNER,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50000.0,
}
SPECIALS = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<tool>": 4}  # text -> GGUF's token type
TEXT = (
    "The year 2024 had 366 days; don't we'll it's 1234567 and 3.14. Numbers 11 22 33 2024 2024.\n\n"
    "  Spaces   and\ttabs \r\n new lines\n\n\n mixed. Grüße, 你好，世界！日本語 テスト 🙂👍🏽 é WORLD'S hello hello\n"
)


def write(path, arch="llama", sizes=(), metadata=(), tensors=None):
    """A small GGUF file; `sizes` go under the architecture's name, None removes a key; tensors may bring their type."""
    writer = GGUFWriter(path, arch)
    values = {f"{arch}.{key}": value for key, value in {**SIZES, **dict(sizes)}.items()} | dict(metadata)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            {float: writer.add_float32, str: writer.add_string, list: writer.add_array}[type(value)](key, value)
    tensors = {"token_embd.weight": np.zeros((64, HIDDEN), np.float32)} if tensors is None else tensors
    for name, data in tensors.items():
        data, kind = data if isinstance(data, tuple) else (data, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def refused(path):
    """The one line with which a file is refused, everything in it having been looked at."""
    with pytest.raises(BadInput) as caught:
        base = GGUFFile(path)
        base.files()
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value) and path.name in str(caught.value)
    return str(caught.value)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def can_dequantise(kind):
    try:
        return dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind).shape is not None
    except NotImplementedError:
        return False


def finite_bytes(kind, rows, columns, generator):
    """Random blocks; those whose scales make values that are not finite are left out."""
    values, size = GGML_QUANT_SIZES[kind]
    wanted = rows * columns // values
    blocks = generator.integers(0, 256, (20 * wanted, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        blocks = blocks[np.isfinite(dequantize(blocks, kind)).all(axis=-1)]
    return blocks[:wanted].reshape(rows, -1)


@mutation(
    "lora/pretrained/gguf.py",
    "return self._dequantised(self._tensors[whole], dtype, first + start, first + stop)",
    "return self._dequantised(self._tensors[whole], torch.bfloat16, first + start, first + stop).to(dtype)",
)
@pytest.mark.parametrize("kind", [kind for kind in GGMLQuantizationType if can_dequantise(kind)], ids=lambda k: k.name)
def test_every_type_reads_as_the_packages_dequantisation_of_the_same_bytes(path, kind, monkeypatch):
    monkeypatch.setattr(gguf, "CHUNK", 3 * 512)  # several chunks, the last one shorter
    generator = np.random.default_rng(kind)
    original = generator.standard_normal((20, 512)).astype(np.float32)
    candidates = [finite_bytes(kind, 20, 512, generator)]
    with suppress(NotImplementedError, QuantError):
        candidates.append(quantize(original, kind).view(np.uint8))
    for data in candidates:
        expected = torch.from_numpy(dequantize(data, kind)).to(torch.bfloat16)
        write(path, sizes={"embedding_length": 512}, tensors={"token_embd.weight": (data, kind)})
        base = GGUFFile(path)
        got = base.read("model.embed_tokens.weight")
        assert base.header["model.embed_tokens.weight"] == ("BF16", (20, 512))
        assert got.dtype == torch.bfloat16 and torch.equal(got, expected) and got.unique().numel() > 2
        for dtype in (torch.float32, torch.float16, torch.float64):  # rounded once, to what a run computes in
            wide = base.read("model.embed_tokens.weight", dtype)
            assert wide.dtype == dtype and torch.equal(wide, torch.from_numpy(dequantize(data, kind)).to(dtype))
    if kind.name in ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_1"):
        assert (got.float() - torch.from_numpy(original)).abs().max() < 0.3


@pytest.mark.parametrize("kind", [kind for kind in GGMLQuantizationType if not can_dequantise(kind)])
def test_types_that_cannot_be_dequantised_are_refused(path, kind):
    data = np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8)
    write(path, tensors={"token_embd.weight": (data, kind)})
    assert f"tensor type {kind.value} cannot" in refused(path)


def random_bf16(*shape):
    """Values that bfloat16 holds exactly, as float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16().float().numpy()


QK = {"q": (HEADS * HEAD_DIM, HEADS), "k": (KV_HEADS * HEAD_DIM, KV_HEADS)}


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_llamas_q_and_k_get_back_the_row_order_the_converter_changed_and_nothing_else_moves(path, arch):
    originals = {"v.weight": random_bf16(KV_HEADS * HEAD_DIM, HIDDEN), "v.bias": random_bf16(KV_HEADS * HEAD_DIM)}
    stored = {"token_embd.weight": random_bf16(64, HIDDEN)}
    for which, (rows, _) in QK.items():
        originals |= {f"{which}.weight": random_bf16(rows, HIDDEN), f"{which}.bias": random_bf16(rows)}
    for name, data in originals.items():
        moved = arch == "llama" and name[0] in QK
        stored[f"blk.1.attn_{name}"] = permuted(data, QK[name[0]][1]) if moved else data
        assert not moved or not np.array_equal(stored[f"blk.1.attn_{name}"], data)
    base = GGUFFile(write(path, arch, tensors=stored))
    for name, data in originals.items():
        got = base.read(f"model.layers.1.self_attn.{name.replace('.', '_proj.')}")
        assert torch.equal(got.float(), torch.from_numpy(data)), name


def small_model(kind):
    """Tensors of a whole small file, matrices of type `kind`; and their values in float32, as the package has them."""
    stored, meant = {}, {}
    for name, shape in WHOLE.items():
        data = np.random.default_rng(sum(map(ord, name))).standard_normal(shape).astype(np.float32)
        data = 1 + data / 4 if "norm" in name else data / shape[-1] ** 0.5
        packed = quantize(data, kind) if len(shape) > 1 else data
        stored[name] = (packed, kind) if len(shape) > 1 else data
        meant[name] = torch.from_numpy(dequantize(packed, kind).copy() if len(shape) > 1 else data)
    return stored, meant


WHOLE = {"token_embd.weight": (64, HIDDEN), "output_norm.weight": (HIDDEN,)} | {
    f"blk.{i}.{name}": shape
    for i in range(LAYERS)
    for name, shape in {
        "attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,),
        "attn_q.weight": (HEADS * HEAD_DIM, HIDDEN), "attn_q.bias": (HEADS * HEAD_DIM,),
        "attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_k.bias": (KV_HEADS * HEAD_DIM,),
        "attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_v.bias": (KV_HEADS * HEAD_DIM,),
        "attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_gate.weight": (INNER, HIDDEN), "ffn_up.weight": (INNER, HIDDEN), "ffn_down.weight": (HIDDEN, INNER),
    }.items()
}  # fmt: skip


HUB_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.11.attn_norm.weight": "model.layers.11.input_layernorm.weight",
    "blk.11.ffn_norm.weight": "model.layers.11.post_attention_layernorm.weight",
    "blk.11.attn_q.weight": "model.layers.11.self_attn.q_proj.weight",
    "blk.11.attn_k.bias": "model.layers.11.self_attn.k_proj.bias",
    "blk.11.attn_v.weight": "model.layers.11.self_attn.v_proj.weight",
    "blk.11.attn_output.weight": "model.layers.11.self_attn.o_proj.weight",
    "blk.11.ffn_gate.weight": "model.layers.11.mlp.gate_proj.weight",
    "blk.11.ffn_up.bias": "model.layers.11.mlp.up_proj.bias",
    "blk.11.ffn_down.weight": "model.layers.11.mlp.down_proj.weight",
}


@mutation("lora/pretrained/load.py", "base.read(name, dtype).to(device)", "base.read(name).to(device, dtype)")
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q5_0"])
def test_a_float32_model_has_every_value_of_its_file_and_computes_with_it(path, kind):
    stored, meant = small_model(GGMLQuantizationType[kind])
    model = load_model(GGUFFile(write(path, "qwen2", tensors=stored)), torch.float32)
    truth = Model(model.config)
    hub = HUB_NAMES | {"blk.11.ffn_up.weight": "model.layers.11.mlp.up_proj.weight"}
    for name, end in itertools.product("qkv", ("weight", "bias")):
        hub[f"blk.11.attn_{name}.{end}"] = f"model.layers.11.self_attn.{name}_proj.{end}"
    values = {}
    for name, tensor in meant.items():
        layer = name.split(".")[1]
        values[hub[name.replace(f".{layer}.", ".11.")].replace(".11.", f".{layer}.")] = tensor
    truth.load_state_dict(values, strict=True)
    assert same(snapshot(truth), snapshot(model))
    tokens = torch.arange(40) % 64
    with torch.no_grad():
        logits, rounded = model(tokens), load_model(GGUFFile(path), torch.bfloat16).float()(tokens)
        assert torch.equal(logits, truth(tokens)) and far(rounded, logits, 1e-6)


@mutation(
    "lora/pretrained/gguf.py",
    "exact = torch.float32 if self._layout.other_values(name) else dtype",
    "exact = dtype",
)
def test_what_a_converter_added_to_gemmas_norms_is_subtracted_in_float32(path):
    stored = np.random.default_rng(0).uniform(0.5, 1.5, HIDDEN).astype(np.float32)
    base = GGUFFile(write(path, "gemma2", tensors=TENSORS | {"output_norm.weight": stored}))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        got = base.read("model.norm.weight", dtype)
        assert got.dtype == dtype and torch.equal(got, torch.from_numpy(stored - 1).to(dtype))


@mutation(
    "lora/pretrained/gguf.py",
    "first, last = (start, count if stop is None else stop) if matrix else (0, count)",
    "first, last = 0, count",
)
@pytest.mark.parametrize("arch", ["phi3", "llama", "gemma2"])
def test_some_rows_of_a_tensor_are_those_of_the_whole_and_part_of_a_fused_one_holds_no_other(path, arch):
    rows = {"attn_qkv": (HEADS + 2 * KV_HEADS) * HEAD_DIM, "ffn_up": 2 * INNER}
    names = {"phi3": rows, "llama": {"attn_q": HEADS * HEAD_DIM, "ffn_down": INNER}, "gemma2": {"ffn_up": INNER}}[arch]
    tensors = {f"blk.0.{name}.weight": random_bf16(count, HIDDEN) for name, count in names.items()}
    norm = {"output_norm.weight": random_bf16(HIDDEN)}
    base = GGUFFile(write(path, arch, tensors=TENSORS | tensors | norm))
    assert len(base.header) == {"phi3": 7, "llama": 4, "gemma2": 3}[arch]
    for name, (_, shape) in base.header.items():
        whole = base.read(name, torch.float32)
        assert tuple(whole.shape) == shape and whole.untyped_storage().nbytes() == 4 * whole.numel()
        for start, stop in ((0, 3), (5, 6), (4, shape[0]), (7, 7)):
            assert torch.equal(base.read_rows(name, start, stop, torch.float32), whole[start:stop])
    if arch == "phi3":
        q, k = (base.read(f"model.layers.0.self_attn.{name}_proj.weight").float() for name in "qk")
        assert torch.equal(torch.cat([q, k]), torch.from_numpy(tensors["blk.0.attn_qkv.weight"][: len(q) + len(k)]))


@mutation("lora/pretrained/write.py", "base.read(name, base.widest)", "base.read(name)")
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_a_merged_file_is_the_sum_in_float32_rounded_once(path, tmp_path, dtype):
    stored, meant = small_model(GGMLQuantizationType.F32)
    metadata = tokenizer_metadata("smollm", TINY, [("h", "e")])
    base = GGUFFile(write(path, "qwen2", metadata=metadata, tensors=stored))
    delta = torch.randn(HEADS * HEAD_DIM, HIDDEN, generator=torch.Generator().manual_seed(1)) / 100
    target, out = "model.layers.1.self_attn.q_proj.weight", tmp_path / "out"
    out.mkdir()
    write_model(base, out, lambda name, W: merged_weight(W, delta, dtype) if name == target else W, dtype)
    exact, written = meant["blk.1.attn_q.weight"] + delta, ModelFolder(out)
    kind = dtype or torch.bfloat16
    assert torch.equal(written.read(target), exact.to(kind))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(kind).removeprefix("torch.")
    assert torch.equal(written.read("model.norm.weight"), meant["output_norm.weight"].to(kind))
    twice = (meant["blk.1.attn_q.weight"].bfloat16() + delta).to(kind)
    assert not torch.equal(twice, exact.to(kind))


def test_fingerprints_of_a_file_are_those_of_its_bf16_values_whatever_a_run_computes_in(path):
    """Adapters that were trained when files were read as bf16 belong to the same base."""
    stored, meant = small_model(GGMLQuantizationType.Q8_0)
    base = GGUFFile(write(path, "qwen2", tensors=stored))
    load_model(base, torch.float32)
    as_bf16 = {"model.embed_tokens.weight": meant["token_embd.weight"].bfloat16()}
    expected = passport.contents(as_bf16.get, as_bf16)
    assert passport.contents(base.read, as_bf16) == expected
    assert {kind for kind, _ in base.header.values()} == {"BF16"}


def test_tensors_have_hub_names_and_shapes_out_by_in(path):
    tensors = {name: np.zeros((i + 1) * HEAD_DIM, np.float32) for i, name in enumerate(HUB_NAMES)}
    for name in ("token_embd.weight", "blk.11.ffn_down.weight"):
        tensors[name] = np.zeros((40, 8), np.float32)
    base = GGUFFile(write(path, tensors=tensors))
    assert base.header == {hub: ("BF16", tensors[name].shape) for name, hub in HUB_NAMES.items()}


@pytest.mark.parametrize(
    "name",
    ["blk.0.ffn_gate_inp.weight", "blk.00.attn_q.weight", "blk.N.attn_q.weight", "attn_q.weight", "blk.attn_q.weight",
     "blk.0.output.weight", "blk.0.attn_q.scale", "output", "", "model.norm.weight", "a\nb\x1b[31m.weight"],
)  # fmt: skip
def test_unknown_tensors_are_refused_by_name(path, name):
    embeddings = np.zeros((64, HIDDEN), np.float32)
    message = refused(write(path, tensors={"token_embd.weight": embeddings, name: np.zeros(32, np.float32)}))
    assert repr(name) in message and "\x1b" not in message


def test_a_file_that_shrinks_after_its_header_was_read_is_bad_input(path):
    base = GGUFFile(write(path))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(BadInput, match="shorter"):
        base.read("model.embed_tokens.weight")


def test_a_file_that_shrinks_while_its_header_is_read_is_bad_input(path, monkeypatch):
    monkeypatch.setattr(gguf_header, "os", SimpleNamespace(fstat=lambda file: SimpleNamespace(st_size=10**6)))
    write(path)
    os.truncate(path, 200)
    assert "shorter" in refused(path)


# ---- config ----------------------------------------------------------------------------------------------------------

TENSORS = {"token_embd.weight": np.zeros((64, HIDDEN), np.float32)}
VOCABULARY = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(60)]}
IDS = ("bos", "eos", "padding")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


def test_a_llama_file_gives_a_llama_config(path):
    base = GGUFFile(write(path))
    assert base.config == CONFIG and base.path == path and base.name == str(path)
    assert "1e-05" in json.dumps(base.config)  # not the nearest float32, 9.999999747378752e-06
    assert ModelConfig.from_json(base.config).head_dim == HEAD_DIM


def test_a_qwen2_file_gives_a_qwen2_config(path):
    config = GGUFFile(write(path, "qwen2")).config
    without = {key: value for key, value in CONFIG.items() if key not in ("attention_bias", "mlp_bias")}
    assert config == without | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    assert ModelConfig.from_json(config).qkv_bias


def bias(name):
    return {name: np.zeros(HEAD_DIM, np.float32)}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"sizes": {"attention.head_count_kv": None}}, {"num_key_value_heads": HEADS}),
        ({"sizes": {"rope.freq_base": None}}, {"rope_theta": 10000.0}),
        ({"sizes": {"attention.key_length": 16, "rope.dimension_count": 16}}, {"head_dim": 16}),
        ({"tensors": TENSORS | {"output.weight": TENSORS["token_embd.weight"]}}, {"tie_word_embeddings": False}),
        ({"tensors": TENSORS | bias("blk.0.attn_q.bias")}, {"attention_bias": True}),
        ({"tensors": TENSORS | bias("blk.0.ffn_up.bias")}, {"mlp_bias": True}),
        ({"sizes": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}}, {}),
        ({"sizes": {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}}, {}),
        (
            {"sizes": {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        ),
        (
            {"metadata": VOCABULARY | {f"tokenizer.ggml.{n}_token_id": i for i, n in enumerate(IDS)}},
            {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        ),
        (
            {"metadata": VOCABULARY | {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 4}},
            {"eos_token_id": [5, 4]},
        ),
        (
            {"metadata": VOCABULARY | {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 5}},
            {"eos_token_id": 5},
        ),
        ({"metadata": VOCABULARY | {"tokenizer.ggml.eot_token_id": 5}}, {"eos_token_id": 5}),
    ],
)  # fmt: skip
def test_config_fields_follow_the_metadata(path, change, expected):
    config = GGUFFile(write(path, **change)).config
    assert config == CONFIG | expected
    ModelConfig.from_json(config)


def with_divisors(divisors, **sizes):
    sizes |= {"embedding_length": 64, "attention.head_count": 1, "attention.head_count_kv": 1, "rope.freq_base": 5e5}
    tensors = {"token_embd.weight": np.zeros((64, 64), np.float32), "rope_freqs.weight": divisors}
    return {"sizes": sizes, "tensors": tensors}


@pytest.mark.parametrize("factor", [8, 16, 32])
def test_the_scaling_of_llama3_is_recovered_from_its_divisors(path, factor):
    divisors = llama3_divisors(factor)
    assert len(set(divisors.tolist())) > 4  # the blend is there, not only its ends
    base = GGUFFile(write(path, **with_divisors(divisors)))
    assert base.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert "rope_freqs.weight" not in base.header
    scaled = inverse_frequencies(ModelConfig.from_json(base.config), torch.float64, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert torch.allclose(scaled, plain / torch.from_numpy(divisors).double(), rtol=1e-5, atol=0)


NO_MODEL = {"tensors": {"output_norm.weight": np.zeros(HIDDEN, np.float32)}}


@pytest.mark.parametrize(
    "change, words",
    [
        (with_divisors(llama3_divisors(24)), "rope_freqs.weight"),
        (with_divisors(llama3_divisors(8, original=4096)), "rope_freqs.weight"),
        (with_divisors(llama3_divisors(8)[:-1]), "rope_freqs.weight"),
        (with_divisors(llama3_divisors(8)) | {"arch": "qwen2"}, "rope_freqs.weight"),
        (with_divisors(llama3_divisors(8), **{"rope.scaling.factor": 2.0}), "rope_freqs.weight"),
        (with_divisors(np.full(32, np.nan, np.float32)), "rope_freqs.weight"),
        (
            {"sizes": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}},
            "original_context_length: it is missing",
        ),
        ({"sizes": {"rope.scaling.type": "su", "rope.scaling.factor": 4.0}}, "rope.scaling.type: 'su'"),
        ({"arch": "mamba"}, "general.architecture: 'mamba'"),
        ({"sizes": {"expert_count": 8}}, "llama.expert_count"),
        ({"sizes": {"attention.sliding_window": 4096}}, "llama.attention.sliding_window"),
        ({"sizes": {"rope.dimension_count": 4}}, "llama.rope.dimension_count"),
        ({"sizes": {"attention.value_length": 4}}, "llama.attention.value_length"),
        ({"sizes": {"block_count": None}}, "llama.block_count"),
        ({"sizes": {"block_count": 2.0}}, "llama.block_count"),
        ({"sizes": {"attention.head_count": 0}}, "llama.attention.head_count"),
        ({"sizes": {"attention.head_count_kv": [1, 2]}}, "llama.attention.head_count_kv"),
        ({"sizes": {"rope.freq_base": math.inf}}, "llama.rope.freq_base"),
        ({"sizes": {"rope.freq_base": math.nan}}, "llama.rope.freq_base"),
        ({"sizes": {"attention.layer_norm_rms_epsilon": "small"}}, "layer_norm_rms_epsilon"),
        ({"metadata": VOCABULARY | {"tokenizer.ggml.eos_token_id": 60}}, "tokenizer.ggml.eos_token_id"),
        ({"metadata": VOCABULARY | {"tokenizer.ggml.bos_token_id": "t1"}}, "tokenizer.ggml.bos_token_id"),
        ({"metadata": {"tokenizer.ggml.tokens": [1, 2]}}, "tokenizer.ggml.tokens"),
        ({"tensors": TENSORS | {"blk.0.attn_q.weight": np.zeros((12, HIDDEN), np.float32)}}, "q_proj"),
        ({"tensors": TENSORS | bias("blk.0.attn_k.bias"), "sizes": {"attention.key_length": 1}}, "k_proj"),
        (NO_MODEL, "token_embd.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_implemented_or_makes_no_sense_is_refused_by_its_key(path, change, words):
    assert words in refused(write(path, **change))


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
def test_a_path_without_a_file_is_bad_input_and_never_waits(path, kind):
    if kind != "missing":
        (path.mkdir if kind == "folder" else lambda: os.mkfifo(path))()
    assert "there is no such file" in refused(path)


# ---- tokenizer -------------------------------------------------------------------------------------------------------

WORDS, REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + REST
LLAMA_3 = WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + REST
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
MARKS = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + REST
)
PRE = {
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "gpt-2": GPT2,
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), BYTES]),
    "qwen35": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(MARKS), "isolated"), BYTES]),
    "tekken": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(TEKKEN), "isolated"), BYTES]),
}
WHOLE_WORDS = ("llama-bpe", "tekken")
# "Ab\n\n 1234 don't I'LLs go  !?\nx" as each of them cuts it
PIECES = {
    "smollm": "Ab ĊĊĠ 1 2 3 4 Ġdon 't ĠI ' LLs Ġgo Ġ Ġ!? Ċ x",
    "gpt-2": "Ab ĊĊ Ġ1234 Ġdon 't ĠI ' LLs Ġgo Ġ Ġ!? Ċ x",
    "qwen2": "Ab ĊĊ Ġ 1 2 3 4 Ġdon 't ĠI 'LL s Ġgo Ġ Ġ!?Ċ x",
    "llama-bpe": "Ab ĊĊ Ġ 123 4 Ġdon 't ĠI 'LL s Ġgo Ġ Ġ!?Ċ x",
    "qwen35": "Ab ĊĊ Ġ 1 2 3 4 Ġdon 't ĠI 'LL s Ġgo Ġ Ġ!?Ċ x",
    "tekken": "Ab ĊĊ Ġ 1 2 3 4 Ġdon 't ĠI 'LLs Ġgo Ġ Ġ!?Ċ x",
}
STRINGS = [
    "", " ", "hello", "Hello, World!", TEXT, "1234567890 12 3", "  two\n\n\nlines \t\r\n", "你好 日本語", "🙂👍🏽 ok",
    "don't I'LL we'Ve", "cafe\u0301 caf\u00e9", "<|im_start|>user\nhi<|im_end|>\n", "a<tool>b<|endoftext|>",
    "\u0000\u200d", "<|im_start|", "hello<|im_end|><|im_end|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """For each pre-tokenizer a small tokenizer, built without the module under test."""
    built = {}
    for pre, pre_tokenizer in PRE.items():
        fast = FastTokenizer(models.BPE(ignore_merges=pre in WHOLE_WORDS))
        fast.normalizer = normalizers.NFC() if pre.startswith("qwen") else None
        fast.pre_tokenizer, fast.decoder = pre_tokenizer, decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(SPECIALS), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        fast.train_from_iterator([TEXT] * 3, trainer)
        model = json.loads(fast.to_str())["model"]
        vocabulary, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
        vocabulary["WORLD"] = len(vocabulary)  # no merges lead there: found only where merges are ignored
        fast.model = models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS)
        fast.add_tokens([AddedToken(t, normalized=False, special=kind == 3) for t, kind in SPECIALS.items()])
        built[pre] = fast, vocabulary, merges
    return built


def tokenizer_metadata(pre, vocabulary, merges, **more):
    tokens = sorted(vocabulary, key=vocabulary.get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [SPECIALS.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": vocabulary["<|im_start|>"],
        "tokenizer.ggml.eos_token_id": vocabulary["<|im_end|>"],
        "tokenizer.ggml.add_bos_token": False,
    } | {f"tokenizer.{key.replace('__', '.')}": value for key, value in more.items()}


TINY = {"<|im_start|>": 0, "<|im_end|>": 1, "h": 2, "e": 3, "he": 4, "Ġ": 5}
EMBEDDINGS = {"token_embd.weight": np.zeros((410, HIDDEN), np.float32)}


@mutation("lora/pretrained/chat.py", "and 0 <= i < config.vocab_size))", "and 0 <= i))")
def test_a_file_may_have_more_tokens_than_embeddings_and_ends_by_those_that_it_has(path):
    letters = ["<|im_start|>", "<|im_end|>", *string.ascii_lowercase, "he", "Ġ"]
    metadata = tokenizer_metadata("smollm", {token: i for i, token in enumerate(letters)}, [("h", "e")])
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    metadata["tokenizer.chat_template"] = template + "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    metadata |= {"tokenizer.ggml.eos_token_id": 29, "tokenizer.ggml.eot_token_id": 1}
    tensors = {"token_embd.weight": np.zeros((29, HIDDEN), np.float32)}
    chat = load_chat(GGUFFile(write(path, metadata=metadata, tensors=tensors)))
    assert chat.tokenizer.size == 30 and chat.tokenizer.rows == 29 and chat.stops == {1}
    assert chat.prompt([{"role": "user", "content": "he"}]) == [0, 28, 1, 0]
    with pytest.raises(BadInput, match="has id 29, the model has 29 embeddings"):
        chat.prompt([{"role": "user", "content": "h e"}])


def files_of(path, metadata, **change):
    return {n: data.decode() for n, data in GGUFFile(write(path, metadata=metadata, **change)).files().items()}


@pytest.mark.parametrize("pre", PRE)
def test_ids_are_those_of_a_tokenizer_built_independently(path, trained, pre):
    reference, vocabulary, merges = trained[pre]
    files = files_of(path, tokenizer_metadata(pre, vocabulary, merges), tensors=EMBEDDINGS)
    fast = FastTokenizer.from_str(files["tokenizer.json"])
    for text in STRINGS:
        for special in (False, True):
            assert fast.encode(text, add_special_tokens=special).ids == reference.encode(text).ids, text
        ids = fast.encode(text).ids
        assert fast.decode(ids, skip_special_tokens=False) == reference.decode(ids, skip_special_tokens=False)
        normal = text if not pre.startswith("qwen") else normalizers.NFC().normalize_str(text)
        assert fast.decode(ids, skip_special_tokens=False) == normal
    assert fast.get_vocab(with_added_tokens=True) == vocabulary
    added = {token.content: token.special for token in fast.get_added_tokens_decoder().values()}
    assert added == {token: kind == 3 for token, kind in SPECIALS.items()}


@pytest.mark.parametrize("pre", PRE)
def test_every_pre_tokenizer_cuts_text_as_its_model_does(path, trained, pre):
    files = files_of(path, tokenizer_metadata(pre, *trained[pre][1:]), tensors=EMBEDDINGS)
    fast = FastTokenizer.from_str(files["tokenizer.json"])
    pieces = [piece for piece, _ in fast.pre_tokenizer.pre_tokenize_str("Ab\n\n 1234 don't I'LLs go  !?\nx")]
    assert pieces == PIECES[pre].split(" ")


def test_only_llama3_and_tekken_take_a_whole_word_without_merges(path, trained):
    for pre, (_, vocabulary, merges) in trained.items():
        files = files_of(path, tokenizer_metadata(pre, vocabulary, merges), tensors=EMBEDDINGS)
        ids = FastTokenizer.from_str(files["tokenizer.json"]).encode("WORLD").ids
        assert (ids == [vocabulary["WORLD"]]) == (pre in WHOLE_WORDS)


@pytest.mark.parametrize(
    "pre, said, added", [("qwen2", None, 0), ("qwen2", True, 1), ("llama-bpe", None, 1), ("llama-bpe", False, 0)]
)
def test_bos_is_added_when_the_file_says_so_and_by_default_for_llama3(path, trained, pre, said, added):
    reference, vocabulary, merges = trained[pre]
    metadata = tokenizer_metadata(pre, vocabulary, merges, ggml__add_bos_token=said)
    files = files_of(path, metadata, tensors=EMBEDDINGS)
    fast, ids = FastTokenizer.from_str(files["tokenizer.json"]), reference.encode("hello").ids
    assert fast.encode("hello").ids == [vocabulary["<|im_start|>"]] * added + ids
    assert fast.encode("hello", add_special_tokens=False).ids == ids
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is bool(added)


def test_the_settings_hold_the_template_and_the_special_tokens(path, trained):
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
    more = {"chat_template": template, "ggml__padding_token_id": 2, "ggml__unknown_token_id": 0}
    files = files_of(path, tokenizer_metadata("smollm", *trained["smollm"][1:], **more), tensors=EMBEDDINGS)
    assert json.loads(files["tokenizer_config.json"]) == {
        "chat_template": template,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert json.loads(files["generation_config.json"]) == ids


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ggml__model": "llama"}, "tokenizer.ggml.scores: it is missing"),
        ({"ggml__model": "bert"}, "'bert' with 'smollm'"),
        ({"ggml__pre": "default"}, "'default'; implemented is 'gpt2' with smollm, gpt-2, qwen2, llama-bpe"),
        ({"ggml__pre": None}, "'missing'"),
        ({"ggml__merges": ["h e", "nothing known"]}, "nothing"),
        ({"ggml__merges": ["h e", "he"]}, "tokenizer.ggml"),
        ({"ggml__merges": ["h e l"]}, "tokenizer.ggml"),
        ({"ggml__merges": None}, "tokenizer.ggml.merges"),
        ({"ggml__token_type": [1, 1]}, "2 types"),
        ({"ggml__token_type": None}, "tokenizer.ggml.token_type"),
        ({"ggml__token_type": [3, 3, 1, 1, 1, 6]}, "unknown ones: {1, 3, 6}"),
        ({"ggml__token_type": ["1"] * 6}, "tokenizer.ggml.token_type"),
        ({"ggml__tokens": ["a", "b", "a"], "ggml__token_type": [1, 1, 1]}, "twice"),
        ({"ggml__add_bos_token": True, "ggml__bos_token_id": None}, "tokenizer.ggml.bos_token_id"),
        ({"ggml__add_bos_token": 1}, "tokenizer.ggml.add_bos_token"),
        ({"ggml__add_eos_token": True}, "tokenizer.ggml.add_eos_token"),
        ({"chat_template": ["a", "b"]}, "tokenizer.chat_template"),
    ],
)
def test_a_tokenizer_that_is_not_supported_or_broken_is_refused(path, change, words):
    GGUFFile(write(path, metadata=tokenizer_metadata("smollm", TINY, [("h", "e")]))).files()
    assert words in refused(write(path, metadata=tokenizer_metadata("smollm", TINY, [("h", "e")], **change)))


# ---- files that lie --------------------------------------------------------------------------------------------------

HUGE = (2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
UINT32, STRING, ARRAY, UINT64, FLOAT64 = 4, 8, 9, 10, 12


def text(value, length=None):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def pair(key, kind, value=b""):
    return text(key) + struct.pack("<I", kind) + value


def array(kind, count, data=b""):
    return struct.pack("<IQ", kind, count) + data


def described(name="token_embd.weight", dims=(4, 4), kind=0, offset=0, n_dims=None):
    dims = struct.pack(f"<{len(dims)}Q", *dims)
    return (
        text(name)
        + struct.pack("<I", len(dims) // 8 if n_dims is None else n_dims)
        + dims
        + struct.pack("<IQ", kind, offset)
    )


def header(pairs=(), tensors=(), n_pairs=None, n_tensors=None, magic=b"GGUF", version=3, data=64):
    counts = (len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


ENTRIES, SHORT, PAST = "entries are announced", "bytes are announced", "would end at byte"
KINDS = (0, 7, STRING, UINT64, FLOAT64)
NAME = pair("general.name", STRING, text("x"))
TWO = described(), described("output.weight", offset=64)


def aligned(kind, value):
    return header([pair("general.alignment", kind, value)])


LIES = {  # what is wrong: (what the message says, the file)
    "empty": ("begins with b''", b""),
    "magic only": ("begins with b'GGUF'", b"GGUF"),
    "wrong magic": ("begins with b'GGML", header(magic=b"GGML")),
    "safetensors": ("begins with", struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"}'),
    "git-lfs pointer": ("git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362\n"),
    "big-endian": ("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0)),
    **{f"version {v}": (f"version {v} is not", header(version=v)) for v in (0, 1, 4, 99)},
    **{f"{n} pairs": (ENTRIES, header([NAME], n_pairs=n)) for n in HUGE},
    **{f"{n} tensors": (ENTRIES, header([NAME], [described()], n_tensors=n)) for n in HUGE},
    # fewer bytes remain than so many need, though a loop over them would be short
    **{f"{n} pairs": (ENTRIES, header([NAME], n_pairs=n, data=0)) for n in (9, 100)},
    **{f"{n} tensors": (ENTRIES, header([NAME], [described()], n_tensors=n, data=0)) for n in (9, 100)},
    **{f"key of {n} bytes": (SHORT, header([text("a", n)])) for n in HUGE},
    **{f"string of {n} bytes": (SHORT, header([pair("a", STRING, text("abc", n))])) for n in HUGE},
    "string longer than what remains": (SHORT, header([pair("a", STRING, text("abc", 100))])),
    **{f"tensor name of {n} bytes": (SHORT, header([], [text("abc", n)])) for n in HUGE},
    **{f"{n} of type {t}": (ENTRIES, header([pair("a", ARRAY, array(t, n, bytes(64)))])) for n in HUGE for t in KINDS},
    **{f"array with {n} bytes": (SHORT, header([pair("a", ARRAY, array(STRING, 1, text("a", n)))])) for n in HUGE},
    **{f"dimension {n}": (PAST, header([NAME], [described(dims=(n,))])) for n in HUGE},
    **{f"dimensions {n}": (PAST, header([NAME], [described(dims=(n, n, n, n))])) for n in HUGE},
    **{f"offset {n}": (PAST, header([NAME], [described(offset=n // 32 * 32)])) for n in HUGE},
    "array of arrays": ("array of arrays", header([pair("a", ARRAY, array(ARRAY, 2, array(UINT32, 0) * 2))])),
    "deeply nested arrays": ("array of arrays", header([pair("a", ARRAY, array(ARRAY, 1) * 5000)])),
    **{f"value type {t}": (f"value type {t} is", header([pair("a", t, bytes(8))])) for t in (13, 2**32 - 1)},
    "array type 13": ("value type 13 is", header([pair("a", ARRAY, array(13, 1, bytes(8)))])),
    "the same key twice": ("general.name: it is there twice", header([NAME, NAME])),
    "the same tensor twice": ("token_embd.weight: it is there twice", header([NAME], [described(), described()])),
    "overlap": ("overlaps", header([NAME], [described(), described("output.weight", offset=32)], data=128)),
    "same place": ("overlaps", header([NAME], [described(), described("output.weight")], data=128)),
    "offset not aligned": ("not aligned to 32", header([NAME], [described(offset=4)], data=128)),
    "data one byte too short": (PAST, header([NAME], TWO, data=127)),
    "no dimensions": ("0 dimensions", header([NAME], [described(dims=())])),
    "five dimensions": ("5 dimensions", header([NAME], [described(dims=(2, 2, 2, 2, 1))])),
    "2^32-1 dimensions": ("4,294,967,295 dimensions", header([NAME], [described(n_dims=2**32 - 1)])),
    "dimension 0": ("shape (4, 0)", header([NAME], [described(dims=(0, 4))])),
    "a broken block": ("blocks of 32 values (Q8_0)", header([NAME], [described(dims=(33, 4), kind=8)], data=4096)),
    **{
        f"tensor type {t}": (f"tensor type {t} cannot", header([NAME], [described(dims=(256,), kind=t)], data=4096))
        for t in (4, 5, 24, 26, 36, 255, 2**32 - 1)
    },
    **{f"alignment {n}": (f"{n} is no power", aligned(UINT32, struct.pack("<I", n))) for n in (0, 13, 33, 2**21)},
    "alignment as text": ("'32' is no power of two", aligned(STRING, text("32"))),
    "alignment as an array": ("is no power of two", aligned(ARRAY, array(UINT32, 1, struct.pack("<I", 32)))),
    "key that is not UTF-8": ("not UTF-8", header([pair(b"\xff\xfe", UINT32, bytes(4))])),
    "string not UTF-8": ("a: text that is not UTF-8 at its byte 1", header([pair("a", STRING, text(b"b\xc3"))])),
    "surrogate in a string": ("not UTF-8", header([pair("a", STRING, text(b"\xed\xa0\x80"))])),
    "tensor name that is not UTF-8": ("not UTF-8", header([NAME], [described(b"\x80")])),
    "a key that paints": ("value type 99", header([pair("\x1b[31m\n" + "a" * 999, 99)])),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_quickly_and_in_little_memory(path, lie):
    words, data = LIES[lie]
    path.write_bytes(data)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        message = refused(path)
        assert time.perf_counter() - start < 20 and tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()
    assert "broken GGUF header" in message and words in message
    assert len(message) < 300 + len(str(path)) and message.isprintable()


def test_metadata_of_more_than_64_mib_is_refused_though_the_file_is_that_large(path):
    path.write_bytes(header([pair("a", ARRAY, array(0, 65 * 2**20))]))
    os.truncate(path, 2**30)
    assert ENTRIES in refused(path)


def test_the_same_bytes_without_a_lie_are_read(path):
    sizes = {"block_count": 1, "context_length": 8, "embedding_length": 4, "feed_forward_length": 4}
    sizes["attention.head_count"] = 1
    pairs = [pair("general.architecture", STRING, text("llama")), NAME]
    pairs += [pair("general.alignment", UINT32, struct.pack("<I", 32))]
    pairs += [pair(f"llama.{key}", UINT32, struct.pack("<I", value)) for key, value in sizes.items()]
    pairs += [pair("llama.attention.layer_norm_rms_epsilon", FLOAT64, struct.pack("<d", 1e-6))]
    pairs += [pair("a", ARRAY, array(UINT64, 1, bytes(8)))]
    for version in (2, 3):
        path.write_bytes(header(pairs, TWO, data=128, version=version))
        assert set(GGUFFile(path).header) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A complete small model file: its bytes, where those of the tensors begin and where they end."""
    metadata = tokenizer_metadata("smollm", TINY, [("h", "e")], chat_template="{{ messages }}")
    tensors = {"token_embd.weight": (np.zeros((8, 34), np.uint8), GGMLQuantizationType.Q8_0)}
    for name in ("attn_q", "attn_k", "ffn_up"):
        tensors[f"blk.0.{name}.weight"] = np.ones((16, HIDDEN), np.float32)
    tensors["rope_freqs.weight"] = llama3_divisors(8, theta=50000.0, dim=HEAD_DIM)
    path = tmp_path_factory.mktemp("valid") / "valid.gguf"
    data = write(path, metadata=metadata, tensors=tensors).read_bytes()
    places = [(tensor.offset, tensor.offset + tensor.size) for tensor in GGUFFile(path)._tensors.values()]
    return data, min(places)[0], max(places)[1]


def everything(path):
    """Use all of a base."""
    base = GGUFFile(path)
    for name in base.header:
        base.read(name)
    json.dumps(base.config), base.files()
    return base


def test_a_file_cut_anywhere_is_refused(path, valid):
    data, start, end = valid
    path.write_bytes(data)
    everything(path)
    for length in [*range(0, start, 3), *range(start, end, 97), end - 1]:
        path.write_bytes(data[:length])
        assert "broken GGUF header" in refused(path)


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    longs=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([0, 1, 8, 2**31, *HUGE])), max_size=2),
    cut=st.one_of(st.none(), st.floats(0, 1)),
)
def test_any_damage_gives_a_checkpoint_or_bad_input(tmp_path, valid, flips, longs, cut):
    data, end = bytearray(valid[0]), valid[1]  # the tensors' bytes may be anything
    for where, byte in flips:
        data[int(where * end)] ^= byte
    for where, number in longs:
        data[int(where * end) : int(where * end) + 8] = struct.pack("<Q", number)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data if cut is None else data[: int(cut * len(data))])
    try:
        everything(path)
    except BadInput as error:
        assert path.name in str(error) and "\n" not in str(error)


def test_a_header_with_a_large_vocabulary_is_read_soon(path):
    numbers = random.Random(0)
    tokens = [f"token{i}" for i in range(50_000)]
    merges = [f"{numbers.choice(tokens)} {numbers.choice(tokens)}" for _ in range(50_000)]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
    write(path, metadata=metadata, tensors={"token_embd.weight": np.zeros((50_000, 32), np.float16)})
    start = time.perf_counter()
    GGUFFile(path)
    assert time.perf_counter() - start < 20
