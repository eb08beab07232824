"""LoRALinear against formulas written out here: values, gradients, initial state, dropout, precision."""

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora import ops
from lora.adapter.layer import LoRALinear
from tests.helpers import as_written, bits, close, error, far
from tests.mutation import mutation

SHAPES = pytest.mark.parametrize("shape", [(37,), (11, 37), (3, 5, 37)], ids=str)
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def random_layer(bias=True, rank=5, alpha=8.0, dropout=0.0, dtype=torch.float64, base=None, seed=0, sizes=(37, 29)):
    """in 37, out 29; ||s B A|| is about 30 % of ||W||."""
    torch.manual_seed(seed)
    linear = nn.Linear(*sizes, bias=bias, dtype=base or dtype)
    nn.init.normal_(linear.weight, std=(2 / sizes[0]) ** 0.5)
    if bias:
        nn.init.normal_(linear.bias, std=0.5)
    layer = LoRALinear(linear, rank, alpha, dropout, dtype)
    nn.init.normal_(layer.lora_A, std=sizes[0] ** -0.5)
    nn.init.normal_(layer.lora_B, std=0.4 * rank**0.5 / alpha)
    ratio = layer.alpha / rank * (layer.lora_B @ layer.lora_A).norm() / linear.weight.norm()
    assert 0.05 < ratio < 0.5
    return layer


def random_input(shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(x, W, b, A, B, alpha):
    """y_o = b_o + Σ_i W_oi x_i + (alpha / r) Σ_r B_or Σ_i A_ri x_i, in float64."""
    x, W, A, B = (t.detach().double() for t in (x, W, A, B))
    y = torch.einsum("...i,oi->...o", x, W)
    y = y + (alpha / A.shape[0]) * torch.einsum("...i,ri,or->...o", x, A, B)
    return y if b is None else y + b.detach().double()


def parts(layer):
    return layer.base.weight, layer.base.bias, layer.lora_A, layer.lora_B


# ---- values ----------------------------------------------------------------------------------------------------------


@mutation("lora/ops/fast_lora.py", "[(s * B).to(x.dtype)", "[B.to(x.dtype)")
@SHAPES
@BIAS
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["f64", "f32"])
def test_forward_equals_dense_formula(shape, bias, dtype, tol):
    layer, x = random_layer(bias, dtype=dtype), random_input(shape, dtype)
    y = layer(x)
    assert y.dtype == dtype and close(y, formula(x, *parts(layer), alpha=8.0), tol)
    assert far(y, layer.base(x), tol)


