"""Several adapters on one base: each is a set of LoRALinears around the very same Linears, and a value head if it has
one; one set is in place."""

import os
from collections.abc import Sequence

import torch
from torch import nn

from lora import ops, pretrained
from lora.adapter import passport, sets, store, value_head
from lora.adapter.layer import LoRALinear
from lora.adapter.merge import merged_weight, plain_linear
from lora.adapter.sets import AdapterSet
from lora.adapter.targets import linears
from lora.errors import BadInput, BadNumbers
from lora.pretrained import ModelFiles

BASE = "base"


def column_names(adapters: Sequence[str]) -> dict[str, str | None]:
    """Name -> folder: `base` -> None, then the last name of each adapter's folder, numbered where it is taken."""
    names: dict[str, str | None] = {BASE: None}
    for adapter in adapters:
        wanted = os.path.basename(os.path.abspath(adapter)) or "adapter"
        taken = {name.casefold() for name in names}  # they become file names
        numbered = (wanted, *(f"{wanted}-{number}" for number in range(2, len(adapters) + 3)))
        names[next(name for name in numbered if name.casefold() not in taken)] = adapter
    return names


def unfit(flag: str, adapters: Sequence[str]) -> list[str]:
    """Problems with the folders given by `flag`: one that holds no adapter, or that is given twice."""
    problems, seen = [], set()
    for adapter in adapters:
        folder = os.path.realpath(adapter)
        if folder in seen:
            problems.append(f"wrong {flag} in {adapter}: its folder is given twice. Give it once")
        seen.add(folder)
        try:
            store.read_config(adapter)
        except BadInput as error:
            problems += error.problems
    return problems


def common_base(adapters: Sequence[str], insist: bool = False) -> str:
    """The base that adapters were made on; the first one's where `insist`.

    Raises BadInput for two names that the passports do not prove to be one model.
    """
    first, *others = ((adapter, passport.base_of(adapter), passport.read(adapter)) for adapter in adapters)
    problems, fix = [], "Use adapters of one base, or give --model if it is one in two places"
    for adapter, name, papers in others:
        hashes = [p and (p["base"]["structure"], p["base"]["patched"]) for p in (first[2], papers)]
        if name != first[1] and (None in hashes or hashes[0] != hashes[1]) and not insist:
            why = f"{first[0]} was trained on {first[1]}, this on {name}"
            problems.append(f"different bases in {adapter}: {why}. {fix}")
    if problems:
        raise BadInput(*problems)
    return first[1]


def find_base(model: str | None, asked: str | None, adapters: Sequence[str], insist: bool = False) -> ModelFiles:
    """The base of adapters, packed as `asked` (see `passport.packing`), or as in the training of all that say it.

    Raises BadInput as `common_base`, and for adapters of different packings where none is asked for.
    """
    if not model:
        model = common_base(adapters, insist)
    trained = {adapter: passport.quant_of(adapter) for adapter in adapters if passport.read(adapter)}
    first = next(iter(trained), None)
    problems = []
    for adapter, quant in trained.items():
        if not (asked or insist) and passport.numbers(quant) != passport.numbers(trained[first]):
            why = f"{first} was trained on {trained[first] or '16 bit'}, this on {quant or '16 bit'}"
            problems.append(f"different packings in {adapter}: {why}. Use adapters of one packing")
    if problems:
        raise BadInput(*problems)
    return pretrained.find(model, passport.packing(asked, first))


def dry_load(
    empty: nn.Module, adapter: str, base, verify: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, LoRALinear]:
    """The layers of an adapter, as `store.load` puts them on a base on `meta`, which is left as it was.

    Raises BadInput where the adapter does not fit, or, if `verify`, where it was trained on another base.
    """
    layers = sets.read(empty, adapter, base.read, dtype).layers
    if verify:
        passport.verify(adapter, base, layers)
    return layers


class Several:
    """Adapters of one model, by name; `base` is none of them.

    All share the model's own Linears, whose tensors are never written. One set is in place at a time, and nothing of
    another is left in the model, so switching back gives the same bits again.
    """

    def __init__(self, model: nn.Module):
        self.model, self.linears = model, linears(model)
        self.sets = {BASE: AdapterSet({}, value_head.of(model))}
        self.placed = BASE, False

    def add(self, name: str, folder: str, read: store.Read | None = None) -> None:
        """Read an adapter; the base is in place afterwards. Raises BadInput as `store.load`, and for a taken name."""
        if name in self.sets:
            why = "so the model without an adapter is called" if name == BASE else "another adapter is called so"
            raise BadInput(f"wrong name in {folder}: {name!r}, but {why}. Give another name")
        self.switch(BASE)
        self.sets[name] = sets.read(self.model, folder, read)

    def switch(self, name: str, merged: bool = False) -> None:
        """Put the adapter `name` in place; if `merged`, as plain Linears that hold W + ΔW, as fast as the base and with
        the bits of `merge_and_unload`.

        Raises KeyError for a name that is not there, BadNumbers, with the base in place, for a sum that is not finite.
        """
        layers, head = self.sets[name]
        if self.placed == (name, merged):
            return
        self.placed = BASE, False  # where a sum is not finite
        self._place(self.linears)  # this drops the sums of an adapter before
        value_head.place(self.model, self.sets[BASE].head)
        self._place({path: merged_linear(path, layer) for path, layer in layers.items()} if merged else layers)
        value_head.place(self.model, head)
        self.placed = name, merged

    def _place(self, modules: dict[str, nn.Module]) -> None:
        for path, module in modules.items():
            self.model.set_submodule(path, module)


@torch.no_grad()
def merged_linear(path: str, layer: LoRALinear) -> nn.Linear:
    """A plain Linear with the weight W + ΔW, rounded once, and the base's own bias. Raises BadNumbers."""
    weight = merged_weight(layer.base.weight, layer.delta())
    if not ops.is_finite(weight):
        raise BadNumbers(f"not finite in {path}: the merged weight does not fit {weight.dtype}. Use another adapter")
    return plain_linear(layer.base, weight)
