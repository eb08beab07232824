"""The loss is the sum over trained tokens; a step is a set of examples, however it is cut; the update is AdamW's."""

import copy
import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora import ops
from lora.adapter.inject import inject, lora_layers
from lora.data.batch import Batch, collate, dummy_batch, micro_batches
from lora.data.order import steps
from lora.errors import BadNumbers
from lora.methods import sft
from lora.methods.objective import Objective, measure
from lora.ops import cross_entropy, fast_rms_norm, plain
from lora.text.chat import Example
from lora.train.schedule import SCHEDULES, learning_rate
from lora.train.step import accumulate, clip, train_step
from tests import oracle
from tests.helpers import bits, close, error, far, objective_of, patched, random_example, same, snapshot, tiny_model
from tests.mutation import mutation

VOCAB = 131


UNEQUAL = [random_example(prompt, answer, answer) for prompt, answer in ((40, 1), (3, 7), (12, 60), (2, 200), (25, 2))]


def plain_objective_of(model):
    def objective(b: Batch) -> torch.Tensor:
        return plain.cross_entropy(model.trunk(b.tokens, b.lengths)[b.trained], model.head_weight, b.targets)

    return objective


def adapter(model) -> list[torch.nn.Parameter]:
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def gradients(model, batches) -> torch.Tensor:
    """The gradient of a whole step, as one vector."""
    for p in adapter(model):
        p.grad = None
    accumulate(objective_of(model), batches)
    return torch.cat([p.grad.flatten() for p in adapter(model)])


def random_parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    """Parameters with gradients of norm 5."""
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for shape in ((3, 4), (7,), (2, 5)):
        parameters.append(torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)))
        parameters[-1].grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in parameters))
    for p in parameters:
        p.grad *= 5 / norm
    return parameters


# ---- a step ----------------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers that Python reads, and shapes that depend on numbers."""

    WAIT = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in self.WAIT
        return function(*args, **kwargs or {})


@mutation("lora/train/step.py", "loss = loss + part.detach().to(widest(part.device))", "loss += part.item()")
@mutation(
    "lora/methods/objective.py",
    "self.loss = self.loss + loss.detach().to(widest(loss.device))",
    "self.loss = self.loss + loss.item()",
)
def test_a_gpu_is_waited_for_three_times_a_step_however_it_is_cut(monkeypatch):
    """For the loss, the norm, and the share that stayed as it was."""
    monkeypatch.setattr(fast_rms_norm, "_divides", lambda weight: False)  # which a GPU is not asked
    monkeypatch.setattr(ops, "attention", plain.attention)  # it has a kernel of its own
    monkeypatch.setattr(Tensor, "tolist", None)
    model, args = patched(tiny_model()).train(), SimpleNamespace(checkpoint_activations=False, micro_tokens=300)
    optimizer = torch.optim.SGD(adapter(model), lr=0.01)
    for micro in (1, 300):
        with Reads() as reads:
            train_step(Objective(sft, model, args), micro_batches(UNEQUAL, micro), optimizer, 0.01, 1.0)
        assert reads.count == 3


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens():
    model = patched(tiny_model())
    loss, trained = accumulate(objective_of(model), [collate(UNEQUAL)])
    total = count = 0
    for tokens, flags in UNEQUAL:
        logits = model(torch.tensor(tokens)).detach().numpy()
        part = oracle.nll(logits[:-1], tokens[1:], flags[1:])
        total, count = total + part[0], count + part[1]
    assert trained == count == 270
    assert loss == pytest.approx(total / count, rel=1e-12)


@mutation(
    "lora/data/batch.py",
    "    return filled([], 1, device)",
    "    return collate([Example([0, 0], [False, True])], device)",
)
def test_a_batch_of_which_nothing_is_trained_gives_zeros():
    model = patched(tiny_model()).train()
    b = dummy_batch()
    loss = cross_entropy(model.trunk(b.tokens, b.lengths)[b.trained], model.head_weight, b.targets)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_first_trained_token_is_predicted_from_the_last_token_of_its_prompt():
    model = tiny_model()
    a = Example([5, 6, 7, 8], [False, False, False, True])
    b = Example([9, 6, 7, 8], [False, False, False, True])
    for example in (a, b):
        logits = model(torch.tensor(example.tokens[:-1]))
        expected = -logits[-1].log_softmax(-1)[example.tokens[-1]]
        batch = collate([example])
        assert close(objective_of(model)(batch), expected, 1e-12)


