"""Models with packed Linears beside the same models with the numbers that these stand for, and who holds numbers.

Import as `from tests.quantised import ...`.
"""

import copy
import weakref
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora.quant import gguf, int8, nf4
from lora.quant.linear import QuantLinear
from lora.quant.packed import Packed


def blocks(kind: str, weight: Tensor) -> gguf.Blocks:
    """Random bytes in the shape of a weight, with scales that make them numbers of its size."""
    of, random = gguf.TYPES[kind], torch.Generator().manual_seed(weight.numel())
    data = torch.randint(256, (weight.numel() // of.block, of.bytes), dtype=torch.uint8, generator=random)
    for i, at in enumerate(of.scales):  # a scale, then a minimum
        scale = (-1) ** i * (0.5 + torch.rand(len(data), 1, generator=random)) / weight.shape[1] ** 0.5
        data[:, at : at + 2] = (scale / {"Q6_K": 1000, "Q4_K": 100, "Q8_0": 50}.get(kind, 8)).half().view(torch.uint8)
    return gguf.Blocks(tuple(weight.shape), data, kind)


FORMATS: dict[str, Callable[[Tensor], Packed]] = {
    "nf4": lambda weight: nf4.pack(tuple(weight.shape), [weight]),
    "nf4 with float32 scales": lambda weight: nf4.pack(tuple(weight.shape), [weight], nested=False),
    "int8": lambda weight: int8.pack(tuple(weight.shape), [weight]),
    "Q4_1": lambda weight: blocks("Q4_1", weight),
    "Q8_0": lambda weight: blocks("Q8_0", weight),
    "Q6_K": lambda weight: blocks("Q6_K", weight),
}


def both(model: nn.Module, form: str = "nf4", name: str = "_proj") -> tuple[nn.Module, nn.Module]:
    """The model with the Linears whose names end so packed, and a copy that holds their numbers, rounded to its dtype
    once."""
    packed, dense = model, copy.deepcopy(model)
    for path, linear in list(model.named_modules()):
        if path.endswith(name) and type(linear) is nn.Linear:
            quantised = QuantLinear(FORMATS[form](linear.weight.detach()), linear.bias, linear.weight.dtype)
            packed.set_submodule(path, quantised)
            dense.get_submodule(path).weight = nn.Parameter(quantised.weight, requires_grad=False)
    return packed, dense


class Numbers:
    """How often packed weights became numbers, `made`, and which of these tensors somebody holds, `held`."""

    def __init__(self):
        self.made, self.held = 0, set()

    def clear(self) -> None:
        self.made = 0


@contextmanager
def watched(monkeypatch):
    """Inside the block every dequantised weight is counted, until its memory is given back."""
    numbers, dequantise = Numbers(), Packed.dequantise

    def counted(self, dtype=torch.float32):
        array = dequantise(self, dtype).double().numpy()  # a tensor on its memory keeps it, whoever has that tensor
        numbers.made += 1
        key = numbers.made, self.shape
        numbers.held.add(key)
        weakref.finalize(array, numbers.held.discard, key)
        return torch.from_numpy(array)

    with monkeypatch.context() as patch:
        patch.setattr(Packed, "dequantise", counted)
        yield numbers
