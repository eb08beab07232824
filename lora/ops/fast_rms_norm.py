"""RMSNorm with its gradient in closed form. With n = x / RMS(x) and g = w ∂L/∂y for y = w n:

    ∂x = (g - n mean(g n)) / RMS(x)        ∂w = Σ n ∂L/∂y

Saved is n in the dtype of x; autograd would save x and n in float32.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora.ops.plain import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`plain.rms_norm`"""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y = x.to(wide(x.dtype))
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)  # 1 / RMS, (..., 1)
        n = (y * scale).to(weight.dtype)
        ctx.save_for_backward(n.to(x.dtype), scale, weight)
        return (weight * n).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        n, scale, weight = ctx.saved_tensors
        d_weight = (gradient * n).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        g, n = (gradient * weight).to(scale.dtype), n.to(scale.dtype)
        g.addcmul_(n, (g * n).mean(-1, keepdim=True), value=-1).mul_(scale)
        return g.to(gradient.dtype), d_weight, None
