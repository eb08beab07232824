"""What every --reward is: a name, a weight, and a value for each completion."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from lora.rewards.spec import Spec


class Asked(NamedTuple):
    """One completion: the row of the data as it was read, the prompt's turns, the text without its end of turn, and its
    number of tokens."""

    row: dict
    messages: list[dict]
    text: str
    tokens: int


class Row(Protocol):
    """A prompt of the data: the row as it was read, its `file:line`, the prompt's turns."""

    row: dict
    where: str
    messages: list[dict]


class Part:
    """One --reward. Most have nothing to start, to load or to end."""

    def __init__(self, spec: Spec):
        self.name, self.weight = spec.name, spec.weight

    def start(self) -> None:
        """Begin what takes a while. Raises BadInput."""

    def problems(self, rows: Sequence[Row]) -> Iterable[str]:
        """Lines for what is wrong with the reward or with a row. Raises BadInput for what hides all else."""
        return ()

    def load(self, model) -> None:
        """The model is in memory."""

    def score(self, asked: Sequence[Asked]) -> list[float | None]:
        """A value for each completion; None is "not scorable"."""
        raise NotImplementedError

    def close(self) -> None:
        """The run ends."""
