"""What people see of a run: the progress bar, metrics.jsonl, and the picture of the loss."""

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, takewhile
from pathlib import Path
from types import MappingProxyType

from tqdm import tqdm

from lora import files
from lora.errors import BadInput, say
from lora.train.step import StepResult
from lora.train.stopping import NO_SIGNAL

NUMBERS = {  # what a row has at least: that of a step, of a step that was left out, of an evaluation
    "step": ("step", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "unchanged", "tokens_per_second",
             "seconds"),
    "skipped": ("step", "lr", "seconds"),
    "evaluation": ("step", "retention_kl", "retention_loss_before", "retention_loss", "seconds"),
}  # fmt: skip


PANELS = {"log_prob_": "log p, nats", "reward_": "reward", "score_": "score"}  # of the picture: names that begin so
OF_SAMPLES = {  # of a run that samples answers: panel -> names
    "loss": ("loss",),
    "KL, nats\na token": ("kl",),
    "entropy, nats": ("entropy",),
    "tokens": ("length",),
    "share": ("ended", "no_signal", "clipped"),
}
SIDES = {"chosen": "#2f7d32", "good": "#2f7d32", "rejected": "#b3261e", "bad": "#b3261e", "margin": "#7a7f87"}
OTHERS = ("#1f4e8c", "#b35900", "#2f7d32", "#8c2f5b", "#7a7f87")  # colours of other names
SILENT = 10  # steps in a row without a signal, after which that is said


