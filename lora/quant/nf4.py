"""NF4: four bits a weight, sixteen values that are quantiles of a normal distribution, a scale for 64 weights.

    w = TABLE[code] · absmax of its block       and the scales themselves in 8 bits: absmax = map[code] · absmax' + mean

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, sections 2 and 3; bit for bit as bitsandbytes does it on a CPU.
With scales in 8 bits a weight takes 4 + 8/64 + 32/(64·256) = 4.127 bits.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora.quant.packed import Packed

BLOCK, BLOCKS_A_SCALE = 64, 256
TABLE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
TINY = 1e-38  # in place of the scale of a block of zeros
CELLS = 16  # in a unit of the numbers from -1 to 1; two values of TABLE are nowhere as near as that
GRID = 65535  # steps from -1 to 1, on which bitsandbytes looks up the code of a scale


class NF4(Packed):
    """`codes` (n/2,) uint8, the first of two in the high half of a byte; `absmax` (blocks,): float32, or codes of `map`
    (256,) for the scales `nested_absmax` (blocks / 256,) and `mean` (). `table` (16,) has the values of the codes."""

    def __init__(
        self, shape, codes: Tensor, absmax: Tensor, nested_absmax=None, mean=None, map=None, table=TABLE, block=BLOCK
    ):
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)  # both values of a byte, (256, 2)
        if nested_absmax is not None and map is None:
            map = dynamic_map()
        tensors = {"codes": codes, "absmax": absmax, "nested_absmax": nested_absmax, "mean": mean, "map": map}
        super().__init__(shape, block, **tensors, pairs=pairs.view(torch.int64).view(-1))

    def decode(self, first: int, last: int) -> Tensor:
        codes = self.codes[first * self.block // 2 : last * self.block // 2]
        values = self.pairs.index_select(0, codes.int()).view(torch.float32)
        if missing := (last - first) * self.block - len(values):  # of the last block
            values = pad(values, (0, missing))
        return values.view(-1, self.block).mul_(self.scale(first, last)[:, None])

    def scale(self, first: int, last: int) -> Tensor:
        """absmax of some blocks in float32."""
        if self.nested_absmax is None:
            return self.absmax[first:last]
        start = first // BLOCKS_A_SCALE
        nested = self.nested_absmax[start : -(-last // BLOCKS_A_SCALE)].repeat_interleave(BLOCKS_A_SCALE)
        nested = nested[first - start * BLOCKS_A_SCALE :][: last - first]
        return self.map.index_select(0, self.absmax[first:last].int()).mul_(nested).add_(self.mean)

    def scales(self) -> list[Tensor]:
        scales = [self.absmax] if self.nested_absmax is None else [self.nested_absmax, self.mean, self.map]
        return [*scales, self.pairs.view(torch.float32)]  # a file brings its own values


def pack(shape: tuple[int, int], rows: Iterable[Tensor], nested: bool = True) -> NF4:
    """A weight that comes as some rows (n, in) after others, each of whole blocks but for the last."""
    parts = [pack_blocks(part) for part in rows]
    codes, absmax = (torch.cat(found) for found in zip(*parts, strict=True))
    if not nested:
        return NF4(shape, codes, absmax)
    mean = absmax.mean()
    return NF4(shape, codes, *pack_scales(absmax - mean), mean)


def pack_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two a byte, and the largest magnitude of each block in float32."""
    blocks = pad(values.reshape(-1).float(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    blocks = blocks * (1 / absmax.clamp(min=TINY))[:, None]  # by the reciprocal, as there: a quotient rounds otherwise
    codes = nearest(blocks.view(-1))[: values.numel() + values.numel() % 2]
    return codes[::2] << 4 | codes[1::2], absmax


def nearest(numbers: Tensor) -> Tensor:
    """The codes of the values of TABLE that are nearest to numbers from -1 to 1, (n,); a tie goes to the lower one.

    That is how many middles between two values lie below a number: those below its cell of 1/CELLS, which are looked
    up, and perhaps the next one.
    """
    middles = (TABLE[1:] + TABLE[:-1]) / 2
    below = torch.bucketize(torch.arange(-CELLS, CELLS + 1) / CELLS, middles)  # of each cell
    next_one = pad(middles, (0, 1), value=torch.inf)[below]
    cell = (numbers + 1).mul_(CELLS).int().clamp_(0, 2 * CELLS)  # what is no number has to have one as well
    return below.to(torch.uint8).index_select(0, cell).add_(numbers > next_one.index_select(0, cell))


def pack_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `dynamic_map` (n,), and the largest magnitude of each 256 scales."""
    blocks = pad(scales, (0, -len(scales) % BLOCKS_A_SCALE)).view(-1, BLOCKS_A_SCALE)
    absmax, values = blocks.abs().amax(1), dynamic_map()
    on_grid = ((blocks * (1 / absmax.clamp(min=TINY))[:, None] + 1) * 0.5 * GRID + 0.5).trunc()
    codes = torch.bucketize(on_grid / GRID * 2 - 1, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    codes[absmax == 0] = 0
    return codes.view(-1)[: len(scales)], absmax


@cache
def dynamic_map() -> Tensor:
    """256 numbers from -0.993 to 1, the denser the nearer to 0: 2^i in each tenth of the range, of both signs.

    Dettmers et al. 2021, https://arxiv.org/abs/2110.02861, section 2.2.
    """
    found = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2)
        found += [middles, -middles]
    return torch.cat(found).sort().values
