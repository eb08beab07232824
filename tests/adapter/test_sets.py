"""Adapters beside each other on one base: one is in place, and what was there before comes back bit for bit."""

import pytest
import torch

from lora import pretrained
from lora.adapter import sets, store, value_head
from lora.adapter.inject import inject, lora_layers
from lora.adapter.variants import DoRALinear
from lora.errors import BadInput
from tests import cli
from tests.adapters import write_adapter, write_head
from tests.helpers import close, far, randomise_adapter, same, snapshot
from tests.mutation import mutation

TOKENS = torch.arange(3, 40)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    write_adapter(folder / "judge", 1, rank=4, targets=("q_proj", "mlp"))
    write_head(folder / "judge")
    write_adapter(folder / "dora", 2, kind=DoRALinear)
    return folder


def load(*adapters):
    model = pretrained.load_model(str(cli.model_folder()), torch.float32)
    for folder in adapters:
        store.load(model, folder)
    return model


def policy():
    """A model that trains an adapter with a value head."""
    model = load()
    inject(model, rank=3, alpha=6)
    randomise_adapter(model, 7)
    value_head.add(model, model.config.hidden_size)
    return model.train()


@mutation("lora/adapter/sets.py", "    put_in(model, adapter)\n", "")
@mutation(
    "lora/adapter/sets.py",
    "        take_out(model)\n        put_in(model, before)",
    "        pass",
)
@pytest.mark.parametrize("name", ["judge", "dora"])
def test_a_model_computes_with_the_adapter_in_place_and_afterwards_as_before(work, name):
    model = policy()
    before, weights = model(TOKENS), snapshot(model)
    other = sets.read(model, work / name)
    assert torch.equal(model(TOKENS), before)
    with sets.in_place(model, other):
        found, head = model(TOKENS), value_head.of(model)
    assert close(found, load(work / name)(TOKENS), 1e-6) and far(found, before, 1e-4)
    assert torch.equal(model(TOKENS), before) and same(weights, snapshot(model))
    assert (head is None) == (name == "dora")


@mutation("lora/adapter/sets.py", "    value_head.place(model, adapter.head)", "    pass")
def test_each_adapter_has_its_own_head_or_none(work):
    model = policy()
    own, other = value_head.of(model), sets.read(model, work / "judge")
    with sets.in_place(model, other):
        assert value_head.of(model) is other.head is not own
    assert value_head.of(model) is own
    with sets.in_place(model, sets.read(model, work / "dora")):
        assert value_head.of(model) is None


@mutation("lora/adapter/sets.py", "        module.requires_grad_(False).eval()", "        pass")
def test_what_trains_stays_the_same_and_the_other_adapter_is_frozen(work):
    model = policy()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    other = sets.read(model, work / "judge")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert not any(p.requires_grad for layer in other.layers.values() for p in layer.parameters())
    with sets.in_place(model, other):
        assert not any(p.requires_grad for p in model.parameters())


@mutation("lora/adapter/sets.py", "        p.requires_grad_()", "        pass")
def test_a_model_whose_every_weight_trains_goes_on_training(work):
    model = load().requires_grad_(True)
    sets.read(model, work / "judge")
    assert all(p.requires_grad for p in model.parameters()) and not lora_layers(model)


def test_both_stand_around_the_very_same_linears(work):
    model = policy()
    other = sets.read(model, work / "judge")
    own = lora_layers(model)
    assert other.layers.keys() < own.keys()
    assert all(layer.base is own[path].base for path, layer in other.layers.items())


@mutation(
    "lora/adapter/sets.py",
    "        found = take_out(model)\n        put_in(model, before)",
    "        found = take_out(model)",
)
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(work, tmp_path):
    cli.write_model(tmp_path / "wide", hidden_size=2 * cli.SIZES["hidden_size"])
    write_adapter(tmp_path / "stranger", 4, model=tmp_path / "wide")
    model = policy()
    before = model(TOKENS)
    with pytest.raises(BadInput, match="wrong tensor"):
        sets.read(model, tmp_path / "stranger")
    assert torch.equal(model(TOKENS), before)
