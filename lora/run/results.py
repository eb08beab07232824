"""The folder of a run: checkpoints while it goes on; adapter, picture and report at its end."""

import time
from contextlib import contextmanager
from pathlib import Path

import torch

from lora import files, flags, folders, pretrained, settings
from lora.adapter import passport, store
from lora.adapter.inject import lora_layers
from lora.data.sources import numbered
from lora.export import card, report
from lora.export.card import METRICS, SETTINGS
from lora.run import full
from lora.run.plan import Plan
from lora.train import run_state, stopping
from lora.train.record import Record, draw

PICTURE, REPORT = "loss.png", "report.md"
MODEL = (*pretrained.SIDECARS, *pretrained.WEIGHTS)  # of --full
WROTE = (store.WEIGHTS, store.CONFIG, SETTINGS)  # by these --overwrite knows a folder of ours
HOLDS = (*passport.ADAPTER, *MODEL, METRICS, PICTURE, REPORT, card.FILE, run_state.FOLDER)  # and may hold these


def holds(out: Path) -> list[str]:
    """The names that a run's folder may hold."""
    return [*HOLDS, *pretrained.shards(out)]


def saved(out: Path) -> bool:
    """Has a run in this folder got as far as to save something?"""
    return bool(run_state.steps(out)) or any((out / name).exists() for name in (store.WEIGHTS, "config.json"))


class Results:
    """What the one process that writes knows: the run's folder, and when a checkpoint is due."""

    def __init__(self, model, plan: Plan, s, out: Path, state: run_state.State, optimizer, parameters: dict):
        self.model, self.plan, self.s, self.out, self.state = model, plan, s, out, state
        self.optimizer, self.parameters = optimizer, parameters
        self.saved, self.last, self.later = state.step, time.monotonic(), []
        base, spoken = plan.base, {"system": False if s.no_system else s.system, "date": s.date}
        learned = {**settings.decisive(flags.TRAIN, s), "steps": plan.total}
        marks = passport.fingerprints(plan.chat.tokenizer, plan.chat.template.source, state.data, learned)
        self.papers = passport.make(base.name, base.header, base.read, lora_layers(model), spoken, **marks)

    @contextmanager
    def folder(self):
        """The folder of a new run, or of the one that is gone on with, cleared of what killed processes left."""
        if self.state.step == 0:
            with folders.live_folder(self.out, self.s.overwrite, lambda: self.saved > 0):
                files.write_json(self.out / SETTINGS, self.state.settings)
                yield
            return
        for place in (self.out, self.out / run_state.FOLDER):
            folders.sweep(place)
        self.later = [step for step in run_state.ours(self.out) if step > self.state.step]
        if not self.later:
            self._prune()  # it may have been killed between a save and this
        yield

    @property
    def best(self) -> int | None:
        """The step of the best evaluation so far."""
        return stopping.best(self.state.evaluations, self.s.max_forgetting)

    def due(self) -> bool:
        """Is it time for a checkpoint, or was the last evaluation the best?"""
        step, seconds = self.state.step, flags.seconds(self.s.save_every)
        on_time = step % int(self.s.save_every) == 0 if seconds is None else time.monotonic() - self.last >= seconds
        return on_time or step == self.best

    def save(self, record: Record) -> None:
        """Write a checkpoint of this step, if there is none yet; only then are older ones removed."""
        if self.saved == self.state.step:
            return
        self.state.rows = len(record.rows)
        files.sync(self.out / METRICS)
        run_state.save(self.out, self.state, self.optimizer, self.parameters, self._write)
        self.saved, self.last = self.state.step, time.monotonic()
        for step in self.later:  # of the run before it was gone on with from an earlier checkpoint
            if step > self.state.step and run_state.at(self.out, step).exists():
                folders.remove_folder(run_state.at(self.out, step))
        self.later = []
        self._prune()

    def _prune(self) -> None:
        """The newest stay, and the best as each of them sees it: the run may go on from any."""
        most, rows = self.s.max_forgetting, self.state.evaluations
        seen = ([row for row in rows if row["step"] <= step] for step in run_state.ours(self.out)[-self.s.keep :])
        run_state.prune(self.out, self.s.keep, {stopping.best(part, most) for part in seen} - {None})

    def _write(self, folder: Path) -> None:
        """What was learned, into a folder."""
        if self.s.full:
            return full.write(self.plan.base, folder, self.parameters, self.plan.chat.template.source)
        files.write_bytes(folder / passport.TEMPLATE, self.plan.chat.template.source.encode())
        papers = self.papers | {"step": self.state.step}
        store.save(self.model, folder, self.plan.base.hub_id, papers, "CAUSAL_LM")

    def publish(self, record: Record, ended: str) -> None:
        """The best adapter or model, or without evaluations the last, in the run's own folder; settings and card."""
        if self.s.full:
            full.publish(run_state.at(self.out, self.best or self.state.step), self.out, getattr(torch, self.s.dtype))
        elif self.best is None:
            self._write(self.out)
        else:
            for name in passport.ADAPTER:
                source = run_state.at(self.out, self.best) / name
                files.write_bytes(self.out / name, files.read_bytes(source, limit=2**40))
        files.write_json(self.out / SETTINGS, {**self.state.settings, settings.ENDED: ended})
        draw(record.rows, self.out / PICTURE, self._title(), self.best)
        made = card.Made(self.state.settings, record.rows, self.best or self.state.step)
        (card.write_full if self.s.full else card.write_adapter)(self.out, self.out.name, self.plan.base, made)

    def report(self, record: Record, ended: str, answers) -> None:
        """`report.md`, with (question, before, after) of some answers."""
        python, out, kind = "python", str(self.out), "--model" if self.s.full else "--adapter"
        commands = [
            (python, "train.py", "--config", f"{out}/{SETTINGS}", "--out", f"{out}-again"),
            (python, "generate.py", kind, out),
            (python, "evaluate.py", kind, out, "--data", *(self.s.eval_data or files_of(self.s) or ["FILE"])),
        ]
        numbers = self.plan.numbers(self.s) | {"trained parameters": f"{self.plan.in_adapter(self.s):,}"}
        report.write(
            self.out / REPORT,
            self._title(),
            ended,
            self.state.settings,
            numbers,
            record.rows,
            self.best,
            answers,
            commands,
        )

    def _title(self) -> str:
        what = "every weight" if self.s.full else f"rank {self.s.rank}"
        return f"{self.out.name}: {self.plan.base.hub_id}, {what}, {len(self.plan.examples)} examples"


def files_of(s) -> list[str]:
    """The files of --data, without weights."""
    return [numbered(name)[0] for name in s.data or ()]
