"""Decoding's short cuts: joined products equal those one by one, and leave the model as it was, bit for bit."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from lora import ops
from lora.adapter import merge
from lora.adapter.inject import disabled, inject, lora_layers
from lora.adapter.layer import LoRALinear
from lora.device import few_rows
from lora.inference.generate import generate
from lora.ops import fast_decoding
from lora.ops.fast_decoding import for_decoding, join
from tests.helpers import (
    as_true_as,
    as_written,
    close,
    far,
    patched,
    randomise_adapter,
    same,
    snapshot,
    some_tokens,
    tiny_model,
)
from tests.mutation import mutation

PROMPT = some_tokens(7).tolist()
NEVER = {-1}


def full_forward(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


def some_linears(biases=(True, False, True), sizes=(12, 5, 9)) -> list[nn.Linear]:
    torch.manual_seed(0)
    made = [nn.Linear(17, size, bias, dtype=torch.float64) for size, bias in zip(sizes, biases, strict=True)]
    return [linear.requires_grad_(False) for linear in made]


def with_branches(linears, ranks=(3, 4, 2), alphas=(8, 2, 5)) -> list[LoRALinear]:
    layers = [LoRALinear(*of, dtype=torch.float64) for of in zip(linears, ranks, alphas, strict=True)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    return layers


# ---- values ----------------------------------------------------------------------------------------------------------


@mutation(
    "lora/ops/fast_decoding.py",
    "product(x, weight, bias).split(sizes, -1)",
    "product(x, weight, bias).split(sizes[::-1], -1)",
)
@mutation("lora/ops/fast_decoding.py", "(s * B for _, B, s in maps)", "(maps[0][2] * B for _, B, s in maps)")
@pytest.mark.parametrize("biases", [(True, False, True), (False, False, False), (True, True, True)], ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_prepared_linears_compute_what_each_computes_alone(adapted, biases):
    linears = some_linears(biases)
    linears = with_branches(linears) if adapted else linears
    for count in (1, 3):
        x = torch.randn(4, 17, dtype=torch.float64)
        with as_written():
            alone = [linear(x) for linear in linears[:count]]
        with for_decoding([linears[:count]]), torch.no_grad():
            ways = [linear for linear in linears if "joined" in vars(linear)]
            found = ops.linears(x, linears[:count])
            first = linears[0](x)
        assert ways == linears[:1] and not vars(linears[0]).keys() & {"joined", "forward"}
        assert close(first, alone[0], 1e-13)
        assert all(close(a, b, 1e-13) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("state", ["adapted", "disabled", "merged", "one merged", "dropout in training"])
def test_greedy_with_an_adapter_is_the_argmax_of_the_full_forward(state):
    model = tiny_model()
    base = full_forward(model, PROMPT, 8)
    patched(model, dropout=0.5 if state == "dropout in training" else 0.0)
    layers = lora_layers(model)
    merged = list(layers.values()) if state == "merged" else [layers["model.layers.1.self_attn.k_proj"]]
    if "merged" in state:
        for layer in merged:
            layer.merged_weight = merge.merged_weight(layer.base.weight, layer.delta())
    if state == "disabled":
        with disabled(model):
            assert generate(model, [PROMPT], NEVER, 8) == [base]
    elif state == "dropout in training":
        model.train()
        torch.manual_seed(0)
        first = generate(model, [PROMPT], NEVER, 8)
        torch.manual_seed(0)
        assert generate(model, [PROMPT], NEVER, 8) == first != generate(model, [PROMPT], NEVER, 8)
    else:
        expected = full_forward(model, PROMPT, 8)
        assert generate(model, [PROMPT], NEVER, 8) == [expected] != [base]


def test_an_adapter_that_trains_on_is_seen_by_the_next_answer():
    model = patched(tiny_model())
    before = generate(model, [PROMPT], NEVER, 8)
    randomise_adapter(model, seed=5)
    after = generate(model, [PROMPT], NEVER, 8)
    assert after == [full_forward(model, PROMPT, 8)] != before


def test_rows_of_equal_length_in_one_batch_equal_each_alone():
    model, rows = tiny_model(), [some_tokens(11, seed=n) for n in range(3)]
    cache, alone = model.new_cache(3, 11), [model(row) for row in rows]
    model(torch.cat([row[:5] for row in rows]), [5, 5, 5], cache=cache)
    for end in range(5, 8):
        logits = model(torch.stack([row[end] for row in rows]), [1, 1, 1], cache=cache)
        assert close(logits, torch.stack([row[end] for row in alone]), 1e-12)
    cache.keep([0, 2])
    chunk = model(torch.cat([rows[0][8:10], rows[2][8:9]]), [2, 1], cache=cache)
    assert close(chunk, torch.cat([alone[0][8:10], alone[2][8:9]]), 1e-12)
    logits = model(torch.stack([rows[0][10], rows[2][9]]), [1, 1], cache=cache)  # of unequal length by now
    assert close(logits, torch.stack([alone[0][10], alone[2][9]]), 1e-12)


# ---- what is left of it ----------------------------------------------------------------------------------------------


@mutation("lora/ops/fast_decoding.py", "        part.data = rows", "        pass")
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_generating_lays_weights_together_once_and_changes_no_bit(adapted, tmp_path):
    model = tiny_model(model_type="qwen2")
    model = patched(model) if adapted else model
    before, size = snapshot(model), sum(p.nbytes for p in model.parameters())
    answer = generate(model, [PROMPT], NEVER, 6)
    assert same(before, snapshot(model))
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert len(storages) == len(places) - 2 * 3  # in each of two layers q, k, v are one, and gate, up
    assert sum(storages.values()) == size
    assert generate(model, [PROMPT], NEVER, 6) == answer
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert same(before, load_file(tmp_path / "model.safetensors"))


@mutation("lora/ops/fast_decoding.py", "part.untyped_storage().data_ptr() == home", "True")
def test_weights_that_were_moved_or_replaced_are_used_as_they_are():
    model, another = tiny_model(), tiny_model(seed=1)
    for each in (model, another):
        generate(each, [PROMPT], NEVER, 2)
    turned, mixed = copy.deepcopy(model), copy.deepcopy(model)
    attention = turned.model.layers[0].self_attn
    attention.k_proj.weight = nn.Parameter(attention.k_proj.weight.flip(0), requires_grad=False)
    k_proj = model.model.layers[1].self_attn.k_proj
    k_proj.weight = another.model.layers[1].self_attn.k_proj.weight  # at the same place of another joined tensor
    for changed in (model, turned, mixed, mixed.to(torch.float32).to(torch.float64)):
        assert generate(changed, [PROMPT], NEVER, 8) == [full_forward(changed, PROMPT, 8)]


@mutation(
    "lora/ops/fast_decoding.py",
    """@torch.inference_mode(False)  # weights made in it could not be trained with
