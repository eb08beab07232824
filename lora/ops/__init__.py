"""The formulas of the core path: `plain` has each as its paper writes it, `fast_*` one fast version each, chosen here.

All have the signatures of `plain`, whose docstrings say shapes and dtypes. `use_plain()` turns every fast version off.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora.ops import (
    fast_attention,
    fast_decoding,
    fast_gated_delta,
    fast_log_probs,
    fast_lora,
    fast_quantised,
    fast_rms_norm,
    fast_short_convolution,
    fast_swiglu,
    flash_attention,
    plain,
    windowed_attention,
)
from lora.ops.plain import Weight, is_autocast, is_finite, no_autocast, rotate, soft_cap, wide

__all__ = [
    "Weight", "attend", "attention", "cross_entropy", "gated_delta", "gated_linear", "is_finite", "is_plain",
    "last_inputs", "linear", "linears", "log_probs", "logits", "lora_linear", "no_autocast", "recomputed", "rms_norm",
    "rotate", "short_convolution", "soft_cap", "swiglu", "use_plain", "wide",
]  # fmt: skip

SHORT = 512  # up to so many keys the plain form is faster on a CPU than PyTorch's kernel; beyond, its T² memory hurts
_plain = False


def use_plain(on: bool = True) -> None:
    """From now on every formula runs as written: slower, and the same numbers up to rounding."""
    global _plain
    _plain = on


def is_plain() -> bool:
    return _plain


def _as_written(x: Tensor) -> bool:
    """A compiler makes its own fast version of the formula, and autocast knows the operations of the plain one only."""
    return _plain or torch.compiler.is_compiling() or is_autocast(x)


def _unless_saved(formula, *inputs) -> Tensor:
    """A cheap formula as written; in compiled code its result is formed again in the backward pass, not saved."""
    if torch.compiler.is_compiling():
        return checkpoint(formula, *inputs, use_reentrant=False)
    return formula(*inputs)


def recomputed(block: Callable, *inputs) -> Tensor:
    """`block(*inputs)`, of which only the inputs are saved for the backward pass: the rest is computed again there."""
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=fast_quantised.contexts)


def linear(x: Tensor, W: Weight, b: Tensor | None) -> Tensor:
    return (plain if isinstance(W, Tensor) or _as_written(x) else fast_quantised).linear(x, W, b)


def lora_linear(x: Tensor, W: Weight, b: Tensor | None, A: Tensor, B: Tensor, s: float, dropout: float = 0.0) -> Tensor:
    return (plain if _as_written(x) else fast_lora).lora_linear(x, W, b, A, B, s, dropout)


def linears(x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    if joined := fast_decoding.joined(modules):
        return joined(x)
    return (plain if _as_written(x) else fast_lora).linears(x, modules)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if _as_written(x) or not torch.is_grad_enabled():
        return _unless_saved(plain.rms_norm, x, weight, eps)
    return fast_rms_norm.rms_norm(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    if _as_written(gate) or not torch.is_grad_enabled():
        return _unless_saved(plain.swiglu, gate, up, activation)
    return fast_swiglu.swiglu(gate, up, activation)


def gated_linear(gate: Tensor, up: Tensor, activation: str, module: nn.Module) -> Tensor:
    if _as_written(gate) or not torch.is_grad_enabled():
        return module(swiglu(gate, up, activation))
    return fast_lora.gated_linear(gate, up, activation, module)


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None = None, cap=None) -> Tensor:
    window = window if window and window < max(lengths) else None
    if _plain or is_autocast(q):
        return plain.attention(q, k, v, lengths, window, cap)
    if flash_attention.takes_documents(q.device, q.dtype, q.shape[-1]) and not cap:
        return flash_attention.attention(q, k, v, lengths, window)
    if q.device.type in ("cpu", "meta") and not window and not cap:
        return fast_attention.attention(q, k, v, lengths)
    documents = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*document, window, cap) for document in documents])


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, cap: float | None = None) -> Tensor:
    if _plain or is_autocast(q):
        return plain.attend(q, k, v, window, cap)
    if cap or (window and window < len(k)):
        return windowed_attention.attend(q, k, v, window, cap)
    short = q.device.type in ("cpu", "meta") and len(k) <= SHORT
    return plain.attend(q, k, v) if short else flash_attention.attend(q, k, v)


def short_convolution(x: Tensor, w: Tensor, lengths: list[int], before: Tensor | None = None) -> Tensor:
    return (plain if _as_written(x) else fast_short_convolution).short_convolution(x, w, lengths, before)


def last_inputs(x: Tensor, lengths: list[int], count: int, before: Tensor | None = None) -> Tensor:
    return (plain if _as_written(x) else fast_short_convolution).last_inputs(x, lengths, count, before)


def gated_delta(q, k, v, g, beta, lengths: list[int], states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return (plain if _as_written(q) else fast_gated_delta).gated_delta(q, k, v, g, beta, lengths, states)


def logits(hidden: Tensor, head: Tensor, cap: float | None = None) -> Tensor:
    if _as_written(hidden) or torch.is_grad_enabled():
        return plain.logits(hidden, head, cap)
    return soft_cap(fast_decoding.product(hidden, head), cap)


def log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, cap: float | None = None, temperature: float = 1.0
) -> Tensor:
    form = plain if _plain or is_autocast(hidden) else fast_log_probs
    return form.log_probs(hidden, head, targets, cap, temperature)


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    return -log_probs(hidden, head, targets, cap).sum()  # `plain.cross_entropy`
