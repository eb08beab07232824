"""Each variant is its paper's formula, starts as its base, merges, comes back, and goes all the way with train.py."""

import copy
import json
import re
import shutil
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora import ops
from lora.adapter import store
from lora.adapter.inject import disabled, inject, lora_layers
from lora.adapter.layer import LoRALinear
from lora.adapter.merge import merge, merge_and_unload, unmerge
from lora.adapter.peft_config import LoRAConfig
from lora.adapter.targets import find_targets
from lora.adapter.variants import DoRALinear, PiSSALinear, RsDoRALinear, RsLoRALinear
from lora.ops.fast_decoding import for_decoding
from lora.run import adapter
from lora.run.settings import TrainSettings
from lora.run.trainable import make_optimizer
from lora.train.step import train_step
from tests import cli
from tests.helpers import (
    as_written,
    bits,
    close,
    error,
    far,
    randomise_adapter,
    same,
    snapshot,
    some_tokens,
    tiny_model,
)
from tests.mutation import mutation

KINDS = [RsLoRALinear, DoRALinear, RsDoRALinear, PiSSALinear]
EACH = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
RANK, ALPHA = 5, 8.0


def linear(bias=True, sizes=(37, 29), dtype=torch.float64, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    base = nn.Linear(*sizes, bias=bias, dtype=torch.float64)
    nn.init.normal_(base.weight, std=(2 / sizes[0]) ** 0.5)
    return base.to(dtype)


@torch.no_grad()
def move(model, seed=1):
    """Away from the start: all that trains, by about a third of its size."""
    random = torch.Generator().manual_seed(seed)
    for p in (p for p in model.parameters() if p.requires_grad):
        noise = torch.randn(p.shape, generator=random, dtype=torch.float64)
        p.add_((0.3 * noise * (p.double().std() if p.any() else 0.3)).to(p.dtype))
    return model


def layer_of(kind, *where, dtype=torch.float64, **how) -> LoRALinear:
    return move(kind(linear(*where), RANK, ALPHA, dtype=dtype, **how))


def patched(kind, dtype=torch.float64, seed=1, **how) -> nn.Module:
    model = tiny_model(dtype)
    inject(model, 3, 7.0, dtype=torch.promote_types(dtype, torch.float32), kind=kind, **how)
    randomise_adapter(model, seed) if kind is not PiSSALinear else move(model, seed)
    for layer in lora_layers(model).values():
        if isinstance(layer, DoRALinear):
            layer.lora_magnitude_vector.data *= torch.linspace(0.7, 1.4, len(layer.lora_magnitude_vector))
    return model


# ---- the formulas ----------------------------------------------------------------------------------------------------


def paper(kind, W, trained, principal) -> torch.Tensor:
    """The weight a layer computes with, as the paper writes it. (out, in)"""
    A, B, *m = trained
    s = ALPHA / RANK**0.5 if issubclass(kind, RsLoRALinear) else ALPHA / RANK
    if kind is PiSSALinear:
        return W - principal + s * B @ A  # W_res + s B A
    V = W + s * B @ A
    return m[0][:, None] * V / V.norm(dim=1, keepdim=True).detach() if m else V


def principal_part(W, r) -> torch.Tensor:
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return sum(S[i] * U[:, i, None] * Vt[None, i] for i in range(r))


@mutation(
    "lora/adapter/variants.py",
    """        with torch.no_grad():
            weight = self.base.weight if weight is None""",
    """        with torch.enable_grad():
            weight = self.base.weight if weight is None""",
)
@mutation("lora/adapter/variants.py", "return self.alpha / self.rank**0.5", "return self.alpha / self.rank")
@EACH
@BIAS
@pytest.mark.parametrize("way", ["fast", "plain"])
def test_values_and_gradients_are_the_papers(kind, bias, way):
    layer, x = layer_of(kind, bias), torch.randn(3, 11, 37, dtype=torch.float64, requires_grad=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == (3 if issubclass(kind, DoRALinear) else 2)
    W, b = layer.base.weight, layer.base.bias
    theirs, x2 = [p.detach().clone().requires_grad_() for p in trained], x.detach().clone().requires_grad_()
    with as_written() if way == "plain" else nullcontext():
        y = layer(x)
    expected = x2 @ paper(kind, W, theirs, principal_part(W, RANK)).T + (0 if b is None else b)
    assert close(y, expected, 1e-12) and far(y, layer.base(x), 1e-12)
    G = torch.randn_like(y)
    ours, others = torch.autograd.grad(y, [x, *trained], G), torch.autograd.grad(expected, [x2, *theirs], G)
    assert all(close(a, b, 1e-11) and far(a, 0 * a, 1e-11) for a, b in zip(ours, others, strict=True))
    assert close(W + layer.delta(), paper(kind, W, trained, principal_part(W, RANK)), 1e-12)


@EACH
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_several_together_equal_each_alone(kind, dropout):
    layers = [layer_of(kind, n > 1, (37, 13 + n), torch.float64, n, dropout=dropout).train() for n in range(3)]
    x = torch.randn(11, 37, dtype=torch.float64)
    torch.manual_seed(3)
    found = ops.linears(x, layers)
    torch.manual_seed(3)
    with as_written():
        assert all(close(y, layer(x), 1e-13) for y, layer in zip(found, layers, strict=True))
    for layer in layers:
        layer.eval()
    with for_decoding([layers]), torch.no_grad():
        assert "joined" in vars(layers[0])
        assert all(close(y, layer(x), 1e-13) for y, layer in zip(ops.linears(x, layers), layers, strict=True))


def test_doras_dropout_is_on_all_that_the_adapter_adds():
    """y = W x + b + (g - 1) W x' + g s B A x', x' the dropped input, as in PEFT."""
    layer, x = layer_of(DoRALinear, dropout=0.5).train(), torch.randn(11, 37, dtype=torch.float64)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    dropped = torch.nn.functional.dropout(x, 0.5)
    W, D = layer.base.weight, ALPHA / RANK * layer.lora_B @ layer.lora_A
    g = layer.lora_magnitude_vector / (W + D).norm(dim=1)
    assert close(y, layer.base(x) + (g - 1) * (dropped @ W.T) + g * (dropped @ D.T), 1e-12)


def test_rows_of_zeros_stay_finite():
    base = linear()
    base.weight.data[3] = 0
    layer = DoRALinear(base, RANK, ALPHA, dtype=torch.float64)
    y = layer(torch.randn(11, 37, dtype=torch.float64))
    y.sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad)


def test_pissa_starts_from_the_largest_singular_values():
    layer = PiSSALinear(linear(), RANK, ALPHA, dtype=torch.float64)
    W, start = layer.base.weight, layer.scaling * layer.lora_B @ layer.lora_A
    S = torch.linalg.svdvals(W)
    assert close(start, principal_part(W, RANK), 1e-12)
    assert close(torch.linalg.svdvals(W - start)[:-RANK], S[RANK:], 1e-12)
    assert close(layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0), 1e-12)  # the root of S is in both
    assert not layer.start_A.requires_grad and torch.equal(layer.start_A, layer.lora_A)


