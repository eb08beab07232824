"""What a run trains has two forms, an adapter and all weights, which the loop and the checkpoints treat alike."""

import pytest
import torch

from lora.adapter.inject import inject, lora_layers
from lora.data.batch import micro_batches
from lora.pretrained import Spoken, find, load_model
from lora.run.trainable import Adapter, AllWeights
from lora.train.step import train_step
from tests import cli
from tests.helpers import objective_of, random_example, same, snapshot, some_tokens
from tests.mutation import mutation

BF16, F32 = torch.bfloat16, torch.float32


def trainable_of(kind: str):
    """A form of trainable on the small model in bfloat16, with its optimizer; the model file is its base."""
    base = find(str(cli.model_folder()))
    model = load_model(base, BF16 if kind == "adapter" else F32)
    if kind == "adapter":
        inject(model, rank=3)
        made = Adapter(model, base, cli.CHATML, {"format": 1})
    else:
        made = AllWeights(model, BF16, base, Spoken(cli.CHATML))
    return model, made, torch.optim.AdamW(made.parameters.values(), fused=True)


def step(model, made, optimizer) -> None:
    batches = micro_batches([random_example(4, 9, seed) for seed in (1, 2)], 64)
    train_step(objective_of(model), batches, optimizer, 0.05)
    made.sync_model()


def values(made) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.parameters.items()}


@mutation("lora/run/trainable.py", "        store.restore(self.model, folder)", "        pass", case="adapter")
@mutation("lora/run/trainable.py", "            master.copy_(found.read(name))", "            pass", case="model")
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_what_is_restored_is_what_was_written_bit_for_bit_and_the_model_computes_with_it(tmp_path, kind):
    model, made, optimizer = trainable_of(kind)
    step(model, made, optimizer)
    made.write(tmp_path, 1)
    written, state = values(made), snapshot(model)
    step(model, made, optimizer)
    assert made.kind == kind and not same(state, snapshot(model))
    made.restore(tmp_path)
    assert same(written, values(made)) and same(state, snapshot(model))
    assert (tmp_path / "chat_template.jinja").read_text() == cli.CHATML


@mutation("lora/run/trainable.py", "            weight.copy_(master)", "            pass", case="model")
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_parameters_are_float32_and_after_a_step_the_model_answers_differently(kind):
    model, made, optimizer = trainable_of(kind)
    names = {f"{path}.{part}" for path in lora_layers(model) for part in ("lora_A", "lora_B")}
    assert made.parameters.keys() == (names or dict(model.named_parameters()).keys())
    assert {p.dtype for p in made.parameters.values()} == {F32} and model.dtype == BF16
    before = model(some_tokens(9)).detach()
    step(model, made, optimizer)
    assert not torch.equal(before, model(some_tokens(9)))


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_what_is_published_is_what_was_written_in_the_dtype_of_the_model(tmp_path, kind):
    model, made, optimizer = trainable_of(kind)
    step(model, made, optimizer)
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    checkpoint.mkdir(), out.mkdir()
    made.write(checkpoint, 1)
    made.publish(checkpoint, out)
    if kind == "adapter":
        assert cli.tree(out) == cli.tree(checkpoint)
    else:
        assert same(snapshot(load_model(find(str(out)), BF16)), snapshot(model))
        assert set(cli.tree(out)) == set(cli.tree(checkpoint))
