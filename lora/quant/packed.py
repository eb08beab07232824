"""What all packed weights are: blocks of codes with their scales, and how they become numbers again.

A format says how some blocks are decoded, in float32; rounding once to the dtype of the computation is done here, for
some blocks at a time, so that what lies between stays small and in the cache.
"""

import torch
from torch import Tensor, nn

from lora import ops
from lora.heap import huge_pages

AT_ONCE = {"cpu": 2**20}  # values; a GPU takes a whole weight


ROWS = 32  # codes are looked up in so many rows, which threads share: `index_select` of one row runs on one thread


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """The entries of a table, for codes (n,) of any integer dtype."""
    rows = ROWS if len(codes) % ROWS == 0 else 1
    return table.expand(rows, len(table)).gather(1, codes.view(rows, -1).long()).view(-1)


class Packed(nn.Module):
    """A weight (out, in) as blocks of `block` values, row after row. Its tensors are buffers that no state_dict has."""

    def __init__(self, shape: tuple[int, int], block: int, **tensors: Tensor | None):
        super().__init__()
        self.shape, self.block = tuple(shape), block
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn, recurse=True):
        """Moved, the blocks go to another device; never to another dtype, in which scales would be others."""
        return super()._apply(lambda t: fn(t.reshape(-1).view(torch.uint8)).view(t.dtype).view(t.shape), recurse)

    def decode(self, first: int, last: int) -> Tensor:
        """Blocks `first` to `last` in float32, (last - first, block)."""
        raise NotImplementedError

    def scales(self) -> list[Tensor]:
        """What codes are multiplied by: finite, or the file is broken."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.buffers())

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def is_finite(self) -> bool:
        return all(map(ops.is_finite, self.scales()))

    @torch.no_grad()
    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in): decoded in float32, and rounded once to `dtype`."""
        count = self.shape[0] * self.shape[1]
        values = torch.empty(count, dtype=dtype, device=self.device)
        huge_pages(values)
        step = max(1, AT_ONCE.get(values.device.type, count) // self.block)  # blocks
        for first in range(0, -(-count // self.block), step):
            start, stop = first * self.block, min((first + step) * self.block, count)
            values[start:stop] = self.decode(first, -(-stop // self.block)).view(-1)[: stop - start]
        return values.view(self.shape)
