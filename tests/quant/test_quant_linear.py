"""What is computed and trained on packed weights is to the bit what is on the numbers they stand for, and nobody keeps
those numbers."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lora import ops
from lora.adapter import sets, value_head
from lora.adapter.inject import disabled, inject, lora_layers
from lora.adapter.layer import LoRALinear
from lora.adapter.merge import merge, merge_and_unload, unload, unmerge
from lora.adapter.variants import DoRALinear, PiSSALinear, RsDoRALinear, RsLoRALinear
from lora.ops.fast_decoding import for_decoding
from lora.quant.linear import QuantLinear
from lora.quant.packed import Packed
from tests.helpers import as_written, bits, close, far, randomise_adapter, some_tokens, tiny_model
from tests.mutation import mutation
from tests.quantised import FORMATS, both, watched

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
KINDS = [LoRALinear, RsLoRALinear, DoRALinear, RsDoRALinear, PiSSALinear]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32", "bfloat16"])
forms = pytest.mark.parametrize("form", FORMATS)
kinds = pytest.mark.parametrize("kind", KINDS)
drops = pytest.mark.parametrize("dropout", [0.0, 0.3])


def equal(a, b) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


# ---- products --------------------------------------------------------------------------------------------------------


def weights(form: str, dtype: torch.dtype, out: int = 24) -> tuple:
    """Packed, and its numbers."""
    random = torch.Generator().manual_seed(out)
    packed = FORMATS[form](torch.randn(out, 256, generator=random) / 16)
    return packed, packed.dequantise(dtype)


def numbers(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()


def taken(op, arguments, leaves) -> list[torch.Tensor]:
    """What an op gives, and the gradients of a weighted sum of it; dropout draws the same each time."""
    torch.manual_seed(0)
    y = op(*arguments)
    return [y, *torch.autograd.grad((y * numbers(*y.shape, dtype=y.dtype, seed=9).detach()).sum(), leaves)]


@mutation("lora/ops/fast_quantised.py", "return gradient @ dense(", "return 0 * gradient @ dense(")
@mutation("lora/ops/fast_quantised.py", "return F.linear(x, numbers, b)", "return F.linear(x, numbers)")
@forms
@dtypes
def test_a_product_with_packed_weights_and_its_gradient_are_those_with_their_numbers(dtype, form):
    W, dense = weights(form, dtype)
    for shape in ((7, 256), (2, 3, 256), (256,)):
        for b in (None, numbers(24, dtype=dtype).detach()):
            x = numbers(*shape, dtype=dtype)
            right = taken(ops.linear, (x, dense, b), [x])
            assert equal(taken(ops.linear, (x, W, b), [x]), right) and far(right[1], 0 * right[1], 1e-3)
            with as_written():
                assert equal(taken(ops.linear, (x, W, b), [x]), right)


@mutation("lora/ops/fast_lora.py", "W = dense(W, G.dtype)", "W = dense(W, G.dtype) / 2", case="0.0-float64-nf4")
@forms
@dtypes
@drops
def test_a_product_with_an_adapter_and_its_gradients_are_those_with_the_numbers(dropout, dtype, form):
    W, dense = weights(form, dtype)
    x, b = numbers(7, 256, dtype=dtype), numbers(24, dtype=dtype).detach()
    A, B = numbers(3, 256, seed=1), numbers(24, 3, seed=2)

    found, right = (taken(ops.lora_linear, (x, W, b, A, B, 0.7, dropout), [x, A, B]) for W in (W, dense))
    assert equal(found, right)
    with as_written():
        found, written = (taken(ops.lora_linear, (x, W, b, A, B, 0.7, dropout), [x, A, B]) for W in (W, dense))
    assert equal(found, written) and all(close(a, b, 1e-2) for a, b in zip(found, right, strict=True))


SIZES = ("q", 24), ("k", 8), ("v", 16)


@forms
@dtypes
def test_several_layers_of_one_input_some_of_them_packed_are_as_their_numbers(dtype, form):
    linears = nn.ModuleDict({f"{name}_proj": nn.Linear(256, out, name == "v") for name, out in SIZES})
    packed, dense = both(linears.to(dtype), form)
    packed["k_proj"] = dense["k_proj"]  # as a file has blocks for some and none for others
    x = numbers(5, 256, dtype=dtype)
    for model in (packed, dense):
        inject(model, 3, 6, dtype=torch.promote_types(dtype, torch.float32))
        randomise_adapter(model)
    found, right = (taken(beside, (x, model), [x, *trained(model)]) for model in (packed, dense))
    assert equal(found, right)


def beside(x: torch.Tensor, linears: nn.ModuleDict) -> torch.Tensor:
    return torch.cat(ops.linears(x, list(linears.values())), -1)


def trained(model: nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


# ---- what is kept for the backward pass ------------------------------------------------------------------------------

TOKENS, LENGTHS = some_tokens(31), [20, 11]


def models(form="nf4", dtype=torch.float64, kind=LoRALinear, dropout=0.0, targets=("all",), **overrides) -> list:
    """A packed model and one of its numbers, each with the same random adapter, in training mode."""
    found = both(tiny_model(dtype, **{"hidden_size": 36, "num_hidden_layers": 2} | overrides), form)
    for model in found:
        torch.manual_seed(3)
        inject(model, 3, 6, dropout, targets, torch.promote_types(dtype, torch.float32), kind, init="kaiming")
        randomise_adapter(model.train())
    return list(found)


def loss_of(model) -> torch.Tensor:
    torch.manual_seed(5)
    hidden = model.trunk(TOKENS, LENGTHS)
    return ops.cross_entropy(hidden, model.head_weight, TOKENS.roll(-1))


def learned(model) -> list[torch.Tensor]:
    """The loss and all gradients."""
    loss = loss_of(model)
    return [loss, *torch.autograd.grad(loss, trained(model))]


def saved_bytes(model) -> int:
    """Those of all storages that autograd keeps of a loss, parameters left aside."""
    own, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def save(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        loss = loss_of(model)
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in storages.items() if place not in own)


@mutation(
    "lora/ops/fast_quantised.py",
    "return (None, W) if numbers is not W and not is_recomputing() else (numbers, None)",
    "return numbers, None",
    case="0.0-LoRALinear",
)
@mutation(
    "lora/ops/fast_lora.py",
    "form = plain if isinstance(W, Tensor) else fast_quantised",
    "form = plain",
    case="0.3-LoRALinear",
)
@kinds
@drops
def test_after_the_forward_pass_nobody_holds_numbers_and_autograd_keeps_what_it_keeps_of_a_dense_model(
    monkeypatch, dropout, kind
):
    packed, dense = models(kind=kind, dropout=dropout)
    assert saved_bytes(packed) == saved_bytes(dense)
    with watched(monkeypatch) as numbers:
        loss = loss_of(packed)
        assert numbers.made >= 14 and not numbers.held
        loss.backward()
        assert not numbers.held


@mutation("lora/ops/__init__.py", ", context_fn=fast_quantised.contexts)", ")")
@mutation(
    "lora/ops/fast_quantised.py",
    "return (None, W) if numbers is not W and not is_recomputing() else (numbers, None)",
    "return numbers, None",
)
@mutation("lora/ops/fast_lora.py", "saved, gradients, ctx.needs_input_grad[0])", "saved, gradients, True)")
@pytest.mark.parametrize("again", [False, True])
def test_weights_become_numbers_twice_a_step_and_few_of_them_at_a_time(monkeypatch, again):
    """Once in each pass, but for the first block's input, which needs no gradient. Where blocks are computed again,
    those of a block stay from its second forward pass to its gradient."""
    packed, _ = models(num_hidden_layers=3)
    every, most = sum(isinstance(module, QuantLinear) for module in packed.modules()), []
    packed.checkpoint_activations = again
    with watched(monkeypatch) as numbers:
        for p in trained(packed):
            p.register_post_accumulate_grad_hook(lambda _: most.append(len(numbers.held)))
        loss = loss_of(packed)
        assert numbers.made == every == 21 and not numbers.held
        loss.backward()
        assert numbers.made == 2 * every - 3 * (not again) and not numbers.held
    assert max(most) <= (7 if again else 1)


@kinds
@drops
def test_recomputed_on_packed_weights_gives_the_same_bits(dropout, kind):
    packed, dense = models(kind=kind, dropout=dropout)
    first = learned(packed)
    for model in (packed, dense):
        model.checkpoint_activations = True
        assert equal(learned(model), first)


# ---- everything that is done with an adapter -------------------------------------------------------------------------


@mutation("lora/adapter/layer.py", "return packed if packed is not None and not (self.merged and self.enabled) else",
          "return packed if packed is not None else", case="nf4-qwen2-0.0-LoRALinear")  # fmt: skip
@kinds
@drops
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_every_variant_computes_learns_merges_and_unmerges_as_on_the_numbers(form, family, dropout, kind):
    """qwen2 has biases."""
    packed, dense = models(form, torch.float32, kind, dropout, model_type=family)
    assert equal(learned(packed), learned(dense))
    packed.eval(), dense.eval()
    before, blocks = (
        packed(TOKENS),
        [bits(b) for m in packed.modules() if isinstance(m, QuantLinear) for b in m.buffers()],
    )
    with disabled(packed), disabled(dense):
        base = packed(TOKENS)
        assert torch.equal(base, dense(TOKENS)) and far(base, before, 1e-4)
    merge(packed), merge(dense)
    merged = packed(TOKENS)
    assert torch.equal(merged, dense(TOKENS)) and close(merged, before, 1e-4)
    with disabled(packed):
        assert torch.equal(packed(TOKENS), base)
    unmerge(packed)
    assert torch.equal(packed(TOKENS), before)
    assert equal(blocks_of(packed), blocks)


def blocks_of(model: nn.Module) -> list[torch.Tensor]:
    return [bits(block) for module in model.modules() if isinstance(module, Packed) for block in module.buffers()]


@mutation("lora/adapter/merge.py", "linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), base.bias",
          "linear.weight = nn.Parameter(weight, requires_grad=False)", case="LoRALinear")  # fmt: skip
@kinds
def test_unloaded_it_is_packed_again_and_merged_and_unloaded_it_is_plain_linears(kind):
    packed, _ = models(kind=kind, model_type="qwen2")
    before = packed.eval()(TOKENS)
    unload(packed)
    assert not lora_layers(packed) and isinstance(packed.model.layers[0].mlp.up_proj, QuantLinear)
    packed, _ = models(kind=kind, model_type="qwen2")
    merge_and_unload(packed.eval())
    assert not any(isinstance(m, QuantLinear) for m in packed.modules())
    assert close(packed(TOKENS), before, 1e-9)


@mutation("lora/adapter/merge.py", "if weight is not None and type(layer.base) is not nn.Linear:", "if False:")
def test_merging_forms_the_numbers_of_a_tied_model_twice_to_look_and_to_keep(monkeypatch):
    packed, _ = models(tie_word_embeddings=True)
    with watched(monkeypatch) as numbers:
        merge_and_unload(packed)
    assert numbers.made == 2 * 14 and packed.config.tie_word_embeddings


def test_an_adapter_is_taken_out_and_put_in_around_the_very_same_blocks():
    packed, _ = models()
    linear, before = packed.model.layers[1].mlp.up_proj.base, learned(packed)
    value_head.add(packed, 36).requires_grad_(False)
    taken_out = sets.take_out(packed)
    assert packed.model.layers[1].mlp.up_proj is linear and type(linear) is QuantLinear
    sets.put_in(packed, taken_out)
    assert equal(learned(packed), before) and value_head.of(packed) is taken_out.head


@pytest.mark.parametrize("targets", [("q_proj",), ("mlp",), (r"re:.*\.1\..*",)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_where_only_some_linears_are_patched_all_is_as_on_the_numbers(monkeypatch, dropout, targets):
    packed, dense = models(targets=targets, dropout=dropout)
    for again in (False, True):
        packed.checkpoint_activations = again
        assert equal(learned(packed), learned(dense))
        with watched(monkeypatch) as numbers:
            loss = loss_of(packed)
            assert numbers.made and not numbers.held
            loss.backward()


@dtypes
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_for_decoding_answers_are_those_on_the_numbers(merged, patched, dtype):
    packed, dense = (model.eval() for model in models(dtype=dtype, model_type="qwen2"))
    found = []
    for model in (packed, dense):
        if merged and patched:
            merge(model)
        if not patched:
            unload(model)
        with torch.no_grad(), for_decoding(model.groups()):
            found.append(model(TOKENS))
        with torch.no_grad():
            assert close(found[-1], model(TOKENS), {torch.bfloat16: 0.1, torch.float32: 1e-5}.get(dtype, 1e-12))
    assert close(*found, {torch.bfloat16: 0.1, torch.float32: 1e-5}.get(dtype, 1e-12))


@drops
@pytest.mark.parametrize("plain", [False, True])
def test_under_autocast_packed_weights_are_their_numbers(plain, dropout):
    found = []
    for model in models(dtype=torch.float32, dropout=dropout):
        with as_written() if plain else nullcontext(), torch.autocast("cpu", torch.bfloat16):
            found.append(learned(model))
    assert equal(*found)


@mutation("lora/quant/packed.py", "fn(t.reshape(-1).view(torch.uint8))", "fn(t)", case="nf4")
@forms
def test_a_model_that_is_moved_to_another_dtype_keeps_the_bits_of_its_blocks(form):
    packed, _ = both(nn.ModuleDict({"q_proj": nn.Linear(256, 8)}), form)
    before = packed["q_proj"].weight
    packed.to(torch.bfloat16).double()
    assert torch.equal(packed["q_proj"].packed.dequantise(torch.float32), before)
