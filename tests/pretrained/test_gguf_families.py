"""GGUF files of every family, made by llama.cpp's rules and not by our writer, are the model that they were made of.

What writes them is tests/pretrained/gguf_converter.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from lora import pretrained
from lora.errors import BadInput
from lora.network.config import ModelConfig
from lora.pretrained import gguf_keys
from lora.pretrained.gguf import GGUFFile
from lora.pretrained.gguf_layout import Order
from lora.quant.linear import QuantLinear
from tests import cli
from tests.helpers import close, some_tokens
from tests.mutation import mutation
from tests.pretrained import gguf_converter as converter
from tests.pretrained.test_gguf import TENSORS, refused, write
from tests.pretrained.test_gguf_write import CASES, DELTA, models_in, same_model

UNWRITTEN = ("attention_factor", "another order", "llama 3", "without yarn")  # not by the converter, or told elsewhere
CONVERTED = {case: sizes for case, sizes in CASES.items() if not any(word in case for word in UNWRITTEN)}


models = pytest.fixture(models_in, scope="module")


@mutation("lora/pretrained/gguf_names.py", '"blk.ssm_beta": "linear_attn.in_proj_b"',
          '"blk.ssm_beta": "linear_attn.in_proj_a"', case="qwen3_5")  # fmt: skip
@mutation("lora/pretrained/gguf_layout.py", "return (-tensor).log()", "return tensor.log()", case="qwen3_5")
@mutation("lora/pretrained/gguf_layout.py", "start=2 * delta.key_heads * delta.key_dim)", "start=0)", case="qwen3_5")
@mutation("lora/pretrained/gguf_layout.py", '"A_log", "dt_bias"', '"A_log", "dt"', case="qwen3_5")
@mutation("lora/pretrained/gguf_layout.py", 'and ".linear_attn." not in name', "", case="qwen3_5")
@mutation("lora/pretrained/gguf_rope.py", 'found |= {"mscale": 1.0, "mscale_all_dim": keys.get(LOG, float)}',
          "pass", case="ministral3")  # fmt: skip
@mutation("lora/pretrained/gguf_rope.py", '{"llama_4_scaling_beta": keys.get(TEMPERATURE, float)} if', "{} if",
          case="ministral3")  # fmt: skip
@pytest.mark.parametrize("case", CONVERTED)
def test_a_file_made_by_the_converters_rules_is_the_folder_that_it_was_made_of(models, tmp_path, case):
    folder = models(case)
    base = GGUFFile(converter.convert(folder, tmp_path / "a.gguf"))
    ours, theirs = (pretrained.load_model(one, torch.bfloat16) for one in (base, pretrained.find(str(folder))))
    ours.config = replace(ours.config, eos_token_ids=theirs.config.eos_token_ids)  # such a file has no tokenizer
    assert same_model(ours, theirs)
    tokens = some_tokens(vocab=290)
    assert torch.equal(ours(tokens), theirs(tokens))
    wide = pretrained.load_model(base)  # A_log is the logarithm of an exponential
    assert close(wide(tokens), pretrained.load_model(str(folder))(tokens), 1e-4)


@mutation("lora/pretrained/gguf.py", ".to(dtype)[start:stop]", ".to(dtype)", case="qwen3_5")
@pytest.mark.parametrize("case", ["llama", "phi3", "gemma2", "qwen3_5"])
def test_some_rows_of_any_tensor_are_those_of_the_whole(models, tmp_path, case):
    base = GGUFFile(converter.convert(models(case), tmp_path / "a.gguf"))
    for name, (_, shape) in base.header.items():
        whole = base.read(name, torch.float32)
        assert tuple(whole.shape) == shape
        assert torch.equal(base.read_rows(name, 1, shape[0] - 1, torch.float32), whole[1:-1]), name


# ---- blocks that are kept --------------------------------------------------------------------------------------------

WIDE = DELTA | {"hidden_size": 64, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "intermediate_size": 64}


@mutation("lora/pretrained/gguf.py", "if order := self._layout.order(name):", "if False:")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_kept_blocks_of_gated_deltanet_change_places_whole(tmp_path, kind):
    folder = cli.write_model(tmp_path / "model", **WIDE)
    path = converter.convert(folder, tmp_path / "a.gguf", GGMLQuantizationType[kind])
    kept = pretrained.find(str(path), "keep")
    packed = [name for name in kept.header if kept.block_type(name)]
    assert {name.split(".")[-2] for name in packed} >= {"in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj", "q_proj"}
    for name in packed:
        assert torch.equal(kept.packed(name).dequantise(torch.float32), kept.original.read(name, torch.float32)), name
    model, plain = pretrained.load_model(kept), pretrained.load_model(kept.original)
    assert isinstance(model.model.layers[0].linear_attn.out_proj, QuantLinear)
    assert close(model(some_tokens(vocab=290)), plain(some_tokens(vocab=290)), 1e-5)


@mutation("lora/pretrained/gguf_layout.py", "% TYPES[kind].block == 0", "> 0")
def test_a_block_that_would_be_torn_is_read_as_16_bits_and_said(tmp_path):
    """128 columns of a value head are half a block of Q4_K: out_proj's columns cannot change places in whole blocks."""
    sizes = {"hidden_size": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_hidden_layers": 2}
    keys = converter.keys_of(cli.SIZES | DELTA | sizes | {"rope_theta": 1e4})
    out, alpha = (f"model.layers.0.linear_attn.{name}.weight" for name in ("out_proj", "in_proj_a"))
    for kind, bytes_of_256, said in ("Q4_K", 144, "1 16 bit, 1 Q4_K"), ("Q8_0", 272, "2 Q8_0"):
        rows = {"blk.0.ssm_out.weight": (256, 2), "blk.0.ssm_alpha.weight": (4, 1)}
        tensors = {name: (np.zeros((count, blocks * bytes_of_256), np.uint8), GGMLQuantizationType[kind])
                   for name, (count, blocks) in rows.items()}  # fmt: skip
        path = write(tmp_path / f"{kind}.gguf", "qwen35", keys, tensors=TENSORS | tensors)
        base = GGUFFile(path)
        assert base.block_type(out) == (None if kind == "Q4_K" else kind) and base.block_type(alpha) == kind
        assert base.read(out).shape == (256, 512) and bool(base.nbytes(alpha))
        assert pretrained.find(str(path), "keep").described.endswith(f"Linears as they are: {said}")


@pytest.mark.parametrize("dim, start", [(0, 0), (1, 0), (0, 8)])
def test_an_order_undone_is_the_tensor_again_and_moves_every_part_to_the_place_it_says(dim, start):
    order = Order(1, 2, 3, -1, start, dim)
    tensor = torch.arange(20 * 18.0).view(20, 18) if dim else torch.arange((start + 12) * 5.0).view(-1, 5)
    moved = order.moved(tensor)
    assert torch.equal(order.moved(moved, back=True), tensor) and not torch.equal(moved, tensor)
    size = (tensor.shape[dim] - start) // 6
    for a in range(2):
        for b in range(3):
            theirs, ours = (start + size * at for at in (b * 2 + a, a * 3 + b))
            assert torch.equal(moved.narrow(dim, theirs, size), tensor.narrow(dim, ours, size))
    assert torch.equal(moved.narrow(dim, 0, start), tensor.narrow(dim, 0, start))


# ---- what files say --------------------------------------------------------------------------------------------------

QWEN35 = converter.keys_of(cli.SIZES | DELTA | {"rope_theta": 1e4, "rms_norm_eps": 1e-6})


def qwen35(path, tensors=TENSORS, **change):
    keys = QWEN35 | {key.replace("__", "."): value for key, value in change.items()}
    return write(path, "qwen35", keys, tensors=tensors)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@mutation("lora/pretrained/gguf.py", "return count - ahead", "return count")
def test_layers_that_guess_further_tokens_are_left_out_and_said(path):
    ahead = {f"blk.3.{name}": np.zeros((4, 32), np.float32) for name in ("attn_q.weight", "nextn.eh_proj.weight")}
    tensors = TENSORS | ahead | {"blk.2.attn_norm.weight": np.ones(32, np.float32)}
    base = GGUFFile(qwen35(path, tensors, nextn_predict_layers=1))
    assert base.config["num_hidden_layers"] == 3
    assert base.described.endswith("without the layers that guess further tokens (2 tensors)")
    assert set(base.header) == {"model.embed_tokens.weight", "model.layers.2.input_layernorm.weight"}
    assert "blk.3.nextn" in refused(qwen35(path, tensors))


@mutation("lora/pretrained/gguf.py", 'return {"layer_types": [kinds[int(one)] for one in value[: self._layers]]}',
          "return {}")  # fmt: skip
def test_layers_that_are_told_one_by_one_are_those(path):
    base = GGUFFile(qwen35(path, attention__recurrent_layers=[True, False, False, True]))
    assert ModelConfig.from_json(base.config).mixers == ("delta", "attention", "attention", "delta")
    gemma = {"attention.sliding_window": 6, "block_count": 4, "attention.key_length": 8, "attention.value_length": 8}
    windows = (6, None, None, 6)
    for pattern in ([True, False, False, True], 3, 2, None):
        sizes = gemma | {"attention.sliding_window_pattern": pattern}
        base = GGUFFile(write(path, "gemma2", sizes, tensors=TENSORS))
        told = (
            windows
            if isinstance(pattern, list)
            else tuple(6 * ((i + 1) % (pattern or 2) > 0) or None for i in range(4))
        )
        assert ModelConfig.from_json(base.config).windows == told


def mistral3(path, tensors=TENSORS, **change):
    keys = {f"rope.scaling.{key}": value for key, value in change.items()}
    return write(path, "mistral3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                                    "rope.scaling.original_context_length": 32, **keys}, tensors=tensors)  # fmt: skip


@mutation("lora/pretrained/gguf_rope.py", "theirs = grows(factor) / ", "theirs = 1 / ")
@pytest.mark.parametrize(
    "keys, attention", [
        ({}, 1.1386294), ({"yarn_log_multiplier": 1.0}, 1.0), ({"attn_factor": 0.5}, 0.5693147),
        ({"attn_factor": 1.25, "yarn_log_multiplier": 1.0}, 1.25), ({"yarn_attn_factor": 2.0}, 1.1386294),
    ],
)  # fmt: skip
def test_attention_is_multiplied_by_what_llama_cpp_makes_of_its_keys(path, keys, attention):
    config = ModelConfig.from_json(GGUFFile(mistral3(path, **keys)).config)
    assert abs(config.rope_scaling.attention_factor - attention) < 1e-6
    assert config.rope_scaling.kind == "yarn" and config.rope_scaling.q_beta == 0


def test_a_mistral3_file_without_a_temperature_is_a_llama(path):
    base = GGUFFile(write(path, "mistral3", tensors=TENSORS))
    assert base.config["model_type"] == "llama" and "rope_scaling" not in base.config


SHORT = {"rope_factors_short.weight": np.ones(4, np.float32)}
LONG = {"rope_factors_long.weight": np.ones(4, np.float32)}


@pytest.mark.parametrize(
    "made, words",
    [
        (lambda path: qwen35(path, ssm__inner_size=60), "qwen35.ssm.inner_size: 60 is not 4 heads of 16"),
        (lambda path: qwen35(path, ssm__inner_size=48, ssm__time_step_rank=3), "ssm.group_count: 2 does not divide 3"),
        (lambda path: qwen35(path, nextn_predict_layers=4), "qwen35.nextn_predict_layers: 4 of 4 layers"),
        (lambda path: qwen35(path, block_count=2**31), "qwen35.block_count: 2,147,483,648 is more than 1,024"),
        (lambda path: qwen35(path, attention__recurrent_layers=[1, 0]), "recurrent_layers: it does not say 0 or 1"),
        (lambda path: qwen35(path, attention__recurrent_layers=[2, 0, 1, 1]), "recurrent_layers: it does not say"),
        (lambda path: qwen35(path, TENSORS | {"blk.0.attn_qkv.weight": np.zeros((66, 32), np.float32)}), "in_proj_qkv"),
        (lambda path: qwen35(path, TENSORS | {"blk.0.ssm_a": np.zeros(3, np.float32)}), "A_log: shape (3,)"),
        (lambda path: qwen35(path, TENSORS | {"blk.0.ssm_a.weight": np.zeros(4, np.float32)}), "'blk.0.ssm_a.weight'"),
        (lambda path: write(path, "qwen3", {"ssm.state_size": 4}, tensors=TENSORS), "qwen3.ssm.state_size"),
        (lambda path: write(path, "llama", {"attention.temperature_scale": 0.1}), "llama.attention.temperature_scale"),
        (lambda path: write(path, "mistral3", {"attention.temperature_scale": 0.1}), "implemented with YaRN only"),
        (lambda path: mistral3(path, yarn_ext_factor=0.5), "yarn_ext_factor: 0.5 is not implemented"),
        (lambda path: mistral3(path, TENSORS | {"rope_freqs.weight": np.ones(4, np.float32)}), "rope_freqs.weight"),
        (lambda path: mistral3(path, attn_factor=0.0), "attn_factor: 0.0 is no float"),
        (lambda path: write(path, "llama", {"rope.scaling.attn_factor": 1.1}), "1.1 is implemented with YaRN and long"),
        (lambda path: write(path, "phi3", {"rope.scaling.original_context_length": 64}, tensors=TENSORS | SHORT),
         "rope_factors_long.weight: it is not 4 numbers, or missing"),
        (lambda path: write(path, "phi3", tensors=TENSORS | SHORT | LONG), "original_context_length: it is missing"),
        (lambda path: write(path, "qwen3", tensors=TENSORS | SHORT | LONG), "rope_factors_short.weight: it is not"),
        (lambda path: write(path, "qwen3", {"rope.scaling.type": "longrope"}, tensors=TENSORS), "'longrope'; none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_a_file_says_wrongly_is_refused_by_its_key(path, made, words):
    assert words in refused(made(path))


def test_gemma_4_is_refused_by_name_both_ways(path, tmp_path):
    """Its layers have heads of two sizes, and use each other's keys."""
    assert "general.architecture: 'gemma4'; implemented are llama" in refused(write(path, "gemma4", tensors=TENSORS))
    config = ModelConfig.from_json(cli.SIZES | {"model_type": "gemma4_text"})
    with pytest.raises(BadInput, match=r"gemma4_text as GGUF is not implemented, only llama, .*convert it with"):
        gguf_keys.architecture(config, "base")
