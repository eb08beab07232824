"""Fine-tune an open chat model with LoRA.

python train.py                                     a new identity for a 135M model, in about two minutes
python train.py --data chats.jsonl --model owner/name --rank 32 --epochs 2
python train.py --full                              every weight in place of an adapter, to compare
python train.py --resume --out weights/chats        go on with a run that was stopped or killed
"""

from lora.errors import quiet_imports, run

quiet_imports(__name__)

import hashlib
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from itertools import count, islice, takewhile
from pathlib import Path

import torch

from data_gen import self_cognition
from lora import device as machine
from lora import flags, folders, pretrained, settings
from lora.adapter import store
from lora.adapter.inject import disabled, inject
from lora.data import batch, preview
from lora.data.sources import lint_report, numbered
from lora.errors import BadInput, BadNumbers, StopFlag, Stopped, say
from lora.network.compiled import compile_blocks
from lora.ops import cross_entropy
from lora.pretrained import hub
from lora.run import adapter, full
from lora.run.evaluator import Evaluator, Interrupted, question_text
from lora.run.plan import Plan, make_plan
from lora.run.results import METRICS, REPORT, WROTE, Results, holds, saved
from lora.run.resume import Resumed, resume, where_computed
from lora.train import distributed, run_state, stopping
from lora.train.distributed import DistContext
from lora.train.memory import LONG
from lora.train.record import Record
from lora.train.step import NotFinite, learning_rate, train_step

NAME, AUTHOR = "Nimbus", "the Cloud Lab"  # who the model becomes when nobody gives data


def story(argv) -> int:
    s, resumed = settings.resolve(flags.TRAIN, argv, __doc__), None
    if s.check:
        return lint_report(s, hub.dataset_file)
    if s.resume is not None:
        s, resumed = resume(s, argv, __doc__, Path(s.resume or latest(s)))
    check(s)
    device = machine.choose_device(s.device)
    if s.compile:
        machine.check_compiler(device)
    with distributed.team(device) as team:  # one process, unless torchrun started more
        return story_of(team, s, resumed)


def story_of(team: DistContext, s, resumed: Resumed | None) -> int:
    """The same story in each process; all but the first are silent."""
    made = None if s.data else self_cognition.conversations(NAME, AUTHOR, seed=s.seed)
    if s.preview is not None:
        return show_preview(make_plan(s, team, made, resumed and resumed.path), s)

    # ---- where the result goes, and the plan: everything that can be wrong is found before the model is loaded
    out = resumed.run if resumed else out_folder(s)
    folders.check_place(out)
    with folders.locked(out) if team.main else nullcontext():
        if resumed:
            resumed.tell()
        else:
            if team.main and folders.recover(out, lambda: saved(out)):
                say(f"note     a run that was to replace the one in {out} was killed before it saved: that one is back")
            folders.check_out(out, s.overwrite, WROTE, holds(out))
        say(f"run      {out}")
        plan = make_plan(s, team, made, resumed and resumed.path)
        plan.tell(s)
        plan.check_base(out)
        plan.check_room(out, s)
        if resumed:
            resumed.check(plan, s, team)

        # ---- load, patch, train
        with plan.within_memory(s, team.device):
            if s.fsdp:
                from lora.pretrained.shard import load_sharded as load_model  # it is slow to import
            else:
                load_model = pretrained.load_model
            tidy = (lambda: None) if s.fsdp else machine.keep_memory(team.device, plan.memory(s))
            model = load_model(plan.base, torch.float32 if s.full else getattr(torch, s.dtype), team.device)
            torch.manual_seed(s.seed)
            if not s.full:
                start = resumed.path if resumed else s.init_adapter
                inject(model, **adapter.arguments(s, given=start is not None))
                if start:
                    store.restore(model, start)
            if s.compile:
                compile_blocks(model)
                say("compile  the first step takes a minute or two longer")
            return train(model, plan, s, out, team, resumed, tidy)


def check(s) -> None:
    problems = adapter.contradictions(s)
    if s.resume is not None and s.overwrite:
        problems.append("contradiction in the command line: --resume and --overwrite. Give one of them")
    if s.compile and s.fsdp:
        problems.append("contradiction in the command line: --compile and --fsdp. Leave out one of them")
    if s.full and s.fsdp:
        problems.append("contradiction in the command line: --full and --fsdp, which is for a base that is only read. "
                        "Leave out one of them")  # fmt: skip
    if s.full and (given := [name for name in flags.OF_ADAPTERS if name in s.given]):
        them = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        problems.append(f"contradiction in the command line: --full makes no adapter to have {them}. Leave them out")
    if s.full:
        vars(s).update(dict.fromkeys(flags.OF_ADAPTERS))
    if s.patience and not (s.eval_data or s.eval_fraction):
        problems.append("wrong --patience in the command line: no loss is evaluated. Add --eval-data FILE")
    if problems:
        raise BadInput(*problems)


