"""The folder of a run: checkpoints while it goes on; adapter or model, picture and report at its end."""

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from itertools import count, takewhile
from pathlib import Path

from lora import device as machine
from lora import files, folders, pretrained, settings
from lora.adapter import passport, store
from lora.data.sources import numbered
from lora.errors import BadInput, BadNumbers, say
from lora.export import card, report
from lora.export.card import METRICS, PREVIEW, SETTINGS
from lora.methods import METHODS, dpo, samples
from lora.run import track
from lora.run.plan import Plan
from lora.run.settings import TrainSettings, seconds
from lora.run.trainable import Trainable
from lora.train import run_state, stopping
from lora.train.distributed import DistContext
from lora.train.record import Record, draw
from lora.train.step import NotFinite

PICTURE, REPORT, REFERENCE, REFERENCE_ADAPTER = "loss.png", "report.md", "reference.safetensors", "reference"
MODEL = (*pretrained.SIDECARS, *pretrained.WEIGHTS)  # of --full
WROTE = (store.WEIGHTS, store.CONFIG, SETTINGS)  # by these --overwrite knows a folder of ours
HOLDS = (  # and these
    *passport.ADAPTER, *MODEL, METRICS, PREVIEW, PICTURE, REPORT, REFERENCE, REFERENCE_ADAPTER, card.FILE,
    run_state.FOLDER, track.FOLDER,
)  # fmt: skip


def holds(out: Path) -> list[str]:
    """The names that a run's folder may hold."""
    return [*HOLDS, *pretrained.shards(out)]


def saved(out: Path) -> bool:
    """Has a run in this folder got as far as to save something?"""
    return bool(run_state.steps(out)) or any((out / name).exists() for name in (store.WEIGHTS, "config.json"))


def new_folder(args: TrainSettings) -> Path:
    """--out, or the first of weights/NAME, weights/NAME-2, ... that is free; NAME is that of the data."""
    return files.behind_link(args.out) if args.out else next(path for path in _names(args) if not path.exists())


def latest_folder(args: TrainSettings) -> Path:
    """--out, or the last of weights/NAME, weights/NAME-2, ... that is there."""
    if args.out:
        return files.behind_link(args.out)
    there = list(takewhile(Path.exists, _names(args)))
    if not there:
        raise BadInput(f"no run in {next(_names(args))}: there is nothing to resume. Give --out or --resume DIR")
    return there[-1]


def _names(args: TrainSettings) -> Iterator[Path]:
    name = Path(numbered(args.data[0])[0]).name.split(".")[0] if args.data else "self-introduction"
    first = Path("weights") / (name or "adapter")
    return (first.with_name(f"{first.name}-{n}") if n > 1 else first for n in count(1))


@contextmanager
def reserved(out: Path, args: TrainSettings, resumed: bool, main: bool):
    """Inside the block the name `out` belongs to this run. Raises BadInput where a new run would replace something."""
    folders.check_place(out)
    with folders.locked(out) if main else nullcontext():
        if not resumed:
            if main and folders.recover(out, lambda: saved(out)):
                say(f"note     a run that was to replace the one in {out} was killed before it saved: that one is back")
            folders.check_out(out, args.overwrite, WROTE, holds(out))
        yield


