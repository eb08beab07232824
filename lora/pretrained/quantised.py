"""A model whose Linears are packed while it is read: into NF4 or int8, or as its own file has them.

Embeddings, norms and head stay what they are. Nothing is ever whole in both forms: rows are read and packed a few at a
time.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from lora import files
from lora.errors import BadInput
from lora.pretrained.folder import ModelFiles
from lora.pretrained.prequantised import DEQUANTISED
from lora.quant import int8, nf4
from lora.quant.packed import AT_ONCE, Packed

PACK = {"nf4": nf4.pack, "int8": int8.pack}
KEEP = "keep"
MODES = (*PACK, KEEP)
BITS_4 = {"NF4", "FP4"}  # blocks that are not packed again
BITS = {"nf4": 4 + 8 / nf4.BLOCK + 32 / (nf4.BLOCK * nf4.BLOCKS_A_SCALE), "int8": 8}  # and a scale for each row


class Quantised:
    """Model files in a mode of MODES; all else about them is the `original`'s.

    `packed` gives the blocks of a Linear, and `read` the numbers they stand for. Raises BadInput for a model to `keep`
    that has no blocks to keep, and for one to pack that comes in four bits: those of a folder are kept or read as they
    are. A GGUF file's numbers are packed anew, as every other's: they are rounded twice then.
    """

    widest = torch.float32  # loses nothing of a decoded block

    def __init__(self, original: ModelFiles, mode: str):
        self.original, self.quant = original, mode
        self.linears = [name for name in original.header if len(original.header[name][1]) == 2 and ".layers." in name]
        kept = [name for name in self.linears if original.block_type(name)] if mode == KEEP else self.linears
        wrong = f"wrong --quant in the command line: {{}} in {original.name}. Give {{}}"
        if not kept:
            found = next(iter(sorted(Path(original.path).glob("*.gguf"))), None)
            fix = f"--model {found}, or " if found else ""
            raise BadInput(wrong.format("there are no blocks to keep", f"{fix}--quant nf4 or int8"))
        if mode != KEEP and {original.block_type(name) for name in kept} & BITS_4:
            raise BadInput(wrong.format("Linears have 4 bits already", "--quant keep"))
        self._kept = set(kept)
        described = original.described.removesuffix(DEQUANTISED if mode == KEEP else "")
        self.described = f"{described}, {self._types()}"

    def __getattr__(self, name: str):
        return getattr(self.original, name)

    def _types(self) -> str:
        """What its Linears become, in words."""
        if self.quant != KEEP:
            return f"Linears in {self.quant}"
        count = {}
        for name in self.linears:
            kind = self.original.block_type(name) or "16 bit"
            count[kind] = count.get(kind, 0) + 1
        return "Linears as they are: " + ", ".join(f"{n} {kind}" for kind, n in count.items())

    def packed(self, name: str) -> Packed | None:
        """The blocks of a Linear's weight; None for what is not packed. Raises BadInput for scales not finite."""
        if name not in self._kept:
            return None
        if self.quant == KEEP:
            return self.original.packed(name)
        return PACK[self.quant](self.header[name][1], self._some_rows(name))

    def _some_rows(self, name: str) -> Iterator[torch.Tensor]:
        """A weight's rows in parts of whole blocks."""
        rows, columns = self.header[name][1]
        step = nf4.BLOCK * max(1, AT_ONCE["cpu"] // (nf4.BLOCK * columns))
        for start in range(0, rows, step):
            yield self.original.read_rows(name, start, min(start + step, rows))

    def nbytes(self, name: str) -> int | None:
        """The bytes of a packed weight, without reading it."""
        if name not in self._kept:
            return None
        rows, columns = self.header[name][1]
        if self.quant == KEEP:
            return self.original.nbytes(name)
        return int(rows * columns * BITS[self.quant] / 8) + 4 * rows * (self.quant == "int8")

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        packed = self.packed(name)
        if packed is None:
            return self.original.read(name, dtype)
        return packed.dequantise(dtype or files.DTYPES[self.header[name][0]])

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.read(name, dtype)[start:stop]
