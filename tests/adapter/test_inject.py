"""Which modules are patched, what then trains, and that an error changes nothing."""

import copy

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lora.adapter.inject import inject, lora_layers
from lora.adapter.layer import LoRALinear
from lora.adapter.targets import GROUPS, find_targets, linears, matches
from tests.helpers import close, far, patched, randomise, same, snapshot, some_tokens, tiny_model
from tests.mutation import mutation

ATTENTION = {f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"}
MLP = {f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "down")}


class Plain(nn.Module):
    """No transformer: Linears with names that are suffixes of each other, at the top and nested."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(7, 9)
        self.my_fc = nn.Linear(9, 11, bias=False)
        self.block = nn.ModuleDict({"fc": nn.Linear(11, 13), "other": nn.Linear(13, 7), "norm": nn.LayerNorm(7)})
        self.pool = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x):
        x = torch.tanh(self.my_fc(self.fc(x)))
        return self.pool(self.block["norm"](self.block["other"](self.block["fc"](x))))


def plain(dtype=torch.float64):
    return randomise(Plain().to(dtype))


def kinds(model):
    """Everything an injection could change: classes, trainability and mode of what is there."""
    return (
        {path: (type(module), module.training) for path, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    )


def patched_paths(model):
    return {path for path, module in model.named_modules() if isinstance(module, LoRALinear)}


# ---- exactly the targets ---------------------------------------------------------------------------------------------


@mutation("lora/adapter/targets.py", '"all": ATTENTION + MLP,', '"all": (*ATTENTION, *MLP, "lm_head"),')
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all"], ATTENTION | MLP),
        (["attention"], ATTENTION),
        (["mlp"], MLP),
        (["attention", "mlp", "all"], ATTENTION | MLP),
        (["o_proj"], {path for path in ATTENTION if path.endswith("o_proj")}),
        (["self_attn.q_proj", "up_proj"], {p for p in ATTENTION | MLP if p.endswith(("q_proj", "up_proj"))}),
        (["model.layers.1.mlp.down_proj"], {"model.layers.1.mlp.down_proj"}),
        (["lm_head"], {"lm_head"}),
        (["all", "lm_head"], ATTENTION | MLP | {"lm_head"}),
        ([r"re:model\.layers\.0\..*"], {p for p in ATTENTION | MLP if ".0." in p}),
        ([r"re:.*\.[qv]_proj"], {p for p in ATTENTION if p.endswith(("q_proj", "v_proj"))}),
        ([r"re:.*_proj", "lm_head"], ATTENTION | MLP | {"lm_head"}),
    ],
    ids=str,
)
def test_exactly_the_targets_are_patched(targets, expected):
    model = tiny_model(torch.float32)
    assert {path for path, m in model.named_modules() if type(m) is nn.Linear} == ATTENTION | MLP | {"lm_head"}
    bases = {path: model.get_submodule(path) for path in expected}
    returned = inject(model, 3, 6, targets=targets)
    assert patched_paths(model) == expected == set(returned) and len(returned) == len(expected)
    assert all(model.get_submodule(path).base is base for path, base in bases.items())
    assert list(lora_layers(model)) == returned


@mutation("lora/adapter/targets.py", 'path == suffix or path.endswith("." + suffix)', 'path.endswith("." + suffix)')
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["fc"], {"fc", "block.fc"}),
        (["block.fc"], {"block.fc"}),
        (["my_fc"], {"my_fc"}),
        (["re:fc"], {"fc"}),
        (["re:.*fc"], {"fc", "my_fc", "block.fc"}),
        (["other", "0"], {"block.other", "pool.0"}),
        (["pool.2", "re:block.*"], {"block.fc", "block.other", "pool.2"}),
        (["re:.*"], {"fc", "my_fc", "block.fc", "block.other", "pool.0", "pool.2"}),
    ],
    ids=str,
)
def test_any_module_with_linears_is_patched_and_computes_the_formula(targets, expected):
    model = plain()
    before = copy.deepcopy(model)
    patched(model, rank=2, targets=targets)
    assert patched_paths(model) == expected
    x = torch.randn(11, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    dense = copy.deepcopy(before)
    with torch.no_grad():
        for path in expected:
            layer = model.get_submodule(path)
            dense.get_submodule(path).weight += layer.alpha / 2 * layer.lora_B @ layer.lora_A
    assert close(model(x), dense(x), 1e-12) and far(model(x), before(x), 1e-12)


def test_rank_alpha_dropout_and_dtype_reach_every_layer():
    model = tiny_model(torch.bfloat16)
    inject(model, 3, 7.0, 0.25, ["all"], torch.float64)
    for layer in lora_layers(model).values():
        assert (layer.rank, layer.alpha, layer.dropout) == (3, 7.0, 0.25)
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float64 and layer.base.weight.dtype == torch.bfloat16


def test_groups_name_the_seven_projections_and_never_the_head():
    """Of a Llama; of other families, tests/run/test_layer_kinds.py."""
    model = tiny_model(torch.float32)
    inject(model, 2, 4, targets=["all"])
    assert {path.rsplit(".", 1)[1] for path in lora_layers(model)} == {
        path.rsplit(".", 1)[1] for path in ATTENTION | MLP
    }
    for group in GROUPS:
        model = tiny_model(torch.float32)
        inject(model, 2, 4, targets=[group])
        assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding


def test_layers_start_with_different_A():
    model = tiny_model(torch.float32)
    inject(model, 2, 4, targets=["q_proj"])
    first, second = lora_layers(model).values()
    assert not torch.equal(first.lora_A, second.lora_A)


@mutation("lora/adapter/targets.py", "if type(module) in KINDS}", "if isinstance(module, KINDS)}")
def test_subclasses_of_linear_are_left_alone():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    assert isinstance(model["attention"].out_proj, nn.Linear) and set(linears(model)) == {"fc"}
    with pytest.raises(ValueError, match="out_proj"):
        inject(model, 2, 4, targets=["out_proj"])


@mutation("lora/adapter/inject.py", "layer.train(model.training)", "layer")
@pytest.mark.parametrize("training", [True, False])
def test_patching_keeps_the_mode(training):
    model = tiny_model(torch.float32).train(training)
    inject(model, 2, 4, 0.5)
    assert all(module.training is training for module in model.modules())


# ---- what a target matches -------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["q_proj", "o_proj", "foo_proj", "proj", "o", "0", "1", "10", "layers", "all", "self.attn", ""])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(".".join)


@mutation("lora/adapter/targets.py", 'path == suffix or path.endswith("." + suffix)', "path.endswith(suffix)")
@settings(deadline=None)
@given(path=PATHS, target=PATHS)
@example(path="model.foo_proj", target="o_proj")
@example(path="o_proj", target="o_proj")
@example(path="layers.10.q_proj", target="0.q_proj")
@example(path="a.o_proj.b", target="o_proj")
def test_a_target_matches_whole_names_at_the_end_of_a_path(path, target):
    assume(target not in GROUPS and not target.startswith("re:"))
    names, wanted = path.split("."), target.split(".")
    assert matches(path, target) == (names[len(names) - len(wanted) :] == wanted and len(wanted) <= len(names))


@mutation("lora/adapter/targets.py", "re.fullmatch(target[3:], path)", "re.search(target[3:], path)")
@settings(deadline=None)
@given(path=PATHS)
def test_a_pattern_matches_the_whole_path(path):
    assert matches(path, "re:" + path.replace(".", r"\."))
    assert not matches("x." + path, "re:" + path.replace(".", r"\."))
    assert not matches(path + ".x", "re:" + path.replace(".", r"\."))


# ---- what trains -----------------------------------------------------------------------------------------------------


@mutation(
    "lora/adapter/inject.py",
    """    model.requires_grad_(False)