@mutation(
    "lora/adapter/variants.py",
    """        A = torch.cat([self.lora_A, self.lora_A - self.start_A])  # (2r, in)
        return A, torch.cat([self.lora_B - self.start_B, self.start_B], 1)  # (out, 2r)""",
    """        A = torch.cat([self.lora_A, self.start_A])
        return A, torch.cat([self.lora_B, -self.start_B], 1)""",
)
def test_pissas_small_changes_survive_bfloat16():
    """A change of 1 in 1,000 is less than A's last bit in bfloat16."""
    layer = PiSSALinear(linear(dtype=torch.bfloat16, sizes=(257, 129)), 7, 8.0)
    layer.lora_A.data *= 1.001
    layer.lora_B.data *= 0.999
    layer.lora_B.data += 1e-4 * torch.randn(129, 7)
    x = torch.randn(64, 257).bfloat16()
    exact = x.double() @ copy.deepcopy(layer).double().delta().T
    ours = layer(x).double() - layer.base(x).double()
    rough = x @ (layer.scaling * layer.lora_A.bfloat16().T @ layer.lora_B.bfloat16().T)
    rough -= x @ (layer.scaling * layer.start_A.bfloat16().T @ layer.start_B.bfloat16().T)
    A, B = layer.factors()
    branch = layer.scaling * (x @ A.bfloat16().T) @ B.bfloat16().T
    size = exact.abs().max()
    assert (branch.double() - exact).abs().max() < 0.05 * size < 0.5 * (rough.double() - exact).abs().max()
    assert (ours - exact).abs().max() < 2**-7 * layer(x).abs().max()  # the sum is rounded as every sum is


