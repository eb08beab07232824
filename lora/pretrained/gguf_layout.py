"""Where the tensors of a GGUF file differ from the hub's: the order of rows and columns, values, and shapes.

    q_proj, k_proj          rows of each head            (2, d/2) -> (d/2, 2), where llama.cpp's RoPE turns neighbours
    Gated DeltaNet          value heads                  (key heads, values of each) -> (values of each, key heads)
    norms                   Gemma, Qwen3.5               w -> 1 + w
    A_log                   log of how fast it fades     A -> -exp(A)
    convolutions            (channels, 1, K)             -> (channels, K)

Sources: llama.cpp's convert_hf_to_gguf.py and its conversion/qwen.py.
"""

import re
from typing import NamedTuple

import torch

from lora.network.families import FAMILIES
from lora.network.layer_fields import DeltaSizes
from lora.pretrained.gguf_names import Architecture
from lora.quant.gguf import TYPES

CONVOLUTION = re.compile(r"\.(conv1d|conv\.conv)\.weight$")


class Order(NamedTuple):
    """A dimension in parts (outer, a, b, inner): the hub has a before b, llama.cpp b before a; -1 is what is left. What
    lies before `start` stays."""

    outer: int
    a: int
    b: int
    inner: int
    start: int = 0
    dim: int = 0

    def fits(self, shape: tuple[int, ...]) -> bool:
        count = shape[self.dim] - self.start if len(shape) > self.dim else -1
        return count > 0 and self.a * self.b > 0 and count % (self.a * self.b) == 0

    def moved(self, tensor: torch.Tensor, back: bool = False) -> torch.Tensor:
        """From the hub's order to llama.cpp's, or `back`."""
        dim, parts = self.dim, (self.outer, self.b, self.a, self.inner) if back else self[:4]
        still, moves = tensor.split((self.start, tensor.shape[dim] - self.start), dim)
        moves = moves.unflatten(dim, parts).transpose(dim + 1, dim + 2).flatten(dim, dim + 3)
        return torch.cat((still, moves), dim) if self.start else moves.contiguous()


class Layout:
    """How an architecture holds a model of these sizes; names are the hub's."""

    def __init__(self, arch: Architecture, head_dim: int, delta: DeltaSizes | None = None):
        self.offset, self.orders = FAMILIES[arch.model_type].norm_offset, {}
        if arch.reordered:
            self.orders = dict.fromkeys(("q_proj", "k_proj"), Order(-1, 2, head_dim // 2, 1))
        if delta and delta.value_heads != delta.key_heads:
            heads = Order(1, delta.key_heads, delta.value_heads // delta.key_heads, -1)
            self.orders |= dict.fromkeys(("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias"), heads)
            after = heads._replace(start=2 * delta.key_heads * delta.key_dim)  # queries and keys stay
            self.orders |= {"in_proj_qkv": after, "conv1d": after, "out_proj": heads._replace(dim=1)}

    def order(self, name: str) -> Order | None:
        return next((self.orders[part] for part in name.split(".") if part in self.orders), None)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The hub's shape of what the file has in this one."""
        return (shape[0], 1, *shape[1:]) if CONVOLUTION.search(name) else shape

    def offset_of(self, name: str) -> float:
        """What the converter adds: to all norms but the one inside of Gated DeltaNet, whose weight is the gain."""
        return self.offset if name.endswith("norm.weight") and ".linear_attn." not in name else 0.0

    def differs(self, name: str) -> bool:
        return bool(self.order(name) or self.other_values(name) or CONVOLUTION.search(name))

    def other_values(self, name: str) -> bool:
        return bool(self.offset_of(name)) or name.endswith(".A_log")

    def stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The hub's float32 tensor as the file has it."""
        if order := self.order(name):
            tensor = order.moved(tensor)
        if name.endswith(".A_log"):
            return -tensor.exp()
        tensor = tensor.squeeze(1) if CONVOLUTION.search(name) else tensor
        return tensor + self.offset_of(name) if self.offset_of(name) else tensor

    def hub(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """`stored` the other way; float32 where `other_values`."""
        if order := self.order(name):
            tensor = order.moved(tensor, back=True)
        if name.endswith(".A_log"):
            return (-tensor).log()
        tensor = tensor.unsqueeze(1) if CONVOLUTION.search(name) else tensor
        return tensor - self.offset_of(name) if self.offset_of(name) else tensor

    def maps(self, name: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An adapter's A (r, in) and B (out, r) for this weight as it is stored."""
        order = self.order(name)
        if order is None:
            return A, B
        return (A, order.moved(B)) if order.dim == 0 else (order.moved(A), B)

    def keeps_blocks(self, name: str, shape: tuple[int, int], kind: str) -> bool:
        """Whether no block of the type is torn: columns move in whole blocks, rows always."""
        order = self.order(name)
        return not order or order.dim == 0 or shape[1] // (order.a * order.b) % TYPES[kind].block == 0
