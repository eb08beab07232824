"""Small pairs and judged answers, and the settings of a method. Import as `from tests.methods.linked import ...`."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from lora import methods
from lora.adapter.inject import disabled
from lora.data.batch import Batch, Linked, collate
from lora.methods.answers import log_probs
from lora.methods.objective import Objective
from lora.run.settings import TrainSettings
from lora.text.chat import Example
from tests import cli
from tests.helpers import some_tokens

LONG = (31, 4, 9, 17, 2, 26)  # tokens of answers, so unequal that a mean of means is far off


def settings(method: str, *words, **changed) -> TrainSettings:
    """What `train.py --method METHOD WORDS` knows of its method."""
    args = TrainSettings.resolve(["--method", method, *map(str, words)], "")
    methods.fill(args)
    vars(args).update(changed)
    return args


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


def scored(item: Linked) -> Linked:
    """With a token behind each end of turn, as a reward model needs it."""
    return item._replace(examples=tuple(Example([*e.tokens, 5], [*e.trained, False]) for e in item.examples))


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
    objective = Objective(method, model, args)
    for batch in objective.prepare(batches):
        objective(batch).backward()
    return taken(model)


def taken(model) -> torch.Tensor:
    """The gradients in `.grad`, as one row, which are gone from there then."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.cat([p.grad.flatten() for p in trained])
    model.zero_grad()
    return found


def judged(count: int = 6, **known) -> list[Linked]:
    """Answers that are good and bad by turns, each with an answer that has nothing to do with its question."""
    signs = [(i % 3 != 1,) * 2 for i in range(count)]
    return pairs(count, good=[(float(a), float(b)) for a, b in signs], **known)


# ---- files of rows, for train.py -------------------------------------------------------------------------------------

ASKED = [(f"What is {a} and {b}?", f"It is {a + b}, as {a} and {b} are {a + b}.", f"No, {b}.") for a in (1, 2, 3)
         for b in (1, 2, 3)]  # fmt: skip


def _written(name: str, rows: Sequence[dict]) -> Path:
    path = cli.scratch() / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@cache
def pairs_file() -> Path:
    """Nine pairs."""
    return _written("pairs.jsonl", [{"prompt": q, "chosen": c, "rejected": r} for q, c, r in ASKED])


@cache
def judged_file() -> Path:
    """Nine answers, six of them good."""
    rows = [(q, c, True) if i % 3 else (q, r, False) for i, (q, c, r) in enumerate(ASKED)]
    return _written("judged.jsonl", [{"prompt": q, "completion": a, "label": good} for q, a, good in rows])


@cache
def prompts_file() -> Path:
    """Nine questions with the columns that their rewards read."""
    rows = [{"prompt": q, "a": int(q[8]), "b": int(q[14]), "letters": "aeiou"} for q, *_ in ASKED]
    return _written("prompts.jsonl", rows)


@cache
def own_reward() -> Path:
    """A file with a reward that tells most answers of an untrained model apart."""
    path = cli.scratch() / "own.py"
    path.write_text(
        "def vowels(prompts, completions, letters, **columns):\n"
        "    return [sum(c in l for c in text) / max(1, len(text)) for text, l in zip(completions, letters)]\n"
    )
    return path


SAMPLING = ("grpo", "rloo", "ppo")


def rewarded(method: str, group: int = 4) -> tuple:
    """The flags without which a method that samples its answers does not run; short answers, and no dropout."""
    if method not in SAMPLING:
        return ()
    rewards = ("--reward", f"{own_reward()}:vowels", "multiply:0.5")
    return (*rewards, "--group", group, "--max-new-tokens", 8, "--dropout", 0)


def data_of(method: str) -> Path:
    files = {"sft": cli.data_file, "kto": judged_file, **dict.fromkeys(SAMPLING, prompts_file)}
    return files.get(method, pairs_file)()
