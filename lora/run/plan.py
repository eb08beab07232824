"""What a run will do, before the model is loaded: the base on disk, examples, adapter, course, memory."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import torch

from lora import device as machine
from lora import folders, pretrained
from lora.adapter import passport
from lora.adapter.inject import find_targets
from lora.data import batch, preview
from lora.data.encode import Encoded
from lora.data.retention import retention_batches
from lora.data.sources import Sources, named, read_sources, trained_rows
from lora.errors import is_out_of_memory, out_of_memory, say
from lora.network.decoder import Model
from lora.pretrained import hub
from lora.run import adapter
from lora.text.chat import Chat
from lora.text.template import BUILT_IN
from lora.train import memory, run_state
from lora.train.distributed import DistContext

LEAST_STEPS = 50
LR_TIMES_WIDTH = 1.15  # Adam's best rate falls as 1/width (Yang et al. 2022, arXiv:2203.03466); 0.002 at width 576
FULL_LR = 0.1  # of an adapter's: measured, the same losses; and https://thinkingmachines.ai/blog/lora


@dataclass
class Plan:
    """Everything but the weights. `empty` is the model on meta, `made` are rows where no data was given."""

    base: pretrained.Checkpoint
    chat: Chat
    empty: Model
    targets: dict[str, int]  # path -> rank
    made: Sequence[dict] | None
    sources: Sources
    examples: Encoded
    why_dtype: str
    per_epoch: int  # steps
    total: int  # steps
    warmup: int  # steps
    step_tokens: int  # on average
    per_step: int  # examples of one process at most, replays included
    ordinary: list[batch.Batch] | None  # what is remembered of it is measured; None without evaluations

    def needs(self, s: SimpleNamespace) -> tuple:
        """What `memory` counts with."""
        return self.empty, self.targets, s, self.examples.lengths, self.per_step

    def fingerprint(self) -> str:
        """Of the base's weights."""
        return passport.fingerprint(self.base.header, self.base.read)

    def steps(self, s: SimpleNamespace) -> Iterator[list[int]]:
        """The indices of each step's examples: a pure function of data and settings."""
        sizes = [len(part) for part in self.sources.data]
        shares = [(len(part), share) for part, share in self.sources.replays]
        return batch.steps(sizes, s.batch_size, s.seed, self.total, self.sources.weights, shares)

    def in_adapter(self, s: SimpleNamespace) -> int:
        """The number of parameters that train: the adapter's."""
        if s.full:
            return sum(p.numel() for p in self.empty.parameters())
        return memory.in_adapter(self.empty, self.targets, s.dora)

    def check_base(self, out: Path) -> None:
        """Raises BadInput where --overwrite would delete the base."""
        folders.check_apart(out, [self.base.path] if hasattr(self.base, "path") else [])

    def check_room(self, out: Path, s: SimpleNamespace) -> None:
        """Raises BadEnvironment where the disk has no room for the checkpoints of the run."""
        in_adapter = self.in_adapter(s) * getattr(torch, s.adapter_dtype or "float32").itemsize
        size = run_state.size(in_adapter) + in_adapter * (s.init == "pissa")  # which saves its frozen start, too
        most = math.ceil(self.total / int(s.save_every)) if s.save_every.isdecimal() else 2
        count = max(1, min(s.keep, most))
        folders.check_room(out, (count + 1) * size, f"a run with {count} checkpoints (--keep)")

    def memory(self, s: SimpleNamespace) -> float:
        """Bytes that the run is expected to take at its peak."""
        return memory.expected(*self.needs(s))

    def numbers(self, s: SimpleNamespace) -> dict:
        """Statistics of the data."""
        return preview.numbers(self.examples, self.step_tokens, self.memory(s))

    def tell(self, s: SimpleNamespace) -> None:
        tokens, trained = len(self.examples.tokens), int(self.examples.trained.sum())
        in_base, in_adapter = sum(p.numel() for p in self.empty.parameters()), self.in_adapter(s)
        share, linears = 100 * in_adapter / (in_base + in_adapter), f"{len(self.targets)} linears"
        epochs = f"{self.total / self.per_epoch:.3g} epochs"
        say(f"base     {in_base / 1e6:,.1f} M parameters in {s.dtype} on {s.device} ({self.why_dtype})")
        if s.full:
            say("full     all of them train, in float32, as AdamW's moments are")
            if s.system or s.no_system:
                say("note     a whole model does not remember its system turn: give generate.py the same flag")
        else:
            say(f"adapter  {in_adapter / 1e6:,.2f} M parameters, {share:.2f} % of all, rank {s.rank}, {linears}")
            for line in adapter.table(s, self.empty, self.targets):
                say(line)
        say(f"examples {len(self.examples):,}, {tokens:,} tokens, {trained:,} trained ({100 * trained / tokens:.0f} %)")
        say(f"plan     {self.total} steps of {s.batch_size} examples, about {self.step_tokens:,} tokens; {epochs}")
        if not s.fsdp:
            say(f"memory   about {self.memory(s) / 1e9:.1f} GB")

    @contextmanager
    def within_memory(self, s: SimpleNamespace, device: torch.device):
        """Says what is too much before the block, and after it what to lower: where memory runs out, BadEnvironment."""
        free = machine.free_memory(device)
        if free is not None and device.type == "cpu":
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun: as many share it
        if not s.fsdp and free is not None and (line := memory.warning(free, *self.needs(s))):
            say(f"warning: {line}")
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            fix = memory.advice(self.memory(s) if free is None else free, *self.needs(s))
            raise out_of_memory(error, fix) from error


