"""How results are shown: a Markdown table, a share, a picture."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora.train.report import table

__all__ = ["percent", "picture", "share", "table"]


def share(rows: Iterable[dict], good: Callable[[dict], bool]) -> str:
    """`12 of 50`; a dash where there are none."""
    verdicts = [good(row) for row in rows]
    return f"{sum(verdicts)} of {len(verdicts)}" if verdicts else "-"


def percent(rows: Sequence[dict], good: Callable[[dict], bool]) -> float:
    return 100 * sum(map(good, rows)) / len(rows)


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