# ---- a step is a set of examples -------------------------------------------------------------------------------------


@mutation(
    "lora/train/step.py",
    "part = objective(batch) / count",
    "part = objective(batch) / int(batch.trained.sum()) / len(batches)",
)
@pytest.mark.parametrize("budget", [1, 30, 64, 70, 1000])
def test_any_cut_of_a_step_into_micro_batches_gives_the_same_gradients(budget):
    model = patched(tiny_model())
    whole = gradients(model, [collate(UNEQUAL)])
    batches = micro_batches(UNEQUAL, budget)
    assert (len(batches) == 1) == (budget == 1000)
    assert close(gradients(model, batches), whole, 1e-12)
    assert whole.abs().max() > 1e-2


def test_dividing_by_the_number_of_micro_batches_would_give_other_gradients():
    model = patched(tiny_model())
    whole, batches = gradients(model, [collate(UNEQUAL)]), micro_batches(UNEQUAL, 30)
    mean_of_means = sum(gradients(model, [batch]) for batch in batches) / len(batches)
    assert error(mean_of_means, whole) > 1e-2


@mutation(
    "lora/train/step.py",
    """    optimizer.step()
    optimizer.zero_grad()""",
    "    optimizer.step()",
)
def test_a_short_last_step_is_divided_by_its_own_trained_tokens():
    model = patched(tiny_model())
    *full, last = steps([len(UNEQUAL)], 2, seed=0, total=3)
    assert [len(step) for step in full] == [2, 2] and len(last) == 1
    optimizer = torch.optim.SGD(adapter(model), lr=0.0)
    for step in (*full, last):
        examples = [UNEQUAL[i] for i in step]
        result = train_step(objective_of(model), micro_batches(examples, 40), optimizer, 0.0)
        alone = gradients(copy.deepcopy(model), [collate(examples)])
        assert result.grad_norm == pytest.approx(alone.norm().item(), rel=1e-12)  # nothing left of the step before
        assert result.trained_tokens == sum(sum(e.trained[1:]) for e in examples)
        assert result.tokens == sum(len(e.tokens) - 1 for e in examples)


# ---- clipping and the update -----------------------------------------------------------------------------------------


@mutation(
    "lora/train/step.py",
    "norm = torch.nn.utils.get_total_norm(gradients)",
    "norm = max(gradient.norm() for gradient in gradients)",
)
@pytest.mark.parametrize("limit", [0.3, 4.999, 5.001, 100.0])
def test_clipping_scales_by_limit_over_norm(limit):
    parameters = random_parameters()
    before = [p.grad.clone() for p in parameters]
    assert clip(parameters, limit) == pytest.approx(5, rel=1e-14)
    for p, g in zip(parameters, before, strict=True):
        assert close(p.grad, g * min(1.0, limit / (5 + 1e-6)), 1e-13)


@mutation("lora/train/step.py", "    if max_norm:\n", "    if True:\n")
def test_a_clip_limit_of_zero_changes_no_bit():
    parameters = random_parameters()
    before = [p.grad.clone() for p in parameters]
    assert clip(parameters, 0) == pytest.approx(5, rel=1e-14)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))


