"""Attention by PyTorch's kernels, which never hold T × S weights. Dao 2023, https://arxiv.org/abs/2307.08691"""

from functools import cache, lru_cache, partial
from inspect import signature
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from lora.device import upload


def takes_documents(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Can the kernel for documents of several lengths be used? It wants an Ampere GPU."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    return device.type == "cuda" and fits and torch.cuda.get_device_capability(device) >= (8, 0)


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None = None) -> Tensor:
    """`plain.attention` in one call of that kernel."""
    starts = _starts(tuple(lengths), q.device)
    return _varlen(window)(q, k, v, starts, starts, max(lengths), max(lengths))


@lru_cache(maxsize=4)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each document begins and the last one ends, (N + 1,): made once for all layers of a batch."""
    return upload([0, *accumulate(lengths)], device, torch.int32)


@cache
def _varlen(window: int | None):
    """PyTorch's `varlen_attn`, each query seeing a window of keys that ends with its own, or all to its left."""
    from torch.nn.attention.varlen import varlen_attn  # there is no need of it on a CPU

    # the kernel has always grouped heads; since 2.12 the function before it wants to be told, 2.11 has no such argument
    grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    return partial(varlen_attn, window_size=(window - 1 if window else -1, 0), **grouped)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`plain.attend` of one document without a window or a cap."""
    T, S = q.shape[0], k.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, T, d)
    mask = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1)