def test_gaussian_A_has_a_standard_deviation_of_one_over_r():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(1009, 31), 40, 16.0, init="gaussian")
    assert abs(layer.lora_A.std().item() * 40 - 1) < 0.02 and abs(layer.lora_A.mean().item()) < 0.0005
    assert layer.lora_A.abs().max() > 3 / 40 and not layer.lora_B.any()


def test_pissa_refuses_a_rank_above_the_singular_values_and_changes_nothing():
    model = tiny_model(torch.float32).requires_grad_(True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"self_attn\.k_proj: rank 13 is over the 12 singular values"):
        inject(model, 13, 8, kind=PiSSALinear)
    assert same(before, snapshot(model)) and all(p.requires_grad for p in model.parameters())


# ---- start, off, merged, saved ---------------------------------------------------------------------------------------


@EACH
@BIAS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_new_layer_computes_its_base_bit_for_bit(kind, bias, dtype, dropout):
    base = linear(bias, dtype=dtype)
    layer, x = kind(base, RANK, ALPHA, dropout), torch.randn(3, 11, 37).to(dtype)
    assert torch.equal(layer.train()(x), base(x)) and torch.equal(layer.eval()(x), base(x))
    assert not layer.delta().any()


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disabled_is_the_base_bit_for_bit_merged_or_not(kind, dtype):
    base = tiny_model(dtype)(some_tokens())
    model = patched(kind, dtype)
    assert error(model(some_tokens()), base) > 0.05
    for step in (lambda model: None, merge, unmerge):
        step(model)
        with disabled(model):
            assert torch.equal(bits(model(some_tokens())), bits(base))


@EACH
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-11), (torch.float32, 5e-5)], ids=["f64", "f32"])
def test_merged_is_the_adapter_and_unmerged_the_bits_from_before(kind, dtype, tol):
    model = patched(kind, dtype)
    before, adapted = snapshot(model), model(some_tokens())
    merge(model)
    assert close(model(some_tokens()), adapted, tol) and far(adapted, tiny_model(dtype)(some_tokens()), tol)
    for path, layer in lora_layers(model).items():
        exact = layer.base.weight.double() + copy.deepcopy(layer).double().delta()
        assert close(layer.merged_weight, exact, 2**-20), path  # 16 roundings in float32
    unmerge(model)
    assert same(before, snapshot(model)) and torch.equal(model(some_tokens()), adapted)
    plain = merge_and_unload(model)
    assert not lora_layers(plain) and close(plain(some_tokens()), adapted, tol)