@mutation("lora/adapter/layer.py", "return self.alpha / self.rank", "return self.alpha / self.rank**0.5")
@mutation(
    "lora/adapter/layer.py",
    "return self.scaling * (B.to(wide) @ A.to(wide))",
    "return self.scaling * (A.to(wide).T @ B.to(wide).T).reshape(self.base.weight.shape)",
)
@pytest.mark.parametrize(("rank", "alpha"), [(1, 3.0), (4, 4.0), (40, 100.0)])
def test_scaling_is_alpha_over_rank(rank, alpha):
    layer, x = random_layer(rank=4, alpha=4.0), random_input((11, 37))
    layer = LoRALinear(layer.base, rank, alpha, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    assert close(layer(x), formula(x, *parts(layer), alpha=alpha), 1e-13)
    W, _, A, B = parts(layer)
    assert close(layer.delta(), (alpha / rank) * torch.einsum("or,ri->oi", B, A), 1e-13)
    assert layer.delta().shape == W.shape


@mutation(
    "lora/ops/fast_lora.py",
    "A = torch.cat(As).to(x.dtype)",
    "A = torch.cat([B if A.shape == B.shape else A for A, B in zip(As, Bs)]).to(x.dtype)",
)
def test_square_layer_does_not_swap_A_and_B():
    layer, x = random_layer(rank=5, sizes=(5, 5), alpha=4.0), random_input((7, 5))
    assert close(layer(x), formula(x, *parts(layer), alpha=4.0), 1e-13)


@mutation("lora/adapter/layer.py", "return self.alpha / self.rank", "return self.alpha // self.rank or 1")
def test_doubling_alpha_doubles_delta_bitwise():
    one, two = random_layer(alpha=9.0, dtype=torch.float32), random_layer(alpha=9.0, dtype=torch.float32)
    two.alpha = 18.0
    assert torch.equal(two.delta(), 2 * one.delta()) and one.delta().abs().max() > 0


@mutation("lora/adapter/layer.py", "wide = torch.promote_types(A.dtype, torch.float32)", "wide = A.dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_delta_is_formed_in_float32_from_half_precision_parameters(dtype):
    layer = random_layer(dtype=torch.float32)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(dtype), layer.lora_B.data.to(dtype)
    expected = 8 / 5 * torch.einsum("or,ri->oi", layer.lora_B.double(), layer.lora_A.double())
    assert layer.delta().dtype == torch.float32 and close(layer.delta(), expected, 1e-6)


@mutation("lora/ops/plain.py", "branch(F.dropout(x, dropout), A", "branch(F.dropout(x.detach(), dropout), A")
@SHAPES
@BIAS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fast_path_equals_plain(shape, bias, training, dropout):
    layer, x = random_layer(bias, dropout=dropout).train(training), random_input(shape).requires_grad_()
    leaves, seed = (x, layer.lora_A, layer.lora_B), random_input((*shape[:-1], 29), seed=3)
    results = []
    for way in (nullcontext(), as_written()):
        torch.manual_seed(4)
        with way:
            y = layer(x)
        results.append((y, *torch.autograd.grad(y, leaves, seed)))
    assert all(close(ours, plain, 1e-13) for ours, plain in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(0, 37), (2, 0, 37)], ids=str)
def test_empty_input_gives_empty_output_and_zero_gradients(shape):
    layer, x = random_layer(), random_input(shape).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 29) and x.grad.shape == shape
    assert not layer.lora_A.grad.any() and not layer.lora_B.grad.any()


# ---- the initial state -----------------------------------------------------------------------------------------------


@mutation("lora/adapter/layer.py", "nn.init.zeros_(self.lora_B)", "nn.init.normal_(self.lora_B, std=1e-8)")
@SHAPES
@BIAS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_new_layer_computes_its_base_bit_for_bit(shape, bias, dtype, dropout):
    torch.manual_seed(0)
    base = nn.Linear(37, 29, bias=bias, dtype=dtype)
    layer, x = LoRALinear(base, 5, 8.0, dropout), random_input(shape, dtype)
    for training, view in itertools.product((True, False), (x, x.transpose(0, -2) if x.dim() > 1 else x)):
        assert torch.equal(layer.train(training)(view), base(view))


@mutation("lora/adapter/layer.py", "nn.init.zeros_(self.lora_B)", "nn.init.normal_(self.lora_B, std=1e-8)")
@mutation("lora/adapter/layer.py", "bound = self.base.in_features**-0.5", "bound = (2 / self.base.in_features)**0.5")
@mutation(
    "lora/adapter/layer.py",
    "nn.init.uniform_(self.lora_A, -bound, bound)",
    "nn.init.trunc_normal_(self.lora_A, std=bound, a=-bound, b=bound)",
)
def test_A_starts_uniform_within_its_bound_and_B_zero():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(1009, 31), 1000, 16.0)
    A, bound = layer.lora_A.detach().double().flatten(), 1009**-0.5
    assert A.abs().max() <= bound * (1 + 1e-6) and A.abs().max() > 0.999 * bound  # fp32 may round the bound up
    assert abs(A.var().item() / (bound**2 / 3) - 1) < 0.02 and abs(A.mean().item()) < 5 * bound / math.sqrt(3e6)
    n = A.numel()
    uniform = (A.sort().values / bound + 1) / 2
    steps = torch.arange(n, dtype=torch.float64) / n
    ks = max((uniform - steps).max().item(), (steps + 1 / n - uniform).max().item())
    assert ks * math.sqrt(n) < 1.63  # Kolmogorov-Smirnov, p = 0.01
    assert torch.equal(layer.lora_B, torch.zeros(31, 1000))


