"""What people see of a run: the progress bar, metrics.jsonl, and the picture of the loss."""

import io
import time
from pathlib import Path

from tqdm import tqdm

from lora import files
from lora.train.step import StepResult


class Record:
    """A row a step in `metrics.jsonl`, and a progress bar with loss, learning rate, tokens/s and time left."""

    def __init__(self, path: Path, total: int):
        self.path, self.rows = Path(path), []
        self.start = self.last = time.monotonic()
        self.bar = tqdm(total=total, desc="training", unit="step", dynamic_ncols=True, mininterval=0.5)

    def add(self, result: StepResult, lr: float) -> None:
        now = time.monotonic()
        row = {
            "step": len(self.rows) + 1,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "trained_tokens": result.trained_tokens,
            "tokens_per_second": round(result.tokens / (now - self.last), 1),
            "seconds": round(now - self.start, 3),
        }
        self.last = now
        self.rows.append(row)
        files.append_row(self.path, row)
        speed = sum(r["tokens"] for r in self.rows) / (now - self.start)
        self.bar.set_postfix_str(f"loss {result.loss:.3f}, lr {lr:.1e}, {speed:.0f} tok/s")
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def draw(rows: list[dict], path: Path, title: str) -> None:
    """The picture: loss a step with its running mean, and the learning rate, over trained tokens."""
    import matplotlib  # slow to import, so only where a picture is drawn

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth, mean = [], losses[0]
    weight = max(0.1, 1 - len(losses) / 100)  # about the last ten steps, fewer in a short run
    for loss in losses:
        mean += weight * (loss - mean)
        smooth.append(mean)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 5), dpi=120, sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    above.plot(steps, losses, color="#9db8d9", linewidth=1, marker=".", markersize=4, label="each step")
    above.plot(steps, smooth, color="#1f4e8c", linewidth=2, label="running mean")
    above.set_ylabel("loss (nats per trained token)")
    above.set_ylim(bottom=0)
    above.set_title(title, fontsize=10)
    above.legend(frameon=False)
    below.plot(steps, [row["lr"] for row in rows], color="#b35900", linewidth=1.5)
    below.set_ylabel("learning rate")
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    files.write_bytes(path, buffer.getvalue())