@mutation(
    "lora/train/step.py",
    """    loss, _ = accumulate(objective, batches, count)
""",
    """    loss = 0.0
    for batch in batches:
        part = objective(batch) / sum(batch.count for batch in batches)
        part.backward()
        loss += part.item()
        clip(parameters, limit)
""",
)
@mutation("lora/train/step.py", 'group["lr"] = lr * group.get("lr_ratio", 1.0)', "pass")
@pytest.mark.parametrize("limit", [0.0, 0.05])
def test_steps_equal_a_manual_loop_with_adamw_on_the_plain_loss(limit):
    ours, manual = (patched(tiny_model()) for _ in range(2))
    settings = {"lr": 123.0, "weight_decay": 0.1}  # the rate is set by train_step, step by step
    optimizer, reference = (torch.optim.AdamW(adapter(model), **settings) for model in (ours, manual))
    for step, examples in enumerate([UNEQUAL[:3], UNEQUAL[3:4], UNEQUAL[1:]]):
        lr = 0.02 / (step + 1)
        result = train_step(objective_of(ours), micro_batches(examples, 50), optimizer, lr, limit)
        total = sum(plain_objective_of(manual)(collate([example])) for example in examples)
        mean = total / sum(sum(e.trained[1:]) for e in examples)
        reference.zero_grad()
        mean.backward()
        norm = torch.cat([p.grad.flatten() for p in adapter(manual)]).norm()
        for p in adapter(manual):
            p.grad *= min(1.0, limit / (norm.item() + 1e-6)) if limit else 1.0
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        assert result.loss == pytest.approx(mean.item(), rel=1e-11)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-9) and norm > 10 * limit
    start = patched(tiny_model())
    for a, b, before in zip(adapter(ours), adapter(manual), adapter(start), strict=True):
        assert close(a, b, 1e-9) and far(a, before, 1e-4)  # Adam divides by |g|: 1e-12 in g grows where g is small
        assert a.grad is None


def test_frozen_weights_are_bitwise_untouched():
    model = tiny_model(torch.float32)
    before = snapshot(model)
    inject(model, rank=4, alpha=8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.5)
    for _ in range(5):
        train_step(objective_of(model), micro_batches(UNEQUAL, 64), optimizer, 0.05, 1.0)
    after = {name.replace(".base.", "."): tensor for name, tensor in snapshot(model).items() if "lora_" not in name}
    assert same(before, after)
    assert all(p.grad is None for p in model.parameters())
    assert all(layer.lora_B.abs().max() > 0.01 for layer in lora_layers(model).values())


@mutation("lora/train/step.py", "if not (math.isfinite(loss) and math.isfinite(norm)):", "if False:")
@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_raises_and_steps_no_weight(bad, limit):
    model = patched(tiny_model())
    optimizer = torch.optim.AdamW(adapter(model), lr=0.1)
    train_step(objective_of(model), micro_batches(UNEQUAL, 64), optimizer, 0.1, limit)
    before, moments = snapshot(model), copy.deepcopy(optimizer.state_dict()["state"])

    def spoilt(b: Batch) -> torch.Tensor:
        return objective_of(model)(b) * (bad if max(b.lengths) > 200 else 1.0)

    with pytest.raises(BadNumbers, match="diverged") as raised:
        train_step(spoilt, micro_batches(UNEQUAL, 64), optimizer, 0.1, limit)
    assert raised.value.code == 4
    assert same(before, snapshot(model))
    for old, new in zip(moments.values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(bits(old[key]), bits(new[key])) for key in old)
    assert all(p.grad is None for p in adapter(model))


@mutation("lora/train/step.py", "if not (math.isfinite(loss) and math.isfinite(norm)):", "if not math.isfinite(loss):")
def test_a_gradient_that_is_not_finite_raises_though_the_loss_is():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    batch = collate([Example([1, 2], [False, True])])
    with pytest.raises(BadNumbers):
        train_step(lambda b: weight.abs().sqrt().sum(), [batch], optimizer, 0.1)  # √0 is finite, its slope is not
    assert torch.equal(weight.detach(), torch.zeros(3, dtype=torch.float64))


# ---- the schedules ---------------------------------------------------------------------------------------------------