@mutation("lora/adapter/variants.py", "(self.start_B, -B[1])):", "(self.start_B, B[1])):")
@mutation(
    "lora/adapter/variants.py", "        return self.gain(weight)[:, None] *", "        return self.gain()[:, None] *"
)
@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, kind, dtype):
    model, other = patched(kind, dtype), tiny_model(dtype)
    adapted = model(some_tokens())
    store.save(model, tmp_path / "one")
    config = store.load(other, tmp_path / "one")
    if kind is PiSSALinear:  # a plain LoRA of twice the rank, which counts as much
        assert (config.kind, config.rank, config.alpha) == (LoRALinear, 6, 14.0)
        for path, layer in lora_layers(other).items():
            assert layer.scaling == lora_layers(model)[path].scaling
            assert close(layer.delta(), lora_layers(model)[path].delta(), 1e-6)
    else:
        assert config.kind is kind and same(snapshot(model), snapshot(other))
        assert torch.equal(other(some_tokens()), adapted)
    again = patched(kind, dtype, seed=2)
    assert not same(snapshot(model), snapshot(again))
    store.restore(again, tmp_path / "one")
    assert same(snapshot(model), snapshot(again)) and torch.equal(again(some_tokens()), adapted)
    store.save(again, tmp_path / "two")
    assert cli.tree(tmp_path / "one") == cli.tree(tmp_path / "two")
    meta = tiny_model(dtype).to("meta")  # as merge.py reads it
    store.load(meta, tmp_path / "one")
    for path, layer in lora_layers(meta).items():
        W = other.get_submodule(path).base.weight
        assert torch.equal(layer.delta(W), lora_layers(other)[path].delta())


def test_an_adapter_without_its_magnitudes_is_refused(tmp_path):
    store.save(patched(DoRALinear, torch.float32), tmp_path)
    config = json.loads((tmp_path / store.CONFIG).read_text())
    assert config["use_dora"] is True and "use_rslora" not in config
    store.save(patched(RsLoRALinear, torch.float32), tmp_path)
    (tmp_path / store.CONFIG).write_text(json.dumps(config))
    with pytest.raises(store.BadInput, match=r"missing tensor in .*lora_magnitude_vector"):
        store.load(tiny_model(torch.float32), tmp_path)


# ---- ranks, alphas and layers ----------------------------------------------------------------------------------------


def test_patterns_give_ranks_and_alphas_and_the_first_that_matches_counts():
    model = tiny_model(torch.float32)
    inject(model, 4, 8.0, layers="1-", rank_pattern={"layers.1.self_attn.q_proj": 2, "attention": 3, "all": 5},
           alpha_pattern={"mlp": 16.0})  # fmt: skip
    found = {path.removeprefix("model.layers."): (x.rank, x.alpha) for path, x in lora_layers(model).items()}
    others = {f"1.self_attn.{name}_proj": (3, 8.0) for name in "kvo"}
    assert found == {"1.self_attn.q_proj": (2, 8.0), **others} | {
        f"1.mlp.{name}_proj": (5, 16.0) for name in ("gate", "up", "down")
    }


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [("0", {0}), ("0-1", {0, 1}), ("2-", {2, 3}), ("0,3", {0, 3}), ("1-2,3-", {1, 2, 3}), ("0-99", {0, 1, 2, 3})],
)
def test_layers_are_numbers_and_spans(layers, numbers):
    paths = find_targets(tiny_model(num_hidden_layers=4), ["all"], layers)
    assert {int(path.split(".")[2]) for path in paths} == numbers and len(paths) == 7 * len(numbers)


def test_all_that_matches_nothing_is_named_in_one_error():
    with pytest.raises(ValueError) as caught:
        inject(tiny_model(), targets=["attention"], layers="0,7-9,5", rank_pattern={"up_proj": 3, "q_proj": 3},
               alpha_pattern={"w_proj": 1.0})  # fmt: skip
    text = str(caught.value)
    for part in ("layers '7-9' match no target; there are: 0, 1", "layers '5'", "rank pattern 'up_proj'",
                 "alpha pattern 'w_proj' matches no Linear; there are: k_proj, o_proj, q_proj, v_proj"):  # fmt: skip
        assert part in text
    assert "q_proj'" not in text and "'0'" not in text
    with pytest.raises(ValueError, match="'lm_head' match"):  # it is in no layer
        inject(tiny_model(), targets=["all", "lm_head"], layers="0-", rank_pattern={"lm_head": 3})


class Nested(nn.Module):
    """One whole path is the end of another."""

    def __init__(self):
        super().__init__()
        self.fc, self.a = nn.Linear(3, 3), nn.ModuleDict({"fc": nn.Linear(3, 3), "a": nn.ModuleDict()})
        self.a["a"]["fc"] = nn.Linear(3, 3)


