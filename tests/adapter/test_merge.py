"""Merged is the adapter's sum in one rounding, unmerged is the base bit for bit, and a refusal changes nothing."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora.adapter.inject import disabled, lora_layers
from lora.adapter.layer import LoRALinear
from lora.adapter.merge import changes_a_weight, merge, merge_and_unload, merged_weight, unload, unmerge
from tests.helpers import (
    bits,
    close,
    error,
    far,
    patched,
    same,
    snapshot,
    some_tokens,
    tiny_model,
)
from tests.mutation import mutation

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def base_tensors(model):
    """The tensors of the unpatched model under their own names."""
    return {name.replace(".base.", "."): t for name, t in snapshot(model).items() if "lora_" not in name}


def state(model):
    """All tensors, the merged ones too, and which layers are on."""
    layers = lora_layers(model)
    merged = {f"{path}.merged": layer.merged_weight for path, layer in layers.items() if layer.merged}
    flags = {f"{path}.enabled": torch.tensor(layer.enabled) for path, layer in layers.items()}
    return snapshot(model) | {name: tensor.clone() for name, tensor in (merged | flags).items()}


def hand_merged(model):
    """Logits with W + s B A put into a copy of the base model, computed here."""
    plain = tiny_model(model.dtype)
    with torch.no_grad():
        for path, layer in lora_layers(model).items():
            A, B = layer.lora_A.double(), layer.lora_B.double()
            weight = plain.get_submodule(path).weight
            weight.copy_(weight.double() + layer.alpha / layer.rank * torch.einsum("or,ri->oi", B, A))
    return plain(some_tokens())


# ---- merge -----------------------------------------------------------------------------------------------------------


@mutation(
    "lora/adapter/merge.py",
    "    for layer, weight in sums.items():",
    "    for layer, weight in list(sums.items())[1:]:",
)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["f64", "f32"])
def test_merged_logits_equal_adapter_logits(dtype, tol):
    model = tiny_model(dtype)
    base = model(some_tokens())
    adapter = patched(model)(some_tokens())
    merge(model)
    assert all(layer.merged for layer in lora_layers(model).values())
    merged = model(some_tokens())
    assert close(merged, adapter, tol) and close(merged, hand_merged(model), tol) and far(merged, base, tol)


def test_merged_bfloat16_is_as_near_to_float64_as_the_adapter_in_bfloat16():
    model = patched(tiny_model(torch.bfloat16))
    exact = copy.deepcopy(model).double()(some_tokens())
    adapter = model(some_tokens())
    merge(model)
    merged = model(some_tokens())
    top = exact.abs().max().item()
    mine, other = ((y.double() - exact).abs().max().item() for y in (merged, adapter))
    print(f"error merged {mine:.3g}, as adapter {other:.3g}, of {top:.3g}")
    assert mine <= 1.5 * other + 2**-8 * top and mine < 0.2 * top


def rounded_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16, to nearest and ties to even, by integer arithmetic on the bits."""
    n = x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    n = (n + 0x7FFF + ((n >> 16) & 1)) >> 16
    return n.to(torch.int32).to(torch.int16).view(torch.bfloat16)


def exact_delta_model():
    """A bf16 model whose ΔW is exact in float32 and longer than bfloat16: s = 1/2, A and B small integers / 32."""
    model = patched(tiny_model(torch.bfloat16), rank=4, alpha=2)
    random = torch.Generator().manual_seed(5)
    for layer in lora_layers(model).values():
        for p in (layer.lora_A, layer.lora_B):
            p.data = torch.randint(-31, 32, p.shape, generator=random).float() / 32
    return model


@mutation(
    "lora/adapter/merge.py",
    "return (weight.to(wide) + delta).to(dtype or weight.dtype)",
    "return (weight + delta.to(weight.dtype)).to(dtype or weight.dtype)",
)
def test_merged_bfloat16_weight_is_the_float32_sum_rounded_once():
    model = exact_delta_model()
    merge(model)
    for layer in lora_layers(model).values():
        D = 0.5 * torch.einsum("or,ri->oi", layer.lora_B.double(), layer.lora_A.double())
        total = (layer.base.weight.double() + D).float()
        assert layer.merged_weight.dtype == torch.bfloat16
        assert torch.equal(bits(layer.merged_weight), bits(rounded_to_bfloat16(total)))
        assert (total.bfloat16().float() != total).double().mean() > 0.5  # there is something to round
        assert (D.bfloat16().double() != D).double().mean() > 0.1  # and it would show if ΔW were rounded too