@mutation(
    "lora/train/schedule.py", "(step - warmup) / max(1, total - warmup)", "(step + 1 - warmup) / max(1, total - warmup)"
)
@mutation("lora/train/schedule.py", "return peak * (step + 1) / (warmup + 1)", "return peak * step / (warmup + 1)")
@pytest.mark.parametrize("warmup", [0, 1, 5, 20])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_is_the_closed_form(schedule, warmup):
    total, peak = 20, 3e-4
    rates = [learning_rate(step, total, peak, warmup, schedule) for step in range(total)]
    after = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: math.cos(math.pi / 2 * x) ** 2,
    }[schedule]
    for step, rate in enumerate(rates):
        if step < warmup:
            assert rate == pytest.approx(peak * (step + 1) / (warmup + 1), rel=1e-15)
        else:
            assert rate == pytest.approx(peak * after((step - warmup) / (total - warmup)), rel=1e-13)
    assert all(0 < rate <= peak for rate in rates)  # no step is wasted on a rate of zero
    if warmup < total:
        assert rates[warmup] == peak
    if warmup:
        assert rates[0] == pytest.approx(peak / (warmup + 1), rel=1e-15)
    if schedule == "linear" and warmup < total:
        assert rates[-1] == pytest.approx(peak / (total - warmup), rel=1e-13)


# ---- whole runs ------------------------------------------------------------------------------------------------------


def train(seed: int, count: int, examples, lr: float = 0.01, dropout: float = 0.1, **config):
    """A small run as train.py makes it: the patched model and its losses."""
    model = tiny_model(torch.float32, **config)
    torch.manual_seed(seed)
    inject(model, rank=4, alpha=8, dropout=dropout)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    found = []
    for step, indices in enumerate(steps([len(examples)], 4, seed, count)):
        batches = micro_batches([examples[i] for i in indices], 64)
        rate = learning_rate(step, count, lr, 2)
        found.append(train_step(objective_of(model), batches, optimizer, rate, 1.0).loss)
    return model.eval(), found


def digest(model) -> str:
    return hashlib.sha256(b"".join(bits(p).numpy().tobytes() for p in adapter(model))).hexdigest()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    examples = [random_example(4, 6 + i, i) for i in range(10)]
    (first, a), (again, b), (other, c) = (train(seed, 7, examples) for seed in (3, 3, 4))
    assert digest(first) == digest(again) != digest(other)
    assert [x.hex() for x in a] == [x.hex() for x in b] != [x.hex() for x in c]
    without, _ = train(3, 7, examples, dropout=0.0)
    assert digest(without) != digest(first)  # dropout was on


def test_eight_examples_are_learned_by_heart():
    examples = [random_example(5, 8, i) for i in range(8)]
    model, found = train(0, 160, examples, dropout=0.0, hidden_size=96)  # in 24 dimensions the frozen head gives 0.3
    with torch.inference_mode():
        sums = [objective_of(model)(collate([example])).item() for example in examples]
    assert found[0] > 3 and sum(sums) / 64 < 0.05


@mutation("lora/methods/objective.py", '{"loss": loss / count, **', '{"loss": loss / (count + 1), **')
@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_mean_loss_is_weighted_by_tokens_however_it_is_batched(budget):
    model = patched(tiny_model())
    found = measure(sft, model, micro_batches(UNEQUAL, budget), None)["loss"]
    each = [objective_of(model)(collate([example])).item() for example in UNEQUAL]
    expected = sum(each) / sum(sum(example.trained[1:]) for example in UNEQUAL)
    assert abs(found - expected) < 1e-12 * expected


@mutation(
    "lora/train/step.py", "count_nonzero(flat(parameters) == before)", "count_nonzero(flat(parameters) != before)"
)
def test_updates_that_bf16_rounds_away_are_counted():
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(torch.bfloat16)
        inject(model, 4, 8, dtype=dtype)
        for p in adapter(model):
            torch.nn.init.uniform_(p, 0.5, 1.0)  # next to them bf16 has steps of 0.002
        optimizer = torch.optim.AdamW(adapter(model), weight_decay=0.0)
        before = [p.detach().clone() for p in adapter(model)]
        result = train_step(objective_of(model), micro_batches(UNEQUAL, 300), optimizer, 1e-5)
        same = sum(int(torch.eq(p, old).sum()) for p, old in zip(adapter(model), before, strict=True))
        assert result.unchanged == same / sum(p.numel() for p in before)
        shares[dtype] = result.unchanged
    assert shares[torch.float32] < 0.1 and shares[torch.bfloat16] > 0.99
