"""Ten claims on which everything else stands, each proved in a few lines. With the line in its `@mutation` broken as it
says there, the test fails: `python tests/mutate.py test_essentials` shows it.

`W, b` are a frozen Linear's, `A, B` its adapter's, `s = alpha / rank`. All but the last two run in float64, where
rounding hides nothing.
"""

import pytest
import torch
from torch import nn

from lora.adapter import store
from lora.adapter.inject import inject, lora_layers
from lora.adapter.merge import merge, merge_and_unload, unmerge
from lora.data.batch import micro_batches
from lora.pretrained import ModelFolder, load_chat
from lora.train.step import accumulate, train_step
from tests import cli
from tests.helpers import (
    close,
    example_of,
    far,
    objective_of,
    patched,
    random_example,
    same,
    snapshot,
    some_tokens,
    tiny_model,
)
from tests.mutation import mutation
from tests.run.test_resume import kill_before_step

UNEQUAL = [random_example(prompt, answer, answer) for prompt, answer in ((40, 1), (3, 7), (12, 60), (2, 100), (25, 2))]


def layer_and_parts() -> tuple[nn.Module, ...]:
    """A Linear with an adapter of rank 3 and alpha 5, nothing in it zero; W, b, A, B; and an input of 7 rows."""
    torch.manual_seed(0)
    layer = patched(nn.Sequential(nn.Linear(11, 23)).double(), rank=3, alpha=5, targets=["0"])[0]
    return layer, layer.base.weight, layer.base.bias, layer.lora_A, layer.lora_B, torch.randn(7, 11).double()


@mutation("lora/adapter/layer.py", "        return self.alpha / self.rank\n", "        return self.alpha\n")
def test_1_the_forward_pass_is_the_formula():
    layer, W, b, A, B, x = layer_and_parts()
    y = x @ W.T + b + 5 / 3 * x @ A.T @ B.T
    assert close(layer(x), y, 1e-13) and far(x @ W.T + b, y, 1e-13)


@mutation("lora/ops/fast_lora.py", "d_Bs.append((part.T @ G).mul_(s).T)", "d_Bs.append((part.T @ G).T)")
def test_2_the_gradients_are_those_that_autograd_finds_for_the_dense_formula():
    layer, W, b, A, B, x = layer_and_parts()
    g, inputs = torch.randn(7, 23).double(), (A, B, x.requires_grad_())
    expected = torch.autograd.grad(x @ (W + 5 / 3 * B @ A).T + b, inputs, g)
    assert all(close(*pair, 1e-12) for pair in zip(torch.autograd.grad(layer(x), inputs, g), expected, strict=True))
    assert not W.requires_grad and not b.requires_grad


@mutation("lora/adapter/layer.py", "nn.init.zeros_(self.lora_B)", "nn.init.normal_(self.lora_B, std=1e-3)")
def test_3_a_fresh_adapter_changes_nothing():
    model, tokens = tiny_model(), some_tokens()
    before = model(tokens)
    inject(model, rank=4, alpha=8)
    assert len(lora_layers(model)) == 14 and torch.equal(model(tokens), before)


@mutation("lora/adapter/layer.py", "return self.scaling * (B.to(wide) @ A.to(wide))", "return B.to(wide) @ A.to(wide)")
def test_4_a_merged_model_computes_what_the_adapter_computed_with_plain_linears():
    model, tokens = patched(tiny_model()), some_tokens()
    adapted = model(tokens)
    merge_and_unload(model)
    assert not lora_layers(model) and close(model(tokens), adapted, 1e-12)
    assert far(tiny_model()(tokens), adapted, 1e-12)


@mutation(
    "lora/adapter/merge.py", "        layer.merged_weight = weight\n", "        layer.base.weight.copy_(weight)\n"
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_5_unmerging_gives_every_bit_back(dtype):
    model, tokens = patched(tiny_model(dtype)), some_tokens()
    before, adapted = snapshot(model), model(tokens)
    for _ in range(10):
        merge(model)
        assert all(layer.merged for layer in lora_layers(model).values())
        unmerge(model)
    assert same(before, snapshot(model)) and torch.equal(model(tokens), adapted)


@mutation("lora/adapter/layer.py", "return self.rank, self.alpha, {", "return self.rank, self.rank, {")
def test_6_an_adapter_that_was_saved_comes_back_bit_for_bit(tmp_path):
    model, again = patched(tiny_model(torch.float32)), tiny_model(torch.float32)
    store.save(model, tmp_path)
    store.load(again, tmp_path)
    assert same(snapshot(model), snapshot(again)) and torch.equal(model(some_tokens()), again(some_tokens()))


@mutation("lora/text/chat.py", "spans[answer.turn] = (first, last + 1)", "spans[answer.turn] = (first, last)")
def test_7_trained_is_what_the_assistant_says_with_its_end_of_turn_and_nothing_else():
    chat = load_chat(ModelFolder(cli.model_folder()))
    turns = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "Bye!"))
    tokens, trained = example_of(chat, [{"role": role, "content": text} for role, text in turns])
    learned = chat.tokenizer.spell([token for token, on in zip(tokens, trained, strict=True) if on])
    assert learned == "Hello.<|im_end|>Bye!<|im_end|>"


@mutation("lora/train/step.py", "part = objective(batch) / count", "part = objective(batch) / len(batch.targets)")
def test_8_accumulated_micro_batches_of_unequal_counts_are_one_batch():
    model = patched(tiny_model()).train()

    def gradient(batches) -> torch.Tensor:
        model.zero_grad()
        accumulate(objective_of(model), batches)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    assert len(micro_batches(UNEQUAL, 1)) == 5 and len(micro_batches(UNEQUAL, 10_000)) == 1
    assert close(gradient(micro_batches(UNEQUAL, 1)), gradient(micro_batches(UNEQUAL, 10_000)), 1e-12)
    mean_of_means = sum(gradient(micro_batches([example], 1)) for example in UNEQUAL) / 5
    assert far(mean_of_means, gradient(micro_batches(UNEQUAL, 1)), 1e-3)


@mutation("lora/adapter/inject.py", "    model.requires_grad_(False)\n", "    pass\n")
def test_9_a_step_changes_A_and_B_and_no_bit_of_the_base():
    model = tiny_model(torch.bfloat16).requires_grad_()
    inject(model, rank=4, alpha=8)
    before = snapshot(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    for _ in range(2):  # the first gives A no gradient, as B is 0
        train_step(objective_of(model), micro_batches(UNEQUAL, 100), optimizer, 0.01)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{path}.{name}" for path in lora_layers(model) for name in ("lora_A", "lora_B")}


@mutation("train.py", "        run_state.load_optimizer(resumed.path, optimizer, trainable.parameters)", "        pass")
def test_10_a_run_that_was_killed_and_resumed_is_bit_for_bit_the_run_that_never_stopped(tmp_path):
    how = ("--max-steps", 6, "--save-every", 2, "--batch-size", 3, "--dropout", 0.2)
    assert cli.train("whole", *how, cwd=tmp_path).code == 0
    assert cli.train("killed", *how, cwd=tmp_path, before=kill_before_step(6)).code != 0
    assert cli.call("train", "--resume", "--out", "killed", cwd=tmp_path).code == 0
    whole, killed = (tmp_path / run / "adapter_model.safetensors" for run in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