@mutation(
    "lora/adapter/merge.py",
    "return (weight.to(wide) + delta).to(dtype or weight.dtype)",
    "return (weight.to(wide) + delta).to(weight.dtype).to(dtype or weight.dtype)",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, None], ids=str)
def test_merged_weight_rounds_once_to_the_dtype_asked_for(dtype):
    """merge.py --dtype: a bf16 weight written as float32 keeps the whole sum."""
    for layer in lora_layers(exact_delta_model()).values():
        weight, D = layer.base.weight, layer.delta()
        ours = merged_weight(weight, D, dtype)
        exact = weight.double() + D.double()
        assert ours.dtype == (dtype or torch.bfloat16)
        assert torch.equal(ours, exact.float().to(ours.dtype)) and ours.data_ptr() != weight.data_ptr()
        assert torch.equal(merged_weight(weight.double(), D), exact)


@mutation(
    "lora/adapter/merge.py",
    "layers = {path: layer for path, layer in lora_layers(model).items() if not layer.merged}",
    """layers = lora_layers(model)
    for layer in layers.values():
        layer.base.weight.data = layer.weight.data""",
)
@DTYPES
def test_merging_twice_is_merging_once(dtype):
    model = patched(tiny_model(dtype))
    merge(model)
    once, logits = state(model), model(some_tokens())
    merge(model)
    assert same(once, state(model)) and torch.equal(model(some_tokens()), logits)


def test_merge_completes_a_model_that_is_merged_in_part():
    model = patched(tiny_model())
    merge(model)
    whole = state(model)
    layers = list(lora_layers(model).values())
    for layer in layers[::2]:
        layer.merged_weight = None
    merge(model)
    assert same(whole, state(model))


@mutation(
    "lora/adapter/merge.py",
    """        layer.merged_weight = weight
""",
    """        layer.base.weight.data = weight; layer.merged_weight = weight
""",
)
def test_merging_leaves_the_base_and_the_adapter_alone():
    model = patched(tiny_model(torch.bfloat16))
    before = snapshot(model)
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    merge(model)
    assert same(before, snapshot(model))
    assert pointers == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


# ---- unmerge ---------------------------------------------------------------------------------------------------------


@mutation(
    "lora/adapter/merge.py",
    """        layer.merged_weight = None
""",
    """        layer.base.weight.data = (layer.merged_weight - layer.delta()).to(
            layer.base.weight.dtype
        ).detach(); layer.merged_weight = None
""",
)
def test_unmerging_restores_every_bit_over_1000_bfloat16_cycles():
    model = patched(tiny_model(torch.bfloat16, num_hidden_layers=1, attention_bias=True))
    before, layers = base_tensors(model), list(lora_layers(model).values())
    with disabled(model):
        logits = model(some_tokens())
    torch.manual_seed(0)
    for cycle in range(1000):
        for layer in layers:
            nn.init.normal_(layer.lora_A)
            nn.init.normal_(layer.lora_B, std=0.1)
        merge(model)
        assert cycle % 100 or all((layer.weight != layer.base.weight).double().mean() > 0.5 for layer in layers)
        unmerge(model)
        assert cycle % 100 or same(before, base_tensors(model))
    assert same(before, base_tensors(model)) and not any(layer.merged for layer in layers)
    for layer in layers:
        nn.init.zeros_(layer.lora_B)
    assert torch.equal(model(some_tokens()), logits)


def test_merging_and_unmerging_keeps_the_adapters_logits():
    model = patched(tiny_model(torch.float32))
    logits = model(some_tokens())
    merge(model)
    unmerge(model)
    assert torch.equal(model(some_tokens()), logits)


JOURNEYS = {
    "other dtype and back": lambda model: model.to(torch.float32).to(torch.bfloat16),
    "the same dtype": lambda model: model.to(torch.bfloat16),
    "deepcopy": copy.deepcopy,
    "cpu": lambda model: model.to("cpu"),
    "train and eval": lambda model: model.train().eval(),
    "state dict": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
}