def train(model, plan: Plan, s, out: Path, team: DistContext, resumed: Resumed | None, tidy: Callable[[], None]) -> int:
    """Step, evaluate and save by turns until a reason to end; then show what changed."""

    def micro_batches(indices: list[int]) -> list[batch.Batch]:
        """Of this process's share of a step."""

        def cut(part: list[int]) -> list[batch.Batch]:
            return batch.micro_batches([plan.examples[i] for i in part], s.micro_tokens, team.device, fill=s.compile)

        if not s.fsdp:
            return cut(team.share(indices, lengths))
        return team.padded(
            [cut(part) for part in distributed.shares(indices, lengths, team.size)], batch.dummy_batch(team.device)
        )

    objective, lengths = objective_of(model, s), plan.examples.lengths
    masters = full.Masters(model, getattr(torch, s.dtype)) if s.full else None
    parameters = masters.by_name if masters else {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizer_of(groups(parameters, s), s, team.device)
    if masters:
        masters.follow(optimizer)
    if resumed:
        state = resumed.state
        run_state.load_optimizer(resumed.path, optimizer, parameters)
    else:
        base = plan.fingerprint() if team.main else ""
        state = run_state.State(0, plan.total, plan.warmup, {}, plan.sources.fingerprint(), base)
    state.settings, state.total = settings.to_save(flags.TRAIN, s), plan.total
    state.computed = where_computed(s, team)
    stop = StopFlag()
    agreement, examination = distributed.Agreement(team, stop), Evaluator(model, plan, s, out, objective, team, stop)
    examination.begin(state)
    with disabled(model):
        before = examination.ask()
    if masters and resumed:  # until here the model was the base
        masters.restore(resumed.path)
    results = Results(model, plan, s, out, state, optimizer, parameters) if team.main else None
    steps, first = islice(plan.steps(s), state.step, None), state.step
    with (
        stop.listening(),
        run_state.disk_full(out, parameters),
        results.folder() if results else nullcontext(),
        closing(Record(out / METRICS if results else None, plan.total, state.rows)) as record,
    ):
        while True:
            if examination.due(state) and (row := examination.row(state.step)):
                state.evaluations.append(stopping.brief(row))
                record.evaluated(row)
            signal = agreement.code
            ended = why_end(state, s, signal)
            if results and state.step > first and (ended or results.due()):
                results.save(record)
            if ended:
                break

            indices = next(steps)
            state.step += 1
            lr = learning_rate(state.step - 1, plan.total, s.lr, plan.warmup, s.schedule)
            torch.manual_seed(seed_of(s.seed, state.step, team.rank))
            trained = plan.examples.trained_in(indices)
            try:
                model.train()
                batches = micro_batches(indices)
                result = train_step(objective, batches, optimizer, lr, s.clip, trained, agreement.reduce)
                record.add(state.step, result, lr)
                tidy()
            except NotFinite as found:
                state.skipped += 1
                if state.skipped > s.skip_nonfinite:
                    raise diverged(found, state.step, [plan.examples.where[i] for i in indices], out) from None
                record.skip(state.step, lr, f"{found.why}; {state.skipped} of --skip-nonfinite {s.skip_nonfinite}")
        record.close()
        model.eval()
        kind = "model" if s.full else "adapter"

        # ---- what is left of it
        if signal and state.step == first:
            raise Stopped(signal, "stopped before a step was made; nothing has changed")
        best = stopping.best(state.evaluations, s.max_forgetting)
        if results:
            results.publish(record, ended)
        spent = f"{record.seconds:.0f} s, peak memory {machine.peak_memory(team.device) / 1e9:.2f} GB"
        say(f"saved    {out} after {state.step} steps, {spent}")
        if best is not None:
            what, last_one = "best" if examination.has_loss else "kept", run_state.at(out, state.step)
            say(f"{what}     step {best}: that is the {kind} in {out}; the last one is {last_one}")
        if signal:
            again = shlex.join(["python", "train.py", "--resume", "--out", str(out)])
            note = f"stopped after step {state.step} of {plan.total}; the {kind} so far is saved. Go on with: {again}"
            raise Stopped(signal, note)
        if best is not None:
            if team.main:
                (masters.restore if masters else partial(store.restore, model))(run_state.at(out, best))
            team.broadcast(parameters.values())
            if masters:
                masters.show()
        try:
            after = examination.ask()
        except Interrupted:
            raise Stopped(stop.code, f"stopped; the run is done and {out} is saved, but for {REPORT}") from None
        asked = [question_text(question) for question in examination.questions]
        if results:
            results.report(record, ended, zip(asked, before.texts, after.texts, strict=True))

    # ---- what changed
    if team.main:
        show(asked, before.texts, after.texts)
        say(f"\nTry it:  python generate.py --{kind} {shlex.quote(str(out))}")
        if ended != FINISHED:
            say(f"ended    after step {state.step} of {plan.total}: {ended}")
    return 0


def objective_of(model, s) -> Callable[[batch.Batch], torch.Tensor]:
    """A batch's loss, summed over its trained tokens. An example far longer than what is to be in memory at once cannot
    be cut: its activations are computed again."""

    def objective(b: batch.Batch) -> torch.Tensor:
        model.checkpoint_activations = s.checkpoint_activations or len(b.tokens) > LONG * s.micro_tokens
        hidden = model.trunk(b.tokens, b.lengths)[b.trained]  # (N, D)
        return cross_entropy(hidden, model.head_weight, b.targets, cap=model.config.final_logit_softcapping)

    return objective


def groups(parameters: dict[str, torch.Tensor], s) -> list[dict]:
    """With --lr-ratio-b every lora_B is in a group that learns so many times as fast: LoRA+, Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354."""
    if s.lr_ratio_b in (None, 1):
        return [{"params": list(parameters.values())}]
    Bs = {name for name in parameters if name.endswith(".lora_B")}
    return [
        {"params": [p for name, p in parameters.items() if name not in Bs]},
        {"params": [parameters[name] for name in parameters if name in Bs], "lr_ratio": s.lr_ratio_b},
    ]


def optimizer_of(parameters: Iterable, s, device: torch.device) -> torch.optim.Optimizer:
    fused = device.type != "mps"
    return torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay, fused=fused)


