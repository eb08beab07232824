"""Prefill, decode, choose: from prompts to answers, several at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lora.device import few_rows
from lora.network.decoder import Model
from lora.ops import wide
from lora.ops.fast_decoding import for_decoding


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest; a filter at its default does nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6  # dividing by less overflows float32, and draws the likeliest all the same


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens that occurred less likely: logits (V,), divided where positive, multiplied where negative.

    Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1, with the sign fixed as everybody does.
    """
    scores = logits[seen]
    return logits.index_put((seen,), torch.where(scores > 0, scores / penalty, scores * penalty))


def probabilities(logits: torch.Tensor, how: Sampling) -> torch.Tensor:
    """logits (V,) -> the distribution (V,) that is drawn from: temperature, then top-k, then top-p, then min-p.

    top-p keeps the smallest set of likeliest tokens whose sum reaches p; min-p keeps tokens with at least that share of
    the likeliest one's probability.
    """
    p = (logits / how.temperature).softmax(-1)
    if 0 < how.top_k < len(p):
        p = p * (p >= p.topk(how.top_k).values[-1])
    if how.top_p < 1:
        p = p / p.sum()
        ordered, index = p.sort(descending=True, stable=True)
        kept = ordered.cumsum(0) - ordered < how.top_p
        p = torch.zeros_like(p).scatter(0, index, ordered * kept)
    if how.min_p > 0:
        p = p * (p >= how.min_p * p.max())
    return p / p.sum()


def choose(logits: torch.Tensor, how: Sampling, generator: torch.Generator, seen: Sequence[int] = ()) -> int:
    """The next token for logits (V,), `seen` being the ids so far."""
    logits = logits.to(wide(logits.dtype))
    if how.repetition_penalty != 1:
        logits = penalise(logits, torch.tensor(sorted(set(seen)), device=logits.device), how.repetition_penalty)
    if how.greedy:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits, how).cpu(), 1, generator=generator))


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    max_new: int = 256,
    how: Sampling = Sampling(),
    on_token: Callable[[int, int], None] = lambda row, token: None,
) -> list[list[int]]:
    """Answers to several prompts, as ids without the stop token; each comes out as it would alone.

    `on_token(row, token)` is called for every token as it is chosen. An answer ends at a stop token, after `max_new`
    tokens, or where the model's positions end.
    """
    with for_decoding(model.groups()), torch.inference_mode():
        return _generate(model, prompts, stops, max_new, how, on_token)


def _generate(model, prompts, stops, max_new, how, on_token):
    most = model.config.max_position_embeddings
    room = min(most, max(map(len, prompts)) + max_new)
    answers: list[list[int]] = [[] for _ in prompts]
    generators = [torch.Generator().manual_seed(how.seed + row) for row in range(len(prompts))]
    rows = list(range(len(prompts)))
    cache = model.new_cache(len(rows), room)
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)
    lengths = [len(prompt) for prompt in prompts]
    while rows:
        with few_rows(len(tokens), model.device):
            hidden = model.trunk(tokens, lengths, cache=cache)  # (T, D)
        ends = torch.tensor(lengths).cumsum(0) - 1  # the last position of each row
        with few_rows(len(rows), model.device):
            logits = model.head(hidden[ends.to(hidden.device)])  # (B, V)
        if how.greedy and how.repetition_penalty == 1:
            chosen = logits.to(wide(logits.dtype)).argmax(-1).tolist()  # all rows at once
        else:
            seen = [(*prompts[row], *answers[row]) for row in rows]
            chosen = [choose(logits[i], how, generators[row], seen[i]) for i, row in enumerate(rows)]
        going = []
        for i, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if token in stops:
                continue
            answers[row].append(token)
            on_token(row, token)
            if len(answers[row]) < max_new and len(prompts[row]) + len(answers[row]) < most:
                going.append(i)
        if len(going) < len(rows):
            cache.keep(going)
            rows = [rows[i] for i in going]
        tokens = torch.tensor([answers[row][-1] for row in rows], device=model.device)
        lengths = [1] * len(rows)
    return answers
