"""Which evaluation is the best so far, and when there is no point in going on. Pure functions of the evaluations.

An evaluation is a row {"step", "eval_loss", "retention_kl"}; either number may be missing. Step 0 is the start.
"""

import math
from collections.abc import Sequence

FINISHED = "all steps are done"
WITHOUT_SIGNAL = "steps_without_signal"  # so many in a row, of those whose answers are sampled
NO_SIGNAL = (
    "Where all answers to a prompt have the same reward nothing is learned: give easier rows, train on examples first, "
    "or raise --temperature"
)


def brief(row: dict) -> dict:
    """The part of an evaluation that decisions need."""
    return {key: row[key] for key in ("step", "eval_loss", "retention_kl") if key in row}


def best(evaluations: Sequence[dict], most: float | None = None) -> int | None:
    """The step with the lowest `eval_loss`, the first of equals; without losses the last one. Only evaluations that
    forgot at most `most` nats count. None where there is none after step 0."""
    fitting = [row for row in evaluations if row["step"] > 0 and not _forgot(row, most)]
    if not fitting:
        return None
    with_loss = [row for row in fitting if "eval_loss" in row]
    return min(with_loss, key=lambda row: row["eval_loss"])["step"] if with_loss else fitting[-1]["step"]


def why_end(evaluations: Sequence[dict], patience: int | None = None, most: float | None = None) -> str | None:
    """The reason to end a run after its last evaluation, if there is one."""
    rows = [row for row in evaluations if row["step"] > 0]
    if rows and _forgot(rows[-1], most):
        forgot, step = rows[-1]["retention_kl"], rows[-1]["step"]
        else_ = "" if best(rows, most) else "; none was within it, so the last one is kept"
        return f"{forgot:.3f} nats forgotten by step {step}, over --max-forgetting {most:g}{else_}"
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    if patience and losses and len(losses) - 1 - losses.index(min(losses)) >= patience:
        return f"no better evaluation than at step {best(evaluations, most)} in {patience} (--patience)"
    return None


def _forgot(row: dict, most: float | None) -> bool:
    return most is not None and row.get("retention_kl", 0.0) > most


def reason_to_stop(state, args, signal: int | None) -> str | None:
    """Why a run ends after the step it stands at; None where it goes on."""
    if signal:
        return f"stopped by a signal after step {state.step}"
    without = state.carried.get(WITHOUT_SIGNAL)
    if without is not None and without >= (args.patience or math.inf):
        return f"no group of the last {without:.0f} steps had a signal (--patience). {NO_SIGNAL}"
    early = why_end(state.evaluations, args.patience if without is None else None, args.max_forgetting)
    return early or (FINISHED if state.step >= state.total else None)
