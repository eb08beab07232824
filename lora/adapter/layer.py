"""`LoRALinear`: a frozen `nn.Linear` plus a scaled low-rank map, after Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    y = W x + b + s B A x        s = alpha / rank,   A (r, in),   B (out, r)

`delta` is the only place that forms ΔW = s B A. The base tensor is never written: a merged layer holds W' = W + ΔW in a
tensor of its own, so unmerging is dropping that tensor. The variants in `lora.adapter.variants` override what differs.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """A frozen Linear with an adapter beside it. At the start B = 0, so the layer computes what its base computes.

    `lora_A` (rank, in) and `lora_B` (out, rank) are kept in `dtype`; the branch is computed in the dtype of the input.
    `init` says how A starts: kaiming or gaussian; None where values are about to come from a file. Raises ValueError
    where rank, alpha or dropout make no sense.
    """

    prepared = None  # the faster way for decoding, while there is one
    fields = ()  # of adapter_config.json: those that are true for this kind of layer

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, dtype=torch.float32, init="kaiming"
    ):
        super().__init__()
        if type(rank) is not int or rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
            raise ValueError(
                f"rank {rank}, alpha {alpha}, dropout {dropout}: need rank >= 1, alpha > 0, 0 <= dropout < 1"
            )
        self.base = base
        self.rank, self.alpha, self.dropout, self.enabled = rank, alpha, dropout, True
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, dtype=dtype, device=device))
        # W' while merged: a buffer, so that .to() takes it along; not persistent, so that a state_dict is the base's
        self.register_buffer("merged_weight", None, persistent=False)
        self.reset(init)
        base.requires_grad_(False)

    def reset(self, init: str | None = "kaiming") -> None:
        """A ~ U(-1/√in, 1/√in), which is the usual `kaiming_uniform_(a=√5)` written out, or A ~ N(0, 1/r²); B = 0."""
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.rank)
        elif init:
            bound = self.base.in_features**-0.5
            nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    @staticmethod
    def shapes(rank: int, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """The layer's tensors in a file, by their names there, which are its parameters' but for `.weight`."""
        return {"lora_A.weight": (rank, in_features), "lora_B.weight": (out_features, rank)}

    def saved(self) -> tuple[int, float, dict[str, torch.Tensor]]:
        """Rank, alpha and tensors for a file."""
        names = self.shapes(self.rank, *self.base.weight.shape)
        return self.rank, self.alpha, {name: getattr(self, name.removesuffix(".weight")) for name in names}

    @torch.no_grad()
    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """The values of a file that `saved` has filled."""
        for name, tensor in tensors.items():
            getattr(self, name.removesuffix(".weight")).copy_(tensor)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def merged(self) -> bool:
        return self.merged_weight is not None

    @property
    def weight(self) -> torch.Tensor:
        """The weight the layer computes with, leaving the branch aside: W, or W' while merged. (out, in)"""
        return self.merged_weight if self.merged and self.enabled else self.base.weight

    @property
    def adapting(self) -> bool:
        """Is there a branch to compute? Not while merged, not while disabled."""
        return self.enabled and not self.merged

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The A (r, in) and B (out, r) that the branch is computed with."""
        return self.lora_A, self.lora_B

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """ΔW = s B A, (out, in), in float32 or wider whatever the dtype of A and B.

        `weight` is W for variants that need it, where the layer's own is on `meta`.
        """
        A, B = self.factors()
        wide = torch.promote_types(A.dtype, torch.float32)
        return self.scaling * (B.to(wide) @ A.to(wide))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""
        return (self.prepared(x) if self.prepared else self.together(x, [self]))[0]

    @classmethod
    def together(cls, x: torch.Tensor, layers: list["LoRALinear"]) -> tuple[torch.Tensor, ...]:
        """Several layers of one input, x (..., in), in one autograd node: q/k/v, gate/up, or one alone."""
        if torch.compiler.is_compiling():  # it makes its own of the formula; of in-place sums it would make copies
            return tuple(layer.plain(x) for layer in layers)
        if all(layer.adapting and not (layer.training and layer.dropout) for layer in layers):
            return cls.products(x, layers)
        return tuple(layer.plain(x) for layer in layers)

    @classmethod
    def products(cls, x: torch.Tensor, layers: list["LoRALinear"]) -> tuple[torch.Tensor, ...]:
        """`together` of layers that all adapt, without dropout."""
        weights = [w for layer in layers for w in (layer.base.weight, layer.base.bias, *layer.factors())]
        return _LoRAProducts.apply(x, [layer.scaling for layer in layers], *weights)

    @classmethod
    def prepared_way(
        cls, layers: list["LoRALinear"], joined
    ) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None:
        """For decoding, while no weight changes: x -> the outputs of several layers of one input, by three products.

        `joined(weights, biases)` makes their frozen maps one. The branches become one as well, every A above the next
        and every s B on a diagonal of blocks, converted once. None where some have a branch and others have not.
        """
        if len({layer.adapting for layer in layers}) > 1 or any(layer.training and layer.dropout for layer in layers):
            return None
        base = joined([layer.weight for layer in layers], [layer.base.bias for layer in layers])
        if not layers[0].adapting:
            return base
        dtype = layers[0].base.weight.dtype
        As, Bs = zip(*(layer.factors() for layer in layers), strict=True)
        A = torch.cat(As).to(dtype)  # (Σ r, in)
        scaled = [layer.scaling * B for layer, B in zip(layers, Bs, strict=True)]
        B = torch.block_diag(*scaled).to(dtype)  # (Σ out, Σ r)
        return lambda x: base.whole(x).add_(F.linear(F.linear(x, A), B)).split(base.sizes, -1)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The formula as written, with dropout on the branch's input; `together` is the fast version of it."""
        y = F.linear(x, self.weight, self.base.bias)
        return y + self.branch(F.dropout(x, self.dropout, self.training)) if self.adapting else y

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """s B A x"""
        A, B = self.factors()
        return (self.scaling * (x @ A.to(x.dtype).T)) @ B.to(x.dtype).T

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}, enabled={self.enabled}"


