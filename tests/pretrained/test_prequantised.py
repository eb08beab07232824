"""Weights quantised in their hub folder: read as the formulas of their formats say, kept, or refused by name."""

import json
import re
from math import ceil, inf, nan

import pytest
import safetensors.torch
import torch

from lora import files
from lora.errors import BadInput
from lora.pretrained import ModelFolder, empty_model, find, load_model, write_model, write_packed
from lora.quant import nf4
from lora.quant.linear import QuantLinear
from tests.helpers import same, some_tokens, tiny_model
from tests.mutation import mutation
from tests.pretrained.test_pretrained import folder_of, problems_of, tensors_of

FP4 = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
TABLES = {"nf4": nf4.TABLE, "fp4": torch.cat([FP4, -FP4])}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
UP = "model.layers.0.mlp.up_proj.weight"  # (40, 24)


def in_four_bits(
    name, shape, /, kind="nf4", block=64, nested=False, stored=torch.uint8, **said
) -> tuple[dict, torch.Tensor]:
    """Random codes under the names of bitsandbytes, and the numbers that they stand for, found one by one."""
    count, random = shape[0] * shape[1], torch.Generator().manual_seed(sum(shape))
    blocks = ceil(count / block)
    codes = torch.randint(256, (ceil(count / 2),), generator=random, dtype=torch.uint8)
    scales = torch.rand(blocks, generator=random) + 0.1
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    tensors = {name: codes.view(stored)[:, None], f"{name}.quant_map": TABLES[kind].clone(), f"{name}.absmax": scales}
    if nested:
        coded = torch.randint(256, (blocks,), generator=random, dtype=torch.uint8)
        by, values = torch.rand(ceil(blocks / 256), generator=random), torch.rand(256, generator=random)
        scales = values[coded.long()] * by.repeat_interleave(256)[:blocks] + 0.25
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        tensors |= {f"{name}.absmax": coded, f"{name}.nested_absmax": by, f"{name}.nested_quant_map": values}
    data = json.dumps(state | said).encode()
    tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(data), dtype=torch.uint8)
    nibbles = [half for byte in codes.tolist() for half in (byte >> 4, byte & 15)][:count]
    values = [TABLES[kind][nibble] * scales[i // block] for i, nibble in enumerate(nibbles)]
    return tensors, torch.stack(values).view(shape)


def quantised_folder(path, pack, quantization_config=BNB, **config):
    """A folder of the tiny model whose Linears are `pack(name, shape)`, and the numbers of all its tensors."""
    plain = tensors_of(tiny_model(torch.bfloat16, **config))
    stored, numbers = {}, {}
    for name, tensor in plain.items():
        linear = name.endswith("_proj.weight")
        tensors, numbers[name] = pack(name, tuple(tensor.shape)) if linear else ({name: tensor}, tensor.float())
        stored |= tensors
    return folder_of(path, stored, quantization_config=quantization_config, **config), numbers


FORMS = [
    {}, {"kind": "fp4"}, {"nested": True}, {"block": 32, "nested": True}, {"block": 128}, {"block": 4096},
    {"stored": torch.bfloat16}, {"stored": torch.float32, "nested": True}, {"dtype": "float16"}, {"dtype": "float32"},
]  # fmt: skip


@mutation("lora/pretrained/prequantised.py", "table=self.values(self.table), block=self.block, **nested)", "**nested)")
@mutation("lora/pretrained/prequantised.py", "self.map = self.get(", "self.mean = self.get(")
@mutation(
    "lora/pretrained/prequantised.py", "self.values(self.name).view(torch.uint8)", "self.values(self.name).byte()"
)
@mutation("lora/quant/nf4.py", "super().__init__(shape, block, **tensors", "super().__init__(shape, BLOCK, **tensors")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_numbers_in_four_bits_are_a_value_times_the_scale_of_its_block(tmp_path, form):
    path, numbers = quantised_folder(tmp_path / "m", lambda name, shape: in_four_bits(name, shape, **form))
    folder, kept = ModelFolder(path), find(str(path), "keep")
    dtype = getattr(torch, form.get("dtype", "bfloat16"))
    assert folder.header[UP] == ({"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[str(dtype)[6:]], (40, 24))
    for name, number in numbers.items():
        assert torch.equal(folder.read(name, torch.float32), number), name
        if name.endswith("_proj.weight"):
            assert torch.equal(folder.read(name), number.to(dtype))
            assert torch.equal(folder.read_rows(name, 3, 7, torch.float32), number[3:7])
            assert torch.equal(kept.packed(name).dequantise(), number)
            tables = sum(buffer.nbytes for key, buffer in kept.packed(name).named_buffers() if key in ("pairs", "map"))
            offset = 4 * ("nested" in form)
            assert folder.nbytes(name) == kept.packed(name).nbytes - tables - offset
            assert folder.block_type(name) == form.get("kind", "nf4").upper()
        else:
            assert folder.block_type(name) is folder.packed(name) is folder.nbytes(name) is None


def test_such_a_folder_is_a_model_in_16_bit_unless_its_blocks_are_kept(tmp_path):
    path, numbers = quantised_folder(tmp_path / "m", in_four_bits)
    folder, kept = ModelFolder(path), find(str(path), "keep")
    assert folder.described == f"folder {path} in NF4, dequantised"
    assert kept.described == f"folder {path} in NF4, Linears as they are: 14 NF4"
    plain, packed = load_model(folder), load_model(kept)
    assert same(tensors_of(plain), numbers)
    assert sum(isinstance(module, QuantLinear) for module in packed.modules()) == 14
    assert torch.equal(plain(some_tokens()), packed(some_tokens()))
    assert "quantization_config" not in folder.config
    write_model(folder, tmp_path / "m", lambda name, tensor: tensor)  # over itself
    assert same(tensors_of(load_model(ModelFolder(path))), {n: t.bfloat16().float() for n, t in numbers.items()})
    assert ModelFolder(path).described == f"folder {path}"


def test_the_mean_of_the_scales_may_be_a_tensor_as_in_old_files(tmp_path):
    def pack(name, shape):
        tensors, numbers = in_four_bits(name, shape, nested=True, nested_offset=None)
        return tensors | {f"{name}.nested_offset": torch.tensor(0.25)}, numbers

    path, numbers = quantised_folder(tmp_path / "m", pack)
    assert torch.equal(ModelFolder(path).read(UP, torch.float32), numbers[UP])


def test_a_config_that_asks_others_to_quantise_on_loading_changes_nothing_here(tmp_path):
    tensors = tensors_of(tiny_model(torch.float32))
    folder = ModelFolder(folder_of(tmp_path / "m", tensors, quantization_config=BNB))
    assert same(tensors_of(load_model(folder)), tensors) and "dequantised" not in folder.described


# ---- parts of a tensor that a family stores as one


@mutation("lora/pretrained/prequantised.py", "start * columns // 2 : ceil(", "start * columns : ceil(")
@mutation("lora/pretrained/prequantised.py", "whole.scale(first, last)", "whole.scale(0, last - first)")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("width", "shared"), [(64, ()), (24, ("k_proj", "v_proj"))])
def test_parts_of_a_fused_weight_keep_its_blocks_where_no_block_is_of_two(tmp_path, width, shared, nested):
    config = {"model_type": "phi3", "hidden_size": width, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"intermediate_size": 56, "num_hidden_layers": 1}
    sizes = {"qkv_proj": (2 * width, width), "o_proj": (width, width), "gate_up_proj": (112, width)}
    tensors, numbers = {}, {}
    for name, shape in sizes.items():
        name = f"model.layers.0.{'mlp' if 'gate' in name else 'self_attn'}.{name}.weight"
        packed, numbers[name] = in_four_bits(name, shape, nested=nested)
        tensors |= packed
    ordinary = {name: t for name, t in tensors_of(tiny_model(**config)).items() if "_proj." not in name}
    down = {"model.layers.0.mlp.down_proj.weight": torch.randn(width, 56)}
    path = folder_of(tmp_path / "m", tensors | ordinary | down, quantization_config=BNB, **config)
    folder = ModelFolder(path)
    first = 0
    for part, rows in ("q_proj", width), ("k_proj", width // 2), ("v_proj", width // 2):
        name, expected = f"model.layers.0.self_attn.{part}.weight", numbers["model.layers.0.self_attn.qkv_proj.weight"]
        expected, first = expected[first : first + rows], first + rows
        assert torch.equal(folder.read(name, torch.float32), expected)
        assert folder.block_type(name) == (None if part in shared else "NF4")
        if part not in shared:
            assert torch.equal(folder.packed(name).dequantise(), expected)
            assert folder.nbytes(name) == rows * width // 2 + 4 * rows * width // 64
        else:
            assert folder.packed(name) is None
    count = f"{6 - len(shared)} NF4, {1 + len(shared)} 16 bit"
    kept = find(str(path), "keep")
    assert sorted(kept.described.split("as they are: ")[1].split(", ")) == sorted(count.split(", "))
    assert torch.equal(load_model(folder)(some_tokens()), load_model(kept)(some_tokens()))


# ---- eight bits


@mutation("lora/pretrained/prequantised.py", "[start:stop] / LARGEST", "[start:stop] / 128")
def test_eight_bits_are_a_code_times_the_largest_of_its_row_over_127(tmp_path):
    def pack(name, shape):
        codes, largest = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0]) + 0.1
        stem = name.removesuffix("weight")
        layout = torch.tensor(0, dtype=torch.uint8)
        tensors = {name: codes, f"{stem}SCB": largest, f"{stem}weight_format": layout}
        return tensors, codes.float() * (largest / 127)[:, None]

    path, numbers = quantised_folder(tmp_path / "m", pack, BNB | {"load_in_4bit": False, "load_in_8bit": True})
    folder = ModelFolder(path)
    assert folder.described.endswith(" in INT8, dequantised")
    assert same(tensors_of(load_model(folder)), numbers)
    assert torch.equal(find(str(path), "keep").packed(UP).dequantise(), numbers[UP])
    assert folder.nbytes(UP) == folder.packed(UP).nbytes == 40 * 28
    assert find(str(path), "nf4").packed(UP).shape == (40, 24)  # fewer bits than it has: packed anew


# ---- FP8


def in_float8(name, shape, block=(16, 16)):
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    grid = tuple(ceil(size / by) for size, by in zip(shape, block, strict=True))
    factors = torch.rand(grid) + 0.1
    values = [
        [weight[i, j].float() * factors[i // block[0], j // block[1]] for j in range(shape[1])] for i in range(shape[0])
    ]
    stem = name.removesuffix("weight")
    dropped = {f"{stem}activation_scale": torch.tensor(2.0), f"{stem}input_scale": torch.tensor(3.0)}
    return {name: weight, f"{name}_scale_inv": factors} | dropped, torch.tensor(values)


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


@mutation("lora/pretrained/prequantised.py", "repeat_interleave(wide)[:columns]", "repeat_interleave(wide)[-columns:]")
@mutation(
    "lora/pretrained/prequantised.py", "range(start // high, ceil(stop / high))", "range(start // high, stop // high)"
)
@mutation("lora/pretrained/prequantised.py", "* factors[i].", "* factors[i - start // high].")
def test_fp8_is_a_number_times_the_factor_of_its_block_in_sizes_that_blocks_do_not_divide(tmp_path):
    path, numbers = quantised_folder(tmp_path / "m", in_float8, FP8)  # 24 and 40 are no multiples of 16
    folder = ModelFolder(path)
    assert folder.described == f"folder {path} in FP8, dequantised"
    assert same(tensors_of(load_model(folder)), numbers)
    assert torch.equal(folder.read(UP), numbers[UP].bfloat16())
    assert torch.equal(folder.read_rows(UP, 17, 33, torch.float32), numbers[UP][17:33])
    packed = find(str(path), "int8")
    assert packed.described.endswith(" in FP8, dequantised, Linears in int8")
    with pytest.raises(BadInput, match=r"no blocks to keep in .*/m\. Give --quant nf4 or int8$"):
        find(str(path), "keep")


def test_fp8_has_blocks_of_128_where_the_config_says_nothing_and_one_factor_may_be_for_all(tmp_path):
    config = {"hidden_size": 144, "intermediate_size": 130, "num_hidden_layers": 1}

    def pack(name, shape):
        tensors, numbers = in_float8(name, shape, (128, 128))
        if "o_proj" in name:
            tensors[f"{name}_scale_inv"], numbers = torch.tensor(0.5), tensors[name].float() * 0.5
        return tensors, numbers

    path, numbers = quantised_folder(tmp_path / "m", pack, {"quant_method": "fp8"}, **config)
    assert same(tensors_of(load_model(ModelFolder(path))), numbers)


# ---- written


PHI3 = {"model_type": "phi3", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {"model_type": "gemma2", "head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 2}


@mutation("lora/pretrained/write_packed.py", "nested=len(parts) == 1", "nested=True", case="phi3-1")
@mutation("lora/pretrained/write_packed.py", "else together", "else parts[0]", case="phi3-1")
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [{}, PHI3, GEMMA], ids=["llama", "phi3", "gemma2"])
def test_a_base_packed_in_nf4_is_written_and_kept_with_the_same_numbers(tmp_path, config, shards):
    plain = folder_of(tmp_path / "plain", tensors_of(tiny_model(torch.bfloat16, **config)), **config)
    write_model(ModelFolder(plain), plain, lambda name, tensor: tensor)  # as its family stores it
    if shards > 1:
        stored = safetensors.torch.load_file(plain / "model.safetensors")
        (plain / "model.safetensors").unlink()
        folder_of(plain, stored, shards, **config)
    packed = find(str(plain), "nf4")
    write_packed(packed, tmp_path / "packed")
    kept = find(str(tmp_path / "packed"), "keep")
    assert {name: entry for name, entry in kept.header.items()} == packed.header
    for name in packed.header:
        assert torch.equal(kept.read(name, torch.float32), packed.read(name, torch.float32)), name
    assert torch.equal(load_model(kept)(some_tokens()), load_model(packed)(some_tokens()))
    assert sorted(path.name for path in plain.iterdir()) == sorted(p.name for p in (tmp_path / "packed").iterdir())
    said = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert said.pop("quantization_config")["quant_method"] == "bitsandbytes"
    assert said == json.loads((plain / "config.json").read_text())


def test_what_would_be_written_wrong_is_refused(tmp_path):
    plain = folder_of(tmp_path / "plain", tensors_of(tiny_model(torch.bfloat16)))
    with pytest.raises(BadInput, match=r"only nf4 is written, not int8\. Give --quant nf4"):
        write_packed(find(str(plain), "int8"), tmp_path / "new")
    odd = PHI3 | {"hidden_size": 24}
    fused = folder_of(tmp_path / "phi", tensors_of(tiny_model(torch.bfloat16, **odd)), **odd)
    with pytest.raises(BadInput, match=r"qkv_proj\.weight: a block of 64 would have values of two of its parts"):
        write_packed(find(str(fused), "nf4"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- what is wrong is one line


@mutation("lora/pretrained/quantised.py", "Path(original.path)", "Path(original.name)")
def test_keep_names_the_gguf_file_that_lies_in_the_folder(tmp_path):
    folder = folder_of(tmp_path / "m", tensors_of(tiny_model(torch.bfloat16)))
    with pytest.raises(BadInput, match=rf"no blocks to keep in {folder}\. Give --quant nf4 or int8$"):
        find(str(folder), "keep")
    (folder / "tiny.Q4_K_M.gguf").write_bytes(b"GGUF")
    files.write_json(folder / "source.json", {"model": "its-name"})
    with pytest.raises(
        BadInput, match=rf"in its-name\. Give --model {folder}/tiny\.Q4_K_M\.gguf, or --quant nf4 or int8$"
    ):
        find(str(folder), "keep")


@mutation("lora/pretrained/quantised.py", '& {"NF4", "FP4"}', '& {"NF4"}', case="fp4-nf4")
@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_has_four_bits_is_not_rounded_a_second_time(tmp_path, kind, mode):
    path, _ = quantised_folder(tmp_path / "m", lambda name, shape: in_four_bits(name, shape, kind))
    with pytest.raises(BadInput, match=rf"Linears have 4 bits already in {path}\. Give --quant keep$"):
        find(str(path), mode)


def changed(end, change):
    """A tensor of the weight UP, changed; gone where `change` is None."""

    def apply(tensors):
        tensor = tensors.pop(UP + end)
        return tensors | ({UP + end: change(tensor)} if change else {})

    return apply


def said(**fields):
    return lambda tensors: tensors | in_four_bits(UP, (40, 24), nested=f"{UP}.nested_absmax" in tensors, **fields)[0]


STATE, ENDLESS = ".quant_state.bitsandbytes__nf4", f"{UP}: values that are not finite"
FLOAT8_CODES, INT8_CODES = (torch.ones(40, 24).to(dtype) for dtype in (torch.float8_e4m3fn, torch.int8))
BROKEN = {
    "codes cut": (changed("", lambda t: t[:-1]), f"{UP}: 479 bytes, where the shape (40, 24) asks for 480"),
    "codes too long": (changed("", lambda t: torch.cat([t, t])), f"{UP}: 960 bytes, where the shape"),
    "codes missing": (changed("", None), f"missing tensor in M:{UP}: only its scales are there"),
    "codes of bool": (changed("", lambda t: t > 3), f"{UP}: dtype BOOL"),
    "scales cut": (
        changed(".absmax", lambda t: t[1:]), f"{UP}.absmax: 14 values, where the weight's shape (40, 24) asks for 15"
    ),
    "scales missing": (changed(".absmax", None), f"missing tensor in M:{UP}.absmax: {UP} is quantised"),
    "scales in whole numbers": (changed(".absmax", lambda t: t.long()), f"{UP}.absmax: dtype I64, where "),
    "a scale is not a number": (changed(".absmax", lambda t: t * nan), ENDLESS),
    "a scale is endless": (changed(".absmax", lambda t: t / 0), ENDLESS),
    "15 values": (changed(".quant_map", lambda t: t[1:]), f"{UP}.quant_map: 15 values, where "),
    "no values": (changed(".quant_map", None), f"missing tensor in M:{UP}.quant_map"),
    "a value is not a number": (changed(".quant_map", lambda t: t.where(t < 1, nan)), ENDLESS),
    "no state": (changed(STATE, None), f"missing tensor in M:{UP}{STATE}"),
    "the state is no JSON": (changed(STATE, lambda t: t[1:]), f"broken JSON in M:{UP}{STATE}:1: "),
    "the state is no text": (changed(STATE, lambda t: t + 128), f"wrong encoding in M:{UP}{STATE}"),
    "the state is a list": (changed(STATE, lambda t: t[:2].copy_(t.new([91, 93]))), f"wrong JSON in M:{UP}{STATE}"),
    "the state is large": (changed(STATE, lambda t: t.repeat(1000)), f"{UP}{STATE}: over 65,536 bytes"),
    "the shape is larger": (said(shape=[40, 48]), f"{UP}: 480 bytes, where the shape (40, 48) asks for 960"),
    "the shape is another": (said(shape=[24, 40]), f"M:{UP}: shape (24, 40), the config asks for (40, 24)"),
    "the shape is a vector": (said(shape=[960]), f"{UP}{STATE}: shape [960] is not that of a matrix"),
    "the shape is negative": (said(shape=[-40, -24]), f"{UP}{STATE}: shape [-40, -24] is not"),
    "the shape is endless": (said(shape=[10**30, 24]), f"{UP}{STATE}: shape [1000"),
    "the shape is true": (said(shape=[960, True]), f"{UP}{STATE}: shape [960, True] is not"),
    "the block size is 0": (said(blocksize=0), f"{UP}{STATE}: blocksize 0 is none of (32, 64, "),
    "the block size is a text": (said(blocksize="64"), f"{UP}{STATE}: blocksize 64 is none of "),
    "the block size is another": (
        said(blocksize=32), f"{UP}.absmax: 15 values, where the weight's shape (40, 24) asks for 30"
    ),
    "the dtype is none": (said(dtype="int8"), f"{UP}{STATE}: dtype int8 is none of a weight"),
    "the dtype is a function": (said(dtype="load"), f"{UP}{STATE}: dtype load is none of a weight"),
}  # fmt: skip
NESTED = {
    "scales of scales cut": (changed(".nested_absmax", lambda t: t[1:]), f"{UP}.nested_absmax: 0 values, where "),
    "no scales of scales": (changed(".nested_absmax", None), f"{UP}.absmax: dtype U8, where F32 or F16 or BF16 is"),
    "a scale of scales is endless": (changed(".nested_absmax", lambda t: t + inf), ENDLESS),
    "no values of scales": (changed(".nested_quant_map", None), f"missing tensor in M:{UP}.nested_quant_map"),
    "255 values of scales": (changed(".nested_quant_map", lambda t: t[1:]), f"{UP}.nested_quant_map: 255 values, "),
    "a value of scales is endless": (changed(".nested_quant_map", lambda t: t / 0), ENDLESS),
    "no mean": (said(nested_offset=None), f"{UP}{STATE}: nested_offset None is no finite number"),
    "the mean is not a number": (said(nested_offset=nan), f"{UP}{STATE}: nested_offset nan is no finite number"),
    "the mean is endless": (said(nested_offset=10**400), f"{UP}{STATE}: nested_offset 1000"),
    "other blocks of scales": (said(nested_blocksize=128), f"{UP}{STATE}: nested_blocksize is not 256"),
}  # fmt: skip


@mutation(
    "lora/quant/nf4.py",
    "return [*scales, self.pairs",
    "return [*scales, self.pairs[:0]",
    case="a value is not a number",
)
@mutation("lora/pretrained/prequantised.py", "abs(self.mean) < 3e38", "True", case="the mean is not a number")
@mutation(
    "lora/pretrained/prequantised.py",
    "self.need(found == asked, self.name,",
    "self.need(True, self.name,",
    case="codes cut",
)
@mutation("lora/pretrained/prequantised.py", "count is None or prod(shape) == count", "True", case="15 values")
@pytest.mark.parametrize("case", [*BROKEN, *NESTED])
def test_what_does_not_fit_is_named_in_one_line(tmp_path, case):
    change, message = (BROKEN | NESTED)[case]
    path, _ = quantised_folder(tmp_path / "M", lambda name, shape: in_four_bits(name, shape, nested=case in NESTED))
    tensors = change(safetensors.torch.load_file(path / "model.safetensors"))
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    for problem in (problems_of(path), kept_problems_of(path)):
        assert message in problem.replace(str(path), "M") and "\n" not in problem, problem


def kept_problems_of(path) -> str:
    with pytest.raises(BadInput) as raised:
        load_model(find(str(path), "keep"))
    return str(raised.value)


OTHER_BROKEN = {
    "fp8 without factors": (FP8, {UP: FLOAT8_CODES}, rf"missing tensor in .*:{UP}_scale_inv: "),
    "fp8 with too few factors": (
        FP8, {UP: FLOAT8_CODES, f"{UP}_scale_inv": torch.ones(2, 2)},
        rf"{UP}_scale_inv: shape \(2, 2\), where the weight's \(40, 24\) asks for \(3, 2\), a factor for 16 x 16",
    ),
    "fp8 with a factor that is endless": (
        FP8, {UP: FLOAT8_CODES, f"{UP}_scale_inv": torch.full((3, 2), inf)},
        rf"{UP}: values that are not finite",
    ),
    "fp8 with blocks of nothing": (
        FP8 | {"weight_block_size": [0, 16]},
        {UP: FLOAT8_CODES, f"{UP}_scale_inv": torch.ones(3, 2)},
        rf"{UP}: weight_block_size \[0, 16\] in the config is not two sizes",
    ),
    "fp8 of another program": (
        FP8, {f"{UP}_scale": torch.ones(40)}, rf"{UP}_scale: its weights are quantised, which is not implemented",
    ),
    "int8 without codes": (BNB, {UP.replace("weight", "SCB"): torch.ones(40)}, rf"{UP}: F32 \(40, 24\), where "),
    "int8 in another layout": (
        BNB, {
            UP: INT8_CODES, UP.replace("weight", "SCB"): torch.ones(40),
            UP.replace("weight", "weight_format"): torch.tensor(2, dtype=torch.uint8),
        },
        r"up_proj\.weight_format: layout 2, where only rows, 0, is implemented",
    ),
    "int8 with too few scales": (
        BNB, {UP: INT8_CODES, UP.replace("weight", "SCB"): torch.ones(39)},
        r"up_proj\.SCB: 39 values, where the weight's shape \(40, 24\) asks for 40",
    ),
    "gptq": ({"quant_method": "gptq"}, {}, r"quantised by gptq, which is not implemented\. Give .* from, tiny$"),
    "awq": ({"quant_method": "awq"}, {}, r"quantised by awq, which is not implemented\. Give .* from, tiny$"),
    "mxfp4": ({"quant_method": "mxfp4"}, {}, r"quantised by mxfp4, which is not implemented"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, {}, r"quantised by compressed-tensors, "),
    "a config that is a list": ([1], {}, r"quantization_config: its weights are quantised, which is not implemented"),
    "a method that is a list": ({"quant_method": []}, {}, r"quantization_config: its weights are quantised"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_BROKEN)
def test_other_formats_are_refused_by_name_and_what_is_broken_in_one_line(tmp_path, case):
    config, tensors, message = OTHER_BROKEN[case]
    tensors = tensors_of(tiny_model(torch.float32)) | tensors
    path = folder_of(tmp_path / "tiny-GPTQ", tensors, quantization_config=config)
    problem = problems_of(path)
    assert re.search(message, problem) and "\n" not in problem, problem


def test_all_broken_weights_are_named_at_once(tmp_path):
    path, _ = quantised_folder(tmp_path / "m", in_four_bits)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".quant_map")}
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    with pytest.raises(BadInput) as raised:
        empty_model(ModelFolder(path))
    assert len(raised.value.problems) == 14