def make_plan(s: SimpleNamespace, team: DistContext, made: Sequence[dict] | None, resumed: Path | None = None) -> Plan:
    """Read everything but the weights, and write into `s` what the settings left open. Raises BadInput.

    A new run takes what --init-adapter brings; one that is gone on with has all that in its checkpoint `resumed`.
    """
    dtype, why_dtype = machine.choose_dtype(s.dtype, team.device)
    s.dtype, s.device = str(dtype).removeprefix("torch."), team.device.type
    with team.main_first():  # what one process downloads, the others find
        base = pretrained.find(s.model)
        if team.size > 1:
            for _, name, _ in named(s):
                hub.dataset_file(name)
    say(f"model    {base.described}")
    empty = pretrained.empty_model(base)
    if s.init_adapter and not resumed:
        adapter.take_over(s, base)
    template = s.template
    if resumed and template not in (None, *BUILT_IN) and "template" not in s.given:
        template = passport.template_of(resumed)  # the file itself may be gone
    chat = pretrained.load_chat(base, False if s.no_system else s.system, template, date.fromisoformat(s.date))
    if s.init_adapter and not resumed:
        passport.verify_chat(s.init_adapter, base.name, chat.tokenizer, chat.template.source, s.no_verify)
    targets = dict.fromkeys(find_targets(empty), 0) if s.full else adapter.ranks(s, empty)
    s.max_len = min(s.max_len or empty.config.max_position_embeddings, empty.config.max_position_embeddings)
    sources = read_sources(s, chat, hub.dataset_file, made)
    examples = sources.examples

    per_epoch = math.ceil(sum(map(len, sources.data)) / s.batch_size)
    if s.max_steps is None:
        s.epochs = s.epochs or max(3, math.ceil(LEAST_STEPS / per_epoch))
    total = s.max_steps or s.epochs * per_epoch
    s.lr = s.lr or round(LR_TIMES_WIDTH / empty.config.hidden_size * (FULL_LR if s.full else 1), 6)
    warmup = int(s.warmup if s.warmup >= 1 else s.warmup * total)
    step_tokens = batch.tokens_per_step([p.lengths for p in sources.data], s.batch_size, sources.weights,
                                        [(p.lengths, share) for p, share in sources.replays])  # fmt: skip
    per_step = s.batch_size + math.ceil(sum(share for _, share in sources.replays) * s.batch_size)
    per_step = math.ceil(per_step / team.size)
    return Plan(
        base, chat, empty, targets, made, sources, examples, why_dtype, per_epoch, total, warmup, step_tokens, per_step,
        _ordinary(s, chat, sources, made, empty.config.max_position_embeddings, team.device),
    )  # fmt: skip


def _ordinary(s, chat: Chat, sources: Sources, made, limit: int, device) -> list[batch.Batch] | None:
    """The conversations on which forgetting is measured, where anything is to be evaluated."""
    held_out = sources.held_out or []
    if not (len(held_out) or s.retention or s.eval_every or s.max_forgetting is not None):
        return None
    rows = trained_rows(s, hub.dataset_file, made)
    found, used, left = retention_batches(chat, s.retention, limit, s.micro_tokens, device, rows)
    without = f" ({left} are trained on or too long)" if left else ""
    say(f"eval     {len(held_out)} held-out examples, {used} ordinary conversations{without}")
    return found
