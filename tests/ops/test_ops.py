"""Every op's fast version equals its formula, values and gradients; `--plain` uses no fast version."""

import pytest
import torch
from torch import nn

from lora import ops
from lora.adapter.layer import LoRALinear
from lora.network.layers import RMSNorm
from lora.ops import (
    fast_attention,
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
from tests.helpers import DELTAS, as_written, close, far, patched, some_tokens, tiny_model
from tests.mutation import mutation
from tests.quantised import FORMATS, both

TOL = 1e-12


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()


def layers() -> list[LoRALinear]:
    torch.manual_seed(0)
    found = [LoRALinear(nn.Linear(9, out, dtype=torch.float64), 3, 5, dtype=torch.float64) for out in (8, 6, 4)]
    for layer in found:
        nn.init.normal_(layer.lora_B)
    return found


ADAPTED = layers()
OUT = [layer.lora_A for layer in ADAPTED] + [layer.lora_B for layer in ADAPTED]
x, W, b, A, B = numbers(11, 9), numbers(8, 9), numbers(8), numbers(3, 9), numbers(8, 3)
q, k, v = numbers(21, 6, 8), numbers(21, 3, 8, seed=1), numbers(21, 3, 8, seed=2)
gate, up, head, targets = numbers(11, 9, seed=3), numbers(11, 9, seed=1), numbers(13, 9), torch.arange(11)
packed = FORMATS["nf4"](W.detach())
qkv_of_delta = numbers(150, 2, 6), numbers(150, 2, 6, seed=1), numbers(150, 4, 10)
beta = numbers(150, 4, seed=2)
CASES = {  # name -> arguments, those with gradients, the fast modules that can serve it
    "linear": ((x, packed, b.detach()), (x,), [fast_quantised]),
    "lora_linear": ((x, W.detach(), b.detach(), A, B, 0.7), (x, A, B), [fast_lora]),
    "lora_linear packed": ((x, packed, b.detach(), A, B, 0.7), (x, A, B), [fast_lora]),
    "linears": ((x, ADAPTED), (x, *OUT), [fast_lora]),
    "gated_delta": (
        (*qkv_of_delta, -numbers(150, 4).detach().abs(), beta, [3, 130, 1, 16]),
        (*qkv_of_delta, beta),
        [fast_gated_delta],
    ),
    "gated_delta one each": (
        (*(t[:5] for t in qkv_of_delta), -numbers(5, 4).detach().abs(), beta[:5], [1] * 5, numbers(5, 4, 6, 10)),
        (*qkv_of_delta, beta),
        [fast_gated_delta],
    ),
    "short_convolution": ((x, numbers(9, 4), [2, 1, 8]), (x,), [fast_short_convolution]),
    "last_inputs one each": ((x, [1] * 11, 3, numbers(11, 3, 9)), (x,), [fast_short_convolution]),
    "short_convolution one each": ((x, numbers(9, 4), [1] * 11, numbers(11, 3, 9)), (x,), [fast_short_convolution]),
    "rms_norm": ((x, numbers(9), 1e-5), (x,), [fast_rms_norm]),
    "swiglu": ((gate, up), (gate, up), [fast_swiglu]),
    "swiglu gelu": ((gate, up, "gelu_tanh"), (gate, up), [fast_swiglu]),
    "gated_linear": ((gate, up, "silu", ADAPTED[0]), (gate, up, OUT[0], OUT[3]), [fast_lora]),
    "gated_linear gelu": ((gate, up, "gelu_tanh", ADAPTED[1]), (gate, up, OUT[1], OUT[4]), [fast_lora]),
    "attention": ((q, k, v, [5, 1, 12, 3]), (q, k, v), [fast_attention]),
    "attention window": ((q, k, v, [5, 1, 12, 3], 4), (q, k, v), [windowed_attention]),
    "attention cap": ((q, k, v, [5, 1, 12, 3], None, 1.5), (q, k, v), [windowed_attention]),
    "attend": ((q[-5:], k, v), (q, k, v), []),
    "attend window": ((q[-5:], k, v, 4), (q, k, v), [windowed_attention]),
    "logits": ((x, head, 2.0), (x, head), []),
    "log_probs": ((x, head, targets), (x, head), [fast_log_probs]),
    "log_probs cap": ((x, head, targets, 2.0), (x, head), [fast_log_probs]),
    "cross_entropy": ((x, head, targets), (x, head), [fast_log_probs]),
    "cross_entropy cap": ((x, head, targets, 2.0), (x, head), [fast_log_probs]),
}
FAST = (fast_attention, fast_gated_delta, fast_log_probs, fast_lora, fast_quantised, fast_rms_norm,
        fast_short_convolution, fast_swiglu, flash_attention, windowed_attention)  # fmt: skip


def with_gradients(op, arguments, leaves) -> list[torch.Tensor]:
    """The outputs of an op, and the gradients of a weighted sum of them."""
    outputs = op(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((y * numbers(*y.shape, seed=9).detach()).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("case", CASES)
def test_every_fast_version_equals_its_formula_with_gradients(case):
    arguments, leaves, _ = CASES[case]
    name = case.partition(" ")[0]
    fast = with_gradients(getattr(ops, name), arguments, leaves)
    with as_written():
        written = with_gradients(getattr(plain, name), arguments, leaves)
        again = with_gradients(getattr(ops, name), arguments, leaves)
    assert all(close(a, b, TOL) and far(b, 0 * b, TOL) for a, b in zip(fast, written, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again, written, strict=True))


def test_the_cases_cover_every_op_that_has_a_fast_version():
    public = {name for name in ops.__all__ if hasattr(plain, name) and getattr(ops, name) is not getattr(plain, name)}
    assert public == {case.partition(" ")[0] for case in CASES}


@mutation("lora/ops/__init__.py", "return _plain or torch.compiler.is_compiling()", "return False")
@mutation(
    "lora/ops/__init__.py",
    """    if _plain or is_autocast(q):
        return plain.attention(q, k, v, lengths, window, cap)
""",
    "",
)
@mutation(
    "lora/ops/__init__.py",
    "form = plain if _plain or is_autocast(hidden) else fast_log_probs",
    "form = fast_log_probs",
)
def test_with_use_plain_no_fast_version_runs(monkeypatch):
    model, tokens = patched(both(tiny_model())[0], targets=("q_proj",)).train(), some_tokens(20)
    of_deltas = tiny_model(**DELTAS)

    def loss():
        losses = (ops.cross_entropy(one.trunk(tokens, [13, 7]), one.head_weight, tokens) for one in (model, of_deltas))
        return sum(losses) + ops.swiglu(gate, up).sum()

    expected = loss()
    used = set()
    for module in FAST:
        for name in ("linear", "linears", "lora_linear", "rms_norm", "swiglu", "gated_linear", "attention", "attend",
                     "log_probs", "short_convolution", "last_inputs", "gated_delta"):  # fmt: skip
            if hasattr(module, name):
                monkeypatch.setattr(
                    module, name, lambda *a, m=module, n=name, **k: used.add(m) or getattr(plain, n)(*a)
                )
    with as_written():
        assert close(loss(), expected, TOL) and not used
    loss()
    assert used == set(FAST) - {flash_attention, windowed_attention}


@mutation(
    "lora/ops/fast_rms_norm.py", "(g * n).mean(-1, keepdim=True), value=-1)", "(g * n).mean(-1, keepdim=True), value=0)"
)
@mutation("lora/ops/fast_rms_norm.py", "(gradient * n).flatten(0, -2).sum(0)", "gradient.flatten(0, -2).sum(0)")
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("trained", [False, True])
def test_norms_and_their_closed_gradients_equal_the_formula(trained, offset):
    random = torch.Generator().manual_seed(4)
    norm = RMSNorm(24, 1e-5, offset).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=random)
    norm.weight.requires_grad_(trained)
    x, g = (torch.randn(3, 7, 24, generator=random, dtype=torch.float64) for _ in range(2))
    leaves = [x.requires_grad_(), *([norm.weight] if trained else [])]
    fast = [y := norm(x), *torch.autograd.grad(y, leaves, g)]
    with as_written():
        formula = [y := norm(x), *torch.autograd.grad(y, leaves, g)]
    assert torch.equal(fast[0], formula[0]) and len(fast) == 2 + trained
    assert all(close(a, b, 1e-13) for a, b in zip(fast, formula, strict=True))
    low = x.detach().bfloat16()
    found = norm.bfloat16()(low)
    with as_written():
        assert torch.equal(found, norm(low))


@mutation(
    "lora/ops/fast_swiglu.py",
    "ctx.save_for_backward(gate, up)",
    "ctx.save_for_backward(gate, up, activated(gate, activation)[1])",
)
@mutation(
    "lora/ops/fast_lora.py", "ctx.save_for_backward(gate, up, *saved)", "ctx.save_for_backward(gate, up, y, *saved)"
)
def test_swiglu_saves_gate_and_up_alone_also_in_front_of_an_adapter():
    assert len(fast_swiglu.swiglu(gate, up).grad_fn.saved_tensors) == 2
    saved = ops.gated_linear(gate, up, "silu", ADAPTED[0]).grad_fn.saved_tensors
    assert [x.shape for x in saved] == [(11, 9), (11, 9), (11, 3), (3, 9), (8, 9), (8, 3)]  # x Aᵀ, A, W, s B


@mutation("lora/ops/fast_rms_norm.py", "else n.to(x.dtype), scale", "else y, scale")
@mutation("lora/ops/fast_rms_norm.py", "bool(weight.all())", "True")
def test_a_norm_saves_what_the_linear_behind_it_saves_unless_a_weight_is_zero():
    gain = numbers(9, seed=7).detach()
    y = ops.rms_norm(x, gain, 1e-5)
    assert y.grad_fn.saved_tensors[0].data_ptr() == y.data_ptr()
    gain[2] = 0
    fast = with_gradients(ops.rms_norm, (x, gain, 1e-5), (x,))
    assert all(
        close(*pair, TOL) for pair in zip(fast, with_gradients(plain.rms_norm, (x, gain, 1e-5), (x,)), strict=True)
    )