def test_reset_draws_A_anew_and_zeroes_B():
    layer = random_layer()
    A = layer.lora_A.detach().clone()
    layer.reset()
    assert not layer.lora_B.any() and not torch.equal(layer.lora_A, A)
    again = layer.lora_A.detach().clone()
    layer.reset()
    assert not torch.equal(layer.lora_A, again)


# ---- gradients -------------------------------------------------------------------------------------------------------


def closed_form(x, G, W, A, B, s):
    """dA = s Bᵀ Gᵀ x, dB = s Gᵀ (x Aᵀ), dx = G (W + s B A), in float64 over all rows of x and G."""
    flat_x, flat_G = x.detach().double().reshape(-1, x.shape[-1]), G.double().reshape(-1, G.shape[-1])
    W, A, B = (t.detach().double() for t in (W, A, B))
    d_A = s * torch.einsum("or,to,ti->ri", B, flat_G, flat_x)
    d_B = s * torch.einsum("to,ti,ri->or", flat_G, flat_x, A)
    d_x = torch.einsum("to,oi->ti", flat_G, W) + s * torch.einsum("to,or,ri->ti", flat_G, B, A)
    return d_A, d_B, d_x.reshape(x.shape)


@mutation("lora/ops/fast_lora.py", "d_Bs.append((part.T @ G).mul_(s).T)", "d_Bs.append((part.T @ G).mul_(s * s).T)")
@mutation("lora/ops/fast_lora.py", "d_As = (up.T @ rows)", "d_As = (up.T @ rows).mul(ctx.scalings[0])")
@mutation("lora/ops/fast_lora.py", "        d_rows = d_rows.addmm_(up, A)\n", "        pass\n")
@SHAPES
@BIAS
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_gradients_equal_closed_form(shape, bias, dtype, tol):
    layer, x = random_layer(bias, dtype=dtype), random_input(shape, dtype).requires_grad_()
    G = random_input((*shape[:-1], 29), dtype, seed=3)
    layer(x).backward(G)
    W, b, A, B = parts(layer)
    expected = closed_form(x, G, W, A, B, 8 / 5)
    for ours, other in zip((A.grad, B.grad, x.grad), expected, strict=True):
        assert ours.dtype == dtype and close(ours, other, tol)
        assert far(ours, torch.zeros_like(ours), tol)
    assert W.grad is None and (b is None or b.grad is None)


@mutation(
    "lora/ops/fast_lora.py",
    "d_rows = d_rows.addmm_(up, A)\n",
    "d_rows = d_rows.addmm_(up, A, alpha=2)\n",
)
def test_gradients_pass_gradcheck():
    layers = [random_layer(True, 3, 5.0, sizes=(7, 4)), random_layer(False, 2, 3.0, sizes=(7, 5), seed=9)]
    x = random_input((2, 3, 7)).requires_grad_()
    adapters = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]

    def function(x, A1, B1, A2, B2):
        for layer, (A, B) in zip(layers, ((A1, B1), (A2, B2)), strict=True):
            layer._parameters["lora_A"], layer._parameters["lora_B"] = A, B
        return ops.linears(x, layers)

    inputs = (x, *(p.detach().clone().requires_grad_() for p in adapters))
    assert torch.autograd.gradcheck(function, inputs)


def test_gradients_accumulate_over_calls():
    layer = random_layer()
    inputs = [random_input((11, 37), seed=i) for i in (1, 2)]
    G = random_input((11, 29), seed=3)
    for x in inputs:
        layer(x).backward(G)
    W, _, A, B = parts(layer)
    each = [closed_form(x, G, W, A, B, 8 / 5) for x in inputs]
    assert close(A.grad, each[0][0] + each[1][0], 1e-12) and close(B.grad, each[0][1] + each[1][1], 1e-12)


