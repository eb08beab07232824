"""`report.md`: what a run was, how it went, what changed, and the commands that do it again."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora import files
from lora.methods import METHODS, figures, used


def table(head: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_cell(value) for value in line) + " |" for line in lines]


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _figures(rows: Iterable[dict], words: dict[str, str], prefix: str = "") -> list[str]:
    """A table of what a method measures, a line a row; what did not occur has no column."""
    rows = list(rows)
    words = {name: text for name, text in words.items() if any(prefix + name in row for row in rows)}
    lines = ([row["step"], *(_number(row.get(prefix + name)) for name in words)] for row in rows)
    return table(("step", *words.values()), lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def write(
    path: Path,
    title: str,
    ended: str,
    settings: dict,
    numbers: dict,
    rows: Sequence[dict],
    best: int | None,
    answers: Iterable[tuple[str, str, str]],
    commands: Iterable[Sequence[str]],
) -> None:
    """`numbers` are statistics of data and adapter, `rows` those of metrics.jsonl, `answers` (question, before, after),
    `commands` the words of each."""
    trained = [row for row in rows if row.get("loss") is not None]
    evaluated = [row for row in rows if "eval_loss" in row or "retention_kl" in row]
    lines = [f"# {title}", "", f"{ended[:1].upper()}{ended[1:]}.", "", "![the run](loss.png)", ""]
    lines += ["## Course", ""]
    shown = trained[:: max(1, len(trained) // 10)]
    shown += [] if not trained or shown[-1] is trained[-1] else [trained[-1]]
    method = settings.get("method", "sft")
    words = figures(method, trained)
    head = ("step", METHODS[method].LABEL, "gradient norm", "learning rate", "unchanged by the update")
    forms = {"step": "", "loss": ".4f", "grad_norm": ".3g", "lr": ".2e", "unchanged": ".2%"}
    lines += table(head, ([format(row[key], form) for key, form in forms.items()] for row in shown))
    if words:
        lines += ["", *_figures(shown, words)]
    if note := getattr(METHODS[method], "NOTE", ""):
        lines += ["", note]
    if samples := [(row["step"], one) for row in shown[-4:] for one in row.get("samples") or ()]:
        lines += [
            "",
            "Answers of the model, sampled while it learned, the best and the worst to one prompt of a step:",
            "",
        ]
        told = ([step, one["prompt"], one["answer"], _number(one["reward"])] for step, one in samples)
        lines += table(("step", "prompt", "answer", "reward"), told)
    if evaluated:
        what = {
            "eval_reward": "held-out reward",
            "eval_loss": "held-out loss",
            "retention_kl": "forgotten (KL, nats)",
            "retention_loss": "loss on ordinary text",
            "repetition": "repetition of answers",
            "ended": "answers that end",
        }
        keys = [key for key in what if any(key in row for row in evaluated)]
        keys = [key for key in keys if key != "eval_loss" or "eval_reward" not in keys]  # its negative
        values = [[f"{row[key]:.4f}" if key in row else "" for key in keys] for row in evaluated]
        marks = [f"{row['step']}{' (best)' if row['step'] == best else ''}" for row in evaluated]
        rows = ([mark, *line] for mark, line in zip(marks, values, strict=True))
        lines += ["", "## Evaluations", "", *table(("step", *(what[key] for key in keys)), rows)]
        if words and any("eval_loss" in row for row in evaluated):
            lines += ["", "On what is held out:", "", *_figures(evaluated, words, "eval_")]
    lines += ["", "## What changed", "", *table(("asked", "before", "after"), answers)]
    lines += ["", "## Data and parameters", "", *table(("what", "value"), numbers.items())]
    lines += ["", "## Settings", "", *table(("setting", "value"), used(settings).items())]
    lines += ["", "## Again", "", "```", *(shlex.join(map(str, command)) for command in commands), "```", ""]
    files.write_bytes(path, "\n".join(lines).encode())
