"""Codes of NF4 are those of the nearest values, however they are looked up."""

import pytest
import torch

from lora.quant import nf4
from tests.mutation import mutation

MIDDLES = (nf4.TABLE[1:] + nf4.TABLE[:-1]) / 2


@mutation("lora/quant/nf4.py", "CELLS = 16", "CELLS = 8")
@mutation("lora/quant/nf4.py", "numbers > next_one", "numbers >= next_one")
def test_a_number_has_the_code_of_the_nearest_value_and_at_a_tie_of_the_lower():
    """Near every middle and every border of a cell: the floats themselves, 500 on both sides of each."""
    borders = torch.cat([MIDDLES, torch.arange(-16, 17) / 16, torch.tensor([0.0, -0.0, 1e-38, 0.5 + 2**-24])])
    numbers = (borders.view(torch.int32)[:, None] + torch.arange(-500, 501, dtype=torch.int32)).view(torch.float32)
    numbers = torch.cat([numbers[numbers.abs() <= 1 + 2**-23], torch.rand(100_000) * 2 - 1])
    below = sum((numbers > middle).to(torch.uint8) for middle in MIDDLES)
    assert torch.equal(nf4.nearest(numbers), below) and below.unique().tolist() == list(range(16))


@mutation("lora/quant/nf4.py", ".int().clamp_(0, 2 * CELLS)", ".int()")
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_packed_and_found(what):
    weight = torch.randn(4, 64)
    weight[1, 3] = what
    assert not nf4.pack((4, 64), [weight]).is_finite()
