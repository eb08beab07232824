"""Adapters as what they are, low-rank maps ΔW = B A: summed exactly, cut to a lower rank, drawn from a full fine-tune.

A set of maps is {path: (A, B)} with A (r, in) and B (out, r), float64, whatever scales a map folded into its B.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lora.adapter import inject
from lora.adapter.layer import LoRALinear
from lora.adapter.targets import linears

Factors = tuple[torch.Tensor, torch.Tensor]  # A (r, in), B (out, r)


class SVD(NamedTuple):
    """U (out, k), S (k,) descending, Vh (k, in) of a ΔW."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor


class Cut(NamedTuple):
    """A map of lower rank, with ‖ΔW‖ and ‖ΔW − B A‖ (Frobenius)."""

    A: torch.Tensor
    B: torch.Tensor
    norm: float
    lost: float


def is_low_rank(kind: type[LoRALinear]) -> bool:
    """Is the ΔW of these layers s B A, whatever s is? DoRA's is not, so that two of them have no sum."""
    return kind.delta is LoRALinear.delta


@torch.no_grad()
def folded(layer: LoRALinear) -> Factors:
    """A and s B, float64, of a layer that `is_low_rank`: its ΔW is their product."""
    A, B = layer.factors()
    return A.double(), layer.scaling * B.double()


def combine(terms: Sequence[tuple[float, dict[str, Factors]]]) -> dict[str, Factors]:
    """Σ w ΔW of several adapters, exactly: A's one above the other, w B's side by side.

    (Summing √w A and √w B instead, as is sometimes done, adds products of one adapter's A with another's B.) A path
    that only some adapters have keeps their rank.
    """
    paths = dict.fromkeys(path for _, maps in terms for path in maps)
    parts = {path: [(weight, *maps[path]) for weight, maps in terms if path in maps] for path in paths}
    return {
        path: (torch.cat([A for _, A, _ in of]), torch.cat([weight * B for weight, _, B in of], 1))
        for path, of in parts.items()
    }


def svd_of_product(A: torch.Tensor, B: torch.Tensor) -> SVD:
    """The SVD of B A, without forming it: of the (r, r) core between the orthonormal factors of B and Aᵀ."""
    Qb, Rb = torch.linalg.qr(B)  # (out, k), (k, r)
    Qa, Ra = torch.linalg.qr(A.T)  # (in, l), (l, r)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return SVD(Qb @ U, S, Vh @ Qa.T)


def svd_of_matrix(delta: torch.Tensor) -> SVD:
    return SVD(*torch.linalg.svd(delta, full_matrices=False))


def cut(svd: SVD, rank: int | None = None, energy: float | None = None) -> Cut:
    """The nearest map of `rank`, or of the least rank that keeps the share `energy` of Σ S²; of all of S without both.

    The leading singular triples are that map (Eckart & Young 1936, https://doi.org/10.1007/BF02288367), and what is
    lost is the norm of the other singular values. A and B get √S each, so that training can go on from them.
    """
    U, S, Vh = svd
    kept = len(S) if rank is None else min(rank, len(S))
    if energy is not None:
        reached = S.square().cumsum(0)
        kept = min(kept, 1 + int((reached < energy * reached[-1]).sum()))
    root = S[:kept].sqrt()
    return Cut(root[:, None] * Vh[:kept], U[:, :kept] * root, S.norm().item(), S[kept:].norm().item())


def share_lost(cuts: dict[str, Cut]) -> tuple[float, str, float]:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ over all maps as one, and the path of the map that lost the greatest share, with that share."""

    def share(lost: float, norm: float) -> float:
        return lost / norm if norm else 0.0

    lost, norm = (torch.tensor([getattr(c, name) for c in cuts.values()]).norm().item() for name in ("lost", "norm"))
    worst = max(cuts, key=lambda path: share(cuts[path].lost, cuts[path].norm))
    return share(lost, norm), worst, share(cuts[worst].lost, cuts[worst].norm)


@torch.no_grad()
def patch(model: nn.Module, maps: dict[str, Factors], dtype: torch.dtype = torch.float32) -> None:
    """Put a `LoRALinear` of scaling 1 (alpha = rank) round every Linear that has a map, each with that map's rank.

    The model may be on `meta`; A and B are where the maps are.
    """
    layers = {}
    for path, linear in linears(model).items():
        if path in maps:
            A, B = maps[path]
            layers[path] = LoRALinear(linear, len(A), len(A), dtype=dtype, init=None)
            layers[path].lora_A, layers[path].lora_B = nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype))
    inject.patch(model, layers)
