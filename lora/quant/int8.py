"""Eight bits a weight, a scale for each output: w = code · scale, codes from -127 to 127.

Absmax quantisation of rows, as LLM.int8() keeps a weight (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lora.quant.packed import Packed

LARGEST = 127


class Int8(Packed):
    """`codes` (out, in) int8, `scale` (out,) float32."""

    def __init__(self, shape, codes: Tensor, scale: Tensor):
        super().__init__(shape, shape[1], codes=codes, scale=scale)

    def decode(self, first: int, last: int) -> Tensor:
        return self.codes[first:last].float().mul_(self.scale[first:last, None])

    def scales(self) -> list[Tensor]:
        return [self.scale]


def pack(shape: tuple[int, int], rows: Iterable[Tensor]) -> Int8:
    """A weight that comes as some rows (n, in) after others."""
    codes, scales = [], []
    for part in rows:
        part = part.float()
        scale = part.abs().amax(1) / LARGEST
        quotient = part / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes.append(quotient.round_().clamp_(-LARGEST, LARGEST).to(torch.int8))
        scales.append(scale)
    return Int8(shape, torch.cat(codes), torch.cat(scales))
