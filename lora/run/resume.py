"""Going on with a run: which checkpoint, whose settings, and what must be as it was."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from lora import flags, settings
from lora.errors import BadEnvironment, BadInput, say
from lora.run.plan import Plan
from lora.train import run_state, stopping
from lora.train.distributed import DistContext


@dataclass
class Resumed:
    """A run that is gone on with: its folder, its newest good checkpoint or the one that was named, what that says."""

    run: Path
    path: Path
    passed_over: list[str]
    state: run_state.State
    there: list[int]  # the steps of all its checkpoints

    def tell(self) -> None:
        for line in self.passed_over:
            say(f"passed over {line}")
        say(f"resume   {self.path}, step {self.state.step} of {self.state.total}")

    def check(self, plan: Plan, s: SimpleNamespace, team: DistContext) -> None:
        """Raises BadInput naming everything that is not as it was and decides what is learned; BadEnvironment where
        another process has gone on with the run meanwhile."""
        if run_state.steps(self.run) != self.there:
            why = "another process has gone on with it meanwhile"
            raise BadEnvironment(f"changed run in {self.run}: {why}. Give the same command again")
        old, problems = self.state, []
        fix = "Leave it out, or start a new run"
        for name in settings.changed(flags.TRAIN, old.settings, s):
            was, now = old.settings.get(name), getattr(s, name)
            problems.append(f"changed --{name.replace('_', '-')} in the command line: {now}, the run has {was}. {fix}")
        if plan.sources.fingerprint() != old.data:
            names = ", ".join([*(s.data or ["the rows made here"]), *(s.replay or [])])
            new = f"Give the data it had, or start a new run with --init-adapter {self.path}"
            problems.append(f"changed --data in {names}: other examples than {self.run} was trained on. {new}")
        if team.main and plan.fingerprint() != old.base:
            why = f"other weights than {self.run} was trained on"
            problems.append(f"changed --model in {plan.base.name}: {why}. Give the model it had")
        if plan.total != old.total and (s.schedule != "constant" or plan.total < old.step):
            flag = "--max-steps" if s.max_steps else "--epochs"
            why = (
                "only a constant schedule can go on for longer" if s.schedule != "constant" else f"{old.step} are done"
            )
            problems.append(f"changed {flag} in the command line: {plan.total} steps, not {old.total}; {why}. {fix}")
        if problems:
            raise BadInput(*problems)
        plan.warmup = old.warmup  # of the first total, where there are more steps now
        best = stopping.best(old.evaluations, s.max_forgetting)
        if best is not None and (best not in self.there or run_state.fault(run_state.at(self.run, best))):
            say(f"note     the checkpoint of step {best}, the best so far, is not there: only later evaluations count")
            old.evaluations = [row for row in old.evaluations if row["step"] == old.step]
        here = where_computed(s, team)
        for key in here.keys() & old.computed.keys():
            if here[key] != old.computed[key]:
                say(f"note     {key}: {here[key]}, was {old.computed[key]}; what follows may differ in the last bits")
        if s.device == "cuda":
            say("note     on CUDA some sums have no fixed order: what follows may differ in the last bits")


def resume(s: SimpleNamespace, argv: Sequence[str] | None, about: str, named: Path) -> tuple[SimpleNamespace, Resumed]:
    """The checkpoint that `named` has or is; and the settings again, those of its run where no flag says otherwise.

    Raises BadInput where no checkpoint can be believed.
    """
    run, path, passed_over = run_state.find(named)
    if s.out is not None and Path(s.out).resolve() != run.resolve():
        raise BadInput(f"contradiction in the command line: --out {s.out}, and --resume {run}. Leave out --out")
    state = run_state.read_state(path)
    found = Resumed(run, path, passed_over, state, run_state.steps(run))
    return settings.resolve(flags.TRAIN, argv, about, state.settings), found


def where_computed(s: SimpleNamespace, team: DistContext) -> dict:
    """What the last bits of a run depend on."""
    return {
        "torch": torch.__version__,
        "device": s.device,
        "machine": torch.cuda.get_device_name() if s.device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": team.size,
        "compiled": s.compile,
    }
