"""PEFT as referee: our adapters in PEFT, PEFT's in ours, both on transformers' own models and on any module.

LORA_PARITY=1 makes a missing transformers or peft a failure; without it the file is skipped.
"""

import copy
import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from lora.adapter import store
from lora.adapter.inject import inject, lora_layers
from lora.adapter.layer import LoRALinear
from lora.adapter.merge import merge, merge_and_unload, unload
from lora.adapter.variants import DoRALinear, PiSSALinear, RsDoRALinear, RsLoRALinear
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from lora.pretrained import ModelFolder, load_model
from tests.helpers import (
    close,
    far,
    patched,
    randomise,
    randomise_adapter,
    same,
    snapshot,
    some_tokens,
    tiny_config,
    tiny_model,
)
from tests.network.test_families import family_config

if os.environ.get("LORA_PARITY") == "1":
    import peft
    import transformers
else:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
TOL = 2e-5
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2"])


def theirs(family="llama", dtype=torch.float32, seed=0, **overrides) -> nn.Module:
    """transformers' own causal language model with the weights of `tiny_model(seed=seed)`."""
    raw = tiny_config(model_type=family, head_dim=6 if family == "llama" else None, **overrides)
    kind = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family]
    architecture = {"llama": transformers.LlamaForCausalLM, "qwen2": transformers.Qwen2ForCausalLM}[family]
    raw.pop("model_type")
    model = architecture(kind(**raw, attn_implementation="eager")).to(dtype).eval()
    return randomise(model, seed)


def ours_like(model: nn.Module) -> nn.Module:
    """Our decoder with the weights of transformers' model."""
    family = model.config.model_type
    mine = tiny_model(torch.float32, model_type=family, head_dim=6 if family == "llama" else None)
    mine.load_state_dict(model.state_dict(), strict=True)
    return mine


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(37, 29), nn.Linear(29, 41, bias=False)
        self.inner = nn.ModuleDict({"fc1": nn.Linear(41, 23)})

    def forward(self, x):
        return self.inner["fc1"](torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def logits(model, tokens=None):
    """Logits of our model, of transformers', of PEFT's wrapper round either, or of a plain module."""
    inner = getattr(model, "base_model", SimpleNamespace(model=model)).model if is_peft(model) else model
    with torch.no_grad():
        if isinstance(inner, Plain):
            return model(torch.randn(67, 37, generator=torch.Generator().manual_seed(3)))
        tokens = some_tokens() if tokens is None else tokens
        return model(tokens[None]).logits[0] if isinstance(inner, transformers.PreTrainedModel) else model(tokens)


def is_peft(model):
    return isinstance(model, peft.PeftModel)


@torch.no_grad()
def randomise_peft(model, seed=1):
    """Random A and B in PEFT's layers, ΔW 10 to 40 % of W's norm."""
    random = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            A.copy_(torch.randn(A.shape, generator=random) / A.shape[1] ** 0.5)
            B.copy_(torch.randn(B.shape, generator=random))
            share = 0.1 + 0.3 * torch.rand((), generator=random)
            B *= share * layer.base_layer.weight.norm() / (layer.scaling["default"] * (B @ A).norm())
            for magnitude in (vector.weight for vector in layer.lora_magnitude_vector.values()):
                magnitude *= 0.7 + 0.6 * torch.rand(magnitude.shape, generator=random)
    return model


def peft_patched(model, r=5, lora_alpha=8, seed=1, **fields):
    """PEFT's adapter on `model` with random A and B."""
    task = "CAUSAL_LM" if isinstance(model, transformers.PreTrainedModel) else None
    fields = {"target_modules": SEVEN, "task_type": task} | fields
    config = peft.LoraConfig(r=r, lora_alpha=lora_alpha, **fields)
    return randomise_peft(peft.get_peft_model(model, config), seed).eval()


def peft_paths(model):
    """The modules PEFT has patched, by their paths in the unpatched model."""
    prefix = "base_model.model."
    return {path.removeprefix(prefix) for path, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def short(fields):
    """A test's name for these fields of a LoraConfig."""
    return " ".join(f"{key}={value}".replace(str(SEVEN), "seven") for key, value in fields.items())


# ---- files, both ways ------------------------------------------------------------------------------------------------


@FAMILIES
def test_our_adapter_in_peft_gives_our_logits(tmp_path, family):
    base = theirs(family)
    model = ours_like(base)
    before = logits(model)
    assert close(before, logits(base), TOL)
    patched(model)
    store.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(base, tmp_path)
    assert peft_paths(other) == set(lora_layers(model)) and len(peft_paths(other)) == 14
    assert close(logits(model), logits(other), TOL) and far(logits(model), before, TOL)


@FAMILIES
def test_pefts_adapter_in_ours_gives_pefts_logits(tmp_path, family):
    base = theirs(family)
    model, before = ours_like(base), logits(base)
    other = peft_patched(base)
    other.save_pretrained(tmp_path)
    config = store.load(model, tmp_path)
    assert (config.rank, config.alpha) == (5, 8) and set(lora_layers(model)) == peft_paths(other)
    assert close(logits(model), logits(other), TOL) and far(logits(model), before, TOL)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "plain"])