class Record:
    """A row a step and a row an evaluation in `metrics.jsonl`; a progress bar with loss, rate, tokens/s and time left.
    A resumed run starts after `kept` rows of the file. Without a path nothing is written or shown. `listeners` are
    called with each row that has been written."""

    def __init__(self, path: Path | None, total: int, kept: int = 0, listeners: Sequence[Callable[[dict], None]] = ()):
        self.listeners = listeners
        self.path, self.rows = path, read_rows(path, kept) if path and kept else []
        self.kept = kept  # later rows of the file are cut when there is a new one to add
        self.earlier = self.rows[-1]["seconds"] if self.rows else 0.0
        self.start = self.last = time.monotonic()
        self.tokens = 0
        self.bar = tqdm(
            total=total,
            initial=len(self.steps),
            desc="training",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=path is None,
        )

    @property
    def steps(self) -> list[dict]:
        return [row for row in self.rows if "loss" in row]

    @property
    def seconds(self) -> float:
        return round(self.earlier + time.monotonic() - self.start, 3)

    def add(
        self, step: int, result: StepResult, lr: float, figures: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        now = time.monotonic()
        self._append({
            "step": step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "trained_tokens": result.trained_tokens,
            "unchanged": result.unchanged,
            **figures,
            "tokens_per_second": round(result.tokens / (now - self.last), 1),
            "seconds": self.seconds,
        })  # fmt: skip
        if self._silent() == SILENT:
            self.note(f"note     no group of the last {SILENT} steps had a signal. {NO_SIGNAL}")
        self.tokens += result.tokens
        self.last = now
        speed = self.tokens / (now - self.start)
        reward = f"reward {figures['reward']:.3f}, " if "reward" in figures else ""
        self.bar.set_postfix_str(f"{reward}loss {result.loss:.3f}, lr {lr:.1e}, {speed:.0f} tok/s")
        self.bar.update()

    def _silent(self) -> int:
        """How many steps without a signal there were last, in a row."""
        silent = takewhile(lambda row: row.get("no_signal") == 1 and "value_loss" not in row, reversed(self.steps))
        return sum(1 for _ in silent)  # a value head tells equal rewards apart

    def skip(self, step: int, lr: float, why: str) -> None:
        """A step whose loss or gradient was not finite, written as null: JSON has no such numbers."""
        self._append({"step": step, "loss": None, "lr": lr, "grad_norm": None, "seconds": self.seconds})
        self.note(f"skipped  step {step}: {why}")
        self.bar.update()

    def evaluated(self, row: dict) -> None:
        self._append({**row, "seconds": self.seconds})
        self.last = time.monotonic()
        what = "reward" if "eval_reward" in row else "loss"
        words = [f"{what} {row[f'eval_{what}']:.4f}"] if f"eval_{what}" in row else []
        words += [f"accuracy {row['eval_accuracy']:.1%}"] if "eval_accuracy" in row else []
        words.append(f"{row['retention_kl']:.4f} nats forgotten")
        words.append(f"loss on ordinary text {row['retention_loss']:.3f}, was {row['retention_loss_before']:.3f}")
        self.note(f"eval     step {row['step']}: {', '.join(words)}")

    def note(self, text: str) -> None:
        """A line above the progress bar."""
        with self.bar.external_write_mode():
            say(text)

    def _append(self, row: dict) -> None:
        if self.path and self.kept:
            files.write_rows(self.path, self.rows)
            self.kept = 0
        self.rows.append(row)
        if self.path:
            files.append_row(self.path, row)
        for tell in self.listeners:
            tell(row)

    def close(self) -> None:
        self.bar.close()


def is_row(row: object) -> bool:
    """Is it a row as `Record` writes them? The file may have been edited since."""
    if not isinstance(row, dict):
        return False
    kind = "evaluation" if "loss" not in row else "skipped" if row["loss"] is None else "step"
    others = row.keys() - {"samples", *(("loss", "grad_norm") if kind == "skipped" else ())}
    return all(type(row.get(name)) in (int, float) for name in {*NUMBERS[kind], *others})


def read_rows(path: Path, count: int) -> list[dict]:
    """The first `count` rows of a file; none where they are not there."""
    try:
        lines = files.read_bytes(path, limit=2**40).splitlines()[:count]
        rows = [json.loads(line) for line in lines]
    except (BadInput, ValueError):
        rows = []
    if len(rows) < count or not all(map(is_row, rows)):
        say(f"note     {path} does not have the rows before this step any more; it begins anew")
        rows = []
    return rows


def draw(rows: list[dict], path: Path, title: str, best: int | None = None, loss: str = "loss") -> None:
    """The picture: `loss` a step, or the reward of sampled answers, with its running mean, evaluations with the `best`
    one, what a method measures besides, what was forgotten, the rate."""
    import matplotlib  # slow to import, so only where a picture is drawn

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    trained = [row for row in rows if row.get("loss") is not None]
    top = "reward" if any("entropy" in row for row in trained) else "loss"
    held_out = [row for row in rows if f"eval_{top}" in row]
    kept = [row for row in rows if "retention_kl" in row]
    panels = panels_of(trained)
    heights = (3, *(1.5 for _ in panels), *(1 for _ in kept[:1]), 1)
    figure, (above, *middle, below) = plt.subplots(
        len(heights), 1, figsize=(8, 4 + len(heights) / 2 + len(panels)), dpi=120, sharex=True, height_ratios=heights,
        layout="constrained",
    )  # fmt: skip
    shown = [row for row in trained if top in row]  # answers of a step that cannot be scored have no reward
    steps, values = [row["step"] for row in shown], [row[top] for row in shown]
    above.plot(steps, values, color="#9db8d9", linewidth=1, marker=".", markersize=4, label="each step")
    above.plot(steps, smooth(values), color="#1f4e8c", linewidth=2, label="running mean")
    _evaluations(above, held_out, f"eval_{top}", "#2f7d32", "held out")
    if best is not None:
        above.axvline(best, color="#2f7d32", linewidth=1, linestyle=":", label=f"best, step {best}")
    above.set_ylabel(loss if top == "loss" else "reward")
    above.set_title(title, fontsize=10)
    for axes, (label, names) in zip(middle, panels.items(), strict=False):
        for name, color in zip(names, cycle(OTHERS), strict=False):
            values = zip(*((row["step"], row[name]) for row in trained if name in row), strict=True)
            side = name.removeprefix(next(filter(name.startswith, PANELS), ""))
            axes.plot(*values, color=SIDES.get(side, color), linewidth=1.5, label=side.replace("_", " "))
        axes.set_ylabel(label)
        axes.legend(frameon=False)
    for axes in middle[len(panels) :]:
        _evaluations(axes, kept, "retention_kl", "#8c2f5b", "forgotten")
        axes.set_ylabel("forgotten\n(KL, nats)")
    below.plot([row["step"] for row in trained], [row["lr"] for row in trained], color="#b35900", linewidth=1.5)
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    for axes in (above, *middle, below):
        if axes not in middle[: len(panels)] and axes.dataLim.y0 >= 0:  # the loss `robust` may be negative
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    above.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    files.write_bytes(path, buffer.getvalue())


def panels_of(rows: list[dict]) -> dict[str, list[str]]:
    """Panel -> the names it shows. A row may lack some: kto has steps with answers of one kind only."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {label: [name for name in names if name.startswith(kind)] for kind, label in PANELS.items()}
    if "entropy" in names:
        if len(found["reward"]) == 1:  # which is the reward above
            del found["reward"]
        found |= {label: [name for name in its if name in names] for label, its in OF_SAMPLES.items()}
    return {label: its for label, its in found.items() if its}


def smooth(losses: Sequence[float]) -> list[float]:
    """The running mean over about the last ten losses, fewer in a short run."""
    means, mean = [], losses[0] if losses else 0.0
    weight = max(0.1, 1 - len(losses) / 100)
    for loss in losses:
        mean += weight * (loss - mean)
        means.append(mean)
    return means


def _evaluations(axes, rows: list[dict], key: str, color: str, label: str) -> None:
    steps, values = [row["step"] for row in rows], [row[key] for row in rows]
    if rows:
        axes.plot(steps, values, color=color, linewidth=1.5, marker="o", markersize=4, label=label)