""",
    "",
)
@mutation("lora/ops/fast_decoding.py", 'vars(module).pop("joined", None)', "pass")
def test_a_model_that_has_generated_trains_as_before():
    tokens, gradients = some_tokens(9), []
    for generates in (False, True):
        model = patched(tiny_model())
        if generates:
            with torch.inference_mode():  # as a caller may
                generate(model, [PROMPT], NEVER, 3)
        randomise_adapter(model, seed=6)
        F.cross_entropy(model(tokens)[:-1], tokens[1:]).backward()
        gradients.append([p.grad for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)])
    assert all(close(a, b, 1e-14) and far(a, 0 * a, 1e-6) for a, b in zip(*gradients, strict=True))


def test_weights_in_shards_are_left_alone():
    class Shard(torch.Tensor):
        """As FSDP's: a parameter whose type is not nn.Parameter."""

    linears = some_linears()
    linears[1].weight = nn.Parameter(linears[1].weight.as_subclass(Shard), requires_grad=False)
    assert join(linears) is None and join([nn.Identity(), linears[0]]) is None
    assert join(with_branches(linears)) is None and join(with_branches(some_linears())) is not None


@mutation(
    "lora/device.py",
    """        torch.backends.mkldnn.enabled = before
""",
    """        pass
""",
)
def test_one_or_two_rows_on_a_cpu_without_amx_go_without_onednn_and_no_others(monkeypatch):
    before, cpu = torch.backends.mkldnn.enabled, torch.device("cpu")
    monkeypatch.setattr("lora.device.cpu_has_amx", lambda: False)
    seen = []
    for count, device in ((1, cpu), (2, cpu), (3, cpu), (1, torch.device("cuda"))):
        with pytest.raises(KeyError), few_rows(count, device):
            seen.append(torch.backends.mkldnn.enabled)
            raise KeyError
        assert torch.backends.mkldnn.enabled == before
    assert seen == [False, False, before, before]
    monkeypatch.setattr("lora.device.cpu_has_amx", lambda: True)
    with few_rows(1, cpu):
        assert torch.backends.mkldnn.enabled == before


@mutation("lora/ops/fast_decoding.py", "torch.addmv(b, W, x[0])", "torch.mv(W, x[0])")
@mutation("lora/ops/fast_decoding.py", ").T.contiguous()", ").reshape(len(x), -1)")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_few_rows_with_the_weight_as_left_factor_are_the_same_product(monkeypatch, rows, bias):
    """As CPUs with AMX compute it, on any."""
    monkeypatch.setattr(fast_decoding, "cpu_has_amx", lambda: True)
    torch.manual_seed(3)
    linear, x = nn.Linear(96, 160, bias).bfloat16(), torch.randn(rows, 96).bfloat16()
    with for_decoding([[linear]]), torch.no_grad():
        found = linear(x)
        assert ("forward" in vars(linear)) and found.is_contiguous()
    assert "forward" not in vars(linear)
    with torch.no_grad():
        assert as_true_as(found, linear(x), copy.deepcopy(linear).double()(x.double()), factor=1.5)


def test_decoding_in_bfloat16_is_as_true_as_the_full_forward_in_bfloat16():
    model = tiny_model(torch.bfloat16, hidden_size=96, intermediate_size=160)
    inject(model, targets=("mlp",))
    truth, logits = copy.deepcopy(model).double()(some_tokens(12)), []
    cache, tokens = model.new_cache(1, 12), some_tokens(12)
    with for_decoding(model.groups()), torch.inference_mode():
        for token in tokens:
            with few_rows(1, model.device):
                logits.append(model(token[None], cache=cache))
    assert as_true_as(torch.cat(logits), model(tokens), truth, factor=1.5, floor=2**-8)
