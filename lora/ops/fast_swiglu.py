"""SwiGLU that saves gate and up alone; autograd would save a(gate) as well, which is cheap to form again.

y = a(gate) up        ∂up = a(gate) ∂y        ∂gate = a'(gate) up ∂y
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora.ops.plain import ACTIVATIONS


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`plain.swiglu`"""
    return _SwiGLU.apply(gate, up, activation)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](gate).mul_(up)  # in place: a third fewer bytes at once


def activated(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """gate and a(gate), with what autograd needs for a'(gate)."""
    with torch.enable_grad():
        gate = gate.detach().requires_grad_()
        return gate, ACTIVATIONS[activation](gate)


def backward(gate: Tensor, a: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """∂gate and ∂up, of what `activated` gives."""
    (d_gate,) = torch.autograd.grad(a, gate, gradient * up)
    return d_gate, gradient * a.detach()


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        return *backward(*activated(gate, ctx.activation), up, gradient), None
