"""The blocks of GGUF files stand for the numbers that the gguf package finds in them, bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.quant.gguf import TYPES, Blocks
from tests.helpers import bits
from tests.mutation import mutation

ROWS, COLUMNS = 3, 512
FINITE = (st.floats(allow_nan=False, allow_infinity=False, width=16) | st.floats(-1, 1, width=16)).map(np.float16)


@st.composite
def blocks(draw, kind: str) -> np.ndarray:
    """Any bytes but for the scales, which are any finite float16: also negative, zero of both signs and subnormal."""
    size = TYPES[kind].bytes
    data = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    data = np.random.default_rng(draw(st.integers(0, 2**32))).permuted(np.tile(data, (ROWS * COLUMNS, 1)), axis=1)
    data = data[: ROWS * COLUMNS // TYPES[kind].block].copy()
    for at in TYPES[kind].scales:
        scales = draw(st.lists(FINITE, min_size=2, max_size=8))
        data[:, at : at + 2] = np.resize(np.array(scales, np.float16), len(data))[:, None].view(np.uint8)
    return data


def both(data: np.ndarray, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Our numbers and the package's, (rows, columns)."""
    packed = Blocks((ROWS, COLUMNS), torch.from_numpy(data), kind)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(data.reshape(ROWS, -1), gguf.GGMLQuantizationType[kind])
    return packed.dequantise(), torch.from_numpy(theirs)


@mutation("lora/quant/gguf.py", ".sub_(8).mul_(half(b, 0))", ".mul_(half(b, 0)).sub_(8 * half(b, 0))", case="Q4_0")
@mutation("lora/quant/gguf.py", "fields(b[:, 4:], 4, 16).float().mul_(half(b, 0)).add_(half(b, 2))",
          "fields(b[:, 4:], 4, 8).float().mul_(half(b, 0)).add_(half(b, 2))", case="Q4_1")  # fmt: skip
@mutation("lora/quant/gguf.py", "(every & 1) << 4", "(every & 1) << 3", case="Q5_0")
@mutation("lora/quant/gguf.py", "fifth_bits(b[:, 4:8])", "fifth_bits(b[:, 3:7])", case="Q5_1")
@mutation("lora/quant/gguf.py", "b[:, 2:].view(torch.int8)", "b[:, 2:]", case="Q8_0")
@mutation("lora/quant/gguf.py", "rest >> 4 | minima >> 2 & 48", "rest >> 4 | minima >> 2 & 16", case="Q4_K")
@mutation("lora/quant/gguf.py", "fields(b[:, 16:48], 1, 32) << 4", "fields(b[:, 16:48], 1, 16) << 4", case="Q5_K")
@mutation("lora/quant/gguf.py", "b[:, 192:208].view(torch.int8)", "b[:, 192:208]", case="Q6_K")
@pytest.mark.parametrize("kind", TYPES)
def test_any_blocks_are_the_numbers_that_the_gguf_package_finds(kind):
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(data=blocks(kind))
    def check(data):
        ours, theirs = both(data, kind)
        assert torch.equal(bits(ours), bits(theirs))

    check()


@pytest.mark.parametrize("scale", [2**-24, -(2**-24), 1023 * 2**-24, -65504.0, 65504.0, 0.0, -0.0], ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_scales_that_are_subnormal_negative_zero_or_the_largest_give_the_same_numbers(kind, scale):
    data = np.random.default_rng(0).integers(0, 256, (ROWS * COLUMNS // TYPES[kind].block, TYPES[kind].bytes), np.uint8)
    for at in TYPES[kind].scales:
        data[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    ours, theirs = both(data, kind)
    assert torch.equal(bits(ours), bits(theirs)) and (scale == 0 or theirs.any())


@mutation("lora/quant/gguf.py", '"Q5_1": Type(32, 24,', '"Q5_1": Type(32, 22,')
def test_blocks_have_the_sizes_that_the_gguf_package_knows():
    sizes = {kind: (entry.block, entry.bytes) for kind, entry in TYPES.items()}
    assert sizes == {kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] for kind in TYPES}


@mutation("lora/quant/gguf.py", '"Q4_K": Type(256, 144, (0, 2)', '"Q4_K": Type(256, 144, (0,)', case="Q4_K")
@pytest.mark.parametrize("kind", TYPES)
def test_a_scale_that_is_not_finite_is_seen_wherever_a_block_has_one(kind):
    count = ROWS * COLUMNS // TYPES[kind].block
    assert Blocks((ROWS, COLUMNS), torch.zeros(count, TYPES[kind].bytes, dtype=torch.uint8), kind).is_finite()
    with np.errstate(all="ignore"):
        for at in range(TYPES[kind].bytes - 1):  # is it read as a scale, the package's numbers are not finite
            data = np.zeros((count, TYPES[kind].bytes), np.uint8)
            data[-1] = 1
            data[-1, at : at + 2] = np.array([np.inf], np.float16).view(np.uint8)
            finite = bool(torch.isfinite(both(data, kind)[1]).all())
            assert Blocks((ROWS, COLUMNS), torch.from_numpy(data), kind).is_finite() == finite, at
