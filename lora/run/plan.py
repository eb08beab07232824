"""What a run will do, before the weights are loaded: the base on disk, examples, adapter, course, memory."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch

from lora import device as machine
from lora import folders, methods, pretrained
from lora.adapter import passport
from lora.adapter.targets import find_targets
from lora.data import batch, order, preview, retention
from lora.data.encode import Encoded
from lora.data.sources import Sources, named, read_sources, trained_rows
from lora.errors import BadInput, is_out_of_memory, out_of_memory, say
from lora.methods import METHODS
from lora.network.decoder import Model
from lora.pretrained import hub
from lora.rewards import Rewards
from lora.run import adapter, compiling
from lora.run.settings import TrainSettings
from lora.text.chat import Chat
from lora.text.template import BUILT_IN, read_arguments
from lora.train import distributed, memory, run_state
from lora.train.distributed import DistContext

LEAST_STEPS = 50
PREVIEWED = 16, 1024  # examples, and tokens of each, that a run's folder shows
LR_TIMES_WIDTH = 1.15  # Adam's best rate falls as 1/width (Yang et al. 2022, arXiv:2203.03466); 0.002 at width 576
FULL_LR = 0.1  # of an adapter's: measured, the same losses; and https://thinkingmachines.ai/blog/lora


@dataclass
class Plan:
    """Everything but the weights."""

    base: pretrained.ModelFiles
    chat: Chat
    empty: Model  # on `meta`
    on_meta: Model  # the same, patched
    targets: dict[str, int]  # path -> rank
    sources: Sources
    why_dtype: str
    per_epoch: int  # steps
    total: int  # steps
    warmup: int  # steps
    step_tokens: int  # on average
    per_step: int  # examples of one process at most, replays included
    retention_batches: list[batch.Batch] | None  # on which forgetting is measured; None without evaluations
    method: ModuleType  # one of `lora.methods`
    reference: "object | None" = None  # what the model of step 0 says of the examples, where the method compares
    rewards: Rewards | None = None  # of answers, where the model learns from its own

    @property
    def examples(self) -> Encoded:
        return self.sources.examples

    @cached_property
    def data_fingerprint(self) -> str:
        """sha256 over all that is trained."""
        return self.sources.fingerprint()

    def base_fingerprint(self) -> str:
        """sha256 over the base's weights."""
        return passport.fingerprint(self.base.header, self.base.original.read)

    def steps(self, args: TrainSettings) -> Iterator[list[int]]:
        """The indices of each step's examples: a pure function of data and settings."""
        sizes = [len(part) for part in self.sources.data]
        shares = [(len(part), share) for part, share in self.sources.replays]
        return order.steps(sizes, args.batch_size, args.seed, self.total, self.sources.weights, shares)

    def micro_batches(self, indices: list[int], args: TrainSettings, processes: DistContext) -> list[batch.Batch]:
        """This process's share of a step, cut so that it fits into memory."""
        lengths = self.examples.lengths
        fill = args.compile and args.device != "cpu"  # there code is for one length

        def cut(part: list[int]) -> list[batch.Batch]:
            examples = [self.examples[i] for i in part]
            return batch.micro_batches(examples, args.micro_tokens, processes.device, fill)

        if not args.fsdp:
            return cut(processes.share(indices, lengths))
        cuts = [cut(part) for part in distributed.shares(indices, lengths, processes.size)]
        return processes.padded(cuts, batch.dummy_batch(processes.device))

    def trained_parameters(self, args: TrainSettings) -> int:
        if args.full:
            return sum(p.numel() for p in self.empty.parameters())
        return memory.in_adapter(self.empty, self.targets, args.dora)

    @contextmanager
    def rewarding(self, args: TrainSettings, tasks: Mapping[str, Callable]):
        """Inside the block the rewards that --reward names are ready, where the model learns from its own answers.
        Raises BadInput where one cannot be, or a row lacks what it needs."""
        if not methods.samples(args.method):
            yield
            return
        rows = [row for part in (self.examples, self.sources.held_out) if part for row in part.prompts]
        with Rewards(args, tasks, self.base, self.empty) as self.rewards:
            self.rewards.check(rows)
            yield

    def check_place(self, out: Path, args: TrainSettings) -> None:
        """Raises BadInput where --overwrite would delete the base, BadEnvironment where the disk has no room for the
        checkpoints of the run."""
        folders.check_apart(out, [self.base.path] if hasattr(self.base, "path") else [])
        trained = self.trained_parameters(args) * getattr(torch, args.adapter_dtype or "float32").itemsize
        size = run_state.size(trained) + trained * (args.init == "pissa")  # which saves its frozen start, too
        most = math.ceil(self.total / int(args.save_every)) if args.save_every.isdecimal() else 2
        count = max(1, min(args.keep, most))
        folders.check_room(out, (count + 1) * size, f"a run with {count} checkpoints (--keep)")

    def _counted(self, args: TrainSettings) -> tuple:
        """What `lora.train.memory` counts with."""
        lengths, group = self.examples.document_lengths, self.examples.group
        if methods.samples(args.method):
            lengths, group = lengths + args.max_new_tokens, args.group
        return self.on_meta, args, lengths, self.per_step * group, self._packings(args)

    def _packings(self, args: TrainSettings) -> memory.Packings:
        """What --quant packs; without it, what it could."""
        if args.full or args.fsdp or args.compile:
            return {}
        base = self.base if args.quant else pretrained.smallest(self.base)
        return {base.quant: memory.PackedSizes.of(base)}

    def memory(self, args: TrainSettings) -> float:
        """Bytes that the run is expected to take at its peak."""
        return memory.expected(*self._counted(args))

    def numbers(self, args: TrainSettings) -> dict:
        """Statistics of the data."""
        return preview.numbers(self.examples, self.step_tokens, self.memory(args))

    def show_preview(self, args: TrainSettings) -> int:
        preview.show(self.examples, args.preview, self.chat.tokenizer)
        for name, value in self.numbers(args).items():
            print(f"{name}: {value}")
        return 0

    def preview(self, args: TrainSettings) -> dict:
        """What `preview.json` holds, for who looks on: the number of steps, the first examples, numbers of the data."""
        examples = preview.told(self.examples, *PREVIEWED, self.chat.tokenizer)
        return {"total": self.total, "numbers": self.numbers(args), "examples": examples}

    def tell(self, args: TrainSettings) -> None:
        tokens, learned = len(self.examples.tokens), int(self.examples.trained.sum())
        in_base, trained = sum(p.numel() for p in self.empty.parameters()), self.trained_parameters(args)
        share, linears = 100 * trained / (in_base + trained), f"{len(self.targets)} linears"
        epochs = f"{self.total / self.per_epoch:.3g} epochs"
        say(f"base     {in_base / 1e6:,.1f} M parameters in {args.dtype} on {args.device} ({self.why_dtype})")
        if args.full:
            say("full     all of them train, in float32, as AdamW's moments are")
            if args.system or args.no_system or args.template_arg:
                forgets = "its system turn or --template-arg: give generate.py the same flags"
                say(f"note     a whole model does not remember {forgets}")
        else:
            say(f"adapter  {trained / 1e6:,.2f} M parameters, {share:.2f} % of all, rank {args.rank}, {linears}")
            for line in adapter.table(args, self.empty, self.targets):
                say(line)
        what = {"conversation": "examples", "judged": "answers", "prompt": "prompts"}.get(self.method.KIND, "pairs")
        of_them = "" if what == "prompts" else f", {learned:,} trained ({100 * learned / tokens:.0f} %)"
        say(f"{what:8} {len(self.examples):,}, {tokens:,} tokens{of_them}")
        if args.method != "sft":
            say(f"method   {methods.describe(args)}")
        say(f"plan     {self.total} steps of {args.batch_size} {what}, about {self.step_tokens:,} tokens; {epochs}")
        if not args.fsdp:
            say(f"memory   about {self.memory(args) / 1e9:.1f} GB")

    @contextmanager
    def within_memory(self, args: TrainSettings, device: torch.device):
        """Says what is too much before the block, and after it what to lower: where memory runs out, BadEnvironment."""
        free = machine.free_memory(device)
        if free is not None and device.type == "cpu":
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun: as many share it
        if not args.fsdp and free is not None and (line := memory.warning(free, *self._counted(args))):
            say(f"warning: {line}")
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            fix = memory.advice(self.memory(args) if free is None else free, *self._counted(args))
            raise out_of_memory(error, fix) from error