def test_inject_merge_and_save_on_any_module_equal_pefts(tmp_path, kind):
    """On the very same class of module: tensor names, shapes, outputs, merged weights, and the unloaded model."""
    base, targets = (randomise(Plain()), ["fc1", "fc2"]) if kind == "plain" else (theirs(kind), SEVEN)
    before, names = logits(base), set(base.state_dict())
    model = patched(copy.deepcopy(base), targets=targets)
    store.save(model, tmp_path / "ours")

    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert close(logits(model), logits(other), TOL) and far(logits(model), before, TOL)
    other.save_pretrained(tmp_path / "peft")
    assert same(load_file(tmp_path / "ours" / store.WEIGHTS), load_file(tmp_path / "peft" / store.WEIGHTS))
    again = copy.deepcopy(base)
    store.load(again, tmp_path / "peft")
    assert same(snapshot(model), snapshot(again))

    merge(model)
    assert close(logits(model), logits(other), TOL)
    plain, reference = unload(model), other.merge_and_unload()
    assert set(plain.state_dict()) == set(reference.state_dict()) == names
    changed = set()
    for name, tensor in plain.state_dict().items():
        assert close(tensor, reference.state_dict()[name], 1e-6)
        if far(tensor, base.state_dict()[name], 1e-6):
            changed.add(name)
    patched_names = {f"{path}.weight" for path in lora_layers(again)}
    assert changed == patched_names and len(changed) == (3 if kind == "plain" else 14)
    assert close(logits(plain), logits(reference), TOL)


def test_our_config_holds_only_fields_of_peft_and_reads_as_meant(tmp_path):
    store.save(patched(theirs(), 3, 7.5, 0.125, ["mlp"]), tmp_path, "some/model")
    written = json.loads((tmp_path / store.CONFIG).read_text())
    assert written.keys() <= peft.LoraConfig().to_dict().keys()
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (3, 7.5, 0.125, "none")
    assert set(config.target_modules) == {"gate_proj", "up_proj", "down_proj"}
    assert config.base_model_name_or_path == "some/model"


def test_every_default_of_peft_is_read(tmp_path):
    """A file with each field of this PEFT's LoraConfig, as this PEFT writes it."""
    peft_patched(theirs(), r=8).save_pretrained(tmp_path)
    written = json.loads((tmp_path / store.CONFIG).read_text())
    assert written.keys() >= peft.LoraConfig().to_dict().keys() - {"runtime_config"}
    assert store.read_config(tmp_path).rank == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
    ids=short,
)
def test_pefts_variants_are_refused_by_name(tmp_path, fields):
    family = "qwen2" if "bias" in fields else "llama"  # a model with biases
    peft_patched(theirs(family), **fields).save_pretrained(tmp_path)
    with pytest.raises(store.BadInput) as caught:
        store.load(theirs(family), tmp_path)
    assert any(f"{store.CONFIG}:{next(iter(fields))}: " in problem for problem in caught.value.problems)


# ---- the family ------------------------------------------------------------------------------------------------------

