"""A value head on disk: LLaMA-Factory's file, read strictly, in float32, beside its adapter or its model."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora.adapter import store, value_head
from lora.adapter.inject import inject
from lora.adapter.targets import linears
from lora.errors import BadInput, LoraError
from tests.helpers import bits, patched, same, snapshot, tiny_model
from tests.mutation import mutation

WEIGHT, BIAS = "v_head.summary.weight", "v_head.summary.bias"


def filled(model, seed: int = 3):
    """A head with values that float32 alone holds."""
    head = value_head.add(model, 24)
    random = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        nn.init.normal_(parameter, generator=random)
    return model


def saved(folder, dtype=torch.float32):
    model = filled(patched(tiny_model(dtype)))
    store.save(model, folder)
    return model


@mutation("lora/adapter/store.py", "    value_head.save(model, folder)\n", "")
@mutation("lora/adapter/store.py", "value_head.place(model, head)", "value_head.place(model, None)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_travels_with_the_adapter_in_llama_factorys_file_and_in_float32_whatever_the_base(tmp_path, dtype):
    model = saved(tmp_path, dtype)
    found = load_file(tmp_path / "value_head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {WEIGHT: (1, 24), BIAS: (1,)}
    again = tiny_model(dtype)
    store.load(again, tmp_path)
    for name, tensor in found.items():
        kept = again.get_parameter(name)
        assert tensor.dtype == kept.dtype == torch.float32
        assert torch.equal(bits(tensor), bits(kept)) and torch.equal(bits(kept), bits(model.get_parameter(name)))
    hidden = torch.randn(5, 24, dtype=dtype)
    assert again.v_head(hidden).dtype == torch.float32 and torch.equal(again.v_head(hidden), model.v_head(hidden))


@mutation("lora/adapter/value_head.py", "        del model.v_head\n", "        pass\n")
def test_an_adapter_without_a_head_leaves_none_of_another(tmp_path):
    store.save(patched(tiny_model(torch.float32)), tmp_path)
    model = filled(tiny_model(torch.float32))
    store.load(model, tmp_path)
    assert not hasattr(model, "v_head")


@mutation("lora/adapter/value_head.py", "self.summary = Summary(", "self.summary = nn.Linear(")
def test_no_adapter_takes_the_head_for_a_target():
    model = filled(tiny_model(torch.float32))
    assert not any("v_head" in path for path in linears(model))
    with pytest.raises(ValueError, match="summary"):
        inject(model, targets=("summary",))


def test_a_head_on_a_base_without_memory_has_values(tmp_path):
    model = saved(tmp_path)
    with torch.device("meta"):
        empty = type(model)(model.config)
    store.load(empty, tmp_path)
    assert torch.equal(empty.v_head.summary.weight, model.v_head.summary.weight)


# ---- what is wrong with a file ---------------------------------------------------------------------------------------

GOOD = {WEIGHT: torch.ones(1, 24), BIAS: torch.ones(1)}
HOSTILE = {
    "a missing bias": ({WEIGHT: GOOD[WEIGHT]}, [f":{BIAS}: ", "missing tensor"]),
    "no tensor": ({}, [f":{BIAS}: ", f":{WEIGHT}: "]),
    "another name": (GOOD | {"v_head.dropout.p": torch.ones(1)}, ["extra tensor", ":v_head.dropout.p: "]),
    "two outputs": (GOOD | {WEIGHT: torch.ones(2, 24)}, ["shape (2, 24), expected (1, width)"]),
    "a flat weight": (GOOD | {WEIGHT: torch.ones(24)}, ["shape (24,), expected (1, width)"]),
    "no width": (GOOD | {WEIGHT: torch.ones(1, 0)}, ["shape (1, 0), expected (1, width)"]),
    "a long bias": (GOOD | {BIAS: torch.ones(24)}, ["shape (24,), expected (1,)"]),
    "another width": (GOOD | {WEIGHT: torch.ones(1, 25)}, ["reads 25 numbers, this model's hidden states have 24"]),
    "NaN": (GOOD | {WEIGHT: torch.full((1, 24), torch.nan)}, [f":{WEIGHT}: values that are not finite"]),
    "an infinity": (GOOD | {BIAS: torch.full((1,), torch.inf)}, [f":{BIAS}: values that are not finite"]),
    "integers": (GOOD | {BIAS: torch.ones(1, dtype=torch.int64)}, [f":{BIAS}: dtype I64 is not supported"]),
}


@mutation("lora/adapter/value_head.py", "elif not torch.isfinite(read(name).float()).all():", "elif False:", case="NaN")
@mutation("lora/adapter/value_head.py", "elif dtype not in files.DTYPES:", "elif False:", case="integers")
@mutation("lora/adapter/value_head.py", "shape[1] != (width or shape[1])", "False", case="another width")
@mutation("lora/adapter/value_head.py", "elif name not in SHAPES:", "elif False:", case="another name")
@mutation("lora/adapter/value_head.py", "shape[0] == 1 and shape[1] > 0", "shape[1] > 0", case="two outputs")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_head_with_anything_wrong_is_refused_in_one_line_a_tensor_and_nothing_is_changed(tmp_path, case):
    tensors, words = HOSTILE[case]
    saved(tmp_path)
    save_file(tensors, tmp_path / value_head.FILE)
    model = tiny_model(torch.float32)
    before = snapshot(model)
    with pytest.raises(BadInput) as raised:
        store.load(model, tmp_path)
    text = "\n".join(raised.value.problems)
    assert all(word in text for word in words), text
    assert len(raised.value.problems) == (2 if case == "no tensor" else 1)
    assert all(str(tmp_path / value_head.FILE) in line and ". " in line for line in raised.value.problems)
    assert same(before, snapshot(model)) and not hasattr(model, "v_head")


@pytest.mark.parametrize("size", [0, 7, 40, -1])
def test_a_truncated_head_is_refused_in_one_line(tmp_path, size):
    saved(tmp_path)
    data = (tmp_path / value_head.FILE).read_bytes()
    (tmp_path / value_head.FILE).write_bytes(data[:size])
    with pytest.raises(BadInput, match="broken safetensors in "):
        store.load(tiny_model(torch.float32), tmp_path)
    header = json.dumps({WEIGHT: {"dtype": "F32", "shape": [1, 2**60], "data_offsets": [0, 2**62]}}).encode()
    (tmp_path / value_head.FILE).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(BadInput, match="broken safetensors"):
        store.load(tiny_model(torch.float32), tmp_path)


@mutation("lora/adapter/value_head.py", "        raise pickled(Path(folder) / PICKLED)\n", "        pass\n")
def test_a_pickled_head_is_refused_with_the_way_out_unopened_and_the_way_works(tmp_path, monkeypatch):
    saved(tmp_path)
    os.remove(tmp_path / value_head.FILE)
    torch.save(GOOD, tmp_path / value_head.PICKLED)
    with pytest.raises(LoraError) as raised:
        store.load(tiny_model(torch.float32), tmp_path)
    assert raised.value.code == 5
    [line] = raised.value.problems
    monkeypatch.chdir(tmp_path)
    import safetensors.torch  # noqa: F401 (the way out calls it by this name)

    exec("import torch, safetensors.torch; " + line.partition("trust it: ")[2])
    model = tiny_model(torch.float32)
    store.load(model, tmp_path)
    assert torch.equal(model.v_head.summary.weight, GOOD[WEIGHT])


@mutation("lora/adapter/value_head.py", "    head.load_state_dict(tensors)  # in float32\n", "")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_head_that_llama_factory_saved_in_another_dtype_opens_in_float32(tmp_path, dtype):
    saved(tmp_path)
    save_file({name: tensor.to(dtype) for name, tensor in GOOD.items()}, tmp_path / value_head.FILE)
    model = tiny_model(torch.bfloat16)
    store.load(model, tmp_path)
    assert {p.dtype for p in model.v_head.parameters()} == {torch.float32}
    assert torch.equal(model.v_head.summary.weight, GOOD[WEIGHT])
