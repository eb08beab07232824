"""Sampled answers: from the full softmax at a temperature, each by numbers of its own, their log-probabilities those of
a fresh forward pass."""

from dataclasses import replace

import pytest
import torch

from lora import ops
from lora.adapter.merge import merged
from lora.inference.rollout import draws, sample_groups, sample_tokens
from tests.helpers import close, patched, tiny_model
from tests.mutation import mutation

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [35]]


def numbers(prompts: int = 3, group: int = 4, most: int = 9, seed: int = 0) -> torch.Tensor:
    of = [[draws(seed, 1, place, number, most) for number in range(group)] for place in range(prompts)]
    return torch.stack([torch.stack(its) for its in of])


def flat(groups) -> list[list[int]]:
    return [one.tokens for its in groups for one in its]


@mutation("lora/inference/rollout.py", "torch.log_softmax(logits / temperature, -1", "torch.log_softmax(logits, -1")
@mutation(
    "lora/inference/rollout.py",
    "return tokens[:, 0], logs.gather(1, tokens)[:, 0]",
    "return tokens[:, 0], logs.max(1)[0]",
)
@mutation("lora/inference/rollout.py", "cache.keep(shared)", "cache.keep(sorted(shared, reverse=True))")
@mutation(
    "lora/inference/rollout.py",
    "                cache.keep(going)",
    "                cache.keep(list(range(len(going))))",
)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_sampled_log_probabilities_are_those_of_a_fresh_forward_pass_without_merging(temperature, cap):
    model = patched(tiny_model(torch.float32))
    model.config = replace(model.config, final_logit_softcapping=cap)
    with merged(model):
        groups = sample_groups(model, PROMPTS, numbers(), {7, 11, 20, 35, 40, 77}, temperature)
    assert len({len(tokens) for tokens in flat(groups)}) > 1  # answers end at different times
    for prompt, answers in zip(PROMPTS, groups, strict=True):
        for one in answers:
            ids = torch.tensor([*prompt, *one.tokens])
            hidden = model.trunk(ids[:-1])[len(prompt) - 1 :]
            fresh = ops.log_probs(hidden, model.head_weight, ids[len(prompt) :], cap, temperature)
            assert close(torch.tensor(one.log_probs), fresh, 1e-4)
            z = model.head(hidden) / temperature
            expected = torch.distributions.Categorical(logits=z).entropy()
            assert close(torch.tensor(one.entropies), expected, 1e-4)


def test_an_answer_is_the_same_whatever_is_sampled_beside_it():
    model, stops = tiny_model(), {7, 11, 20}
    together = sample_groups(model, PROMPTS, numbers(), stops)
    for place, prompt in enumerate(PROMPTS):
        for number in range(4):
            [[alone]] = sample_groups(model, [prompt], numbers()[place : place + 1, number : number + 1], stops)
            assert alone.tokens == together[place][number].tokens


@mutation(
    "lora/inference/rollout.py",
    'f"{seed}/step {step}/prompt {place}/answer {number}"',
    'f"{seed}/step {step}/prompt {place}"',
)
@mutation(
    "lora/inference/rollout.py",
    'f"{seed}/step {step}/prompt {place}/answer {number}"',
    'f"{seed}/step {step}/answer {number}"',
)
@mutation(
    "lora/inference/rollout.py",
    'f"{seed}/step {step}/prompt {place}/answer {number}"',
    'f"{seed}/prompt {place}/answer {number}"',
)
@mutation(
    "lora/inference/rollout.py",
    'f"{seed}/step {step}/prompt {place}/answer {number}"',
    'f"step {step}/prompt {place}/answer {number}"',
)
def test_each_answer_of_a_run_is_drawn_by_numbers_of_its_own_and_always_by_the_same():
    places = [
        (seed, step, place, number) for seed in (0, 1) for step in (1, 12) for place in (0, 2) for number in (0, 1)
    ]
    every = [draws(*place, 5) for place in places]
    assert all(torch.equal(draws(*place, 5), found) for place, found in zip(places, every, strict=True))
    assert len({tuple(found.tolist()) for found in every}) == len(places)
    assert all(((found >= 0) & (found < 1)).all() for found in every)


@mutation("lora/inference/rollout.py", "reached, right=True)", "reached, right=False)")
@mutation("lora/inference/rollout.py", "tokens.clamp_(max=logits.shape[-1] - 1)", "pass")
def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_number():
    logits = torch.tensor([[0.25, 0.0, 0.25, 0.5]]).log().nan_to_num(neginf=-1e30)
    for number, token in ((0.0, 0), (0.2, 0), (0.25, 2), (0.49, 2), (0.5, 3), (0.99, 3), (1.0, 3)):
        [found], [log_prob], _ = sample_tokens(logits, torch.tensor([number], dtype=torch.float64), 1.0)
        assert found == token and close(log_prob.exp(), logits[0, token].exp(), 1e-6)


def test_evenly_spread_numbers_draw_every_token_as_often_as_it_is_likely():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    count = 100_000
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, _, _ = sample_tokens(logits.expand(count, -1), numbers, 0.8)
    shares = torch.bincount(tokens, minlength=50) / count
    assert (shares - (logits[0] / 0.8).softmax(-1)).abs().max() < 2e-5


@mutation("lora/inference/rollout.py", "answer.ended = token in stops", "answer.ended = False")
@mutation("lora/inference/rollout.py", "min(most, limit - len(prompt))", "most")
@mutation("lora/inference/rollout.py", "not answer.ended and t + 1 < ends[i]", "not answer.ended and t < ends[i]")
def test_an_answer_ends_with_a_stop_token_or_the_most_tokens_or_where_positions_end():
    model = tiny_model(max_position_embeddings=12)
    prompts, stops = [[3] * 8, [5, 2]], set(range(0, 131, 9))
    groups = sample_groups(model, prompts, numbers(2, 6, 7), stops)
    for prompt, answers in zip(prompts, groups, strict=True):
        for one in answers:
            assert one.ended == (one.tokens[-1] in stops)
            assert not stops.intersection(one.tokens[:-1])
            assert one.ended or len(one.tokens) == min(7, 12 - len(prompt))
            assert len(one.tokens) == len(one.log_probs) == len(one.entropies)
    assert {one.ended for its in groups for one in its} == {True, False}


def test_a_prompt_is_computed_once_for_its_group():
    model, tokens = tiny_model(), []
    trunk = model.trunk
    model.trunk = lambda ids, *rest, **how: tokens.append(len(ids)) or trunk(ids, *rest, **how)
    sample_groups(model, PROMPTS, numbers(most=3), set())
    assert tokens == [sum(map(len, PROMPTS)), 12, 12]
