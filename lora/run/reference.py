"""What the model of step 0 says of every answer, which preference losses compare with: `reference.safetensors`.

It is computed once, before the first step, and kept in the run's folder: a resumed run, whose model has moved on, reads
it there, so no second model is held and no second pass made. Answers that are sampled meanwhile have no such numbers:
with them the run keeps the adapter of step 0, if there was one, in `reference/`.
"""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lora import files, folders
from lora.adapter import sets, store
from lora.adapter.inject import disabled
from lora.data import batch
from lora.data.encode import Encoded
from lora.errors import BadInput, say
from lora.methods import samples
from lora.methods.answers import log_probs
from lora.run.plan import Plan
from lora.run.results import REFERENCE, REFERENCE_ADAPTER
from lora.run.resume import Resumed
from lora.run.settings import TrainSettings
from lora.run.trainable import Trainable
from lora.train.distributed import DistContext
from lora.train.evaluate import evaluating

FILE = REFERENCE
ROWS = 512  # laid out together


class Reference:
    """Log-probabilities of examples (rows, 2) in float64, by name, and the fingerprint of those examples."""

    def __init__(self, tensors: dict[str, torch.Tensor], data: str):
        self.tensors, self.data = tensors, data

    def write(self, folder: Path) -> None:
        marks = {"data": self.data, "values": _digest(self.tensors)}
        files.write_tensors(folder / FILE, self.tensors, metadata=marks)

    @classmethod
    def read(cls, folder: Path, data: str) -> "Reference | None":
        """What `write` left for these examples; None where it is not there, or not as it was written."""
        try:
            file = files.Safetensors(folder / FILE)
            found = cls({name: file.read(name) for name in file.header}, data)
        except BadInput:
            return None
        whole = file.metadata == {"data": data, "values": _digest(found.tensors)}
        return found if whole else None


def of_step_0(
    plan: Plan, model, trainable: Trainable, args: TrainSettings, processes: DistContext, resumed: Resumed | None
) -> "Reference | Step0":
    """Give every example of the plan its reference; `model` is as it was loaded. Raises BadInput where the adapter that
    a resumed run started from is needed again and gone."""
    if samples(args.method):
        return Step0(model, plan, args, resumed)
    parts = {"train": plan.examples, "held_out": plan.sources.held_out}
    parts = {name: part for name, part in parts.items() if part is not None}
    data = hashlib.sha256(plan.data_fingerprint.encode())
    for part in parts.values():
        data.update(np.ascontiguousarray(part.tokens))
        data.update(np.ascontiguousarray(part.ends))
    found = Reference.read(resumed.run, data.hexdigest()) if resumed else None
    if found is None:
        if resumed:
            say(f"note     {resumed.run / FILE} is not that of these examples; the reference is computed again")
        if args.init_adapter:
            trainable.restore(Path(args.init_adapter))
        step_0 = disabled(model) if resumed and not args.init_adapter else nullcontext()
        with evaluating(model), torch.no_grad(), step_0:
            tensors = {name: _computed(part, model, args, processes) for name, part in parts.items()}
        found = Reference(tensors, data.hexdigest())
    for name, part in parts.items():
        part.known["reference"] = found.tensors[name].numpy()
    return found


def _computed(part: Encoded, model, args: TrainSettings, processes: DistContext) -> torch.Tensor:
    """Σ log p of each answer, (rows, 2): a part by each process, then added up."""

    def cut(rows) -> list[batch.Batch]:
        return batch.micro_batches([part[i] for i in rows], args.micro_tokens, processes.device)

    found = torch.zeros(len(part), part.group, dtype=torch.float64)
    order = np.argsort(part.lengths, kind="stable")  # as micro-batches are laid out
    bar = tqdm(total=len(part), desc="reference", unit="row", leave=False, disable=None if processes.main else True)
    with bar:
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            shares = [rows[rank :: processes.size] for rank in range(processes.size)]
            mine = shares[processes.rank]
            if args.fsdp:
                batches = processes.padded([cut(share) for share in shares], batch.dummy_batch(processes.device))
            else:
                batches = cut(mine)
            sums = [log_probs(model, b).cpu() for b in batches]
            if len(mine):
                found[torch.from_numpy(mine)] = torch.cat(sums).double().unflatten(0, (-1, part.group))
            bar.update(len(rows))
    return torch.tensor(processes.all_reduce(found.flatten().tolist()), dtype=torch.float64).view_as(found)


class Step0:
    """The model of step 0 in a run that samples: the base alone, or with the adapter that the run started from."""

    def __init__(self, model, plan: Plan, args: TrainSettings, resumed: Resumed | None):
        """Raises BadInput where that adapter is nowhere."""
        self.model, self.folder = model, None
        if args.init_adapter:
            self.folder, kept = Path(args.init_adapter), resumed and resumed.run / REFERENCE_ADAPTER
            if kept and all((kept / name).exists() for name in (store.WEIGHTS, store.CONFIG)):
                self.folder = kept
            elif resumed:
                say(f"note     {kept} is not whole; the model of step 0 is read from {args.init_adapter}")
            self.adapter = sets.read(model, self.folder, plan.base.read)

    def __call__(self) -> AbstractContextManager:
        """Inside the block the model is what it was at step 0."""
        return sets.in_place(self.model, self.adapter) if self.folder else disabled(self.model)

    def write(self, run: Path) -> None:
        if self.folder:
            folders.make_folder(run / REFERENCE_ADAPTER)
        for name in (store.WEIGHTS, store.CONFIG) if self.folder else ():  # the config last: with it, both are there
            if not (run / REFERENCE_ADAPTER / name).exists():
                content = files.read_bytes(self.folder / name, limit=2**40)
                files.write_bytes(run / REFERENCE_ADAPTER / name, content)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()