@mutation("lora/ops/fast_lora.py", "    @once_differentiable  # `down`", "    # `down`")
def test_second_derivatives_are_refused_or_right():
    """As a gradient penalty would take them: of |dA| + |dB| of a loss that is not linear in y."""
    layer, x = random_layer(sizes=(5, 4), rank=2, alpha=3.0), random_input((3, 5)).requires_grad_()
    W, b, A, B = parts(layer)

    def second(y):
        first = torch.autograd.grad(y.pow(3).sum(), [A, B], create_graph=True)
        x.grad = None
        sum(d.pow(2).sum() for d in first).backward()
        return x.grad

    try:
        ours = second(layer(x))
    except RuntimeError as refused:
        assert "once_differentiable" in str(refused)
    else:
        assert close(ours, second(F.linear(x, W, b) + 3 / 2 * (x @ A.T @ B.T)), 1e-12)


@mutation("lora/adapter/layer.py", "nn.init.zeros_(self.lora_B)", "nn.init.normal_(self.lora_B)")
def test_first_gradient_of_A_is_zero_and_of_B_is_not():
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(37, 29), 5, 8.0), random_input((11, 37), torch.float32)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    layer(x).pow(2).sum().backward()
    assert torch.equal(layer.lora_A.grad, torch.zeros(5, 37)) and (layer.lora_B.grad != 0).all()
    optimizer.step()
    optimizer.zero_grad()
    layer(x).pow(2).sum().backward()
    assert (layer.lora_A.grad != 0).all() and (layer.lora_B.grad != 0).all()


def test_input_that_needs_no_gradient_gets_none():
    layer, x = random_layer(), random_input((11, 37))
    layer(x).sum().backward()
    assert x.grad is None and layer.lora_A.grad is not None


# ---- several layers of one input -------------------------------------------------------------------------------------

KINDS = [(True, 3, 8.0, 29), (False, 5, 2.0, 13), (True, 1, 5.0, 41)]  # bias, rank, alpha, out


@mutation("lora/ops/fast_lora.py", "d_rows = G @ W if d_rows is None else d_rows.addmm_(G, W)", "d_rows = G @ W")
@mutation("lora/ops/fast_lora.py", "[s for *_, s in maps]", "[maps[0][-1] for _ in maps]")
@pytest.mark.parametrize("shape", [(37,), (11, 37), (3, 5, 37)], ids=str)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[::2])
def test_together_equals_each_alone(shape, order):
    layers = [random_layer(b, r, alpha, sizes=(37, out), seed=r) for b, r, alpha, out in (KINDS[i] for i in order)]
    x = random_input(shape).requires_grad_()
    seeds = [random_input((*shape[:-1], layer.base.out_features), seed=5 + i) for i, layer in enumerate(layers)]
    outputs = ops.linears(x, layers)
    torch.autograd.backward(outputs, seeds)
    d_x = torch.zeros_like(x)
    for layer, y, G in zip(layers, outputs, seeds, strict=True):
        W, b, A, B = parts(layer)
        assert close(y, formula(x, W, b, A, B, layer.alpha), 1e-13) and close(y, layer(x), 1e-13)
        d_A, d_B, part = closed_form(x, G, W, A, B, layer.alpha / layer.rank)
        assert close(A.grad, d_A, 1e-12) and close(B.grad, d_B, 1e-12)
        d_x += part
    assert close(x.grad, d_x, 1e-12)


def test_together_with_one_output_unused_gives_gradients_of_the_others():
    layers, x = [random_layer(seed=i) for i in range(2)], random_input((11, 37)).requires_grad_()
    G = random_input((11, 29), seed=3)
    ops.linears(x, layers)[1].backward(G)
    W, _, A, B = parts(layers[1])
    for ours, expected in zip((A.grad, B.grad, x.grad), closed_form(x, G, W, A, B, 8 / 5), strict=True):
        assert close(ours, expected, 1e-12)
    assert layers[0].lora_A.grad is None or not layers[0].lora_A.grad.any()


