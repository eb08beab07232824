"""The library equals `lora/essence.py`: the same start and batches give the same losses, A and B; so does merging."""

import copy
from pathlib import Path

import pytest
import torch

from lora import essence
from lora.adapter.inject import inject, lora_layers
from lora.data.batch import collate
from lora.ops import cross_entropy
from lora.text.chat import Example
from lora.train.step import train_step
from tests import cli
from tests.helpers import close, far, some_tokens, tiny_model
from tests.mutation import mutation

TOL, LR, DECAY = 1e-11, 1e-3, 0.1
LENGTHS = ((20, 9), (3, 40), (11, 2), (2, 30))  # prompt, answer
EXAMPLES = [Example(some_tokens(p + a, seed=p).tolist(), [False] * p + [True] * a) for p, a in LENGTHS]


def by_the_essence(model):
    parameters = essence.patch(model, 4, 6)
    start = [p.detach().clone() for p in parameters]
    batches, losses = [essence.pack(EXAMPLES[:3]), essence.pack(EXAMPLES[3:])], []
    moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for t in range(1, 6):
        losses.append(essence.accumulate(model, batches))
        essence.adamw(moments, t, LR, decay=DECAY)
    return start, losses, parameters


def by_the_library(model, start):
    inject(model, 4, 6, dtype=model.dtype)
    parameters = [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]
    with torch.no_grad():
        for p, values in zip(parameters, start, strict=True):
            p.copy_(values)
    batches = [collate(EXAMPLES[:3]), collate(EXAMPLES[3:])]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY)

    def objective(b):
        return cross_entropy(model.trunk(b.tokens, b.lengths)[b.trained], model.head_weight, b.targets)

    return [train_step(objective, batches, optimizer, LR).loss for _ in range(5)], parameters


@mutation(
    "lora/essence.py", "self.base(x) + self.s * (x @ self.A.T) @ self.B.T", "self.base(x) + (x @ self.A.T) @ self.B.T"
)
@mutation("lora/essence.py", 'reduction="sum") / count', 'reduction="sum") / count / len(batches)')
@mutation("lora/essence.py", "decay * p)", "0 * p)")
@mutation("lora/train/step.py", "part = objective(batch) / count", "part = objective(batch) / len(batch.targets)")
@mutation(
    "lora/ops/fast_lora.py",
    "y.reshape(-1, y.shape[-1]).addmm_(part, B.T)",
    "y.reshape(-1, y.shape[-1]).addmm_(part, B.T, alpha=1.01)",
)
def test_losses_and_the_final_adapter_are_those_of_the_library():
    """In float64: Adam turns what rounding leaves of a gradient that is nearly zero into a step of full length."""
    first, second = (tiny_model(torch.float64, num_hidden_layers=2) for _ in range(2))
    torch.set_default_dtype(torch.float64)
    try:
        start, losses, parameters = by_the_essence(first)
    finally:
        torch.set_default_dtype(torch.float32)
    ours, theirs = by_the_library(second, start)
    assert losses == pytest.approx(ours, rel=TOL) and losses[-1] < 0.99 * losses[0]
    for a, b, before in zip(parameters, theirs, start, strict=True):
        assert close(a, b, TOL) and far(a, before, TOL)


@mutation(
    "lora/essence.py", "layer.base.weight += layer.s * layer.B @ layer.A", "layer.base.weight += layer.B @ layer.A"
)
def test_merged_it_computes_what_the_merged_library_computes():
    model = tiny_model(torch.float32)
    base = copy.deepcopy(model)
    start, _, parameters = by_the_essence(model)
    by_the_library(base, [p.detach() for p in parameters] if start else [])
    adapted, tokens = model(some_tokens()), some_tokens()
    essence.merge(model)
    assert not any(isinstance(module, essence.LoRALinear) for module in model.modules())
    assert close(model(tokens), adapted, 1e-5) and far(adapted, tiny_model(torch.float32)(tokens), 1e-5)


def test_it_runs_and_shows_before_after_and_merged(capsys):
    essence.main(str(cli.model_folder()), steps=2)
    out = capsys.readouterr().out
    assert out.startswith("before   What is your name?") and out.count("step ") == 2
    assert "\nafter    What" in out and "\nmerged   What" in out


def test_it_has_a_hundred_lines():
    assert len(Path(essence.__file__).read_text().splitlines()) <= 100