VARIANTS = [
    {"use_rslora": True},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True},
    {"rank_pattern": {"q_proj": 2, "model.layers.1.mlp.up_proj": 7}},
    {"alpha_pattern": {"self_attn.k_proj": 3, "^model.layers.0.mlp.down_proj": 20, "proj": 5}},
    {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 3}, "alpha_pattern": {"q_proj": 1}, "use_rslora": True},
    {"rank_pattern": {"q_proj": 2}, "use_dora": True, "layers_to_transform": [1], "target_modules": r".*\.[qv]_proj"},
    {"init_lora_weights": "gaussian", "use_dora": True, "target_modules": "all-linear"},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=short)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_pefts_variants_in_ours_give_pefts_logits_and_ours_in_peft_again(tmp_path, family, fields):
    base = theirs(family)
    if "layers_to_transform" in fields:  # PEFT has either a pattern or layers
        fields = fields | {"target_modules": ["q_proj", "v_proj"]}
    model, before = ours_like(base), logits(base)
    other = peft_patched(copy.deepcopy(base), **fields)
    other.save_pretrained(tmp_path / "peft")
    store.load(model, tmp_path / "peft")
    assert set(lora_layers(model)) == peft_paths(other)
    assert close(logits(model), logits(other), TOL) and far(logits(model), before, TOL)
    merge(model)
    assert close(logits(model), logits(other), TOL)

    store.save(model, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / store.CONFIG).read_text())
    assert written.keys() <= peft.LoraConfig().to_dict().keys()
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert peft_paths(again) == peft_paths(other) and close(logits(again), logits(other), TOL)
    tensors = [load_file(tmp_path / folder / store.WEIGHTS) for folder in ("peft", "ours")]
    assert same(*tensors)


@pytest.mark.parametrize("kind", [RsLoRALinear, DoRALinear, RsDoRALinear, PiSSALinear])
def test_our_variants_in_peft_give_our_logits(tmp_path, kind):
    base = theirs()
    model, before = ours_like(base), logits(base)
    inject(model, 3, 7.0, kind=kind, rank_pattern={"q_proj": 5}, alpha_pattern={"mlp": 2.0}, layers="1-")
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p)))
    store.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert peft_paths(other) == set(lora_layers(model)) and len(peft_paths(other)) == 7
    assert close(logits(model), logits(other), TOL) and far(logits(model), before, TOL)


@pytest.mark.parametrize("path", ["fc1", "inner.fc1", "fc2"])
def test_a_rank_and_alpha_for_one_path_are_pefts_for_that_path_alone(tmp_path, path):
    """`fc1` is the end of `inner.fc1`."""
    base = randomise(Plain())
    model = copy.deepcopy(base)
    exactly = f"re:{path}"
    inject(model, 5, 8.0, targets=["fc1", "fc2"], rank_pattern={exactly: 3}, alpha_pattern={exactly: 20.0})
    randomise_adapter(model)
    store.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    its = {p: other.get_submodule(f"base_model.model.{p}") for p in ("fc1", "fc2", "inner.fc1")}
    expected = {p: (3, 20.0) if p == path else (5, 8.0) for p in its}
    assert {p: (m.r["default"], m.lora_alpha["default"]) for p, m in its.items()} == expected
    assert close(logits(model), logits(other), TOL) and far(logits(model), logits(unload(model)), TOL)


def test_our_pissa_starts_where_pefts_does():
    mine, other = theirs(), peft_patched_as_it_starts(theirs(), init_lora_weights="pissa")
    inject(mine, 5, 8.0, kind=PiSSALinear)
    for path, layer in lora_layers(mine).items():
        its = other.get_submodule(f"base_model.model.{path}")
        start = its.scaling["default"] * its.lora_B["default"].weight @ its.lora_A["default"].weight
        assert close(layer.scaling * layer.lora_B @ layer.lora_A, start, 1e-5)


def peft_patched_as_it_starts(model, r=5, lora_alpha=8, **fields):
    config = peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=SEVEN, task_type="CAUSAL_LM", **fields)
    return peft.get_peft_model(model, config).eval()


def test_pefts_pissa_is_refused_with_the_reason_unless_it_is_converted(tmp_path):
    """It has changed its base, which we do not see; PEFT converts it to a plain LoRA on the base as it was."""
    base = theirs()
    model, before = copy.deepcopy(base), logits(base)
    other = peft_patched_as_it_starts(base, init_lora_weights="pissa")
    other.peft_config["default"].init_lora_weights = True
    other.save_pretrained(tmp_path / "start")
    other.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "lora_" in name:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p)))
    trained = logits(other)
    other.save_pretrained(tmp_path / "pissa")
    with pytest.raises(store.BadInput, match=r"init_lora_weights: 'pissa' is not implemented: the base was changed .*"
                       r"path_initial_model_for_weight_conversion"):  # fmt: skip
        store.load(copy.deepcopy(model), tmp_path / "pissa")
    other.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    config = store.load(model, tmp_path / "plain")
    assert (config.rank, config.alpha) == (10, 16)
    assert close(logits(model), trained, TOL) and far(trained, before, TOL)


