"""Resuming a run: which checkpoint, whose settings, and what must be as it was."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora import methods
from lora.errors import BadEnvironment, BadInput, say
from lora.run.plan import Plan
from lora.run.results import latest_folder
from lora.run.settings import TrainSettings
from lora.train import run_state, stopping
from lora.train.distributed import DistContext


@dataclass
class Resumed:
    """A resumed run: its folder, its newest good checkpoint or the one that was named, and the state in it."""

    run: Path
    path: Path
    passed_over: list[str]
    state: run_state.State
    steps: list[int]  # of all its checkpoints

    def tell(self) -> None:
        for line in self.passed_over:
            say(f"passed over {line}")
        say(f"resume   {self.path}, step {self.state.step} of {self.state.total}")

    def check(self, plan: Plan, args: TrainSettings, processes: DistContext) -> None:
        """Raises BadInput naming everything that is not as it was and decides what is learned; BadEnvironment where
        another process has resumed the run meanwhile."""
        if run_state.steps(self.run) != self.steps:
            why = "another process has resumed it meanwhile"
            raise BadEnvironment(f"changed run in {self.run}: {why}. Give the same command again")
        old, problems = self.state, []
        fix = "Leave it out, or start a new run"
        changed = args.changed(old.settings)
        for name in changed:
            was, now = old.settings.get(name), getattr(args, name)
            problems.append(f"changed --{name.replace('_', '-')} in the command line: {now}, the run has {was}. {fix}")
        data_flags = {name for name, one in args.flags().items() if one.group == "data"} | {"eval_fraction", "seed"}
        if plan.data_fingerprint != old.data and not data_flags.intersection(changed):  # which made other examples
            names = ", ".join([*(args.data or ["the rows made here"]), *(args.replay or [])])
            new = f"Give the data it had, or start a new run with --init-adapter {self.path}"
            problems.append(f"changed --data in {names}: other examples than {self.run} was trained on. {new}")
        if processes.main and plan.base_fingerprint() != old.base:
            why = f"other weights than {self.run} was trained on"
            problems.append(f"changed --model in {plan.base.name}: {why}. Give the model it had")
        falling, given = args.schedule != "constant", "max_steps" if args.max_steps else "epochs"
        other = getattr(args, given) != old.settings.get(given)  # else what is named above changed the number of steps
        if plan.total != old.total and (falling or plan.total < old.step) and (other or not problems):
            flag = "--" + given.replace("_", "-")
            why = "only a constant schedule can go on for longer" if falling else f"{old.step} are done"
            problems.append(f"changed {flag} in the command line: {plan.total} steps, not {old.total}; {why}. {fix}")
        if problems:
            raise BadInput(*problems)
        plan.warmup = old.warmup  # of the first total, where there are more steps now
        self._forget_lost_evaluations(args.max_forgetting)
        here = where_computed(args, processes)
        for key in here.keys() & old.computed.keys():
            if here[key] != old.computed[key]:
                say(f"note     {key}: {here[key]}, was {old.computed[key]}; what follows may differ in the last bits")
        if args.device == "cuda":
            say("note     on CUDA some sums have no fixed order: what follows may differ in the last bits")

    def _forget_lost_evaluations(self, max_forgetting: float | None) -> None:
        """Without the best checkpoint only later evaluations can be the best."""
        old = self.state
        best = stopping.best(old.evaluations, max_forgetting)
        if best is not None and (best not in self.steps or run_state.fault(run_state.at(self.run, best))):
            say(f"note     the checkpoint of step {best}, the best so far, is not there: only later evaluations count")
            old.evaluations = [row for row in old.evaluations if row["step"] == old.step]


def resume(args: TrainSettings, argv: Sequence[str] | None, about: str) -> tuple[TrainSettings, Resumed]:
    """The checkpoint that --resume means; and the settings again, those of its run where no flag says otherwise.

    Raises BadInput where no checkpoint can be believed.
    """
    run, path, passed_over = run_state.find(Path(args.resume or latest_folder(args)))
    if args.out is not None and Path(args.out).resolve() != run.resolve():
        raise BadInput(f"contradiction in the command line: --out {args.out}, and --resume {run}. Leave out --out")
    state = run_state.read_state(path)
    state.settings = methods.without_others(state.settings)
    found = Resumed(run, path, passed_over, state, run_state.steps(run))
    return TrainSettings.resolve(argv, about, state.settings), found


def begin_state(plan: Plan, args: TrainSettings, processes: DistContext, resumed: Resumed | None) -> run_state.State:
    """The state from which the loop goes on: a checkpoint's, or that of a run without a step."""
    if resumed:
        state = resumed.state
    else:
        base = plan.base_fingerprint() if processes.main else ""
        state = run_state.State(0, plan.total, plan.warmup, {}, plan.data_fingerprint, base)
    state.settings, state.total, state.computed = args.to_save(), plan.total, where_computed(args, processes)
    return state


def where_computed(args: TrainSettings, processes: DistContext) -> dict:
    """What the last bits of a run depend on."""
    gpu = args.device == "cuda"
    return {
        "torch": torch.__version__,
        "device": args.device,
        "machine": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": processes.size,
        "compiled": args.compile,
    }
