"""Sampled answers for reinforcement: groups of them to each prompt, with the log-probability of every token.

They come from the full softmax at a temperature, without the filters of `generate`: a token that is never drawn but has
a probability would bias what is learned from the others. A token is drawn by inverting the cumulative distribution at a
number in [0, 1) of its own, so an answer does not depend on which others are sampled beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora.device import widest
from lora.inference.generate import next_logits
from lora.network.decoder import Model
from lora.ops import wide
from lora.ops.fast_decoding import for_decoding
from lora.train.run_state import seed_of


@dataclass
class Completion:
    """Sampled tokens, an end of turn included, with log p of each and the entropy of its distribution, in nats."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def text(self) -> list[int]:
        """The tokens without the end of turn."""
        return self.tokens[:-1] if self.ended else self.tokens


def draws(seed: int, step: int, place: int, number: int, count: int) -> Tensor:
    """`count` numbers in [0, 1), (count,): those of one answer, a pure function of where it stands in the run."""
    name = f"{seed}/step {step}/prompt {place}/answer {number}"
    generator = torch.Generator().manual_seed(seed_of(name))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample_tokens(logits: Tensor, draw: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens by logits (B, V) and numbers in [0, 1) (B,): their ids, log p and the distributions' entropies, (B,)."""
    logs = torch.log_softmax(logits / temperature, -1, dtype=wide(logits.dtype))  # (B, V)
    p = logs.exp()
    entropies = -torch.linalg.vecdot(p, logs)
    cumulative = p.cumsum(-1, dtype=widest(p.device))  # summed in float32 what is unlikely would get lost
    reached = draw.to(cumulative)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, reached, right=True)  # (B, 1), the first that exceeds it: its p is not 0
    tokens.clamp_(max=logits.shape[-1] - 1)  # where a product was rounded up to the sum
    return tokens[:, 0], logs.gather(1, tokens)[:, 0], entropies


@torch.inference_mode()
def sample_groups(
    model: Model,
    prompts: Sequence[Sequence[int]],
    draw: Tensor,
    stops: set[int],
    temperature: float = 1.0,
    on_token: Callable[[], None] = lambda: None,
) -> list[list[Completion]]:
    """A group of answers to each prompt, by the numbers `draw` (prompts, group, most tokens). A prompt is computed once
    for its group. An answer ends at a stop token, after the most tokens, or where the model's positions end."""
    (_, group, most), limit = draw.shape, model.config.max_position_embeddings
    found = [[Completion() for _ in range(group)] for _ in prompts]
    answers, ends = [one for its in found for one in its], []
    for prompt in prompts:
        ends += [min(most, limit - len(prompt))] * group
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + most)
    active, draw = list(range(len(answers))), draw.flatten(0, 1).to(model.device)  # (prompts · group, most)
    with for_decoding(model.groups()):
        shared = [i // group for i in active]
        logits = next_logits(model, cache, prompts)[shared]  # (B, V)
        cache.keep(shared)
        for t in range(most):
            drawn = sample_tokens(logits, draw[active, t], temperature)
            going = []
            for b, (i, token, log_prob, entropy) in enumerate(zip(active, *(x.tolist() for x in drawn), strict=True)):
                answer = answers[i]
                answer.tokens.append(token)
                answer.log_probs.append(log_prob)
                answer.entropies.append(entropy)
                answer.ended = token in stops
                if not answer.ended and t + 1 < ends[i]:
                    going.append(b)
            if not going:
                break
            on_token()
            if len(going) < len(active):
                cache.keep(going)
                active = [active[b] for b in going]
            logits = next_logits(model, cache, [answers[i].tokens[-1:] for i in active])
    return found
