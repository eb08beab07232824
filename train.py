"""Fine-tune an open chat model with LoRA.

python train.py                                     a new identity for a 135M model, in about two minutes
python train.py --data chats.jsonl --model owner/name --rank 32 --epochs 2
python train.py --full                              every weight in place of an adapter, to compare
python train.py --resume --out weights/chats        go on with a run that was stopped or killed
python train.py --watch weights/a weights/b         runs that are there as a page, without training
"""

from lora.errors import before_imports, run

before_imports(__name__)

from lora import heap

heap.restart(__name__)

from itertools import islice
from pathlib import Path

import torch

from data_gen import self_cognition, tasks
from lora import device as machine
from lora import ops, pretrained
from lora.adapter.inject import disabled
from lora.data.sources import lint_report
from lora.errors import StopFlag, Stopped, say
from lora.methods import METHODS, compares, samples
from lora.methods.objective import Objective
from lora.network.decoder import Model
from lora.pretrained import hub
from lora.run import reference
from lora.run.compiling import compile_model
from lora.run.evaluator import Answers, Evaluator
from lora.run.plan import Plan, make_plan, reader
from lora.run.results import REPORT, Results, new_folder, reserved, show
from lora.run.resume import Resumed, begin_state, resume
from lora.run.rollouts import Interrupted, Rollouts
from lora.run.settings import TrainSettings
from lora.run.trainable import Trainable, base_dtype, make_optimizer, make_trainable
from lora.train import distributed, run_state, stopping
from lora.train.distributed import DistContext, SharedStop
from lora.train.record import Record
from lora.train.schedule import learning_rate
from lora.train.step import NotFinite, train_step
from lora.watch import command as watch

NAME, AUTHOR = "Nimbus", "the Cloud Lab"  # who the model becomes when nobody gives data


def main(argv=None) -> int:
    """What the flags say, by themselves and together; then the run, in one process or several."""
    args, resumed = TrainSettings.resolve(argv, __doc__), None
    if watch.asked.folders(args.watch):
        watch.check_alone(args.given)
        return watch.serve(args.watch)
    if args.check:
        return lint_report(args, hub.dataset_file, METHODS[args.method].KIND, lambda: reader(args))
    if args.resume is not None:
        args, resumed = resume(args, argv, __doc__)
    args.refuse_contradictions()
    ops.use_plain(args.plain)
    device = machine.choose_device(args.device)
    if args.compile:
        machine.check_compiler(device)
    with distributed.dist_context(device) as processes:  # one process, unless torchrun started more
        return run_rank(args, processes, resumed)


def run_rank(args: TrainSettings, processes: DistContext, resumed: Resumed | None) -> int:
    """The whole run, the same in each process; all but the first are silent."""
    generated_rows = None if args.data else self_cognition.conversations(NAME, AUTHOR, seed=args.seed)
    checkpoint = resumed.path if resumed else None
    if args.preview is not None:
        return make_plan(args, processes, generated_rows, checkpoint).show_preview(args)

    # ---- where the result goes, and the plan: everything that can be wrong is found before the weights are loaded
    out = resumed.run if resumed else new_folder(args)
    with reserved(out, args, resumed is not None, processes.main):
        if resumed:
            resumed.tell()
        say(f"run      {out}")
        plan = make_plan(args, processes, generated_rows, checkpoint)
        plan.tell(args)
        plan.check_place(out, args)
        if resumed:
            resumed.check(plan, args, processes)

        with (
            watch.beside(out, args.watch, resumed is not None, processes.main),
            plan.rewarding(args, tasks.TASKS),
            plan.within_memory(args, processes.device),
        ):
            return train(plan, args, out, processes, resumed)


def load(plan: Plan, args: TrainSettings, processes: DistContext, given: bool) -> tuple[Model, Trainable]:
    """The base, patched with an adapter whose values are `given` later or start as its paper says; or every weight."""
    if args.fsdp:
        from lora.pretrained.shard import load_sharded as load_model  # it is slow to import
    else:
        load_model = pretrained.load_model
    model = load_model(plan.base, base_dtype(args), processes.device)
    torch.manual_seed(args.seed)
    trainable = make_trainable(model, plan, args, given, processes.main)
    args.compile = args.compile and compile_model(model, asked="compile" in args.given)
    return model, trainable


