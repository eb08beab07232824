"""Small sampled answers, and what a step of grpo, rloo or ppo does with them."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from lora.adapter import value_head
from lora.adapter.inject import disabled
from lora.data.batch import Batch, Linked, collate
from lora.methods import METHODS, policy
from lora.text.chat import Example
from tests.helpers import patched, some_tokens, tiny_model
from tests.methods.linked import settings, taken

NONE = float("nan")  # the reward of a completion that cannot be scored
LONG = (31, 4, 9, 17, 2, 26, 12, 1)  # tokens of completions, so unequal that a mean of means is far off


def answers(rewards: Sequence[Sequence[float]], ended: float = 1.0, **known) -> list[Linked]:
    """A completion for each reward, a row of them to each prompt, of very unequal lengths."""
    found = []
    for group, row in enumerate(rewards):
        prompt = some_tokens(3 + 2 * group, seed=group).tolist()
        for reward in row:
            i = len(found)
            tokens = some_tokens(LONG[i % len(LONG)], seed=100 + i).tolist()
            example = Example(prompt + tokens, [False] * len(prompt) + [True] * len(tokens))
            numbers = {"reward": (reward,), "group": (float(group),), "ended": (ended if i % 3 else 1.0,)}
            found.append(Linked((example,), {**numbers, **known}))
    return found


STEP = ((1.0, 0.0, 0.5, NONE), (0.2, 0.9, 0.9, -1.0))  # the rewards of two groups


def actor(args) -> torch.nn.Module:
    """A tiny model with a random adapter, for ppo with a random value head, in float64."""
    model = patched(tiny_model())
    if args.method == "ppo":
        head = value_head.add(model, model.config.hidden_size).double().summary
        random = torch.Generator().manual_seed(5)
        head.weight.data = 0.3 * torch.randn(head.weight.shape, generator=random, dtype=torch.float64)
    return model


def moved(model, by: float = 0.02) -> None:
    """Move the adapter and the head a little, as an update would."""
    random = torch.Generator().manual_seed(9)
    for p in model.parameters():
        if p.requires_grad:
            p.data += by * torch.randn(p.shape, generator=random, dtype=p.dtype)


@torch.no_grad()
def measured(model, batch: Batch, args) -> Batch:
    """The batch with what rollouts measure of each token."""
    if batch.linked:
        hidden = policy.hidden(model, batch)
        logs = policy.log_probs(model, hidden, batch, args)
        with disabled(model):
            reference = policy.log_probs(model, policy.hidden(model, batch), batch, args)
        batch.per_token = {"sampled": logs, "reference": reference}
        if args.method == "ppo":
            batch.per_token |= {"old": logs.clone(), "values": model.v_head(hidden)}
    return batch


def laid(model, items: Sequence[Linked], args, cut: int | None = None) -> list[Batch]:
    """Micro-batches of `cut` completions each, or one, measured."""
    cut = cut or len(items)
    return [measured(model, collate(items[i : i + cut]), args) for i in range(0, len(items), cut)]


def prepared(model, batches: Sequence[Batch], args, total=list, carried: dict | None = None) -> list[Batch]:
    return METHODS[args.method].prepare(model, batches, args, total, {} if carried is None else carried)


def step(model, batches: Sequence[Batch], args):
    """Loss of a step and all its gradients as one row, and the figures: what the training loop makes of them."""
    return passed(model, prepared(model, batches, args), args)


def passed(model, batches: Sequence[Batch], args, count: int | None = None):
    """One pass over prepared batches, without a step of the weights."""
    method = METHODS[args.method]
    count = count or sum(method.count(batch, args) for batch in batches)
    whole, figures = 0.0, {}
    for batch in batches:
        loss, number, found = method.loss(model, batch, args)
        assert number == method.count(batch, args)
        (loss / count).backward()
        whole += loss.item() / count
        for name, (value, of) in found.items():
            before = figures.get(name, (0.0, 0))
            figures[name] = before[0] + float(value), before[1] + float(of)
    return whole, taken(model), {name: value / of for name, (value, of) in figures.items() if of}


def together(asks: Sequence) -> list:
    """What `ask(total)` of each rank returns, where `total` adds numbers over all of them, as often as they like."""
    said, barrier = [None] * len(asks), threading.Barrier(len(asks))

    def run(rank: int):
        def total(numbers):
            said[rank] = list(numbers)
            barrier.wait(30)
            sums = [sum(column) for column in zip(*said, strict=True)]
            barrier.wait(30)  # before anybody says the next
            return sums

        return asks[rank](total)

    with ThreadPoolExecutor(len(asks)) as pool:
        return list(pool.map(run, range(len(asks))))


def alone(model, item: Linked, args) -> torch.Tensor:
    """log p of each token of one completion, (N,), by PyTorch's own functions on logits of that document alone."""
    [example] = item.examples
    tokens, first = torch.tensor(example.tokens), example.trained.index(True)
    logs = torch.log_softmax(model(tokens[:-1]) / args.temperature, -1)
    return torch.stack([logs[t - 1, tokens[t]] for t in range(first, len(tokens))])


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    """The gradients of a number, as one row."""
    loss.backward()
    return taken(model)


def args_of(method: str, **changed):
    """What `train.py --method METHOD` knows, with these flags."""
    words = [
        word
        for name, value in changed.items()
        for word in ("--" + name.replace("_", "-"), value)
        if word is not True and value is not False
    ]
    return settings(method, "--reward", "length:10", *words)
