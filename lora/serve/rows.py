"""Adapters by row: one pass through the base for the rows of several adapters, each with its own branch.

`place` puts a `RowsLinear` around every Linear; `Rows.of` says whose the rows of the next pass are, as (name, rows) one
after another. The base's product is one for all; a branch sees its own rows only.

A product of one row among others may round otherwise than alone: kernels differ with the number of rows. `steady` finds
out; where it is so, every product is filled up to the same number of rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from lora.adapter.layer import LoRALinear
from lora.adapter.sets import AdapterSet
from lora.adapter.targets import linears
from lora.ops import linear


class Rows:
    """Whose rows the next pass has: name of an adapter, or of none, and how many; and how many rows products have."""

    def __init__(self):
        self.groups: Sequence[tuple[str, int]] = ()
        self.filled = 0

    @contextmanager
    def of(self, groups: Sequence[tuple[str, int]], filled: int = 0) -> Iterator[None]:
        self.groups, self.filled = groups, filled
        try:
            yield
        finally:
            self.groups, self.filled = (), 0

    def product(self, x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        """x (T, in), times the transpose of each factor in turn -> (T, out)"""
        rows = len(x)
        x = F.pad(x, (0, 0, 0, max(0, self.filled - rows)))
        for factor in factors:
            x = linear(x, factor, None)
        return x[:rows]


class RowsLinear(nn.Module):
    """A Linear of the base, and for some adapters a LoRALinear around that very Linear."""

    def __init__(self, base: nn.Module, layers: Mapping[str, LoRALinear], rows: Rows):
        super().__init__()
        self.base, self.rows = base, rows
        self.weight = getattr(base, "packed", None) or base.weight
        self.layers = dict(layers)  # no submodules: the base is one of each of theirs
        # A and s B in the dtype of the base, made once; None where a variant is no product of two
        self.factors = {name: factors(layer, dtype_of(base)) for name, layer in layers.items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, in) -> (T, out)"""
        y, start = self.rows.product(x, self.weight), 0
        y = y if self.base.bias is None else y + self.base.bias
        for name, count in self.rows.groups:
            mine, start = slice(start, start + count), start + count
            if name in self.layers:
                y[mine] = self.adapted(name, x[mine], y[mine])
        return y

    def adapted(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What this adapter's layer gives for x, where the base gives y."""
        if self.factors[name] is None:
            return torch.cat([self.layers[name](row) for row in x.split(1)])
        return self.layers[name].finish()(y + self.rows.product(x, *self.factors[name]))


def dtype_of(base: nn.Module) -> torch.dtype:
    return getattr(base, "dtype", None) or base.weight.dtype


def factors(layer: LoRALinear, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    found = layer.low_rank()
    return None if found is None else (found[0].to(dtype), (found[2] * found[1]).to(dtype))


def place(model: nn.Module, sets: Mapping[str, AdapterSet]) -> Rows:
    """Put them into the model, around the base's own Linears."""
    rows = Rows()
    for path, base in linears(model).items():
        layers = {name: adapter.layers[path] for name, adapter in sets.items() if path in adapter.layers}
        model.set_submodule(path, RowsLinear(base, layers, rows))
    return rows


@torch.inference_mode()
def steady(model: nn.Module, head: torch.Tensor, most: int) -> bool:
    """Has a row of each of the model's products the same bits however many rows there are, up to `most`?"""
    modules = [module for module in model.modules() if isinstance(module, RowsLinear)]
    chains = [(module.weight,) for module in modules] + [(head,)]
    chains += [pair for module in modules for pair in module.factors.values() if pair is not None]
    seen = {}
    for chain in chains:
        seen.setdefault(tuple((tuple(factor.shape), type(factor)) for factor in chain), chain)
    return all(is_steady(chain, most) for chain in seen.values())


def is_steady(factors: Sequence[torch.Tensor], most: int) -> bool:
    dtype = getattr(factors[0], "dtype", torch.float32)
    x = torch.randn(most, factors[0].shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    x, rows = x.to(factors[0].device), Rows()
    whole = rows.product(x, *factors)
    counts = sorted({*range(1, min(most, 8) + 1), *(n for n in (12, 16, 17, 24) if n < most)})
    return all(torch.equal(rows.product(x[-n:], *factors), whole[-n:]) for n in counts)
