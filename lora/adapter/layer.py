"""`LoRALinear`: a frozen `nn.Linear` plus a scaled low-rank map, after Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    y = W x + b + s B A x        s = alpha / rank,   A (r, in),   B (out, r)

`delta` is the only place that forms ΔW = s B A. The base tensor is never written: a merged layer holds W' = W + ΔW in a
tensor of its own, so unmerging is dropping that tensor. The variants in `lora.adapter.variants` override what differs.
"""

import math
from collections.abc import Callable
from itertools import chain

import torch
from torch import nn

from lora import ops


class LoRALinear(nn.Module):
    """A frozen Linear with an adapter beside it. At the start B = 0, so the layer computes what its base computes.

    `lora_A` (rank, in) and `lora_B` (out, rank) are kept in `dtype`; the branch is computed in the dtype of the input.
    `init` says how A starts: kaiming or gaussian; None where values are about to come from a file. Raises ValueError
    for a rank, alpha or dropout out of range.
    """

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
        device = next(chain(base.parameters(), base.buffers())).device
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

    def export_tensors(self) -> tuple[int, float, dict[str, torch.Tensor]]:
        """Rank, alpha and tensors for a file."""
        names = self.shapes(self.rank, self.base.out_features, self.base.in_features)
        return self.rank, self.alpha, {name: getattr(self, name.removesuffix(".weight")) for name in names}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take the values of a file that `export_tensors` has filled."""
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
    def stored(self) -> ops.Weight:
        """`weight` as the product takes it: packed, where the base is quantised and not merged."""
        packed = getattr(self.base, "packed", None)
        return packed if packed is not None and not (self.merged and self.enabled) else self.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    @property
    def adapting(self) -> bool:
        """Is there a branch to compute? Not while merged, not while disabled."""
        return self.enabled and not self.merged

    @property
    def drops(self) -> float:
        """The dropout of the branch's input, now."""
        return self.dropout if self.training else 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = W x + b + s B A x; or W x + b while there is no branch. x (..., in) -> (..., out), in the dtype of x."""
        if not self.adapting:
            return ops.linear(x, self.stored, self.bias)
        A, B = self.factors()
        return ops.lora_linear(x, self.stored, self.bias, A, B, self.scaling, self.drops)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The A (r, in) and B (out, r) that the branch is computed with."""
        return self.lora_A, self.lora_B

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """ΔW = s B A, (out, in), in float32 or wider whatever the dtype of A and B, and under autocast too.

        `weight` is W for variants that need it, where the layer's own is on `meta`.
        """
        A, B = self.factors()
        wide = torch.promote_types(A.dtype, torch.float32)
        with ops.no_autocast(A):
            return self.scaling * (B.to(wide) @ A.to(wide))

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A, B and s for `ops.linears`, which computes several layers as one; None while there is no branch."""
        return (*self.factors(), self.scaling) if self.adapting else None

    def finish(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What the layer does to W x + b + s B A x, where that was computed for it: nothing."""
        return lambda y: y

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}, enabled={self.enabled}"
