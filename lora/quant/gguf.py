"""The blocks of GGUF files: what llama.cpp serves, kept as they are.

A format is a row of TYPES: values and bytes of a block, where its float16 scales are, and how its bytes become
numbers. Format: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml, names as there; the same numbers
as the gguf package's, bit for bit.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lora.quant.packed import Packed, look_up


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at this byte of each block, in float32, (n, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def fields(codes: Tensor, width: int, run: int) -> Tensor:
    """Numbers of `width` bits, (n, bytes) -> (n, bytes · 8 / width): of every `run` bytes first the lowest bits of all,
    then the next. Four bytes at a time, as no bit crosses from one to another."""
    words = codes.contiguous().view(torch.int32).unflatten(1, (-1, run // 4))
    mask = (2**width - 1) * 0x01010101
    return torch.stack([words >> shift & mask for shift in range(0, 8, width)], 2).view(torch.uint8).flatten(1)


@cache
def eight_bits(device: torch.device) -> Tensor:
    """Those of each byte, as 0 or 16, eight bytes as one number: (256,)"""
    every = torch.arange(256, dtype=torch.int32, device=device)[:, None] >> torch.arange(8, device=device)
    return ((every & 1) << 4).to(torch.uint8).view(torch.int64).view(-1)


def fifth_bits(codes: Tensor) -> Tensor:
    """Bit i of four bytes is that of weight i: (n, 4) -> (n, 32), 0 or 16."""
    return look_up(eight_bits(codes.device), codes.flatten()).view(torch.uint8).view(-1, 32)


def q4_0(b: Tensor) -> Tensor:
    return fields(b[:, 2:], 4, 16).float().sub_(8).mul_(half(b, 0))


def q4_1(b: Tensor) -> Tensor:
    return fields(b[:, 4:], 4, 16).float().mul_(half(b, 0)).add_(half(b, 2))


def q5_0(b: Tensor) -> Tensor:
    return (fields(b[:, 6:], 4, 16) | fifth_bits(b[:, 2:6])).float().sub_(16).mul_(half(b, 0))


def q5_1(b: Tensor) -> Tensor:
    return (fields(b[:, 8:], 4, 16) | fifth_bits(b[:, 4:8])).float().mul_(half(b, 0)).add_(half(b, 2))


def q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].view(torch.int8).float().mul_(half(b, 0))


def scales_and_minima(b: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: eight scales and eight minima, (n, 8, 1), of six bits each in twelve bytes; the upper two bits
    of the last four of each are those of bytes 0 to 7."""
    scales, minima, rest = b[:, 4:16].split(4, 1)
    scales = torch.cat((scales & 63, rest & 15 | scales >> 2 & 48), 1)
    minima = torch.cat((minima & 63, rest >> 4 | minima >> 2 & 48), 1)
    return (half(b, 0) * scales.float())[..., None], (half(b, 2) * minima.float())[..., None]


def q4_k(b: Tensor) -> Tensor:
    d, m = scales_and_minima(b)
    return fields(b[:, 16:], 4, 32).view(-1, 8, 32).float().mul_(d).sub_(m).flatten(1)


def q5_k(b: Tensor) -> Tensor:
    d, m = scales_and_minima(b)
    codes = fields(b[:, 48:], 4, 32) | fields(b[:, 16:48], 1, 32) << 4
    return codes.view(-1, 8, 32).float().mul_(d).sub_(m).flatten(1)


def q6_k(b: Tensor) -> Tensor:
    d = half(b, 208) * b[:, 192:208].view(torch.int8).float()  # (n, 16)
    codes = fields(b[:, :128], 4, 64) | fields(b[:, 128:192], 2, 32) << 4
    return codes.view(-1, 16, 16).float().sub_(32).mul_(d[..., None]).flatten(1)


class Type(NamedTuple):
    block: int  # values
    bytes: int
    scales: tuple[int, ...]  # the bytes at which a float16 is
    decode: Callable[[Tensor], Tensor]  # (n, bytes) uint8 -> (n, block) float32


TYPES = {
    "Q4_0": Type(32, 18, (0,), q4_0),
    "Q4_1": Type(32, 20, (0, 2), q4_1),
    "Q5_0": Type(32, 22, (0,), q5_0),
    "Q5_1": Type(32, 24, (0, 2), q5_1),
    "Q8_0": Type(32, 34, (0,), q8_0),
    "Q4_K": Type(256, 144, (0, 2), q4_k),
    "Q5_K": Type(256, 176, (0, 2), q5_k),
    "Q6_K": Type(256, 210, (208,), q6_k),
}


class Blocks(Packed):
    """`data` (out · in / block, bytes) uint8 of a type of TYPES."""

    def __init__(self, shape, data: Tensor, kind: str):
        super().__init__(shape, TYPES[kind].block, data=data.view(-1, TYPES[kind].bytes))
        self.kind = kind

    def decode(self, first: int, last: int) -> Tensor:
        return TYPES[self.kind].decode(self.data[first:last])

    def scales(self) -> list[Tensor]:
        return [half(self.data, at) for at in TYPES[self.kind].scales]
