"""`QuantLinear`: a frozen Linear whose weight is packed. It looks like an `nn.Linear`: `weight` gives the numbers."""

import torch
from torch import Tensor, nn

from lora import ops
from lora.quant.packed import Packed


class QuantLinear(nn.Module):
    """y = dq(W) x + b in the dtype of x; nothing of it trains. `dtype` is that of `weight`."""

    def __init__(self, packed: Packed, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.packed, self.dtype = packed, dtype
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = packed.shape

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), formed anew at each call."""
        return self.packed.dequantise(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packed.nbytes:,} bytes"
