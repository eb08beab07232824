"""LoRA's layers with their gradient in closed form, several layers of one input in one autograd node.

    y_i = x W_iᵀ + b_i + (x A_iᵀ)(s_i B_i)ᵀ        with G_i = ∂L/∂y_i:

    ∂B_i = s_i G_iᵀ (x A_iᵀ)        ∂A_i = (s_i G_i B_i)ᵀ x        ∂x = Σ_i G_i W_i + (s_i G_i B_i) A_i

Autograd would form the same with more memory traffic. Here products are added into their sum (`addmm_`), x is saved
once for all layers, whose A are stacked, s G B is formed once for ∂A and ∂x, and nothing is computed for the frozen W.
Where x is a(gate) up, of SwiGLU, these are saved and x is formed again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora.ops import fast_quantised, fast_swiglu, plain
from lora.ops.fast_quantised import to_save
from lora.ops.plain import Weight, dense


def lora_linear(x: Tensor, W: Weight, b: Tensor | None, A: Tensor, B: Tensor, s: float, dropout: float = 0.0) -> Tensor:
    """`plain.lora_linear`, whose formula it is with dropout: then x and its noisy copy are two inputs."""
    if dropout:
        form = plain if isinstance(W, Tensor) else fast_quantised
        return form.linear(x, W, b) + plain.branch(F.dropout(x, dropout), A, B, s)
    return _LoRALinears.apply(x, [s], W, b, A, B)[0]


def linears(x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """`plain.linears`, of layers with a branch as one."""
    if (found := _maps(modules)) is None:
        return plain.linears(x, modules)
    outputs = _LoRALinears.apply(x, *found)
    return tuple(module.finish()(y) for module, y in zip(modules, outputs, strict=True))


def gated_linear(gate: Tensor, up: Tensor, activation: str, module: nn.Module) -> Tensor:
    """`plain.gated_linear`"""
    if (found := _maps([module])) is None:
        return module(fast_swiglu.swiglu(gate, up, activation))
    return module.finish()(_GatedLoRALinear.apply(gate, up, activation, *found))


def _maps(modules: Sequence[nn.Module]) -> tuple | None:
    """The scalings, and W, b, A, B of each, of layers that know their `low_rank()` map (A, B, s), if all have one and
    none drops any of its input; `finish()` gives what such a layer does to its sum."""
    if not all(hasattr(module, "low_rank") and not module.drops for module in modules):
        return None
    maps = [module.low_rank() for module in modules]
    if not all(maps):
        return None
    tensors = [t for module, (A, B, _) in zip(modules, maps, strict=True) for t in (module.stored, module.bias, A, B)]
    return [s for *_, s in maps], *tensors


def _forward(ctx, x: Tensor, scalings: list[float], tensors: Sequence) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and what `_backward` needs besides x."""
    Ws, bs, As, Bs = (tensors[i::4] for i in range(4))
    ctx.scalings, ctx.ranks = scalings, [len(A) for A in As]
    A = torch.cat(As).to(x.dtype)  # (Σr, in)
    Bs = [(s * B).to(x.dtype) for s, B in zip(scalings, Bs, strict=True)]
    down = x.reshape(-1, x.shape[-1]) @ A.T  # (T, Σr)
    outputs, kept = [], []
    for W, b, B, part in zip(Ws, bs, Bs, down.split(ctx.ranks, 1), strict=True):
        kept.append(to_save(W, numbers := dense(W, x.dtype)))
        y = F.linear(x, numbers, b)  # (..., out), of x itself, so that with B = 0 the bits are the base's
        outputs.append(y.reshape(-1, y.shape[-1]).addmm_(part, B.T).view(y.shape))
    ctx.packed = [packed for _, packed in kept]
    return outputs, [down, A, *(tensor for tensor, _ in kept), *Bs]


def _backward(ctx, rows: Tensor, saved: Sequence, gradients: Sequence[Tensor], needs_rows: bool):
    """∂x (T, in) where it is needed, and for each layer the gradients of W, b, A, B, one after another."""
    down, A, *weights = saved
    n = len(gradients)
    Ws = [tensor if packed is None else packed for tensor, packed in zip(weights[:n], ctx.packed, strict=True)]
    d_rows, d_Bs, ups, parts = None, [], [], down.split(ctx.ranks, 1)
    for s, G, W, B, part in zip(ctx.scalings, gradients, Ws, weights[n:], parts, strict=True):
        G = G.reshape(-1, G.shape[-1])  # (T, out)
        ups.append(G @ B)
        d_Bs.append((part.T @ G).mul_(s).T)  # sooner done than Gᵀ part
        if needs_rows:
            W = dense(W, G.dtype)
            d_rows = G @ W if d_rows is None else d_rows.addmm_(G, W)
    up = torch.cat(ups, 1)  # (T, Σr)
    if needs_rows:
        d_rows = d_rows.addmm_(up, A)
    d_As = (up.T @ rows).split(ctx.ranks)
    return d_rows, [d for pair in zip(d_As, d_Bs, strict=True) for d in (None, None, *pair)]


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scalings, *tensors):
        outputs, saved = _forward(ctx, x, scalings, tensors)
        ctx.save_for_backward(x, *saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # `down` is saved as numbers, so a second derivative would silently miss its part
    def backward(ctx, *gradients):
        x, *saved = ctx.saved_tensors
        d_rows, others = _backward(ctx, x.reshape(-1, x.shape[-1]), saved, gradients, ctx.needs_input_grad[0])
        return None if d_rows is None else d_rows.view(x.shape), None, *others


class _GatedLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation, scalings, *tensors):
        ctx.activation = activation
        [y], saved = _forward(ctx, fast_swiglu.forward(gate, up, activation), scalings, tensors)
        ctx.save_for_backward(gate, up, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gate, up, *saved = ctx.saved_tensors
        gate, a = fast_swiglu.activated(gate, ctx.activation)
        rows = (a.detach() * up).reshape(-1, up.shape[-1])
        d_rows, others = _backward(ctx, rows, saved, [gradient], any(ctx.needs_input_grad[:2]))
        d_gate_up = (None, None) if d_rows is None else fast_swiglu.backward(gate, a, up, d_rows.view(up.shape))
        return *d_gate_up, None, None, *others