class _LoRAProducts(torch.autograd.Function):
    """y_i = x W_iᵀ + b_i + (x A_iᵀ) (s_i B_i)ᵀ for several i, and its gradients in closed form, G_i = ∂L/∂y_i:

        ∂B = s Gᵀ(x Aᵀ)      ∂A = (s G B)ᵀ x      ∂x = Σ G W + (s G B) A

    What autograd would do, with less memory traffic: products are added into their sum (`addmm_`), x is kept once for
    all layers, whose A are stacked, s G B is formed once for ∂A and ∂x, and nothing is computed for the frozen W.
    """

    @staticmethod
    def forward(ctx, x, scalings, *weights):
        rows = x.reshape(-1, x.shape[-1])  # (T, in)
        Ws, bs, As, Bs = (weights[i::4] for i in range(4))
        ctx.scalings, ctx.shape, ctx.ranks = scalings, x.shape, [len(A) for A in As]
        A = torch.cat(As).to(x.dtype)  # (Σr, in)
        Bs = [(s * B).to(x.dtype) for s, B in zip(scalings, Bs, strict=True)]
        down = rows @ A.T  # (T, Σr)
        outputs = []
        for W, b, B, part in zip(Ws, bs, Bs, down.split(ctx.ranks, 1), strict=True):
            y = F.linear(x, W, b)  # (..., out), of x itself, so that with B = 0 the bits are the base's
            outputs.append(y.reshape(-1, y.shape[-1]).addmm_(part, B.T).view(y.shape))
        ctx.save_for_backward(rows, down, A, *Ws, *Bs)
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # `down` is kept as numbers, so a second derivative would silently miss its part
    def backward(ctx, *gradients):
        rows, down, A, *weights = ctx.saved_tensors
        n = len(gradients)
        d_rows, d_Bs, ups, parts = None, [], [], down.split(ctx.ranks, 1)
        for s, G, W, B, part in zip(ctx.scalings, gradients, weights[:n], weights[n:], parts, strict=True):
            G = G.reshape(-1, G.shape[-1])  # (T, out)
            ups.append(G @ B)
            d_Bs.append((part.T @ G).mul_(s).T)  # sooner done than Gᵀ part
            if ctx.needs_input_grad[0]:
                d_rows = G @ W if d_rows is None else d_rows.addmm_(G, W)
        up = torch.cat(ups, 1)  # (T, Σr)
        if d_rows is not None:
            d_rows = d_rows.addmm_(up, A).view(ctx.shape)
        d_As = (up.T @ rows).split(ctx.ranks)
        return (d_rows, None, *(d for pair in zip(d_As, d_Bs, strict=True) for d in (None, None, *pair)))