def make_plan(
    args: TrainSettings, processes: DistContext, generated_rows: Sequence[dict] | None, checkpoint: Path | None = None
) -> Plan:
    """Read everything but the weights, and write into `args` what the settings left open. Raises BadInput.

    A new run takes what --init-adapter brings; a resumed run has all that in its `checkpoint`.
    """
    dtype, why_dtype = machine.choose_dtype(args.dtype, processes.device)
    args.dtype, args.device = str(dtype).removeprefix("torch."), processes.device.type
    begins_with_adapter = args.init_adapter and not checkpoint
    args.quant = passport.packing(args.quant, args.init_adapter if begins_with_adapter else None)
    with processes.main_first():  # what one process downloads, the others find
        base = pretrained.find(args.model, args.quant)
        if processes.size > 1:
            for _, name, _ in named(args):
                hub.dataset_file(name)
    say(f"model    {base.described}")
    empty = pretrained.empty_model(base)
    if begins_with_adapter:
        adapter.take_over(args, base)
    chat = _chat(args, base, checkpoint)
    if begins_with_adapter:
        passport.verify_chat(args.init_adapter, base.name, chat.tokenizer, chat.template.source, args.no_verify)
    targets = dict.fromkeys(find_targets(empty), 0) if args.full else adapter.ranks(args, empty)
    limit = empty.config.max_position_embeddings
    args.max_len = min(args.max_len or limit, limit)
    if methods.samples(args.method) and args.max_new_tokens >= args.max_len:
        why = f"{args.max_new_tokens}, and a prompt and its answer together have at most {args.max_len} tokens"
        raise BadInput(f"wrong --max-new-tokens in the command line: {why}. Lower it")
    methods.fill(args)
    method = METHODS[args.method]
    sources = read_sources(args, chat, hub.dataset_file, generated_rows, limit, method.KIND)

    per_epoch = math.ceil(sum(map(len, sources.data)) / args.batch_size)
    if args.max_steps is None:
        args.epochs = args.epochs or max(method.EPOCHS, math.ceil(LEAST_STEPS / per_epoch))
    total = args.max_steps or args.epochs * per_epoch
    share = method.RATE * (FULL_LR if args.full else 1)
    args.lr = args.lr or round(LR_TIMES_WIDTH / empty.config.hidden_size * share, 6)
    warmup = int(args.warmup if args.warmup >= 1 else args.warmup * total)
    replays = [(part.lengths, share) for part, share in sources.replays]
    step_tokens = order.tokens_per_step(
        [part.lengths for part in sources.data], args.batch_size, sources.weights, replays
    )
    per_step = args.batch_size + math.ceil(sum(share for _, share in replays) * args.batch_size)
    per_step = math.ceil(per_step / processes.size)
    args.compile = args.compile or compiling.is_worth_it(args, empty, step_tokens * total, processes)
    remembered = _retention_batches(args, chat, sources, generated_rows, limit, processes.device, method.KIND)
    return Plan(
        base, chat, empty, adapter.on_meta(args, empty), targets, sources, why_dtype, per_epoch, total, warmup,
        step_tokens, per_step, remembered, method,
    )  # fmt: skip


