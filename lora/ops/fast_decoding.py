"""Several linear maps of one input as one product, for decoding: there a product costs what reading its weights costs.

Inside `for_decoding` no weight may change. The frozen weights of a group (q, k, v or gate, up) are laid into one
tensor, of which each is a view from then on: there is no second copy. The low-rank branches of a group of LoRA layers
become one as well, every A above the next and every s B on a diagonal of blocks, converted once:

    [y_1 … y_n] = x [W_1 … W_n]ᵀ + (x [A_1 … A_n]ᵀ) diag(s_1 B_1 … s_n B_n)ᵀ

oneDNN lays the right factor of a product out anew each time. So on a CPU with AMX, few rows times a weight are
(W xᵀ)ᵀ there, where that is the small one.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora.device import cpu_has_amx

Outputs = tuple[Tensor, ...]
FEW = 16  # rows; of 32 both ways take as long


@contextmanager
def for_decoding(groups: Iterable[list[nn.Module]]):
    """Inside the block `ops.linears` runs each of these groups of Linears as one product, where it can, and what is
    alone in its group runs as one, too."""
    changed = []
    try:
        for modules in groups:
            if together := join(modules):
                changed.append(modules[0])
                modules[0].joined = together
                if len(modules) == 1:
                    modules[0].forward = lambda x, alone=together: alone(x)[0]
        yield
    finally:
        for module in changed:
            vars(module).pop("joined", None)
            vars(module).pop("forward", None)


def product(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x (..., in), W (out, in)"""
    if x.dim() != 2 or len(x) > FEW or W.device.type != "cpu" or W.dtype != torch.bfloat16 or not cpu_has_amx():
        return F.linear(x, W, b)
    if len(x) == 1:
        return (torch.mv(W, x[0]) if b is None else torch.addmv(b, W, x[0]))[None]
    return (W @ x.T if b is None else torch.addmm(b[:, None], W, x.T)).T.contiguous()


def joined(modules: Sequence[nn.Module]) -> Callable[[Tensor], Outputs] | None:
    """The one product of this group, inside `for_decoding`."""
    return vars(modules[0]).get("joined")


@torch.inference_mode(False)  # weights made in it could not be trained with
@torch.no_grad()
def join(modules: Sequence[nn.Module]) -> Callable[[Tensor], Outputs] | None:
    """x (..., in) -> the outputs of several Linears, or of several LoRA layers; None where there is no better way, as
    with packed weights, which would not stay so."""
    kind = type(modules[0])
    sharded = any(type(parameter) is not nn.Parameter for module in modules for parameter in module.parameters())
    if sharded or any(type(module) is not kind for module in modules):
        return None
    if kind is nn.Linear:
        return _join_frozen(modules)
    if not hasattr(kind, "low_rank") or any(m.drops or not isinstance(m.stored, Tensor) for m in modules):
        return None
    maps = [module.low_rank() for module in modules]
    if not any(maps):
        return _join_frozen(modules)
    if not all(maps):
        return None
    frozen, dtype = _join_frozen(modules, split=False), modules[0].weight.dtype
    A = torch.cat([A for A, _, _ in maps]).to(dtype)  # (Σ r, in)
    B = torch.block_diag(*(s * B for _, B, s in maps)).to(dtype)  # (Σ out, Σ r)
    sizes, finish = [len(module.weight) for module in modules], [module.finish() for module in modules]

    def together(x: Tensor) -> Outputs:
        outputs = frozen(x).add_(product(product(x, A), B)).split(sizes, -1)
        return tuple(last(y) for last, y in zip(finish, outputs, strict=True))

    return together


def _join_frozen(modules: Sequence[nn.Module], split: bool = True) -> Callable:
    weights, biases = [module.weight for module in modules], [module.bias for module in modules]
    weight, bias, sizes = one_tensor(weights), None, [len(w) for w in weights]  # (Σ out, in)
    if any(b is not None for b in biases):
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    if not split:
        return lambda x: product(x, weight, bias)
    return lambda x: product(x, weight, bias).split(sizes, -1)


def one_tensor(parts: Sequence[Tensor]) -> Tensor:
    """The rows of several matrices (n_i, in) as one tensor (Σ n, in), whose views they are made, if they are not yet.

    Copies of them, as `.to` and `deepcopy` make, are tensors of their own again.
    """
    first, sizes = parts[0], [len(part) for part in parts]
    home, starts = first.untyped_storage().data_ptr(), accumulate((p.numel() for p in parts), initial=0)
    if all(
        part.untyped_storage().data_ptr() == home
        and part.storage_offset() == first.storage_offset() + start
        and part.is_contiguous()
        for part, start in zip(parts, starts, strict=False)  # the last start is the end
    ):
        return first.detach().as_strided((sum(sizes), first.shape[1]), first.stride())
    whole = torch.cat([part.detach() for part in parts])
    for part, rows in zip(parts, whole.split(sizes), strict=True):
        part.data = rows
    return whole