@mutation(
    "lora/ops/fast_lora.py",
    "    if not all(maps):\n        return None\n",
    "    maps = [m or maps[0] for m in maps]\n",
)
@pytest.mark.parametrize("state", ["disabled", "merged", "dropout"])
def test_together_with_layers_in_different_states_equals_each_alone(state):
    layers, x = [random_layer(seed=i) for i in range(3)], random_input((11, 37))
    if state == "disabled":
        layers[1].enabled = False
    elif state == "merged":
        layers[1].merged_weight = (layers[1].base.weight + layers[1].delta()).detach()
    else:
        layers[1].dropout = 0.5
    torch.manual_seed(7)
    outputs = ops.linears(x, layers)
    assert close(outputs[0], layers[0](x), 1e-13) and close(outputs[2], layers[2](x), 1e-13)
    torch.manual_seed(7)
    assert close(outputs[1], layers[1](x), 1e-13)
    assert far(outputs[1], ops.linears(x, [random_layer(seed=5)])[0], 1e-13)


# ---- dropout ---------------------------------------------------------------------------------------------------------


@mutation(
    "lora/ops/fast_lora.py",
    "        return form.linear(x, W, b) + plain.branch(F.dropout(x, dropout), A",
    "        x = F.dropout(x, dropout)\n        return form.linear(x, W, b) + plain.branch(x, A",
)
def test_dropout_leaves_the_base_part_alone():
    layer, x = random_layer(dropout=0.5).train(), random_input((11, 37))
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.base(x))


@mutation(
    "lora/ops/fast_lora.py",
    "plain.branch(F.dropout(x, dropout), A, B, s)",
    "F.dropout(plain.branch(x, A, B, s), dropout)",
)
def test_dropout_drops_inputs_of_the_branch():
    """With W = 0 and A the identity, B⁻¹ y / s is what the branch has read: each input is 0 or x / (1 - p)."""
    layer, x = random_layer(rank=6, sizes=(6, 6), dropout=0.25, alpha=9.0).train(), random_input((4000, 6))
    nn.init.zeros_(layer.base.weight)
    nn.init.zeros_(layer.base.bias)
    nn.init.eye_(layer.lora_A)
    nn.init.orthogonal_(layer.lora_B)
    read = layer(x).detach() @ layer.lora_B.detach() / (9 / 6)
    dropped = read.abs() < 1e-9
    assert close(read, torch.where(dropped, 0.0, x / 0.75), 1e-12)
    assert abs(dropped.double().mean().item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / read.numel())
    alone = dropped.any(1) & ~dropped.all(1)
    assert alone.double().mean() > 0.5  # inputs are dropped one by one, not whole rows


@mutation("lora/ops/fast_lora.py", "branch(F.dropout(x, dropout), A", "branch((1 - dropout) * F.dropout(x, dropout), A")
def test_dropout_mean_over_masks_is_the_eval_output():
    p, n = 0.3, 100_000
    layer, x = random_layer(sizes=(7, 5), rank=3, alpha=5.0, dropout=p).train(), random_input((7,))
    torch.manual_seed(0)
    with torch.no_grad():
        mean = layer(x.expand(n, 7)).mean(0)
        layer.eval()
        expected = layer(x)
        D = 5 / 3 * layer.lora_B @ layer.lora_A
        sigma = ((D * x).pow(2).sum(1) * p / (1 - p) / n).sqrt()
    assert ((mean - expected).abs() < 4 * sigma).all() and (sigma > 1e-5).all()


@mutation("lora/adapter/layer.py", "return self.dropout if self.training else 0.0", "return self.dropout")
def test_dropout_acts_in_training_only():
    layer, x = random_layer(dropout=0.5), random_input((11, 37))
    evaluated = layer.eval()(x)
    assert torch.equal(evaluated, layer(x)) and close(evaluated, formula(x, *parts(layer), alpha=8.0), 1e-13)
    layer.train()
    assert far(layer(x), layer(x), 1e-12) and far(layer(x), evaluated, 1e-12)


# ---- precision -------------------------------------------------------------------------------------------------------


