"""What a completion is worth: the weighted sum of every --reward.

with Rewards(parse_all(args.reward), TASKS, args.reward_timeout, args.micro_tokens) as rewards:
    rewards.check(rows, base)           before the model is loaded
    rewards.load(model, base)           the adapters of reward models, on the model that is there
    parts = rewards.score(asked)        {"multiply": [1.0, 0.0], "length": [0.7, None]}
    rewards.total(parts)                [1.7, 0.0]

A part is an object with `.name`, `.weight` and `score(asked) -> list[float | None]`, where None is "not scorable".
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lora.errors import BadInput, collecting
from lora.rewards.functions import Format, Function
from lora.rewards.reward_model import RewardModel
from lora.rewards.spec import Spec, parse, parse_all

__all__ = ["Asked", "Rewards", "Row", "Spec", "TaskFunction", "parse", "parse_all"]


class Asked(NamedTuple):
    """One completion: the row of the data as it was read, the prompt's turns, the text without its end of turn, and its
    number of tokens."""

    row: dict
    messages: list[dict]
    text: str
    tokens: int


Row = tuple[str, dict, list[dict]]  # `file:line`, the row as it was read, the prompt's turns
TaskFunction = Callable[[dict, list[dict], str], float]  # (row, turns, text); ValueError for a row that is no such task


class Task:
    """Is the answer right? A function of the table that the script hands over."""

    def __init__(self, spec: Spec, function: TaskFunction):
        self.name, self.weight, self.task, self.function = spec.name, spec.weight, spec.target, function

    def problems(self, rows: Iterable[Row]) -> Iterator[str]:
        """A line for each row of which the function makes no task."""
        for where, row, messages in rows:
            try:
                self.function(row, messages, "")
            except ValueError as error:
                yield f"no task for --reward {self.task} in {where}: {error}"

    def score(self, asked: Sequence[Asked]) -> list[float | None]:
        return [self.function(one.row, one.messages, one.text) for one in asked]


class Length:
    """max(0, 1 - |tokens - N| / N)"""

    def __init__(self, spec: Spec):
        self.name, self.weight, self.best = spec.name, spec.weight, int(spec.target)

    def score(self, asked: Sequence[Asked]) -> list[float | None]:
        return [max(0.0, 1 - abs(one.tokens - self.best) / self.best) for one in asked]


class Rewards:
    """Every --reward of a run. It has processes that end with the block: a context manager."""

    def __init__(self, specs: Sequence[Spec], tasks: Mapping[str, TaskFunction], timeout: float, micro_tokens: int):
        makers = {
            "task": lambda spec: Task(spec, tasks[spec.target]),
            "format": lambda spec: Format(spec, timeout),
            "length": Length,
            "function": lambda spec: Function(spec, timeout),
            "model": lambda spec: RewardModel(spec, micro_tokens),
        }
        self.parts = [makers[spec.kind](spec) for spec in specs]

    def check(self, rows: Sequence[Row], base, verify: bool = True) -> None:
        """Start what is a process, and look at every row. Raises BadInput with all that is wrong."""
        problems, running = [], []
        for part in self.parts:
            with collecting(problems):
                if isinstance(part, (Format, Function)):
                    part.start()
                    running.append(part)
        for part in self.parts:
            with collecting(problems):
                if isinstance(part, RewardModel):
                    problems += part.problems(base, verify)
                elif isinstance(part, Task) or part in running:
                    problems += part.problems(rows)
        if problems:
            raise BadInput(*problems)

    def load(self, model, base) -> None:
        for part in self.parts:
            if isinstance(part, RewardModel):
                part.load(model, base)

    def score(self, asked: Sequence[Asked]) -> dict[str, list[float | None]]:
        """The values of each part, by its name, one for a completion."""
        return {part.name: part.score(asked) for part in self.parts}

    def total(self, parts: Mapping[str, Sequence[float | None]]) -> list[float]:
        """The weighted sum over the parts that could score a completion; NaN where none could."""
        weights = [part.weight for part in self.parts]
        columns = zip(*(parts[part.name] for part in self.parts), strict=True)
        scored = ([w * v for w, v in zip(weights, values, strict=True) if v is not None] for values in columns)
        return [math.fsum(values) if values else math.nan for values in scored]

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *error) -> None:
        for part in self.parts:
            if isinstance(part, (Format, Function)):
                part.worker.close()