class Results:
    """The run's folder, and when a checkpoint is due. Only the main process writes; the others know what it does."""

    def __init__(
        self,
        trainable: Trainable,
        plan: Plan,
        args: TrainSettings,
        out: Path,
        state: run_state.State,
        optimizer,
        processes: DistContext,
    ):
        self.trainable, self.plan, self.args, self.out, self.state = trainable, plan, args, out, state
        self.optimizer, self.processes = optimizer, processes
        self.first = self.saved = state.step
        self.last, self.later = time.monotonic(), []

    @contextmanager
    def open(self):
        """The run's folder is there inside the block; yields its `Record`."""
        main = self.processes.main
        metrics = self.out / METRICS if main else None
        with (
            run_state.disk_full(self.out, self.trainable.parameters),
            self.folder() if main else nullcontext(),
            track.tracking(self.args, self.out, self.state.step, main) as listeners,
            closing(Record(metrics, self.plan.total, self.state.rows, listeners)) as record,
        ):
            yield record

    @contextmanager
    def folder(self):
        """The folder of a new run, or that of a resumed one, cleared of what killed processes left."""
        if self.state.step == 0:
            with folders.live_folder(self.out, self.args.overwrite, lambda: self.saved > 0):
                files.write_json(self.out / SETTINGS, self.state.settings)
                self._write_what_is_known()
                yield
            return
        for place in (self.out, self.out / run_state.FOLDER):
            folders.sweep(place)
        self.later = [step for step in run_state.ours(self.out) if step > self.state.step]
        if not self.later:
            self._prune()  # the run may have been killed between a save and this
        self._write_what_is_known()
        yield

    def _write_what_is_known(self) -> None:
        files.write_bytes(self.out / PREVIEW, json.dumps(self.plan.preview(self.args), ensure_ascii=False).encode())
        if self.plan.reference:
            self.plan.reference.write(self.out)

    @property
    def best(self) -> int | None:
        """The step of the best evaluation so far."""
        return stopping.best(self.state.evaluations, self.args.max_forgetting)

    def due(self) -> bool:
        """Is it time for a checkpoint, or was the last evaluation the best?"""
        step, span = self.state.step, seconds(self.args.save_every)
        on_time = step % int(self.args.save_every) == 0 if span is None else time.monotonic() - self.last >= span
        return on_time or step == self.best

    def save_if_due(self, record: Record, ended: str | None) -> None:
        if self.processes.main and not self.made_no_step and (ended or self.due()):
            self.save(record)

    def save(self, record: Record) -> None:
        """Write a checkpoint of this step, if there is none yet; only then are older ones removed."""
        step = self.state.step
        if self.saved == step:
            return
        self.state.rows = len(record.rows)
        files.sync(self.out / METRICS)
        parameters = self.trainable.parameters
        run_state.save(self.out, self.state, self.optimizer, parameters, lambda to: self.trainable.write(to, step))
        self.saved, self.last = step, time.monotonic()
        for step in self.later:  # of the run before it was resumed from an earlier checkpoint
            if step > self.state.step and run_state.at(self.out, step).exists():
                folders.remove_folder(run_state.at(self.out, step))
        self.later = []
        self._prune()

    def _prune(self) -> None:
        """The newest stay, and the best as each of them sees it: the run may be resumed from any."""
        most, rows = self.args.max_forgetting, self.state.evaluations
        seen = ([row for row in rows if row["step"] <= step] for step in run_state.ours(self.out)[-self.args.keep :])
        run_state.prune(self.out, self.args.keep, {stopping.best(part, most) for part in seen} - {None})

    def diverged(self, found: NotFinite, indices: list[int]) -> BadNumbers:
        rows = [self.plan.examples.where[i] for i in indices]
        names = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        where = f"step {self.state.step}: {found.why}; rows {names}; {run_state.last_good(self.out)}"
        fix = f"{found.fix}{', or give --reward a smaller weight' if samples(self.args.method) else ''}"
        return BadNumbers(f"training diverged in {where}. {fix}")

    def publish(self, record: Record, ended: str) -> None:
        """The best adapter or model, or without evaluations the last, in the run's own folder; settings and card."""
        best, last = self.best, self.state.step
        if self.processes.main:
            self.trainable.publish(run_state.at(self.out, best or last), self.out)
            files.write_json(self.out / SETTINGS, {**self.state.settings, settings.ENDED: ended})
            draw(record.rows, self.out / PICTURE, self._title(), best, METHODS[self.args.method].LABEL)
            made = card.Made(self.state.settings, record.rows, best or last)
            self.trainable.write_card(self.out, self.out.name, self.plan.base, made)
        peak = machine.peak_memory(self.processes.device) / 1e9
        say(f"saved    {self.out} after {last} steps, {record.seconds:.0f} s, peak memory {peak:.2f} GB")
        if best is not None:
            what, kind = "best" if self.plan.sources.held_out else "kept", self.trainable.kind
            its = f"that is the {kind} in {self.out}; the last one is {run_state.at(self.out, last)}"
            say(f"{what}     step {best}: {its}")

    @property
    def made_no_step(self) -> bool:
        return self.state.step == self.first

    def try_it(self) -> str:
        """The command that shows what was learned."""
        opened = (f"--{self.trainable.kind}", str(self.out))
        if self.args.method == "reward":
            return shlex.join(["python", "evaluate.py", *opened, "--data", numbered(self.args.data[0])[0]])
        return shlex.join(["python", "generate.py", *opened])

    def how_to_resume(self) -> str:
        again = shlex.join(["python", "train.py", "--resume", "--out", str(self.out)])
        done = f"stopped after step {self.state.step} of {self.plan.total}; the {self.trainable.kind} so far is saved"
        return f"{done}. Go on with: {again}"

    def report(self, record: Record, ended: str, answers: list[tuple[str, str, str]]) -> None:
        """`report.md`, with (question, before, after) of some answers."""
        if not self.processes.main:
            return
        python, out, kind = "python", str(self.out), f"--{self.trainable.kind}"
        args = self.args
        data = args.eval_data or [numbered(name)[0] for name in args.data or ()] or ["FILE"]
        read = ["--prompt-key", args.prompt_key] if args.prompt_key else []
        read += ["--response-key", args.response_key] if args.response_key else []
        read += ["--leading-answers", args.leading_answers] if args.leading_answers != "error" else []
        parts = [self.plan.sources.held_out] if args.eval_data else self.plan.sources.data
        read += ["--no-generate"] if any("text" in part.shapes for part in parts) else []  # a document has no answer
        read += ["--method", args.method] if args.method != "sft" else []
        read += ["--beta", f"{args.beta:g}"] if args.method in ("dpo", "kto") and args.beta != dpo.BETA else []
        commands = [
            (python, "train.py", "--config", f"{out}/{SETTINGS}", "--out", f"{out}-again"),
            (python, "generate.py", kind, out),
        ]
        if not samples(args.method):  # whose data has no answers
            commands.append((python, "evaluate.py", kind, out, "--data", *data, *read))
        numbers = self.plan.numbers(self.args)
        numbers["trained parameters"] = f"{self.plan.trained_parameters(self.args):,}"
        rows = record.rows
        report.write(
            self.out / REPORT, self._title(), ended, self.state.settings, numbers, rows, self.best, answers, commands
        )

    def _title(self) -> str:
        examples = f"{len(self.plan.examples)} examples"
        return f"{self.out.name}: {self.plan.base.hub_id}, {self.trainable.described}, {examples}"


def show(answers: list[tuple[str, str, str]]) -> None:
    """(question, before, after) on stdout, one under the other."""

    def short(text: str) -> str:
        line = " ".join(text.split())
        return line if len(line) <= 160 else line[:157] + "..."

    for question, before, after in answers:
        print(f"\n{short(question)}\n  before  {short(before)}\n  after   {short(after)}")
    sys.stdout.flush()