def bfloat16_case():
    layer = random_layer(dtype=torch.float32, base=torch.bfloat16, sizes=(257, 129), rank=7)
    x = random_input((64, 257), torch.bfloat16).requires_grad_()
    return layer, x, random_input((64, 129), torch.bfloat16, seed=3)


@mutation("lora/ops/plain.py", "A.to(x.dtype).T)) @ B.to(x.dtype).T", "A.to(x.dtype).T)).to(B.dtype) @ B.T")
def test_output_has_the_dtype_of_the_input_and_gradients_that_of_the_parameters():
    layer, x, G = bfloat16_case()
    y = layer(x)
    y.backward(G)
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    assert layer.delta().dtype == torch.float32
    with as_written():
        assert layer(x).dtype == torch.bfloat16


def test_bfloat16_is_as_near_to_float64_as_the_formula_in_bfloat16():
    """e(ours) <= 1.5 e(formula computed in bf16 by autograd) + 2⁻⁸ max|y|, for the output and each gradient."""
    layer, x, G = bfloat16_case()
    y = layer(x)
    y.backward(G)
    W, b, A, B = parts(layer)
    exact = [formula(x, W, b, A, B, 8.0), *closed_form(x, G, W, A, B, 8 / 7)]
    A16, B16 = (t.detach().bfloat16().requires_grad_() for t in (A, B))
    x16 = x.detach().clone().requires_grad_()
    y16 = F.linear(x16, W, b) + 8 / 7 * F.linear(F.linear(x16, A16), B16)
    y16.backward(G)
    for ours, reference, truth in zip(
        (y, A.grad, B.grad, x.grad), (y16, A16.grad, B16.grad, x16.grad), exact, strict=True
    ):
        top = truth.abs().max().item()
        mine, other = ((t.detach().double() - truth).abs().max().item() for t in (ours, reference))
        print(f"error {mine:.3g}, of the formula in bf16 {other:.3g}, of {top:.3g}")
        assert mine <= 1.5 * other + 2**-8 * top and mine < 0.1 * top


# ---- switching off, merged, refused ----------------------------------------------------------------------------------


@mutation(
    "lora/adapter/layer.py",
    "return self.merged_weight if self.merged and self.enabled else self.base.weight",
    "return self.merged_weight if self.merged else self.base.weight",
)
@BIAS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("merged", [False, True], ids=["adapting", "merged"])
def test_disabled_layer_computes_its_base_bit_for_bit(bias, dtype, merged):
    layer = random_layer(bias, dropout=0.5, dtype=torch.promote_types(dtype, torch.float32), base=dtype).train()
    x = random_input((3, 5, 37), dtype)
    if merged:
        layer.merged_weight = (layer.base.weight + layer.delta()).to(dtype).detach()
        assert error(layer(x), layer.base(x)) > 0.05
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x)) and layer.weight is layer.base.weight
    assert not layer(x).requires_grad


def test_base_tensor_is_the_very_one_and_never_written():
    base = nn.Linear(37, 29)
    before = bits(base.weight).clone()
    layer = LoRALinear(base, 5, 8.0)
    nn.init.normal_(layer.lora_B)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(random_input((11, 37), torch.float32)).pow(2).sum().backward()
    optimizer.step()
    assert layer.base is base and torch.equal(bits(base.weight), before) and base.weight.grad is None


@mutation("lora/adapter/layer.py", "not 0 <= dropout < 1:", "dropout < 0:")
@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": 2.0},
        {"rank": "8"},
        {"rank": True},
        {"alpha": 0.0},
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"dropout": -0.1},
        {"dropout": 1.0},
        {"dropout": float("nan")},
    ],
    ids=str,
)
def test_impossible_rank_alpha_or_dropout_is_refused_before_anything_changes(wrong):
    base = nn.Linear(3, 5)
    with pytest.raises(ValueError, match="rank >= 1"):
        LoRALinear(base, **({"rank": 2, "alpha": 4.0} | wrong))
    assert base.weight.requires_grad