def test_gradients_of_dora_equal_pefts(tmp_path):
    base, tokens = theirs(), some_tokens()
    model = ours_like(base)
    peft_patched(copy.deepcopy(base), use_dora=True).save_pretrained(tmp_path)
    store.load(model, tmp_path)
    other = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    F.cross_entropy(model.train()(tokens[:-1]), tokens[1:]).backward()
    F.cross_entropy(other(tokens[None, :-1]).logits[0], tokens[1:]).backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): p.grad
        for name, p in other.named_parameters()
        if p.requires_grad
    }
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys() and len(expected) == 42
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("key", [r".*q_proj", r"layers\.[0-3]\..*", r"(q|k)_proj"])
def test_pefts_patterns_that_are_regular_expressions_are_refused_by_name(tmp_path, key):
    peft_patched(theirs(), rank_pattern={key: 2}).save_pretrained(tmp_path)
    with pytest.raises(store.BadInput) as caught:
        store.load(theirs(), tmp_path)
    assert any(f"rank_pattern.{key}: a regular expression" in problem for problem in caught.value.problems)


def test_pefts_adapter_of_an_embedding_is_refused_with_the_way_out(tmp_path):
    peft_patched(theirs(), target_modules=["q_proj", "embed_tokens"]).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    with pytest.raises(
        store.BadInput, match=r"lora_embedding_A.*adapts an embedding.*Merge it into its base with PEFT"
    ):
        store.load(theirs(), tmp_path)


# ---- which modules are meant -----------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Numbers inside numbers, as mixtures of experts have them."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.ModuleDict(  # noqa: E731
            {"router": nn.Linear(7, 2), "experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(7, 7)}) for _ in "ab")}
        )
        self.model = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(3))})
        self.up = nn.Linear(7, 7)

    def forward(self, x):
        for layer in self.model["layers"]:
            x = x + sum(expert["up"](x) for expert in layer["experts"]) * layer["router"](x).sum(-1, keepdim=True)
        return self.up(x)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.0\..*(q|v)_proj"},
        {"target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"},
        {"target_modules": SEVEN, "exclude_modules": ["q_proj", "model.layers.0.mlp.up_proj"]},
        {"target_modules": SEVEN, "exclude_modules": r".*\.1\..*"},
        {"target_modules": r".*_proj", "exclude_modules": r".*mlp.*"},
        {"target_modules": SEVEN, "layers_to_transform": [1]},
        {"target_modules": SEVEN, "layers_to_transform": 0},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": ["k_proj", "model.layers.2.self_attn.o_proj"], "layers_to_transform": [1]},
        {"target_modules": SEVEN, "layers_to_transform": [0], "exclude_modules": ["down_proj"]},
    ],
    ids=short,
)
def test_pefts_choice_of_modules_is_read_as_pefts(tmp_path, fields):
    base = theirs(num_hidden_layers=3)
    model, before = copy.deepcopy(base), logits(base)
    other = peft_patched(base, **fields)
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    store.load(model, tmp_path)
    assert set(lora_layers(model)) == peft_paths(other) != set()
    assert close(logits(model), logits(other), TOL) and far(logits(model), before, TOL)


def test_the_head_that_peft_saves_beside_an_adapter_on_it_is_read_if_it_is_the_bases(tmp_path):
    """By its default PEFT does so wherever lm_head is a target."""
    model = peft_patched(theirs(), target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path)
    ours, other = theirs(), theirs()
    store.load(ours, tmp_path)
    assert close(logits(model), logits(ours), TOL) and far(logits(model), logits(other), TOL)
    other.lm_head.weight.data += 1
    with pytest.raises(store.BadInput, match=r"another head in .*base_model\.model\.lm_head\.base_layer\.weight"):
        store.load(other, tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["up"]},
        {"target_modules": ["up"], "layers_to_transform": [0]},
        {"target_modules": ["up"], "layers_to_transform": [1, 2]},
        {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["experts"]},
        {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": ["nothing", "layers"]},
        {"target_modules": ["experts.0.up"], "exclude_modules": ["model.layers.1.experts.0.up"]},
        {"target_modules": ["up"], "exclude_modules": "up"},
    ],
    ids=short,
)
def test_nested_numbers_are_counted_as_peft_counts_them(tmp_path, fields):
    base = randomise(Experts())
    model = copy.deepcopy(base)
    other = peft_patched(base, **fields)
    other.save_pretrained(tmp_path)
    store.load(model, tmp_path)
    assert set(lora_layers(model)) == peft_paths(other) != set()
    x = torch.randn(11, 7, generator=torch.Generator().manual_seed(3))
    assert close(model(x), other(x), TOL)


