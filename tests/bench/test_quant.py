"""The judgement of bench/quant.py, and the models that it makes up."""

import time

import pytest
import torch

from bench import quant, quant_sides, random_model
from lora import pretrained
from lora.pretrained.quantised import Quantised
from lora.quant.packed import Packed
from tests.mutation import mutation


@mutation("bench/quant.py", 'other["seconds"] / row["seconds"] for row, other in both', "1.0 for row, other in both")
@mutation("bench/quant.py", 'zip(run["rows"][warm:], other', 'zip(run["rows"], other')
def test_ratios_are_taken_step_by_step_after_the_first():
    """A side that is always twice as slow: however uneven its steps and rounds, the ratio is 2 and has no spread."""

    def runs(factor):
        rounds = [[9.0 / factor, 1.0, 4.0], [9.0 / factor, 3.0, 12.0]]
        return [{"rows": [{"seconds": factor * seconds} for seconds in its]} for its in rounds]

    def warm(its):
        return [{"rows": run["rows"][1:]} for run in its]

    assert quant.ratios(runs(1), runs(2), 1) == {"value": 2, "from": 2, "to": 2}
    assert quant.ratios(warm(runs(1)), warm(runs(2)), 0) == {"value": 2, "from": 2, "to": 2}


@mutation("bench/quant.py", 'value"] <= bound', 'value"] < bound')
@pytest.mark.parametrize(
    "sign, value, met", [(">=", 0.8, True), (">=", 0.79, False), ("<=", 0.8, True), ("<=", 1, False)]
)
def test_a_goal_is_met_at_its_bound(sign, value, met):
    assert quant.judged({"value": value}, "it", (sign, 0.8)) == {
        "value": value, "what": "it", "goal": f"{sign} 0.8", "met": met,
    }  # fmt: skip
    assert "met" not in quant.judged({"value": value}, "it", None)


@mutation("bench/random_model.py", 'zlib.crc32(f"{name}:{start}".encode())', 'zlib.crc32(f"{name}".encode())')
def test_a_model_that_exists_nowhere_is_the_same_whenever_it_is_read(monkeypatch):
    monkeypatch.setattr(random_model, "POOL", 1001)  # fewer than a tensor has
    files, again = (random_model.RandomFiles(random_model.SHAPES["tiny"]) for _ in range(2))
    for name, (_, shape) in files.header.items():
        assert files.read(name).shape == shape and torch.equal(files.read(name), again.read(name))
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = files.read_rows(name, 0, 8), files.read_rows(name, 8, 16)
    assert not torch.equal(first, second) and first.float().std().sub(0.02).abs() < 0.002
    model = pretrained.load_model(Quantised(files, "nf4"))
    assert torch.equal(
        model.get_submodule("model.layers.1.mlp.up_proj").packed.codes,
        Quantised(again, "nf4").packed("model.layers.1.mlp.up_proj.weight").codes,
    )


@mutation("bench/quant_sides.py", "spent.append(time.perf_counter() - start)", "spent.append(0.0)")
@mutation("bench/quant_sides.py", "        Packed.dequantise = dequantise\n", "        pass\n")
def test_seconds_of_dequantising_are_counted_inside_the_block_alone(monkeypatch):
    weight = quant_sides.formats((2, 256))["Q4_1"]
    monkeypatch.setattr(Packed, "dequantise", Packed.dequantise)  # is put back, whatever fails
    decode, spent = weight.decode, []
    weight.decode = lambda *blocks: time.sleep(0.01) or decode(*blocks)
    with quant_sides.dequantising(spent):
        weight.dequantise()
        weight.dequantise(torch.bfloat16)
    weight.dequantise()
    assert len(spent) == 2 and min(spent) >= 0.01


def test_every_format_has_a_weight_whose_numbers_are_finite():
    found = quant_sides.formats((2, 256))
    assert {"nf4", "int8", "Q4_1", "Q4_K", "Q6_K"} <= found.keys()
    assert all(torch.isfinite(weight.dequantise()).all() for weight in found.values())
