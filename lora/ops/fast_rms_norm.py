"""RMSNorm with its gradient in closed form. With n = x / RMS(x) and g = w ∂L/∂y for y = w n:

    ∂x = (g - n mean(g n)) / RMS(x)        ∂w = Σ n ∂L/∂y

Saved is y, which the Linear behind it saves too, so that it is there once; n = y / w. Where a weight is zero, n is.
Autograd would save x and n in float32.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora.ops.plain import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`plain.rms_norm`"""
    return _RMSNorm.apply(x, weight, eps)


def _divides(weight: Tensor) -> bool:
    """Can n be had from y? A GPU would have to be waited for to know."""
    return weight.device.type == "meta" or (weight.device.type == "cpu" and bool(weight.all()))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y = x.to(wide(x.dtype))
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)  # 1 / RMS, (..., 1)
        n = (y * scale).to(weight.dtype)
        y = (weight * n).to(x.dtype)
        ctx.divides = _divides(weight)
        ctx.save_for_backward(y if ctx.divides else n.to(x.dtype), scale, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        n, scale, weight = ctx.saved_tensors
        g = (gradient * weight).to(scale.dtype)
        n = n / weight.to(scale.dtype) if ctx.divides else n.to(scale.dtype)
        d_weight = (gradient * n).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g.addcmul_(n, (g * n).mean(-1, keepdim=True), value=-1).mul_(scale)
        return g.to(gradient.dtype), d_weight, None