@pytest.mark.parametrize(
    "chosen",
    [
        {"fc1"},
        {"inner.fc1"},
        {"fc1", "fc2"},
        {"fc1", "inner.fc1"},
        {"inner.fc1", "fc2"},
    ],
    ids=lambda c: "+".join(sorted(c)),
)
def test_peft_patches_exactly_what_we_patched(tmp_path, chosen):
    base = randomise(Plain())
    model = patched(copy.deepcopy(base), targets=[f"re:{path}" for path in sorted(chosen)])
    store.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert peft_paths(other) == set(lora_layers(model)) == chosen
    assert close(logits(model), logits(other), TOL)


def test_exactly_the_targets_are_patched_on_transformers_own_model():
    model = theirs()
    returned = inject(model, 3, 6)
    assert set(returned) == {path for path, m in model.named_modules() if type(m).__name__ == "LoRALinear"}
    assert set(returned) == peft_paths(peft_patched(theirs())) and len(returned) == 14


# ---- training --------------------------------------------------------------------------------------------------------


@FAMILIES
def test_gradients_of_one_step_equal_pefts(tmp_path, family):
    """Mean cross-entropy over shifted tokens, no dropout, the same A and B: each dA and dB within 1e-5 of its norm."""
    base, tokens = theirs(family), some_tokens()
    model = patched(ours_like(base))
    store.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    F.cross_entropy(model.train()(tokens[:-1]), tokens[1:]).backward()
    F.cross_entropy(other(tokens[None, :-1]).logits[0], tokens[1:]).backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for name, p in other.named_parameters()
        if p.requires_grad
    }
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys() and len(expected) == 28
    for name, gradient in gradients.items():
        assert expected[name].norm() > 0, name
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_ten_adamw_steps_equal_pefts(tmp_path):
    base, tokens = theirs(), some_tokens()
    model = patched(ours_like(base))
    store.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    losses = []
    for m, forward in ((model.train(), model), (other, lambda x: other(x[None]).logits[0])):
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for _ in range(10):
            loss = F.cross_entropy(forward(tokens[:-1]), tokens[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    ours, expected = torch.tensor(losses[:10]), torch.tensor(losses[10:])
    assert close(ours, expected, 1e-3) and ours[-1] < ours[0] - 0.5
    assert close(logits(model.eval()), logits(other.eval()), 1e-2)


# ---- files as other programs leave them ------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"]], ids=str)
def test_a_merged_head_that_was_tied_is_saved_as_one_of_its_own(tmp_path, targets):
    """By transformers, and read by transformers and by us."""
    model = theirs(tie_word_embeddings=True)
    model.tie_weights()
    before = logits(model)
    inject(model, 5, 8, targets=targets)
    randomise_adapter(model)
    adapted = logits(model)
    merge_and_unload(model).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = load_model(ModelFolder(tmp_path))
    assert close(logits(again), adapted, TOL) and close(logits(ours), adapted, TOL) and far(adapted, before, TOL)


def tiny_phi3(dtype=torch.float32):
    raw = family_config("phi3")
    config = transformers.Phi3Config(**{key: value for key, value in raw.items() if key != "model_type"})
    model = randomise(transformers.Phi3ForCausalLM(config)).to(dtype).eval()
    ours = Model(ModelConfig.from_json(raw))
    state = {}
    for name, tensor in model.state_dict().items():
        parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        fused = next((stem for stem in parts if stem in name), None)
        names = [name.replace(fused, part) for part in parts[fused]] if fused else [name]
        sizes = [len(ours.state_dict()[name]) for name in names if name in ours.state_dict()]
        state |= dict(zip(names, tensor.split(sizes), strict=True)) if sizes else {}
    ours.load_state_dict(state, strict=True)
    return model, ours.requires_grad_(False).eval()


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"rank_pattern": {"qkv_proj": 3}}], ids=short)
def test_an_adapter_of_phi_3s_fused_linears_gives_pefts_logits(tmp_path, fields):
    model, ours = tiny_phi3()
    base = logits(ours, some_tokens(31, ours.config.vocab_size))
    adapted = peft_patched(model, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], **fields)
    adapted.save_pretrained(tmp_path)
    store.load(ours, tmp_path)
    tokens = some_tokens(31, ours.config.vocab_size)
    assert close(logits(ours, tokens), logits(adapted, tokens), TOL) and far(logits(ours, tokens), base, TOL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
    ],
    ids=short,
)
def test_what_peft_saves_beside_an_adapter_and_never_trained_is_left_out(tmp_path, fields, dtype):
    """On a bf16 base whose head has numbers that float16 rounds."""
    model = theirs(dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[:, :3] *= 1e-6
    ours = tiny_model(torch.bfloat16, head_dim=6)
    ours.load_state_dict(model.state_dict(), strict=True)
    fields = {"target_modules": ["q_proj", "v_proj"]} | fields
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=5, lora_alpha=8, task_type="CAUSAL_LM", **fields))
    randomise_peft(adapted.to(dtype)).save_pretrained(tmp_path)
    kept = [name for name in load_file(tmp_path / store.WEIGHTS) if "lora_" not in name]
    assert bool(kept) == ("bias" not in fields)
    base = copy.deepcopy(ours)
    store.load(ours, tmp_path, read=base.state_dict().get)
    assert set(lora_layers(ours)) == peft_paths(adapted)
    for name in kept:  # and what was trained is not
        tensors = load_file(tmp_path / store.WEIGHTS)
        save_file(tensors | {name: tensors[name] * 1.01}, tmp_path / store.WEIGHTS)
        with pytest.raises(store.BadInput, match=name):
            store.load(base, tmp_path, read=copy.deepcopy(base).state_dict().get)