@mutation("lora/adapter/peft_config.py", 'return path if alone else f"^{re.escape(path)}"', "return path")
@pytest.mark.parametrize("rank_pattern", [{"re:fc": 1}, {"re:a.fc": 1}, {"re:a.a.fc": 1, "re:a.fc": 3}], ids=str)
def test_layers_of_different_ranks_and_alphas_come_back(tmp_path, rank_pattern):
    model, other = Nested(), Nested()
    inject(model, 2, 4.0, targets=["fc"], rank_pattern=rank_pattern, alpha_pattern={"re:a.fc": 7.0})
    store.save(model, tmp_path)
    store.load(other, tmp_path)
    pairs = [{path: (x.rank, x.alpha) for path, x in lora_layers(m).items()} for m in (model, other)]
    assert pairs[0] == pairs[1] and len(set(pairs[0].values())) >= 2
    adapters = [{n: t for n, t in snapshot(m).items() if "lora_" in n} for m in (model, other)]
    assert same(*adapters)
    store.save(other, tmp_path / "again")
    config = json.loads((tmp_path / store.CONFIG).read_text())
    assert json.loads((tmp_path / "again" / store.CONFIG).read_text()) == config
    assert "rank_pattern" in config and "alpha_pattern" in config


def with_patterns(folder, ranks, alphas) -> None:
    path = folder / store.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": ranks, "alpha_pattern": alphas}))


@mutation("lora/adapter/peft_config.py", "if not NAMES_ALONE.fullmatch(key):", "if False:")
@pytest.mark.parametrize("key", [".*q_proj", "model.layers.[0-3].q", "(a+)+$", "q_proj|k_proj", "q_proj?", "\\w+"])
def test_a_pattern_that_is_more_than_names_is_refused_by_name(tmp_path, key):
    store.save(patched(LoRALinear, torch.float32), tmp_path)
    with_patterns(tmp_path, {key: 3}, {})
    with pytest.raises(store.BadInput, match=re.escape(f"{store.CONFIG}:rank_pattern.{key}: a regular expression")):
        store.load(tiny_model(torch.float32), tmp_path)


@pytest.mark.parametrize(("ranks", "alphas"), [({"q_proj": 0}, {}), ({"q_proj": 2.0}, {}), ({}, {"q_proj": "8"}),
                                               ({}, {"q_proj": -1}), ([1], {}), ({}, "q_proj")], ids=str)  # fmt: skip
def test_a_pattern_with_a_value_out_of_range_is_refused(tmp_path, ranks, alphas):
    store.save(patched(LoRALinear, torch.float32), tmp_path)
    with_patterns(tmp_path, ranks, alphas)
    with pytest.raises(store.BadInput, match=r"wrong adapter in .*:(rank|alpha)_pattern"):
        store.load(tiny_model(torch.float32), tmp_path)


@pytest.mark.parametrize(
    ("key", "expected"),
    [("q_proj", True), ("self_attn.q_proj", True), ("^model.layers.0.self_attn.q_proj", True), ("attn.q_proj", False),
     ("^layers.0.self_attn.q_proj", False), ("q_proj$", True), (r"0\.self_attn\.q_proj", True), ("proj", False)],
)  # fmt: skip
def test_a_key_matches_whole_names_at_the_end_of_a_path_as_in_peft(key, expected):
    at = LoRAConfig(4, 8, rank_pattern={key: 2, "v_proj": 3}, alpha_pattern={"up_proj": 1}).at
    path = "model.layers.0.self_attn.q_proj"
    assert at(path) == (2 if expected else 4, 8)
    assert bool(re.match(rf"(.*\.)?({key})$", path)) is expected  # peft.utils.other.get_pattern_key
    assert at(path.replace("q_", "v_")) == (3, 8) and at("up_proj") == (4, 1)


# ---- LoRA+ -----------------------------------------------------------------------------------------------------------