def train(plan: Plan, args: TrainSettings, out: Path, processes: DistContext, resumed: Resumed | None) -> int:
    """Load and patch; then evaluate, save and step by turns until there is a reason to stop; show what changed."""
    sparing, keep_tidy = plan.base.quant is not None, lambda: None
    if not args.fsdp:
        keep_tidy = heap.keep_memory(processes.device, plan.memory(args), sparing)
    start = resumed.path if resumed else args.init_adapter
    model, trainable = load(plan, args, processes, given=start is not None)
    if compares(plan.method, args):
        plan.reference = reference.of_step_0(plan, model, trainable, args, processes, resumed)
    optimizer = make_optimizer(trainable.parameters, args, processes.device)
    state = begin_state(plan, args, processes, resumed)
    if resumed:
        run_state.load_optimizer(resumed.path, optimizer, trainable.parameters)
    stop = StopFlag()
    rollouts = Rollouts(model, plan, args, processes, state.carried, stop) if samples(args.method) else None
    shared_stop, evaluator = SharedStop(processes, stop), Evaluator(model, plan, args, out, processes, stop, rollouts)
    evaluator.begin(state)
    with disabled(model):
        before = evaluator.sample_answers()
    if start:  # until here the model was the base
        trainable.restore(start)
    results = Results(trainable, plan, args, out, state, optimizer, processes)
    objective, steps = Objective(plan.method, model, args, state.carried), islice(plan.steps(args), state.step, None)
    with stop.listening(), results.open() as record:
        model.train()
        while True:
            evaluator.evaluate_if_due(state, record)
            signal = shared_stop.code
            ended = stopping.reason_to_stop(state, args, signal)
            results.save_if_due(record, ended)
            if ended:
                break

            indices = next(steps)
            try:
                if rollouts:  # answers that are sampled, else rows of the data
                    batches = rollouts.micro_batches(indices, state.step + 1)
                else:
                    batches = plan.micro_batches(indices, args, processes)
            except Interrupted:
                continue
            state.step += 1
            lr = learning_rate(state.step - 1, plan.total, args.lr, plan.warmup, args.schedule)
            torch.manual_seed(run_state.dropout_seed(args.seed, state.step, processes.rank))
            batches = objective.prepare(batches, processes.all_reduce)
            count = objective.count_in(batches, processes.all_reduce)
            try:
                for _ in range(args.updates or 1):  # from the same answers
                    result = train_step(objective, batches, optimizer, lr, args.clip, count, shared_stop.reduce)
                    trainable.sync_model()
            except NotFinite as found:
                state.skipped += 1
                if state.skipped > args.skip_nonfinite:
                    raise results.diverged(found, indices) from None
                record.skip(state.step, lr, f"{found.why}; {state.skipped} of --skip-nonfinite {args.skip_nonfinite}")
            else:
                figures = objective.figures(processes.all_reduce) | (rollouts.figures() if rollouts else {})
                record.add(state.step, result, lr, figures)
            keep_tidy()
        record.close()
        model.eval()
        changes = finish(results, evaluator, record, before, ended, signal)
    if processes.main:
        show(changes)
        say(f"\nTry it:  {results.try_it()}")
        if ended != stopping.FINISHED:
            say(f"ended    after step {state.step} of {plan.total}: {ended}")
    return 0


def finish(
    results: Results, evaluator: Evaluator, record: Record, before: Answers, ended: str, signal: int | None
) -> list[tuple[str, str, str]]:
    """Leave adapter or model and a report in the run's folder; returns (question, answer before, answer now)."""
    trainable, processes, out = results.trainable, results.processes, results.out
    if signal and results.made_no_step:
        raise Stopped(signal, "stopped before a step was made; nothing has changed")
    results.publish(record, ended)
    if signal:
        raise Stopped(signal, results.how_to_resume())
    if results.best is not None:  # what was published, in every process
        if processes.main:
            trainable.restore(run_state.at(out, results.best))
        processes.broadcast(trainable.parameters.values())
        trainable.sync_model()
    try:
        after = evaluator.sample_answers()
    except Interrupted:
        raise Stopped(evaluator.stop.code, f"stopped; the run is done and {out} is saved, but for {REPORT}") from None
    changes = list(zip(evaluator.questions, before.texts, after.texts, strict=True))
    results.report(record, ended, changes)
    return changes


if __name__ == "__main__":
    distributed.leave(run(main))