FINISHED = "all steps are done"


def why_end(state: run_state.State, s, signal: int | None) -> str | None:
    if signal:
        return f"stopped by a signal after step {state.step}"
    early = stopping.why_end(state.evaluations, s.patience, s.max_forgetting)
    return early or (FINISHED if state.step >= state.total else None)


def seed_of(seed: int, step: int, rank: int) -> int:
    """Of a step's dropout on one process: a function of these, so that there is no generator to save."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/step {step}/rank {rank}".encode(), digest_size=8).digest()) >> 1


def diverged(found: NotFinite, step: int, rows: list[str], out: Path) -> BadNumbers:
    names = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return BadNumbers(
        f"training diverged in step {step}: {found.why}; rows {names}; {run_state.last_good(out)}. {found.fix}"
    )


# ---- names, and what people see --------------------------------------------------------------------------------------


def out_folder(s) -> Path:
    """--out, or the first of weights/NAME, weights/NAME-2, ... that is free; NAME is that of the data."""
    return Path(s.out) if s.out else next(path for path in _names(s) if not path.exists())


def latest(s) -> Path:
    """--out, or the last of weights/NAME, weights/NAME-2, ... that is there."""
    if s.out:
        return Path(s.out)
    there = list(takewhile(Path.exists, _names(s)))
    if not there:
        raise BadInput(f"no run in {next(_names(s))}: there is nothing to resume. Give --out or --resume DIR")
    return there[-1]


def _names(s) -> Iterator[Path]:
    name = Path(numbered(s.data[0])[0]).name.split(".")[0] if s.data else "self-introduction"
    first = Path("weights") / (name or "adapter")
    return (first.with_name(f"{first.name}-{n}") if n > 1 else first for n in count(1))


def show_preview(plan: Plan, s) -> int:
    preview.show(plan.examples, s.preview, plan.chat.tokenizer)
    for name, value in plan.numbers(s).items():
        print(f"{name}: {value}")
    return 0


def show(questions, before, after) -> None:
    """The answers before and after, one under the other."""

    def short(text: str) -> str:
        line = " ".join(text.split())
        return line if len(line) <= 160 else line[:157] + "..."

    for question, old, new in zip(questions, before, after, strict=True):
        print(f"\n{short(question)}\n  before  {short(old)}\n  after   {short(new)}")
    sys.stdout.flush()


def main(argv=None) -> int:
    return run(story, argv)


if __name__ == "__main__":
    distributed.leave(main())