@mutation("lora/train/step.py", 'lr * group.get("lr_ratio", 1.0)', "lr")
def test_B_learns_so_many_times_as_fast_along_the_whole_schedule():
    """Adam's first step is lr times the gradient's sign."""
    model = patched(LoRALinear, torch.float32)
    s = SimpleNamespace(lr=0.1, lr_ratio_b=16.0, weight_decay=0.0)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batch = SimpleNamespace(tokens=some_tokens(), targets=some_tokens(), padding=0, count=1)
    for lr in (1e-3, 1e-4):
        optimizer = make_optimizer(parameters, s, torch.device("cpu"))
        before = {name: p.detach().clone() for name, p in parameters.items()}
        train_step(lambda b: model(b.tokens).logsumexp(-1).square().sum(), [batch], optimizer, lr)
        for name, p in parameters.items():
            rate = 16 * lr if name.endswith("lora_B") else lr
            assert abs((p - before[name]).abs().median().item() / rate - 1) < 0.01, name
    s.lr_ratio_b = 1.0
    assert len(make_optimizer(parameters, s, torch.device("cpu")).param_groups) == 1


# ---- the commands ----------------------------------------------------------------------------------------------------

RUN = ("--max-steps", 4, "--batch-size", 3, "--save-every", 2, "--keep", 3, "--dropout", 0.1)
PATTERNS = ("--rank-pattern", "q_proj=2", "mlp=3", "--alpha-pattern", "up_proj=5", "--layers", "1-")
FLAGS = {
    "rslora and patterns": ("--rslora", *PATTERNS),
    "dora, gaussian and LoRA+": ("--dora", "--init", "gaussian", "--lr-ratio-b", 8),
    "pissa": ("--init", "pissa", "--lr", 0.01),
}


@cache
def of_the_base() -> str:
    return cli.ask("--model", cli.model_folder(), "--prompt", "Hello.", cwd=cli.scratch()).out


