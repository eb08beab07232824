"""What a completion is worth: the weighted sum of every --reward.

with Rewards(args, TASKS, base, empty) as rewards:
    rewards.check(rows)                 before the model is loaded
    rewards.load(model)                 the adapters of reward models, beside that of the policy
    parts = rewards.score(asked)        {"multiply": [1.0, 0.0], "good": [0.7, None]}
    rewards.total(parts)                [1.7, 0.0]
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from lora.errors import BadInput, collecting
from lora.network.decoder import Model
from lora.pretrained import ModelFiles
from lora.rewards.functions import Format, Function
from lora.rewards.part import Asked, Part, Row
from lora.rewards.reward_model import RewardModel
from lora.rewards.spec import Spec, parse, parse_all, wrong

__all__ = ["Asked", "Part", "Rewards", "Row", "Spec", "parse", "parse_all", "wrong"]

TaskFunction = Callable[[dict, list[dict], str], float]  # (row, turns, text); ValueError for a row that is no such task


class Task(Part):
    """Is the answer right? A function of the table that the script hands over."""

    def __init__(self, spec: Spec, function: TaskFunction):
        super().__init__(spec)
        self.task, self.function = spec.target, function

    def problems(self, rows: Iterable[Row]) -> Iterator[str]:
        """A line for each row of which the function makes no task."""
        for row in rows:
            try:
                self.function(row.row, row.messages, "")
            except ValueError as error:
                yield f"no task for --reward {self.task} in {row.where}: {error}"

    def score(self, asked: Sequence[Asked]) -> list[float | None]:
        return [self.function(one.row, one.messages, one.text) for one in asked]


class Length(Part):
    """max(0, 1 - |tokens - N| / N)"""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.best = int(spec.target)

    def score(self, asked: Sequence[Asked]) -> list[float | None]:
        return [max(0.0, 1 - abs(one.tokens - self.best) / self.best) for one in asked]


class Rewards:
    """Every --reward of a run. It has processes that end with the block: a context manager."""

    def __init__(self, args, tasks: Mapping[str, TaskFunction], base: ModelFiles, empty: Model):
        """`args` has the flags, `empty` is the base on `meta`. Raises BadInput for a wrong --reward."""
        makers = {
            "task": lambda spec: Task(spec, tasks[spec.target]),
            "format": lambda spec: Format(spec, args.reward_timeout),
            "length": Length,
            "function": lambda spec: Function(spec, args.reward_timeout),
            "model": lambda spec: RewardModel(spec, args, base, empty),
        }
        self.parts = [makers[spec.kind](spec) for spec in parse_all(args.reward)]

    def check(self, rows: Sequence[Row]) -> None:
        """Start what is a process, and look at every row. Raises BadInput with all that is wrong."""
        problems = []
        for part in self.parts:
            with collecting(problems):
                part.start()
        for part in self.parts:
            with collecting(problems):
                problems += part.problems(rows)
        if problems:  # of the rewards first: of rows there may be more than are shown
            raise BadInput(*sorted(problems, key=lambda problem: not problem.startswith("wrong --reward")))

    def load(self, model: Model) -> None:
        """Read the adapters of reward models; the model is left as it was."""
        for part in self.parts:
            part.load(model)

    def score(self, asked: Sequence[Asked]) -> dict[str, list[float | None]]:
        """The values of each part, by its name, one for a completion."""
        return {part.name: part.score(asked) for part in self.parts}

    def total(self, parts: Mapping[str, Sequence[float | None]]) -> list[float]:
        """The weighted sum over the parts that could score a completion; NaN where none could."""
        weights = [part.weight for part in self.parts]
        columns = zip(*(parts[part.name] for part in self.parts), strict=True)
        scored = ([w * v for w, v in zip(weights, values, strict=True) if v is not None] for values in columns)
        return [_finite_sum(values) if values else math.nan for values in scored]

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *error) -> None:
        for part in self.parts:
            part.close()


def _finite_sum(values: Sequence[float]) -> float:
    """Raises BadInput where it is over what float32 holds, as gradients are."""
    if not sum(map(abs, values)) <= torch.finfo(torch.float32).max:
        why = "a completion's values, times their weights, add up to more than float32 holds"
        raise BadInput(f"wrong --reward in the command line: {why}. Give smaller weights, or smaller values")
    return math.fsum(values)