""",
    """    pass
""",
)
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("targets", [["all"], ["attention"], ["up_proj", "lm_head"]], ids=str)
def test_only_A_and_B_train_and_their_count_is_r_times_in_plus_out(targets, rank):
    model = tiny_model(torch.float32, num_key_value_heads=2).requires_grad_(True)
    sizes = {path: tuple(linear.weight.shape) for path, linear in linears(model).items()}
    chosen = find_targets(model, targets)
    inject(model, rank, 4, targets=targets)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == {f"{path}.lora_{m}" for path in chosen for m in "AB"}
    assert sum(p.numel() for p in trainable.values()) == sum(rank * sum(sizes[path]) for path in chosen) > 0


@mutation(
    "lora/adapter/inject.py",
    """    model.requires_grad_(False)
""",
    """    pass
""",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_tensors_keep_their_bits_over_20_steps(dtype):
    """Even where somebody hands all parameters to AdamW, with weight decay and clipping."""
    model = tiny_model(dtype, attention_bias=True).requires_grad_(True).train()
    before = snapshot(model)
    patched(model, dropout=0.1)
    adapters = {name: tensor for name, tensor in snapshot(model).items() if "lora_" in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens, losses = some_tokens(), []
    for _ in range(20):
        loss = F.cross_entropy(model(tokens[:-1]).float(), tokens[1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = {name.replace(".base.", "."): tensor for name, tensor in snapshot(model).items() if "lora_" not in name}
    assert same(before, after) and losses[-1] < losses[0] - 1
    assert all(not torch.equal(tensor, model.state_dict()[name]) for name, tensor in adapters.items())
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)


# ---- errors ----------------------------------------------------------------------------------------------------------


@mutation(
    "lora/adapter/targets.py",
    """    if problems:
        raise NoMatch(problems)""",
    """    if problems and len(problems) == len(targets):
        raise NoMatch(problems)""",
)
@mutation(
    "lora/adapter/inject.py",
    """    paths = find_targets(model, targets, layers, rank_pattern, alpha_pattern)
