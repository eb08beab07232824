"""`--track`: the numbers of each row of metrics.jsonl go to another program too, as they are written.

Its package is imported only when it is asked for. It works in a thread of its own: one that is slow, waits for a
network or fails costs the run a line, and no step. What it is given stays on this machine, unless the user's own
environment (`WANDB_MODE`, `TRACKIO_SPACE_ID`, `MLFLOW_TRACKING_URI`) says otherwise.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from tqdm import tqdm

from lora.errors import say

PROJECT, FOLDER = "lora", "tensorboard"  # the project of trackers that have projects; a folder in that of the run
PATIENCE = 60.0  # seconds that a tracker has, after the run, for the rows it has not written yet

Opened = tuple[Callable[[dict, int], None], Callable[[], None]]  # write(numbers, step), close()

# ---- one function a tracker: (folder of the run, its settings, steps that are done) -> Opened ------------------------


def tensorboard(out: Path, settings: dict, step: int) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / FOLDER), purge_step=step + 1 if step else None, flush_secs=5)
    writer.add_text("settings", f"```\n{json.dumps(settings, indent=2, ensure_ascii=False)}\n```")

    def write(numbers: dict, step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def wandb(out: Path, settings: dict, step: int) -> Opened:
    if os.environ.setdefault("WANDB_MODE", "offline") != "online":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of its own faults, to its makers
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run = wandb.init(project=project, name=out.name, config=settings, settings=wandb.Settings(console="off"))
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def trackio(out: Path, settings: dict, step: int) -> Opened:
    import trackio

    with redirect_stdout(sys.stderr):  # stdout is for answers
        run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=out.name, config=settings, embed=False,
            resume="allow" if step else "never", auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def close() -> None:
        with redirect_stdout(sys.stderr):
            run.finish()

    return lambda numbers, step: run.log(numbers, step=step), close


def mlflow(out: Path, settings: dict, step: int) -> Opened:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
        mlflow.set_experiment(PROJECT)
    run = mlflow.start_run(run_name=out.name, log_system_metrics=False)
    params = [(name, str(value)[:500]) for name, value in settings.items() if value is not None]
    for first in range(0, len(params), 100):  # it takes no more at once
        mlflow.log_params(dict(params[first : first + 100]))
    return lambda numbers, step: mlflow.log_metrics(numbers, step=step, run_id=run.info.run_id), mlflow.end_run


TRACKERS = {one.__name__: one for one in (tensorboard, wandb, trackio, mlflow)}

# ---- what is the same for all of them --------------------------------------------------------------------------------


def missing(names: list[str] | None) -> list[str]:
    """A line for each tracker whose package is not there. A folder of its name beside the script is none."""
    specs = {name: find_spec(name) for name in dict.fromkeys(names or ())}
    line = "missing package in --track {0}: there is no {0} here. Install it: {1} -m pip install {0}"
    return [line.format(name, sys.executable) for name, spec in specs.items() if spec is None or spec.origin is None]


class Tracker:
    """A thread that hands rows to one tracker, in their order, until the first failure."""

    def __init__(self, name: str, out: Path, settings: dict, step: int):
        self.name, self.rows = name, SimpleQueue()
        self.thread = Thread(target=self._work, args=(out, settings, step), name=f"--track {name}", daemon=True)
        self.thread.start()

    def __call__(self, row: dict) -> None:
        self.rows.put(row)

    def _work(self, *how) -> None:
        try:
            write, close = TRACKERS[self.name](*how)
            while (row := self.rows.get()) is not None:
                write(numbers(row), row["step"])
            close()
        except Exception as error:
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            with tqdm.external_write_mode():  # above the progress bar
                say(f"warning: --track {self.name} failed; the run goes on without it: {why}")

    def close(self) -> None:
        self.rows.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            say(f"warning: --track {self.name} did not end in {PATIENCE:.0f} s; it may lack the last rows")


def numbers(row: dict) -> dict[str, float]:
    """What a tracker draws of a row: no texts, nothing that is null, and not the step, which is its place."""
    return {name: value for name, value in row.items() if name != "step" and type(value) in (int, float)}


@contextmanager
def tracking(args, out: Path, step: int, main: bool) -> Iterator[list[Tracker]]:
    """The trackers of --track, in the process that writes; they are closed behind the block."""
    names = dict.fromkeys(args.track or ()) if main else ()
    trackers = [Tracker(name, out, args.to_save(), step) for name in names]
    try:
        yield trackers
    finally:
        for one in trackers:
            one.close()