@pytest.mark.parametrize("journey", JOURNEYS.values(), ids=JOURNEYS)
def test_unmerging_restores_every_bit_after(journey):
    model = patched(tiny_model(torch.bfloat16), dtype=torch.bfloat16)
    adapter, before = model(some_tokens()), base_tensors(model)
    merge(model)
    merged = model(some_tokens())
    model = journey(model)
    assert all(layer.merged for layer in lora_layers(model).values()) and torch.equal(model(some_tokens()), merged)
    with disabled(model):
        base = model(some_tokens())
    assert error(base, merged) > 0.1
    unmerge(model)
    assert same(before, base_tensors(model)) and torch.equal(model(some_tokens()), adapter)


@mutation(
    "lora/adapter/layer.py",
    'self.register_buffer("merged_weight", None, persistent=False)',
    "self.merged_weight = None",
)
def test_moving_a_merged_model_moves_the_merged_weight_too():
    model = patched(tiny_model(torch.float32))
    merge(model)
    logits = model(some_tokens())
    assert close(model.double()(some_tokens()), logits, 1e-5)
    assert all(layer.merged_weight.dtype == torch.float64 for layer in lora_layers(model).values())
    assert all(layer.merged_weight.is_meta for layer in lora_layers(copy.deepcopy(model).to("meta")).values())


def test_a_copy_shares_nothing_with_its_original():
    model = patched(tiny_model(torch.float32))
    merge(model)
    before, twin = state(model), copy.deepcopy(model)
    unmerge(twin)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert same(before, state(model))


@mutation(
    "lora/adapter/layer.py",
    'self.register_buffer("merged_weight", None, persistent=False)',
    'self.register_buffer("merged_weight", None)',
)
def test_a_state_dict_taken_while_merged_equals_one_taken_unmerged():
    model = patched(tiny_model(torch.bfloat16))
    unmerged = snapshot(model)
    merge(model)
    assert same(unmerged, snapshot(model))
    other = patched(tiny_model(torch.bfloat16, seed=7), seed=8)
    other.load_state_dict(model.state_dict(), strict=True)
    assert same(unmerged, snapshot(other))
    merge(other)
    assert torch.equal(other(some_tokens()), model(some_tokens()))


@mutation("lora/adapter/merge.py", '        raise ValueError("no layer is merged")', "        return")
def test_unmerging_what_is_not_merged_is_refused():
    model = patched(tiny_model(torch.float32))
    before = state(model)
    with pytest.raises(ValueError, match="no layer is merged"):
        unmerge(model)
    assert same(before, state(model))
    merge(model)
    unmerge(model)
    with pytest.raises(ValueError, match="no layer is merged"):
        unmerge(model)


# ---- refusals --------------------------------------------------------------------------------------------------------