""",
    """    model.requires_grad_(False); paths = find_targets(model, targets, layers, rank_pattern, alpha_pattern)
""",
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"targets": ["all", "w_proj"]},
            "'w_proj' matches no Linear; there are: down_proj, gate_proj, k_proj, lm_head",
        ),
        ({"targets": ["w_proj", "re:(", "x"]}, "'w_proj'.*'re:\\(' is no regular expression.*'x'"),
        ({"targets": ["proj"]}, "'proj' matches no Linear"),
        ({"targets": ["re:layers"]}, "'re:layers' matches no Linear"),
        ({"targets": ["embed_tokens"]}, "'embed_tokens' matches no Linear"),
        ({"targets": []}, "no target"),
        ({"rank": 0}, "rank 0"),
        ({"alpha": -1}, "alpha -1"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
    ids=str,
)
def test_an_error_changes_nothing(arguments, message):
    model = tiny_model(torch.float32).requires_grad_(True).train()
    before, state = kinds(model), snapshot(model)
    with pytest.raises(ValueError, match=message):
        inject(model, **arguments)
    assert kinds(model) == before and same(state, snapshot(model))


def test_a_tied_model_has_no_head_to_patch():
    with pytest.raises(ValueError, match="'lm_head' matches no Linear"):
        inject(tiny_model(torch.float32, tie_word_embeddings=True), targets=["lm_head"])


def test_a_model_without_linears_says_so():
    with pytest.raises(ValueError, match="there are: none"):
        inject(nn.Sequential(nn.Embedding(3, 3)))


@mutation("lora/adapter/inject.py", "    if lora_layers(model):", "    if False:")
def test_patching_twice_is_refused_and_changes_nothing():
    model = patched(tiny_model(torch.float32), targets=["q_proj"])
    before, state = kinds(model), snapshot(model)
    for targets in (["v_proj"], ["q_proj"], ["base"]):
        with pytest.raises(ValueError, match="LoRA layers already"):
            inject(model, targets=targets)
        assert kinds(model) == before and same(state, snapshot(model))
