"""Small pairs and judged answers, and the settings of a method. Import as `from tests.methods.linked import ...`."""

from collections.abc import Sequence
from types import ModuleType

import torch

from lora import methods
from lora.adapter.inject import disabled
from lora.data.batch import Batch, Linked, collate
from lora.methods.answers import log_probs
from lora.run.settings import TrainSettings
from lora.text.chat import Example
from tests.helpers import some_tokens

LONG = (31, 4, 9, 17, 2, 26)  # tokens of answers, so unequal that a mean of means is far off


def settings(method: str, *words, **changed) -> TrainSettings:
    """What `train.py --method METHOD WORDS` knows of its method."""
    args = TrainSettings.resolve(["--method", method, *map(str, words)], "")
    methods.fill(args)
    vars(args).update(changed)
    return args


def answered(prompt: int, answer: int, seed: int) -> Example:
    """A prompt and an answer of so many random tokens."""
    return Example(some_tokens(prompt + answer, seed=seed).tolist(), [False] * prompt + [True] * answer)


def pairs(count: int = 6, **known) -> list[Linked]:
    """Pairs whose sides share a prompt, of very unequal lengths; by name, what is known of each example."""
    found = []
    for i in range(count):
        prompt = some_tokens(3 + 2 * i, seed=i).tolist()
        lengths = LONG[i % len(LONG)], LONG[(i + 2) % len(LONG)]
        answers = [some_tokens(n, seed=100 + 2 * i + side).tolist() for side, n in enumerate(lengths)]
        examples = tuple(Example(prompt + a, [False] * len(prompt) + [True] * len(a)) for a in answers)
        found.append(Linked(examples, {name: tuple(numbers[i]) for name, numbers in known.items()}))
    return found


@torch.no_grad()
def compared(model, items: Sequence[Linked]) -> list[Linked]:
    """The same, with the log-probabilities of the model without its adapter as their reference."""
    with disabled(model):
        each = [tuple(log_probs(model, collate([item])).tolist()) for item in items]
    return [Linked(item.examples, {**item.known, "reference": one}) for item, one in zip(items, each, strict=True)]


def laid_out(lengths: Sequence[Sequence[int]], **known) -> Batch:
    """A batch that knows nothing but how long its answers are, (rows, 2), and some numbers, (rows, 2) by name."""
    counts = torch.as_tensor(lengths).flatten().tolist()
    nothing = torch.zeros(0, dtype=torch.long)
    numbers = {name: torch.as_tensor(part, dtype=torch.float64).flatten() for name, part in known.items()}
    return Batch(nothing, counts, nothing, nothing, counts=[int(n) for n in counts], known=numbers, linked=len(lengths))


def gradients(model, method: ModuleType, args, batches: Sequence[Batch]) -> torch.Tensor:
    """All gradients of the summed loss of some batches, as one row."""
    objective = methods.Objective(method, model, args)
    for batch in objective.prepare(batches):
        objective(batch).backward()
    return taken(model)


def taken(model) -> torch.Tensor:
    """The gradients in `.grad`, as one row, which are gone from there then."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.cat([p.grad.flatten() for p in trained])
    model.zero_grad()
    return found