@mutation(
    "lora/adapter/merge.py",
    """    check_finite(layers)
    sums = {}
""",
    """    sums = {}
""",
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
@pytest.mark.parametrize("where", [0, -1], ids=["first", "last"])
def test_an_adapter_that_is_not_finite_is_refused_and_nothing_changes(bad, matrix, where):
    model = patched(tiny_model(torch.float32))
    path = list(lora_layers(model))[where]
    getattr(model.get_submodule(path), matrix).data[-1, -1] = bad
    before = state(model)
    with pytest.raises(ValueError, match=f"^not finite in {path}.{matrix}:"):
        merge(model)
    assert same(before, state(model)) and not any(layer.merged for layer in lora_layers(model).values())


@mutation(
    "lora/adapter/merge.py",
    "        if not ops.is_finite(sums[layer]):",
    """        layer.merged_weight = sums[layer]
        if not ops.is_finite(sums[layer]):""",
)
def test_a_sum_that_overflows_float16_is_refused_and_nothing_changes():
    model = patched(tiny_model(torch.float16))
    path, layer = list(lora_layers(model).items())[-1]
    layer.base.weight.data[0, 0] = 60000
    layer.lora_A.data[0, 0], layer.lora_B.data[0, 0] = 300, 300
    assert torch.isfinite(layer.delta()).all()
    before = state(model)
    with pytest.raises(ValueError, match=f"^not finite in {path}: the merged weight"):
        merge(model)
    assert same(before, state(model)) and not any(layer.merged for layer in lora_layers(model).values())


# ---- disabled --------------------------------------------------------------------------------------------------------


@mutation(
    "lora/adapter/inject.py",
    """        for layer in before:
            layer.enabled = False""",
    """        for layer in list(before)[:-1]:
            layer.enabled = False""",
)
@DTYPES
def test_disabled_model_computes_its_base_bit_for_bit(dtype):
    """Freshly patched, after training, and while merged."""
    model, tokens = tiny_model(dtype), some_tokens()
    base = model(tokens)
    patched(model, dropout=0.2)

    def check():
        with disabled(model) as inside:
            assert inside is model and torch.equal(model(tokens), base)
            with disabled(model):
                assert torch.equal(model(tokens), base)
            assert torch.equal(model(tokens), base)
            assert not model(tokens).requires_grad
        assert error(model(tokens), base) > 0.1

    check()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(tokens).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(tokens).requires_grad
    with disabled(model):
        assert torch.equal(model(tokens), base)  # dropout is the branch's, so it is off as well
    model.eval()
    check()
    merge(model)
    check()
    unmerge(model)
    check()


@mutation("lora/adapter/inject.py", "layer.enabled = enabled", "layer.enabled = True")
@mutation(
    "lora/adapter/inject.py",
    """    finally:
""",
    """    except ZeroDivisionError:
        pass
    else:
""",
)
def test_disabled_restores_what_was_after_an_exception():
    model = patched(tiny_model(torch.float32))
    layers = list(lora_layers(model).values())
    layers[3].enabled = False
    before, logits = state(model), model(some_tokens())
    with pytest.raises(RuntimeError, match="inside"), disabled(model):
        assert not any(layer.enabled for layer in layers)
        raise RuntimeError("inside")
    assert same(before, state(model)) and torch.equal(model(some_tokens()), logits)


def test_merging_inside_a_disabled_block_takes_effect_after_it():
    model, tokens = tiny_model(), some_tokens()
    base = model(tokens)
    adapter = patched(model)(tokens)
    with disabled(model):
        merge(model)
        assert torch.equal(model(tokens), base)
    assert close(model(tokens), adapter, 1e-12)


# ---- unload ----------------------------------------------------------------------------------------------------------


@mutation(
    "lora/adapter/merge.py",
    "put(model, path, layer, layer.merged_weight, tied)",
    "put(model, path, layer, None, tied)",
)
@DTYPES
def test_unloading_a_merged_model_leaves_a_plain_one_with_the_same_bits(dtype):
    model = tiny_model(dtype, attention_bias=True)
    before = snapshot(model)
    patched(model, targets=["all", "lm_head"])
    merge(model)
    logits = model(some_tokens())
    paths = set(lora_layers(model))
    assert unload(model) is model and not any(isinstance(m, LoRALinear) for m in model.modules())
    assert torch.equal(model(some_tokens()), logits)
    after = snapshot(model)
    assert after.keys() == before.keys() and all(after[name].dtype == dtype for name in after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{path}.weight" for path in paths}
    assert not any(p.requires_grad for p in model.parameters())
    tiny_model(dtype, attention_bias=True).load_state_dict(after, strict=True)


@mutation(
    "lora/adapter/merge.py",
    "put(model, path, layer, layer.merged_weight, tied)",
    "put(model, path, layer, (layer.base.weight + layer.delta()).to(layer.base.weight.dtype), tied)",
)
@DTYPES
def test_unloading_without_merging_leaves_the_base(dtype):
    model = tiny_model(dtype)
    before, logits = snapshot(model), model(some_tokens())
    unload(patched(model))
    assert same(before, snapshot(model)) and torch.equal(model(some_tokens()), logits)


def test_an_unloaded_model_can_be_patched_again():
    model, tokens = tiny_model(), some_tokens()
    patched(model)
    merge(model)
    merged = unload(model)(tokens)
    adapter = patched(model, targets=["mlp"], seed=5)(tokens)
    merge(model)
    second = model(tokens)
    assert close(second, adapter, 1e-12)
    unmerge(model)
    with disabled(model):
        assert torch.equal(model(tokens), merged)
    assert far(second, merged, 1e-12)


@mutation(
    "lora/adapter/merge.py",
    "put(model, path, layer, merged_weight(layer.base.weight, layer.delta()), tied)",
    "put(model, path, layer, layer.base.weight + layer.delta().to(layer.base.weight.dtype), tied)",
)
@mutation(
    "lora/adapter/merge.py",
    "put(model, path, layer, merged_weight(layer.base.weight, layer.delta()), tied)",
    "put(model, path, layer, merged_weight(layer.weight, layer.delta()), tied)",
)
@DTYPES
@pytest.mark.parametrize("before", ["adapting", "merged", "merged in part"])
def test_merging_and_unloading_layer_by_layer_gives_the_same_bits(dtype, before):
    model = patched(tiny_model(dtype, attention_bias=True))
    twin = copy.deepcopy(model)
    if before != "adapting":
        merge(model)
    if before == "merged in part":
        next(iter(lora_layers(model).values())).merged_weight = None
    merge(twin)
    expected = unload(twin)
    assert merge_and_unload(model) is model and not lora_layers(model)
    assert same(snapshot(expected), snapshot(model)) and torch.equal(expected(some_tokens()), model(some_tokens()))
    assert not any(p.requires_grad for p in model.parameters())


@mutation(
    "lora/adapter/merge.py",
    """    layers, tied = lora_layers(model), shared(model)
    check_finite(layers)
""",
    """    layers, tied = lora_layers(model), shared(model)
""",
)
@pytest.mark.parametrize("where", [0, -1], ids=["first", "last"])
def test_merging_and_unloading_refuses_what_is_not_finite_and_changes_nothing(where):
    model = patched(tiny_model(torch.float32))
    path = list(lora_layers(model))[where]
    model.get_submodule(path).lora_B.data[-1, -1] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match=f"^not finite in {path}.lora_B:"):
        merge_and_unload(model)
    assert same(before, state(model)) and len(lora_layers(model)) == 14


def test_merging_and_unloading_refuses_a_sum_that_overflows():
    model = patched(tiny_model(torch.float16))
    path, layer = list(lora_layers(model).items())[-1]
    layer.base.weight.data[0, 0], layer.lora_A.data[0, 0], layer.lora_B.data[0, 0] = 60000, 300, 300
    before = state(model)
    with pytest.raises(ValueError, match=f"^not finite in {path}: the merged weight"):
        merge_and_unload(model)
    assert same(before, state(model))


class Tied(nn.Module):
    """A head that is the embedding, as transformers ties it, and a config that says so."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=True)
        self.embed_tokens, self.fc, self.lm_head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        return self.lm_head(self.fc(self.embed_tokens(tokens)))


@mutation(
    "lora/adapter/merge.py",
    "            model.config.tie_word_embeddings = False",
    "            pass",
    case="merged",
)
@mutation("lora/adapter/merge.py", "id(layer.base.weight) in tied and ", "")
@pytest.mark.parametrize("how", ["merged", "unloaded", "only unloaded"])
def test_a_head_that_was_the_embedding_is_no_longer_tied_to_it_once_it_is_merged(how):
    for targets, untied in ((["fc"], False), (["lm_head"], how != "only unloaded")):
        model, before = patched(Tied(), targets=targets), Tied()
        before.load_state_dict({name.replace(".base", ""): t for name, t in model.state_dict().items()
                                if "lora_" not in name})  # fmt: skip
        tokens = torch.arange(9)
        expected = (before if how == "only unloaded" else model)(tokens)
        if how == "unloaded":
            merge(model)
        model = merge_and_unload(model) if how == "merged" else unload(model)
        assert close(model(tokens), expected, 1e-5) and model.config.tie_word_embeddings is not untied
        assert (model.lm_head.weight is model.embed_tokens.weight) is not untied
        assert torch.equal(model.embed_tokens.weight, before.embed_tokens.weight)


@mutation("lora/adapter/merge.py", "return any(not torch.equal(", "return all(not torch.equal(")
@mutation("lora/adapter/merge.py", "x.delta()), x.base.weight)", "x.delta()), x.base.weight + 1)")
def test_an_adapter_changes_a_weight_if_it_does_in_one_layer_after_rounding():
    model = patched(tiny_model(torch.bfloat16))
    *others, last = lora_layers(model).values()
    with torch.no_grad():
        for layer in others:
            layer.lora_B.zero_()
    assert changes_a_weight(model)
    with torch.no_grad():
        last.lora_B.mul_(1e-12)  # less than half of a last digit
    assert not changes_a_weight(model)
