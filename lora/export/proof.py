"""What merge.py wrote is read back and compared with what was trained, before it is there under its name."""

from collections.abc import Callable
from pathlib import Path

import torch

from lora import device as machine
from lora.export import card, receipt
from lora.network.decoder import Model
from lora.pretrained import ModelFiles, ModelFolder


class Proof:
    """The receipt of what is written to `out`: printed, and in a folder left beside the card. Without prompts there is
    none.

    `base` is the model of the training as it was packed, `target` the one that ΔW is added to, `args` merge.py's.
    Raises BadEnvironment, before anything is written, where there is no room for it, and BadNumbers beyond --tolerance.
    """

    def __init__(self, out: Path, base: ModelFiles, target: ModelFiles, empty: Model, prompts: list[list[int]], args):
        self.out, self.base, self.target, self.prompts, self.args = out, base, target, prompts, args
        self.onto = None if target is base else target
        self.device = machine.choose_device(args.device)
        if prompts:
            receipt.check_room(empty, machine.free_memory(self.device))

    def folder(self, folder: Path) -> None:
        """Compare a model folder; write its card, and the receipt as a file."""
        lines = []
        if self.prompts:
            found, tolerance = self._compare(ModelFolder(folder, str(self.out)))
            receipt.write(folder, found, tolerance, self.base, self.onto)
            lines = receipt.rows(found)
        made = card.made_in(self.args.adapter)
        card.write_merged(folder, self.out.name, self.target, made, lines, self.base)

    def gguf(self, file: Path, kind: str) -> None:
        """Compare a GGUF file whose matrices are of this kind."""
        from lora.pretrained import gguf, gguf_write  # slow to import

        if self.prompts:
            self._compare(gguf.GGUFFile(file), kind, lambda W: gguf_write.rounded(W, kind))

    def _compare(
        self, written: ModelFiles, kind: str | None = None, kept: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> tuple[receipt.Receipt, float]:
        """The receipt, and the tolerance that it is within."""
        args = self.args
        found = receipt.make(self.base, args.adapter, written, self.prompts, self.device, self.onto, kept)
        print(receipt.table(receipt.rows(found)))
        tolerance = receipt.OF_ANOTHER_BASE if self.onto else receipt.TOLERANCE
        tolerance = tolerance if args.tolerance is None else args.tolerance
        receipt.check(found, tolerance, self.out, args.adapter, kind, self.onto)
        return found, tolerance
