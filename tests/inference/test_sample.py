"""Generation: greedy is argmax of the full forward, a batch is its rows alone, filters are what their papers say."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora.inference.generate import Sampling, generate, penalise, probabilities, sample
from tests import oracle
from tests.helpers import close, some_tokens, tiny_config, tiny_model
from tests.mutation import mutation

CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # other work may share the machine
PROMPTS = [some_tokens(n, seed=n).tolist() for n in (5, 1, 12, 3)]
NEVER = {-1}
SEEDED = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=7)


def full_forward(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


# ---- whole answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"model_type": "qwen2", "num_key_value_heads": 2}])
def test_greedy_is_the_argmax_of_the_full_forward_and_of_the_numpy_oracle(config):
    model = tiny_model(**config)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for prompt in PROMPTS[:2]:
        (answer,) = generate(model, [prompt], NEVER, max_new=10)
        assert len(set(answer)) > 2
        assert answer == full_forward(model, prompt, 10)
        assert answer == oracle.greedy(tiny_config(**config), weights, prompt, 10)


@pytest.mark.parametrize("how", [Sampling(), SEEDED], ids=["greedy", "seeded"])
def test_a_batch_gives_what_each_prompt_gives_alone(how):
    model = tiny_model()
    together = generate(model, PROMPTS, NEVER, 12, how)
    assert len({tuple(answer) for answer in together}) == len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = Sampling(**{**how.__dict__, "seed": how.seed + row})
        assert generate(model, [prompt], NEVER, 12, alone) == [together[row]]


@mutation("lora/inference/generate.py", "generators[i], ids[i]) for b, i in", "generators[b], ids[i]) for b, i in")
def test_rows_that_end_early_change_nothing_for_the_others():
    model = tiny_model()
    free = generate(model, PROMPTS, NEVER, 12, SEEDED)
    stops = {free[0][2], free[2][5]}
    stopped = generate(model, PROMPTS, stops, 12, SEEDED)
    for answer, whole in zip(stopped, free, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), len(whole))
        assert answer == whole[:end]
    assert len({len(answer) for answer in stopped}) > 1


def test_seeded_sampling_is_repeatable_and_another_seed_gives_another_answer():
    model = tiny_model()
    state = torch.get_rng_state()
    first = generate(model, PROMPTS, NEVER, 12, SEEDED)
    torch.manual_seed(5)
    assert generate(model, PROMPTS, NEVER, 12, SEEDED) == first
    torch.set_rng_state(state)
    other = Sampling(**{**SEEDED.__dict__, "seed": 8})
    assert generate(model, PROMPTS, NEVER, 12, other) != first
    assert torch.equal(torch.get_rng_state(), state)  # generators of its own: training is not disturbed


@mutation(
    "lora/inference/generate.py",
    """                if token in stops:
                    continue
                ids[i].append(token)
                yield i, token""",
    """                ids[i].append(token)
                yield i, token
                if token in stops:
                    continue""",
)
def test_a_stop_token_ends_an_answer_and_is_no_part_of_it():
    model = tiny_model()
    (whole,) = generate(model, PROMPTS[:1], NEVER, 10)
    stop = whole[4]
    shown = []
    (answer,) = generate(model, PROMPTS[:1], {stop, 130}, 10, on_token=lambda row, token: shown.append(token))
    assert answer == whole[: whole.index(stop)] == shown
    assert generate(model, PROMPTS[:1], {whole[0]}, 10) == [[]]


def test_tokens_are_reported_as_they_are_chosen():
    model, reported = tiny_model(), [[] for _ in PROMPTS]
    answers = generate(model, PROMPTS, NEVER, 6, on_token=lambda row, token: reported[row].append(token))
    assert reported == answers and all(len(answer) == 6 for answer in answers)


@mutation(
    "lora/inference/generate.py",
    "ends = [min(limit, len(prompt) + max_new) for prompt in prompts]",
    "ends = [min(limit - 1, len(prompt) + max_new) for prompt in prompts]",
)
@pytest.mark.parametrize("most", [13, 14, 16])
def test_no_answer_goes_beyond_the_positions_of_the_model(most):
    model = tiny_model(max_position_embeddings=most)
    answers = generate(model, PROMPTS, NEVER, 12)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer) == min(12, most - len(prompt))
        assert answer == full_forward(model, prompt, len(answer))


# ---- choosing one token ----------------------------------------------------------------------------------------------


def brute_force(logits: list[float], how: Sampling) -> list[float]:
    """The distribution by loops over a sorted list; ties in favour of the lower id."""
    best = max(logits)
    weights = [math.exp((z - best) / how.temperature) for z in logits]
    p = [w / math.fsum(weights) for w in weights]
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = set(ranked[: how.top_k] if how.top_k else ranked)
    if how.top_p < 1:
        mass, total, smallest = 0.0, math.fsum(p[i] for i in kept), set()
        for i in ranked:
            if i in kept and mass / total < how.top_p:
                smallest.add(i)
                mass += p[i]
        kept = smallest
    if how.min_p:
        kept = {i for i in kept if p[i] >= how.min_p * p[ranked[0]]}
    total = math.fsum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


FILTERS = st.builds(
    Sampling,
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 14),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 0.9)),
)


@hypothesis_settings(max_examples=400, **CALM)
@given(st.lists(st.floats(-8, 8), min_size=1, max_size=12, unique=True), FILTERS)
def test_top_k_top_p_and_min_p_are_the_brute_force_filters(logits, how):
    gaps = sorted(logits)
    assume(all(b - a > 1e-6 for a, b in pairwise(gaps)))  # no ties by rounding
    expected = brute_force(logits, how)
    nudged = [brute_force(logits, Sampling(how.temperature, how.top_k, min(1, how.top_p + d), max(0, how.min_p + d)))
              for d in (-1e-9, 1e-9)]  # fmt: skip
    assume(all([p > 0 for p in near] == [p > 0 for p in expected] for near in nudged))  # no border by rounding
    found = probabilities(torch.tensor(logits, dtype=torch.float64), how)
    assert close(found, torch.tensor(expected, dtype=torch.float64), 1e-12)


@mutation(
    "lora/inference/generate.py",
    "kept = ordered.cumsum(0) - ordered < sampling.top_p",
    "kept = ordered.cumsum(0) < sampling.top_p",
)
@pytest.mark.parametrize(
    ("how", "kept"),
    [
        (Sampling(1.0, top_k=2), {3, 1}),
        (Sampling(1.0, top_k=4), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=99), {0, 1, 2, 3}),
        (Sampling(1.0, top_p=0.39), {3}),
        (Sampling(1.0, top_p=0.41), {3, 1}),
        (Sampling(1.0, top_p=0.69), {3, 1}),
        (Sampling(1.0, top_p=0.71), {3, 1, 2}),
        (Sampling(1.0, top_p=0.01), {3}),
        (Sampling(1.0, min_p=0.51), {3, 1}),
        (Sampling(1.0, min_p=0.49), {3, 1, 2}),
        (Sampling(1.0, top_k=3, top_p=0.44), {3}),  # 0.4 / 0.9 is 0.444: of what top-k left
        (Sampling(1.0, top_k=3, top_p=0.45), {3, 1}),
        (Sampling(1.0, top_k=2, top_p=0.55), {3}),
    ],
)
def test_worked_examples_of_the_filters(how, kept):
    p = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64)
    found = probabilities(p.log(), how)
    assert {i for i, x in enumerate(found.tolist()) if x > 0} == kept
    expected = torch.tensor([x if i in kept else 0 for i, x in enumerate(p.tolist())], dtype=torch.float64)
    assert close(found, expected / expected.sum(), 1e-12)


@mutation(
    "lora/inference/generate.py",
    "p = torch.zeros_like(p).scatter(0, index, ordered * kept)",
    "p = p * (p.cumsum(0) - p < sampling.top_p)",
)
def test_a_nucleus_is_cut_by_probability_and_not_by_id():
    p = torch.tensor([0.05] * 10 + [0.5], dtype=torch.float64)
    found = probabilities(p.log(), Sampling(1.0, top_p=0.52))
    assert found[-1] > 0.9 and (found > 0).sum() == 2


def test_draws_follow_the_distribution():
    logits = torch.randn(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    how = Sampling(0.8, top_k=7, top_p=0.97, min_p=0.005)
    expected = np.array(brute_force(logits.tolist(), how))
    generator, count = torch.Generator().manual_seed(1), 8_000
    drawn = np.bincount([sample(logits, how, generator) for _ in range(count)], minlength=11)
    assert (drawn[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((drawn[kept] - count * expected[kept]) ** 2 / (count * expected[kept])).sum()
    assert 3 <= kept.sum() <= 7 and chi2 < 30  # P(chi² with at most 6 degrees of freedom > 30) is 4e-5


def test_temperature_zero_is_argmax_whatever_the_filters():
    logits = torch.tensor([0.1, 3.0, 2.9, -5.0])
    assert sample(logits, Sampling(0.0, top_k=1, top_p=0.1, min_p=0.9), torch.Generator()) == 1


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-45, 1e-300])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature):
    logits = torch.tensor([-3.0, 30.0, 29.0, -50.0])
    assert sample(logits, Sampling(temperature), torch.Generator()) == 1
    assert sample(logits, Sampling(temperature, 3, 0.9, 0.1), torch.Generator()) == 1


def test_a_high_temperature_flattens_and_a_low_one_sharpens():
    logits = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for temperature in (0.1, 1.0, 10.0):
        odds = probabilities(logits, Sampling(temperature))
        assert (odds[1] / odds[0]).item() == pytest.approx(math.exp(1 / temperature), rel=1e-12)


@mutation("lora/inference/generate.py", "scores * penalty)", "scores / penalty)")
@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_divides_positive_and_multiplies_negative_scores_of_seen_tokens(penalty):
    logits = torch.tensor([2.0, -2.0, 0.0, 4.0, -1.0], dtype=torch.float64)
    found = penalise(logits, torch.tensor([0, 1, 2]), penalty)
    assert found.tolist() == [2 / penalty, -2 * penalty, 0, 4, -1]
    assert logits.tolist() == [2, -2, 0, 4, -1]


def test_repetition_penalty_counts_prompt_and_answer_once_each():
    logits = torch.tensor([2.0, 1.9, 1.0])
    how = Sampling(repetition_penalty=1.5)
    assert sample(logits, how, torch.Generator(), seen=[0, 0, 0]) == 1
    assert sample(logits, how, torch.Generator(), seen=[0, 1, 0]) == 0  # twice divided, 2 / 1.5² < 1
    model, prompt = tiny_model(), PROMPTS[2]
    (answer,) = generate(model, [prompt], NEVER, 8, Sampling(repetition_penalty=1e6))
    tokens = list(prompt)
    for token in answer:
        logits = model(torch.tensor(tokens))[-1]
        allowed = [i for i in range(131) if i not in tokens]
        assert token == max(allowed, key=lambda i: logits[i].item())
        tokens.append(token)


def test_logits_of_bfloat16_are_chosen_from_in_float32():
    draw = random.Random(0)
    logits = torch.tensor([draw.uniform(-3, 3) for _ in range(50)]).bfloat16()
    how = Sampling(0.7, top_p=0.9)
    a, b = (torch.Generator().manual_seed(3) for _ in range(2))
    assert [sample(logits, how, a) for _ in range(200)] == [sample(logits.float(), how, b) for _ in range(200)]
