"""Under `torch.autocast`, in other people's loops, layers compute what they compute without it, but for rounding."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora import ops
from lora.adapter.inject import inject, lora_layers
from lora.adapter.layer import LoRALinear
from lora.adapter.variants import DoRALinear, PiSSALinear, RsDoRALinear, RsLoRALinear
from tests.helpers import as_written, close, error, randomise, randomise_adapter, some_tokens, tiny_model
from tests.mutation import mutation

KINDS = [LoRALinear, RsLoRALinear, DoRALinear, RsDoRALinear, PiSSALinear]
TOL = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


def cast(dtype: torch.dtype, enabled: bool = True):
    return torch.autocast("cpu", dtype, enabled=enabled)


def run(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, enabled: bool) -> tuple[torch.Tensor, dict]:
    """The output, and the gradients of what trains and of x, with one draw of dropout."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    with cast(dtype, enabled):
        y = model(x)
    y.float().square().sum().backward()
    return y, {"x": x.grad} | {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@mutation("lora/ops/__init__.py", "torch.compiler.is_compiling() or is_autocast(x)", "torch.compiler.is_compiling()",
          case="False-base0-bfloat16-0.0-LoRALinear")  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plain", [False, True])
def test_values_and_gradients_are_those_without_autocast_within_its_rounding(plain, base, dtype, dropout, kind):
    model = randomise(nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 16, bias=False))).to(base)
    inject(model, 4, 8, dropout, ["0", "1"], kind=kind)
    randomise_adapter(model.train())
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    with as_written() if plain else nullcontext():
        y, gradients = run(model, x, dtype, True)
        exact = model.to(torch.float32)
        expected, right = run(exact, x, dtype, False)
    tol = max(TOL[dtype], TOL.get(base, 0))
    assert y.dtype == dtype and close(y, expected, tol)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and close(gradient, right[name], 3 * tol), name
    with torch.no_grad():
        bare = nn.Sequential(*(layer.base for layer in lora_layers(model).values()))
    assert error(expected, bare(x)) > 3 * tol


@mutation("lora/adapter/layer.py", "with ops.no_autocast(A):", "if True:")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_under_autocast_has_the_bits_of_what_is_merged_without(kind):
    model = randomise(nn.Sequential(nn.Linear(24, 40)))
    inject(model, 4, 8, targets=["0"], kind=kind)
    [layer] = lora_layers(randomise_adapter(model)).values()
    with cast(torch.bfloat16):
        delta = layer.delta()
    assert delta.dtype == torch.float32 and torch.equal(delta, layer.delta())


@mutation("lora/ops/__init__.py", "form = plain if _plain or is_autocast(hidden) else", "form = plain if _plain else")
@mutation("lora/ops/__init__.py", "        return plain.attention(", "        return fast_attention.attention(")
def test_the_whole_decoder_trains_under_autocast():
    """Its other formulas as well: RoPE's angles in float32 meet products in bfloat16."""
    model, tokens = tiny_model(torch.float32), some_tokens(40)
    inject(model, 4, 8)
    randomise_adapter(model.train())
    found = {}
    for enabled in (True, False):
        model.zero_grad()
        with cast(torch.bfloat16, enabled):
            hidden = model.trunk(tokens, [25, 15])
            loss = ops.cross_entropy(hidden, model.head_weight, tokens.roll(-1))
        loss.backward()
        found[enabled] = loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert close(found[True][0], found[False][0], 1e-2)
    one, two = (torch.cat([g.flatten() for g in gradients.values()]) for _, gradients in found.values())
    assert F.cosine_similarity(one, two, dim=0) > 0.99
    with cast(torch.bfloat16):  # as a model of other people's may have them: a head in bfloat16, states in float32
        loss = ops.cross_entropy(hidden.detach().requires_grad_(), model.head_weight.bfloat16(), tokens.roll(-1))
    loss.backward()
    assert close(loss, found[False][0], 1e-2)
