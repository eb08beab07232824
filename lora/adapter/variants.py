"""The family: one class per variant of LoRA, each with what its paper changes, and no more.

    rsLoRA   s = α / √r
    DoRA     W' = m (W + s B A) / ‖W + s B A‖, row by row: a length for each output, and a direction
    PiSSA    ΔW = s (B A - B₀ A₀), where s B₀ A₀ is what the r largest singular values make of W

LoRA+ is none of them: it is a learning rate for B, `--lr-ratio-b` of train.py.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from lora import ops
from lora.adapter.layer import LoRALinear


class RsLoRALinear(LoRALinear):
    """s = α / √r in place of α / r, so that layers of large ranks learn as fast as those of small ones.

    Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
    """

    fields = ("use_rslora",)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank**0.5


class DoRALinear(LoRALinear):
    """y = m / ‖W + s B A‖ · (W x + s B A x) + b, the norms of rows, `lora_magnitude_vector` m (out,) trained as well.

    Liu et al. 2024, https://arxiv.org/abs/2402.09353. The norm is a constant for the gradient (§4.3). At the start m is
    the norm of W, and kept in at least float32, so that the layer computes what its base computes.
    """

    fields = ("use_dora",)

    def reset(self, init: str | None = "kaiming") -> None:
        super().reset(init)
        weight = self.base.weight
        wide = torch.promote_types(torch.promote_types(self.lora_A.dtype, torch.float32), weight.dtype)
        self.lora_magnitude_vector = nn.Parameter(self.lora_B.new_empty(len(self.lora_B), dtype=wide))
        if init:
            self.lora_magnitude_vector.data.copy_(weight.to(wide).norm(dim=1))

    @staticmethod
    def shapes(rank: int, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        return LoRALinear.shapes(rank, out_features, in_features) | {"lora_magnitude_vector": (out_features,)}

    def gain(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """m / ‖W + s B A‖, (out,); 0 for rows of zeros, which have no direction."""
        with torch.no_grad():
            weight = self.base.weight if weight is None else weight
            norm = (weight + super().delta()).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        return self.lora_magnitude_vector / norm

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.base.weight if weight is None else weight
        return self.gain(weight)[:, None] * (weight + super().delta()) - weight

    def finish(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """y = W x + s B A x + b -> g (y - b) + b, rounded once: g is near 1, which bfloat16 would make 1."""
        if not self.adapting:
            return super().finish()
        gain, bias = self.gain(), self.bias
        return lambda y: (gain * y if bias is None else gain * y + (1 - gain) * bias).to(y.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.adapting and self.drops):
            return self.finish()(super().forward(x))
        # dropout is on all that the adapter adds to W x + b, as in PEFT: (g - 1) W x' + g s B A x'
        y, x, gain = ops.linear(x, self.stored, self.bias), F.dropout(x, self.dropout), self.gain()
        A, B = (factor.to(x.dtype) for factor in self.factors())
        branch = (self.scaling * (x @ A.T)) @ B.T
        return (y + (gain - 1) * ops.linear(x, self.stored, None) + gain * branch).to(y.dtype)


class RsDoRALinear(RsLoRALinear, DoRALinear):
    """Both."""

    fields = (*RsLoRALinear.fields, *DoRALinear.fields)


class PiSSALinear(LoRALinear):
    """ΔW = s (B A - B₀ A₀): training starts from the principal part of W, of W = U S Vᵀ the r largest singular values:

        A₀ = √(S/s) Vᵀ     B₀ = U √(S/s)

    Meng et al. 2024, https://arxiv.org/abs/2404.02948. There W loses s B₀ A₀; here the base stays what it is and the
    frozen start is subtracted, which is the same sum. Written as B A - B₀ A₀ = (B - B₀) A + B₀ (A - A₀), it is 0 at the
    start, and small changes survive bfloat16. A file holds it as a plain LoRA of rank 2r: [A; A₀] and [B, -B₀].
    Raises ValueError for a rank above the number of singular values.
    """

    @torch.no_grad()
    def reset(self, init: str | None = "pissa") -> None:
        out_features, in_features = self.base.out_features, self.base.in_features
        if self.rank > min(out_features, in_features):
            raise ValueError(f"rank {self.rank} is over the {min(out_features, in_features)} singular values of W")
        if init and not (weight := self.base.weight).is_meta:
            wide = torch.promote_types(weight.dtype, torch.float32)
            U, S, Vt = torch.linalg.svd(weight.to(wide), full_matrices=False)
            root = (S[: self.rank] / self.scaling).sqrt()
            self.lora_A.copy_(root[:, None] * Vt[: self.rank])
            self.lora_B.copy_(U[:, : self.rank] * root)
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        A = torch.cat([self.lora_A, self.lora_A - self.start_A])  # (2r, in)
        return A, torch.cat([self.lora_B - self.start_B, self.start_B], 1)  # (out, 2r)

    def export_tensors(self) -> tuple[int, float, dict[str, torch.Tensor]]:
        A, B = torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], 1)
        return 2 * self.rank, 2 * self.alpha, {"lora_A.weight": A, "lora_B.weight": B}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        A, B = tensors["lora_A.weight"].chunk(2), tensors["lora_B.weight"].chunk(2, 1)
        for place, value in ((self.lora_A, A[0]), (self.start_A, A[1]), (self.lora_B, B[0]), (self.start_B, -B[1])):
            place.copy_(value)


KINDS = (LoRALinear, RsLoRALinear, DoRALinear, RsDoRALinear)  # by what a file says


def kind_of(fields) -> type[LoRALinear]:
    """The class that the fields of an `adapter_config.json` mean, by name whether they are true."""
    meant = {name for kind in KINDS for name in kind.fields if fields.get(name)}
    return next(kind for kind in KINDS if set(kind.fields) == meant)
