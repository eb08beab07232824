"""NF4: known values, and packing again what was unpacked is the identity."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.quant import nf4
from tests.helpers import bits
from tests.mutation import mutation

CALM = settings(max_examples=60, deadline=None)
SHAPES = [(4, 64), (3, 40), (1, 1), (5, 13), (7, 192), (64, 257)]  # whole blocks, a partial last one, odd numbers
KINDS = ["normal", "zero", "constant", "outliers", "tiny", "huge"]


def weight(kind: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values = {
        "zero": w * 0, "constant": w * 0 - 0.37, "outliers": w.where(w.abs() < 2, w * 1e4), "tiny": w * 1e-30,
        "huge": w * 1e30,
    }  # fmt: skip
    return values.get(kind, w)


def unpacked(packed: nf4.NF4) -> list[int]:
    """The codes, one a value."""
    halves = torch.stack([packed.codes >> 4, packed.codes & 15], 1).view(-1)
    return halves[: packed.shape[0] * packed.shape[1]].tolist()


pack = partial(nf4.pack, nested=False)


def test_zeros_are_code_7_with_a_scale_of_0():
    packed = pack((1, 64), [torch.zeros(1, 64)])
    assert unpacked(packed) == [7] * 64 and packed.absmax.tolist() == [0]
    assert torch.equal(nf4.pack((2, 64), [torch.zeros(2, 64)]).dequantise(), torch.zeros(2, 64))


def test_plus_and_minus_one_are_codes_15_and_0():
    ones = torch.tensor([[1.0, -1.0] * 32])
    packed = pack((1, 64), [ones])
    assert unpacked(packed) == [15, 0] * 32 and torch.equal(packed.dequantise(), ones)


@mutation("lora/quant/nf4.py", "numbers > next_one", "numbers >= next_one")
@mutation("lora/quant/nf4.py", "codes[::2] << 4 | codes[1::2]", "codes[1::2] << 4 | codes[::2]")
def test_the_nearest_value_is_taken_and_in_the_middle_of_two_the_lower():
    below, above = 0.0397, 0.0399  # the middle of 0 and 0.0795803 is 0.0397901
    for value, code in ((below, 7), (above, 8)):
        assert unpacked(pack((1, 2), [torch.tensor([[1.0, value]])])) == [15, code]
    middles = (nf4.TABLE[1:] + nf4.TABLE[:-1]) / 2
    row = torch.cat([middles, torch.ones(1)])[None]
    assert unpacked(pack((1, 16), [row])) == [*range(15), 15]


@mutation(
    "lora/quant/nf4.py", "blocks = blocks * (1 / absmax.clamp(min=TINY))", "blocks = blocks / (absmax.clamp(min=TINY))"
)
def test_where_rounding_decides_it_is_that_of_a_product_with_the_reciprocal_as_in_bitsandbytes():
    row = torch.tensor([[1.4962565898895264, -1.2689697742462158, -0.5082475543022156, -0.20635133981704712]])
    assert unpacked(pack((1, 4), [row])) == [15, 1, 4, 6]  # by quotients 15, 0, 3, 5


@mutation("lora/quant/nf4.py", "GRID = 65535", "GRID = 2**22")
@mutation("lora/quant/nf4.py", "codes[absmax == 0] = 0", "pass")
def test_codes_of_scales_are_looked_up_on_a_grid_and_are_0_where_all_are_0_as_in_bitsandbytes():
    codes, largest = nf4.pack_scales(torch.tensor([1, -0.9859399795532227, 0.5]))
    assert codes[:2].tolist() == [255, 1] and largest.tolist() == [1]  # without a grid 0
    assert nf4.pack_scales(torch.zeros(3))[0].tolist() == [0, 0, 0]


def test_every_value_of_the_table_comes_back_as_itself():
    assert torch.equal(pack((1, 16), [nf4.TABLE[None] * 3]).dequantise(), nf4.TABLE[None] * 3)


@mutation("lora/quant/nf4.py", "absmax = blocks.abs().amax(1)\n    blocks", "absmax = blocks.amax(1)\n    blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_what_was_unpacked_gives_the_same_codes_and_scales(shape, kind):
    first = pack(shape, [weight(kind, shape)])
    again = pack(shape, [first.dequantise()])
    assert torch.equal(bits(again.codes), bits(first.codes)) and torch.equal(bits(again.absmax), bits(first.absmax))


@CALM
@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 300), st.floats(-30, 30))
def test_packing_any_normal_weight_again_is_the_identity(seed, rows, columns, exponent):
    w = weight("normal", (rows, columns), seed) * 10**exponent
    first = pack(w.shape, [w])
    again = pack(w.shape, [first.dequantise()])
    assert torch.equal(again.codes, first.codes) and torch.equal(again.absmax, first.absmax)


@pytest.mark.parametrize("kind", ["normal", "zero", "outliers"])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 64)], ids=str)
def test_with_scales_in_eight_bits_packing_again_gives_the_same_codes(shape, kind):
    """Where a scale is still one: beside a block 10,000 times as large its 8 bits may stand for less than 0."""
    first = nf4.pack(shape, [weight(kind, shape)])
    again = nf4.pack(shape, [first.dequantise()])
    scales = first.scale(0, len(first.absmax)).repeat_interleave(64)[: shape[0] * shape[1]]
    assert kind == "outliers" or (scales > 0).all() or not scales.any()
    codes = (torch.tensor(unpacked(packed))[scales >= 0] for packed in (first, again))
    assert torch.equal(*codes)


@mutation("lora/quant/nf4.py", "nested[first - start * BLOCKS_A_SCALE :]", "nested[0:]")
def test_some_blocks_are_decoded_as_all_are(shape=(300, 128)):
    packed = nf4.pack(shape, [weight("normal", shape)])
    whole = packed.dequantise().view(-1, 64)
    for first, last in ((0, 600), (1, 2), (255, 258), (256, 512), (300, 599), (599, 600)):
        assert torch.equal(packed.decode(first, last), whole[first:last])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_that_come_in_parts_of_whole_blocks_are_packed_as_one(shape):
    w = weight("normal", (shape[0] + 64, shape[1]))
    one, parts = nf4.pack(w.shape, [w]), nf4.pack(w.shape, [w[:64], w[64:]])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one.buffers(), parts.buffers(), strict=True))


@mutation("lora/quant/nf4.py", "return NF4(shape, codes, *pack_scales(absmax - mean), mean)",
          "return NF4(shape, codes, *pack_scales(absmax), mean * 0)")  # fmt: skip
def test_scales_in_eight_bits_are_within_half_a_step_of_their_map():
    shape = (256, 128)
    plain, nested = pack(shape, [weight("normal", shape)]), nf4.pack(shape, [weight("normal", shape)])
    blocks = shape[0] * shape[1] // 64
    off = (nested.scale(0, blocks) - plain.absmax).abs()
    steps = nested.map.diff().max() / 2 * (plain.absmax - plain.absmax.mean()).abs().max()
    assert off.max() <= steps and (off / plain.absmax).mean() < 0.003


def test_a_weight_takes_4_127_bits():
    shape = (4096, 256)
    packed = nf4.pack(shape, [torch.randn(shape)])
    tables = packed.pairs.nbytes + packed.map.nbytes
    assert 8 * (packed.nbytes - tables - 4) / (4096 * 256) == pytest.approx(4.127, abs=0.0005)


@mutation("lora/quant/nf4.py", "for i in range(7):", "for i in range(6):")
def test_the_map_of_scales_is_dense_near_zero():
    values = nf4.dynamic_map()
    assert len(values) == 256 and values[-1] == 1 and 0 in values and torch.equal(values, values.sort().values)
    assert (values[:-1] != values[1:]).all() and values.abs()[values != 0].min() < 1e-6
