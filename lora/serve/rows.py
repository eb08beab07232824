"""Adapters by row: one pass through the base for the rows of several adapters, each with its own branch.

`place` puts a `RowsLinear` around every Linear; `Rows.of` says whose the rows of the next pass are, as (name, rows) one
after another. The base's product is one for all; a branch sees its own rows only.

A row among others shall have the bits that it has alone. Two things would spoil them:
- Kernels of products sum in another order for few rows than for many. A `Product` finds out from how many on all is
  one, and fills up to that; where there is no such number, it takes rows one by one.
- Activations of a CPU are computed by vectors, and the numbers that are left at the end of a tensor by another formula
  for the same function, off by one in the last place. `ByRows` lets each row be a tensor of its own, where rows are
  not whole vectors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lora.adapter.layer import LoRALinear
from lora.adapter.sets import AdapterSet
from lora.adapter.targets import linears
from lora.network.config import ModelConfig
from lora.ops import Weight, linear

VECTORS = 64  # numbers: two vectors of bfloat16 in the widest registers, which is how kernels step
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 17, 24, 31)  # of rows, which are tried
ALIGNED = 64  # bytes, as PyTorch's own tensors begin
MOST_OUTPUTS = 16384  # of a vocabulary's products not all are tried


class Rows:
    """Whose rows the next pass has: name of an adapter, or of none, and how many; and whether each is an answer of its
    own, or all are a prompt."""

    def __init__(self):
        self.groups: Sequence[tuple[str, int]] = ()
        self.apart = False

    @contextmanager
    def of(self, groups: Sequence[tuple[str, int]], apart: bool = True) -> Iterator[None]:
        self.groups, self.apart = groups, apart
        try:
            yield
        finally:
            self.groups, self.apart = (), False


class Product:
    """x (T, in) -> W x (T, out). `least`: from so many rows on a row has the same bits however many there are, up to
    some number, and wherever it stands; 0 where that is never so."""

    def __init__(self, weight: Weight, dtype: torch.dtype):
        self.weight, self.dtype, self.least = weight, dtype, 0

    def __call__(self, x: torch.Tensor, apart: bool) -> torch.Tensor:
        """Where rows are `apart`, each has the bits that it has alone."""
        if not apart:
            return linear(x, self.weight, None)
        if not self.least:
            return torch.cat([linear(row.clone(), self.weight, None) for row in x.split(1)])
        rows = len(x)
        if rows < self.least:
            x = F.pad(x, (0, 0, 0, self.least - rows))
        elif x.data_ptr() % ALIGNED:  # rows of a tensor: kernels begin otherwise where these are not aligned
            x = x.clone()
        return linear(x, self.weight, None)[:rows]


class Branch(NamedTuple):
    """What an adapter adds to a layer, made once: A and s B in the dtype of the base, and what it does to the sum."""

    A: Product
    B: Product
    finish: Callable[[torch.Tensor], torch.Tensor]


class RowsLinear(nn.Module):
    """A Linear of the base, and for some adapters a LoRALinear around that very Linear."""

    def __init__(self, base: nn.Module, layers: Mapping[str, LoRALinear], rows: Rows):
        super().__init__()
        self.base, self.rows = base, rows
        packed = getattr(base, "packed", None)
        dtype = base.weight.dtype if packed is None else base.dtype
        self.product = Product(base.weight if packed is None else packed, dtype)
        self.branches = {name: branch(layer, dtype) for name, layer in layers.items()}

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, in) -> (T, out)"""
        y, start = self.product(x, self.rows.apart), 0
        y = y if self.base.bias is None else y + self.base.bias
        for name, count in self.rows.groups:
            mine, start = slice(start, start + count), start + count
            if name in self.branches:
                A, B, finish = self.branches[name]
                y[mine] = finish(y[mine] + B(A(x[mine], self.rows.apart), self.rows.apart))
        return y


@torch.no_grad()
def branch(layer: LoRALinear, dtype: torch.dtype) -> Branch:
    A, B, s = layer.low_rank()
    return Branch(Product(A.to(dtype), dtype), Product((s * B).to(dtype), dtype), layer.finish())


def place(model: nn.Module, sets: Mapping[str, AdapterSet]) -> Rows:
    """Put them into the model, around the base's own Linears."""
    rows = Rows()
    for path, base in linears(model).items():
        layers = {name: adapter.layers[path] for name, adapter in sets.items() if path in adapter.layers}
        model.set_submodule(path, RowsLinear(base, layers, rows))
    return rows


# ---- the same bits ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def try_out(model: nn.Module, head: Product, most: int) -> None:
    """Every product finds out its `least`, for up to `most` rows; those of one shape have one."""
    modules, found = [module for module in model.modules() if isinstance(module, RowsLinear)], {}
    branches = [branch for module in modules for branch in module.branches.values()]
    for product in [head, *(module.product for module in modules), *(x for b in branches for x in (b.A, b.B))]:
        kind = tuple(product.weight.shape), product.dtype
        if kind not in found:
            found[kind] = least_rows(*kind, model.device, most)
        product.least = found[kind]


def least_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, most: int) -> int:
    """The `least` of products of this shape: the same row everywhere must give the same everywhere.

    Tried with any numbers, and with such that each sum is zero and what comes out is what rounding has left: in
    bfloat16 the order of an ordinary sum is seldom seen.
    """
    (outputs, inputs), generator = (min(shape[0], MOST_OUTPUTS), shape[1]), torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    xs = torch.randn(-(-256 // outputs), inputs, generator=generator)
    half, order = inputs // 2, torch.randperm(inputs // 2, generator=generator)

    def paired(x: torch.Tensor, sign: int) -> torch.Tensor:
        return F.pad(torch.cat([x[:, :half], sign * x[:, :half][:, order]], 1), (0, inputs % 2))

    cases = [(weight, xs), (paired(weight, -1), paired(xs, 1))]
    cases = [(weight.to(device, dtype), x) for weight, xs in cases for x in xs.to(device, dtype).split(1)]
    expected = [F.linear(x.repeat(most, 1), weight)[:1] for weight, x in cases]
    least = 0
    for count in sorted({most, *(n for n in COUNTS if n < most)}, reverse=True):
        results = (F.linear(x.repeat(count, 1), weight) for weight, x in cases)
        if not all(torch.equal(y, row.expand_as(y)) for y, row in zip(results, expected, strict=True)):
            break
        least = count
    return least


def is_ragged(config: ModelConfig) -> bool:
    """Do activations see rows that are not whole vectors?"""
    return bool(config.intermediate_size % VECTORS or config.delta or config.gemma4 or config.output_gate)


class ByRows(TorchFunctionMode):
    """Inside the block activations are computed row by row."""

    ACTIVATIONS = frozenset({F.silu, F.gelu, F.softplus, torch.sigmoid, torch.Tensor.sigmoid})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in self.ACTIVATIONS or args[0].dim() < 2:
            return function(*args, **kwargs)
        return torch.cat([function(row.clone(), *args[1:], **kwargs) for row in args[0].split(1)])