@pytest.mark.parametrize("argv", FLAGS.values(), ids=FLAGS)
def test_a_run_with_each_flag_resumes_to_the_same_bits_and_its_folder_needs_no_flags(tmp_path, argv):
    done = cli.train("out", *RUN, *argv, cwd=tmp_path)
    assert done.code == 0, done.err
    whole = cli.tree(tmp_path / "out" / "checkpoints" / "000004"), (tmp_path / "out" / store.WEIGHTS).read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "000004")
    (tmp_path / "out" / store.WEIGHTS).unlink()
    done = cli.call("train", "--resume", "--out", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    again = cli.tree(tmp_path / "out" / "checkpoints" / "000004"), (tmp_path / "out" / store.WEIGHTS).read_bytes()
    assert whole[1] == again[1] and {k: v for k, v in whole[0].items() if "tensors" in k or "config" in k} == {
        k: v for k, v in again[0].items() if "tensors" in k or "config" in k
    }

    mine = cli.ask("--adapter", "out", "--prompt", "Hello.", cwd=tmp_path)
    assert mine.code == 0 and mine.out.strip() and mine.out != of_the_base(), mine.err
    done = cli.call("merge", "--adapter", "out", "--out", "merged", "--dtype", "float32", cwd=tmp_path)
    assert done.code == 0, done.err
    assert cli.ask("--model", "merged", "--prompt", "Hello.", cwd=tmp_path).out == mine.out


def test_a_run_says_what_it_adapts():
    s = TrainSettings.resolve(["--rank", "4", "--dora", *map(str, PATTERNS)], "")
    empty = tiny_model(**cli.SIZES).to("meta")
    assert [" ".join(line.split()) for line in adapter.table(s, empty, adapter.ranks(s, empty))] == [
        "q_proj 1 of 32 x 32 rank 2 alpha 32 160 parameters",
        "k_proj 1 of 16 x 32 rank 4 alpha 32 208 parameters",
        "v_proj 1 of 16 x 32 rank 4 alpha 32 208 parameters",
        "o_proj 1 of 32 x 32 rank 4 alpha 32 288 parameters",
        "gate_proj 1 of 48 x 32 rank 3 alpha 32 288 parameters",
        "up_proj 1 of 48 x 32 rank 3 alpha 5 288 parameters",
        "down_proj 1 of 32 x 48 rank 3 alpha 32 272 parameters",
    ]
    some = ["--target", "k_proj", "--rank-pattern", "0.self_attn.k_proj=9"]
    s = TrainSettings.resolve(some, "")
    [line] = adapter.table(s, empty, adapter.ranks(s, empty))
    assert " ".join(line.split()) == "k_proj 2 of 16 x 32 rank 9-16 alpha 32 1,200 parameters"


@pytest.mark.parametrize("name", ["pissa", "rslora and patterns"])
def test_a_run_from_an_adapter_has_its_variant_ranks_and_alphas_and_starts_with_its_numbers(tmp_path, name):
    dora = ("--dora",) if name != "pissa" else ()
    assert cli.train("first", *FLAGS[name], *dora, cwd=tmp_path).code == 0
    inputs = ("--model", cli.model_folder(), "--data", cli.data_file(), "--init-adapter", "first", "--lr", 1e-12)
    done = cli.call("train", *inputs, "--out", "next", "--max-steps", 1, *cli.ON_CPU, cwd=tmp_path)
    assert done.code == 0, done.err
    before, after = ((tmp_path / folder / store.CONFIG).read_text() for folder in ("first", "next"))
    assert before == after
    models = [tiny_model(torch.float32, **cli.SIZES) for _ in range(2)]
    for model, folder in zip(models, ("first", "next"), strict=True):
        store.load(model, tmp_path / folder)
    assert close(*(model(some_tokens()) for model in models), 1e-6)
    if dora:
        again = cli.call("train", "--config", "next/settings.json", "--out", "again", cwd=tmp_path)
        assert again.code == 0, again.err
        assert (tmp_path / "again" / store.CONFIG).read_text() == after


WRONG = [
    (("--init", "pissa", "--dora"), "--init pissa and --dora"),
    (("--init", "pissa", "--rslora"), "--init pissa and --rslora"),
    (("--init", "pissa", "--rank", 17), "k_proj has 16 singular values, rank 17 is more. Lower it"),
    (("--rank-pattern", "q_proj=2", "q_proj=3"), "--rank-pattern names a target twice"),
    (("--rank-pattern", "w_proj=2"), "wrong --rank-pattern in the command line: rank pattern 'w_proj' matches no"),
    (("--rank-pattern", "q_proj=0"), "wrong --rank-pattern in the command line: 'q_proj=0' is out of range"),
    (("--alpha-pattern", "q_proj"), "wrong --alpha-pattern in the command line: 'q_proj' is out of range"),
    (("--layers", "0-1,7-"), "wrong --layers in the command line: layers '7-' match no target; there are: 0, 1"),
    (("--layers", "1-0"), "wrong --layers in the command line: '1-0' is out of range"),
    (("--target", "embed_tokens"), "embed_tokens: embeddings get no adapters here. Leave it out, or train every weig"),
    (("--target", "lm_head"), "lm_head: heads get no adapters here. Leave it out, or train every weight with --full"),
    (("--init", "olora"), "wrong --init in the command line"),
    (("--fsdp", "--dora"), "--fsdp and --dora, which reads whole weights"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=lambda value: " ".join(map(str, value))[:40])
def test_what_cannot_be_is_refused_by_name(tmp_path, argv, message):
    done = cli.train("out", *argv, cwd=tmp_path)
    assert done.code == 2 and len(done.errors) == 1 and message in done.errors[0], done.err
    assert not list(tmp_path.iterdir())


def test_a_tied_head_is_refused_with_the_way_out(tmp_path):
    model = cli.write_model(tmp_path / "tied", tie_word_embeddings=True)
    done = cli.train("out", "--target", "lm_head", cwd=tmp_path, model=model)
    assert done.code == 2 and "this model's head is its embedding" in done.err and "--full" in done.err