def test_the_state_dict_of_a_whole_peft_model_is_its_adapter_and_the_base(tmp_path):
    """As a trainer saves it that knows nothing of adapters."""
    adapted = peft_patched(theirs())
    adapted.save_pretrained(tmp_path)
    store.load(expected := ours_like(theirs()), tmp_path)
    save_file({f"module.{name}": t.clone() for name, t in adapted.state_dict().items()}, tmp_path / store.WEIGHTS)
    store.load(ours := ours_like(theirs()), tmp_path)
    assert same(snapshot(expected), snapshot(ours)) and close(logits(ours), logits(adapted), TOL)


@pytest.mark.parametrize("how", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.2}], ids=str)
def test_under_autocast_we_compute_what_peft_computes_within_rounding(how):
    """Values and gradients, bfloat16 on a CPU; dropout draws the same numbers for both."""
    x, found = torch.randn(67, 37, generator=torch.Generator().manual_seed(3)), {}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["fc1", "fc2"], init_lora_weights=False, **how)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(randomise(Plain()), config).train()
    kind = DoRALinear if "use_dora" in how else RsLoRALinear if "use_rslora" in how else LoRALinear
    model = randomise(Plain())
    inject(model, 4, 8, how.get("lora_dropout", 0.0), ["fc1", "fc2"], kind=kind)
    model.load_state_dict(
        {key.removeprefix("base_model.model.").replace("base_layer", "base").replace("_A.default.weight", "_A")
         .replace("_B.default.weight", "_B").replace("_vector.default.weight", "_vector"): value
         for key, value in wrapped.state_dict().items()}
    )  # fmt: skip
    for name, one in (("peft", wrapped), ("ours", model.train())):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            y = one(x)
        y.float().square().mean().backward()
        short = {n.replace(".default.weight", "").removeprefix("base_model.model."): p.grad
                 for n, p in one.named_parameters() if p.requires_grad}  # fmt: skip
        found[name] = y, short
    assert found["ours"][0].dtype == found["peft"][0].dtype == torch.bfloat16
    assert close(found["ours"][0], found["peft"][0], 2e-2)
    assert found["ours"][1].keys() == found["peft"][1].keys()
    for name, gradient in found["peft"][1].items():
        assert close(found["ours"][1][name], gradient, 5e-2), name