def reader(args: TrainSettings) -> tuple[Chat, int]:
    """How rows are read, and the most tokens of an example, for --check."""
    base = pretrained.find(args.model)
    limit = pretrained.empty_model(base).config.max_position_embeddings
    return _chat(args, base), min(args.max_len or limit, limit)


def _chat(args: TrainSettings, base: pretrained.ModelFiles, checkpoint: Path | None = None) -> Chat:
    template = args.template
    if checkpoint and template not in (None, *BUILT_IN) and "template" not in args.given:
        template = passport.template_of(checkpoint)  # the file itself may be gone
    system = False if args.no_system else args.system
    today, template_args = date.fromisoformat(args.date), read_arguments(args.template_arg)
    return pretrained.load_chat(base, system, template, today, template_args, args.control_tokens)


def _retention_batches(args, chat: Chat, sources: Sources, generated_rows, limit: int, device, kind) -> list | None:
    """The conversations on which forgetting is measured, where anything is to be evaluated."""
    held_out = sources.held_out or []
    if not (len(held_out) or args.retention or args.eval_every or args.max_forgetting is not None):
        return None
    rows = trained_rows(args, hub.dataset_file, generated_rows, kind)
    found, used, left = retention.retention_batches(chat, args.retention, limit, args.micro_tokens, device, rows)
    without = f" ({left} are trained on or too long)" if left else ""
    say(f"eval     {len(held_out)} held-out examples, {used} ordinary conversations{without}")
    return found
