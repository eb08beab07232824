"""How results are shown: a Markdown table, a share, a picture."""

import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

from lora.export.report import table

__all__ = ["Found", "NotDone", "at_end", "percent", "picture", "share", "table", "thirds", "verdicts"]


def share(rows: Iterable[dict], good: Callable[[dict], bool]) -> str:
    """`12 of 50`; a dash where there are none."""
    verdicts = [good(row) for row in rows]
    return f"{sum(verdicts)} of {len(verdicts)}" if verdicts else "-"


def at_end(found: dict) -> dict:
    """What the last evaluation of a part's training measured."""
    return found["training"]["evaluations"][-1]


def percent(rows: Sequence[dict], good: Callable[[dict], bool]) -> float:
    return 100 * sum(map(good, rows)) / len(rows)


def thirds(values: Sequence[float]) -> list[float]:
    """Means of the first, second and last third of a run."""
    size = len(values) // 3
    return [mean(values[:size]), mean(values[size:-size]), mean(values[-size:])]


def verdicts(folder: Path, measured: dict[str, Callable[[], str]]) -> list[str]:
    """A table of the claims of its claims.toml, what was measured, and the verdict; or that a part is not done yet."""
    lines = []
    for key, row in tomllib.loads((folder / "claims.toml").read_text()).items():
        try:
            lines.append((row["claim"], measured[key](), row["verdict"]))
        except NotDone as missing:
            lines.append((row["claim"], f"not run yet: {missing}", "open"))
    return table(("the articles", "measured here", "verdict"), lines)


class NotDone(LookupError):
    """A part that a figure needs."""


class Found(dict):
    """What each finished part found."""

    def __missing__(self, name: str):
        raise NotDone(f"`{name}`")


@contextmanager
def picture(path: Path, size: tuple[float, float], **shape) -> Iterator:
    """Axes to draw on, as of `pyplot.subplots(**shape)`; then the file. The same drawing gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, **shape)
    yield axes
    figure.savefig(path, dpi=110, metadata={"Software": None}, bbox_inches="tight")
    pyplot.close(figure)
