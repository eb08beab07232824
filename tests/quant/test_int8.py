"""int8: known values, and packing again what was unpacked is the identity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.quant import int8
from tests.helpers import bits
from tests.mutation import mutation
from tests.quant.test_nf4 import KINDS, SHAPES, weight


@mutation("lora/quant/int8.py", "LARGEST = 127", "LARGEST = 126")
def test_known_values():
    packed = int8.pack((3, 4), [torch.tensor([[127.0, -127, 0.4, -63.6], [0, 0, 0, 0], [2, 1, -0.5, 0.25]])])
    assert packed.codes.tolist() == [[127, -127, 0, -64], [0, 0, 0, 0], [127, 64, -32, 16]]
    assert packed.scale.tolist()[:2] == [1, 0]


def test_127_times_a_scale_gives_that_scale_again_whatever_its_bits():
    largest = (torch.arange(2**23, dtype=torch.int32) + (127 << 23)).view(torch.float32)  # from 1 to 2, all of them
    scale = largest / 127
    assert torch.equal(127 * scale / 127, scale)


@mutation("lora/quant/int8.py", "quotient.round_().clamp_", "(quotient * 0.99).round_().clamp_")
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 300), st.floats(-30, 30))
def test_packing_any_normal_weight_again_is_the_identity(seed, rows, columns, exponent):
    w = weight("normal", (rows, columns), seed) * 10**exponent
    first = int8.pack(w.shape, [w])
    again = int8.pack(w.shape, [first.dequantise()])
    assert torch.equal(again.codes, first.codes) and torch.equal(bits(again.scale), bits(first.scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_what_was_unpacked_gives_the_same_codes_and_scales(shape, kind):
    first = int8.pack(shape, [weight(kind, shape)])
    again = int8.pack(shape, [first.dequantise()])
    assert torch.equal(again.codes, first.codes) and torch.equal(bits(again.scale), bits(first.scale))


@mutation("lora/quant/int8.py", "quotient.round_()", "quotient.trunc_()")
def test_no_value_is_off_by_more_than_half_a_step():
    w = weight("normal", (40, 300))
    packed = int8.pack(w.shape, [w[:17], w[17:]])
    assert ((packed.dequantise() - w).abs() <= packed.scale[:, None] * 0.50001).all()
    assert torch.equal(packed.scale, w.abs().amax(1) / 127)
    assert packed.nbytes == 40 * 300 + 40 * 4
