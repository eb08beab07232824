"""From prompts to answers: prefill, sample, decode, for several sequences at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lora.device import few_rows
from lora.network.cache import Cache
from lora.network.decoder import Model
from lora.ops import wide
from lora.ops.fast_decoding import for_decoding


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled. Temperature 0 takes the likeliest; a filter at its default does nothing.

    Raises ValueError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, right, fix in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("min_p", 0 <= self.min_p < 1, "from 0 to below 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)}; give {fix}")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6  # dividing by less overflows float32, and draws the likeliest all the same


GREEDY = Sampling()


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens that occurred less likely: logits (V,), divided where positive, multiplied where negative.

    Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1, with the sign fixed as everybody does.
    """
    scores = logits[seen]
    return logits.index_put((seen,), torch.where(scores > 0, scores / penalty, scores * penalty))


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Distribution (V,) to sample from, for logits (V,): temperature, then top-k, then top-p, then min-p.

    top-p keeps the smallest set of likeliest tokens whose sum reaches p; min-p keeps tokens with at least that share of
    the likeliest one's probability.
    """
    p = (logits / sampling.temperature).softmax(-1)
    if 0 < sampling.top_k < len(p):
        p = p * (p >= p.topk(sampling.top_k).values[-1])
    if sampling.top_p < 1:
        p = p / p.sum()
        ordered, index = p.sort(descending=True, stable=True)
        kept = ordered.cumsum(0) - ordered < sampling.top_p
        p = torch.zeros_like(p).scatter(0, index, ordered * kept)
    if sampling.min_p > 0:
        p = p * (p >= sampling.min_p * p.max())
    return p / p.sum()


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator, seen: Sequence[int] = ()) -> int:
    """The next token for logits (V,); `seen` are the ids so far."""
    logits = logits.to(wide(logits.dtype))
    if sampling.repetition_penalty != 1:
        logits = penalise(logits, torch.tensor(sorted(set(seen)), device=logits.device), sampling.repetition_penalty)
    if sampling.greedy:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits, sampling).cpu(), 1, generator=generator))


def next_logits(model: Model, cache: Cache, new: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits (B, V) behind the new tokens of each sequence of the cache: whole prompts (prefill), or one token each."""
    tokens = torch.tensor([token for ids in new for token in ids], device=model.device)  # (T,)
    lengths = [len(ids) for ids in new]
    with few_rows(len(tokens), model.device):
        hidden = model.trunk(tokens, lengths, cache=cache)  # (T, D)
    last = torch.tensor(lengths).cumsum(0) - 1  # the last position of each sequence
    with few_rows(len(new), model.device):
        return model.head(hidden[last.to(hidden.device)])


@torch.inference_mode()  # on while a token is computed, off while the caller has it
def stream_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    max_new: int = 256,
    sampling: Sampling = GREEDY,
) -> Iterator[tuple[int, int]]:
    """Yield (i, token) for each token of the answer to prompt i, as it is sampled; stop tokens are left out.

    An answer ends at a stop token, after `max_new` tokens, or where the model's positions end. It is the same as alone:
    answer i is sampled with seed + i.
    """
    limit = model.config.max_position_embeddings
    ids = [list(prompt) for prompt in prompts]  # of each sequence, the answer included
    ends = [min(limit, len(prompt) + max_new) for prompt in prompts]
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(prompts))]
    active = list(range(len(prompts)))
    cache = model.new_cache(len(active), max(ends, default=0))
    new = prompts
    with for_decoding(model.groups()):
        while active:
            logits = next_logits(model, cache, new)  # (B, V)
            if sampling.greedy and sampling.repetition_penalty == 1:
                tokens = logits.to(wide(logits.dtype)).argmax(-1).tolist()  # all sequences at once
            else:
                tokens = [sample(logits[b], sampling, generators[i], ids[i]) for b, i in enumerate(active)]
            going = []
            for b, (i, token) in enumerate(zip(active, tokens, strict=True)):
                if token in stops:
                    continue
                ids[i].append(token)
                yield i, token
                if len(ids[i]) < ends[i]:
                    going.append(b)
            if len(going) < len(active):
                cache.keep(going)
                active = [active[b] for b in going]
            new = [ids[i][-1:] for i in active]


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    max_new: int = 256,
    sampling: Sampling = GREEDY,
    on_token: Callable[[int, int], None] = lambda i, token: None,
) -> list[list[int]]:
    """Answers to several prompts, as ids; `on_token(i, token)` is called for every token as it is sampled."""
    answers: list[list[int]] = [[] for _ in prompts]
    for i, token in stream_tokens(model, prompts, stops, max_new, sampling):
        answers[i].append(token)
        on_token(i, token)
    return answers


def generate_all(
    model: Model,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    max_new: int,
    sampling: Sampling,
    batch_size: int,
    bar,
) -> Iterator[list[int]]:
    """Yield the answer to each prompt, as ids, `batch_size` of them computed at once; `bar` is a progress bar."""
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        seeded = replace(sampling, seed=sampling.seed + start)  # answer i by seed + i, however they are batched
        yield from generate(model, batch, stops, max_new, seeded)
        bar.update(len(batch))
