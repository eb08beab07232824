"""TRL as referee: advantages, losses and the gradients of every weight of grpo and rloo, on the same ids and rewards.

LORA_PARITY=1 makes a missing trl a failure; without it the file is skipped. Its own trainers compute, in float32: only
where they would sample, or call a reward function, do they get what ours has.
"""

import os

import pytest
import torch

if os.environ.get("LORA_PARITY") == "1":
    import datasets
    import trl
else:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

from trl.trainer.utils import split_tensor_dict

from lora.data.batch import collate
from lora.methods import METHODS, policy
from tests.helpers import close, far
from tests.methods.sampled import NONE, answers, args_of
from tests.parity.test_parity_preference import TOL, ours, quiet, same, split, theirs, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
GROUP, TEMPERATURE, LIMIT = 4, 0.8, 40
REWARDS = ((1.0, 0.0, 0.5, NONE), (0.2, 0.9, 0.9, -1.0), (1.0, 1.0, 1.0, 1.0), (NONE, 2.0, NONE, NONE))
EPSILONS = {"epsilon": 0.1, "epsilon_high": 0.28}


def push(model) -> None:
    """What an update would do to both models alike: to weights of the same name, the same."""
    for name, p in sorted(model.named_parameters()):
        random = torch.Generator().manual_seed(sum(name.encode()))
        p.data += 0.005 * torch.randn(p.shape, generator=random)


# ---- theirs ----------------------------------------------------------------------------------------------------------


def their_trainer(folder, items, kind, config, parts: int = 1, **how):
    """A trainer that samples these completions and has these rewards."""
    sizes = {"per_device_train_batch_size": len(items) // parts, "gradient_accumulation_steps": parts}
    args = quiet(config, folder, num_generations=GROUP, max_completion_length=LIMIT, temperature=TEMPERATURE, **sizes,
                 **EPSILONS, **how)  # fmt: skip
    rows = datasets.Dataset.from_dict({"prompt": ["What?"] * 8})
    model = theirs()
    theirs(moved=True).save_pretrained(folder / "reference")
    model.config._name_or_path = str(folder / "reference")  # where it looks for its reference
    trainer = kind(model, reward_funcs=lambda **_: None, args=args, train_dataset=rows, processing_class=tokenizer())
    prompts, completions = zip(*(split(item.examples[0]) for item in items), strict=True)
    sampled = list(prompts), list(completions), *([["?"] * len(items)] if kind is trl.RLOOTrainer else
               [None, ["?"] * len(items), None, {}, None, []])  # fmt: skip
    trainer._generate = lambda _: sampled
    trainer._calculate_rewards = lambda *_: torch.tensor([item.known["reward"] for item in items])
    trainer.current_gradient_accumulation_steps = parts
    return trainer


def their_loss(trainer, count: int, parts: int, moves: bool):
    """The loss of a step of theirs, and its advantages."""
    inputs = trainer._generate_and_score_completions([{"prompt": "What?"}] * count)
    if moves:
        push(trainer.model)
    losses = [trainer._compute_loss(trainer.model, part) for part in split_tensor_dict(inputs, parts)]
    by = parts if isinstance(trainer, trl.RLOOTrainer) else 1  # grpo's are divided by the accumulation already
    return sum(losses) / by, inputs["advantages"]


# ---- ours ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measured(model, items, args, parts: int) -> list:
    """Micro-batches with what rollouts measure."""
    reference, size = ours(moved=True), len(items) // parts
    batches = [collate(items[i : i + size]) for i in range(0, len(items), size)]
    for batch in batches:
        for name, one in {"sampled": model, "reference": reference}.items():
            batch.per_token[name] = policy.log_probs(one, policy.hidden(one, batch), batch, args)
    return batches


def our_step(model, items, args, parts: int, moves: bool):
    """The same of ours: loss, advantages, figures."""
    method = METHODS[args.method]
    batches = method.prepare(model, measured(model, items, args, parts), args, list, {})
    if moves:
        for batch in batches:
            method.loss(model, batch, args)  # the first pass
        push(model)
    found = [method.loss(model, batch, args) for batch in batches]
    figures = {name: [f[name] for *_, f in found] for name in found[0][2]}
    means = {name: sum(float(v) for v, _ in pairs) / sum(n for _, n in pairs) for name, pairs in figures.items()}
    advantages = torch.cat([batch.known["advantage"] for batch in batches])
    return sum(loss for loss, *_ in found) / sum(count for _, count, _ in found), advantages, means


def short(item, tokens: int = 8):
    """The completion cut. TRL adds an answer's log-probabilities up in float32, ours in float64: of 31 tokens, 170
    nats, the ratio of two such sums is 1e-5 off."""
    [example] = item.examples
    end = example.trained.index(True) + tokens
    return item._replace(examples=(type(example)(example.tokens[:end], example.trained[:end]),))


def check(folder, method: str, kind, config, parts: int, moves: bool, kl: float, theirs_only=(), **how) -> None:
    items = [short(item) if method == "rloo" else item for item in answers(REWARDS)]
    args = args_of(method, kl=kl, temperature=TEMPERATURE, max_new_tokens=LIMIT, updates=1 + moves, **EPSILONS, **how)
    trainer = their_trainer(folder, items, kind, config, parts, beta=kl, num_iterations=1 + moves, **dict(theirs_only))
    their, their_advantages = their_loss(trainer, len(items), parts, moves)
    model = ours()
    loss, advantages, figures = our_step(model, items, args, parts, moves)
    assert close(advantages, their_advantages, TOL) and far(advantages, torch.zeros_like(advantages), 1e-3)
    assert same(model, loss, trainer.model, their)
    logged = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    if parts == 1:
        assert figures["clipped"] == pytest.approx(logged["clip_ratio/region_mean"], abs=1e-6)
        assert (figures["clipped"] > 0.01) == moves
        assert ("kl" in figures) == (kl > 0) == ("kl" in logged)
        assert not kl or figures["kl"] == pytest.approx(logged["kl"], rel=1e-5, abs=1e-6)


# ---- side by side ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moves", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_the_loss_of_grpo_and_its_gradients_are_those_of_trl(tmp_path, loss, kl, moves):
    """At the first update of a batch and, the ratio no longer 1, at the second."""
    check(tmp_path, "grpo", trl.GRPOTrainer, trl.GRPOConfig, 1, moves, kl, {"loss_type": loss}.items(), loss=loss)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_a_step_of_two_micro_batches_is_that_of_trl_with_accumulation(tmp_path, loss):
    check(tmp_path, "grpo", trl.GRPOTrainer, trl.GRPOConfig, 2, False, 0.1, {"loss_type": loss}.items(), loss=loss)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_with_and_without_scale_are_those_of_trl(tmp_path, scale):
    check(tmp_path, "grpo", trl.GRPOTrainer, trl.GRPOConfig, 1, False, 0.0, {"scale_rewards": scale}.items(),
          scale=scale)  # fmt: skip


@pytest.mark.parametrize("moves", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_loss_of_rloo_and_its_gradients_are_those_of_trl(tmp_path, kl, moves, parts):
    check(tmp_path, "rloo", trl.RLOOTrainer, trl.RLOOConfig, parts, moves, kl)
