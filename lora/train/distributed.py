"""One run over several processes: who takes which examples, one all-reduce a step, one line where something fails.

`torchrun --nproc-per-node N train.py ...` starts N ranks. Each reads all the data, takes its share of every step, and
divides its losses by the trained tokens of the whole step; so the sum over ranks is what one process would have. All
apply the same gradients to equal adapters, which therefore stay equal bit for bit. Rank 0 alone writes and prints.

torchrun watches the processes: where one fails, it sends SIGTERM to the others of its machine, and SIGKILL 30 s later.
A rank that waits for a lost one over gloo sees the closed connection by itself, also without torchrun and from another
machine; over nccl it waits for the SIGKILL.
"""

import functools
import io
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lora.errors import STOP_CODES, BadEnvironment, BadInput, LoraError, StopFlag, Stopped, signals

TIMEOUT = timedelta(hours=2)  # of a collective: another rank may take so long to download a model or to save
# Seconds that rank 0 has to say what ended this rank as well; less than torchrun's 30, or it could not save meanwhile.
PATIENCE = {Stopped: 25.0, LoraError: 5.0, OSError: 5.0}


class Lost(BadEnvironment):
    """Another rank is gone."""


def shares(indices: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Cut a step's examples into one list a rank, every example exactly once; `lengths[i]` are the tokens of example i.

    The longest first, each to the rank with the fewest tokens so far (Graham 1969, doi:10.1137/0117039), which leaves
    no rank more than one example ahead. A rank may get none.
    """
    parts, tokens = [[] for _ in range(size)], [0] * size
    for index in sorted(indices, key=lambda i: -lengths[i]):
        rank = tokens.index(min(tokens))
        parts[rank].append(index)
        tokens[rank] += lengths[index]
    return parts


@dataclass(frozen=True)
class DistContext:
    """This process, one of `size`; `device` is what it computes on. A single process sends nothing."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Is this the rank that writes and prints?"""
        return self.rank == 0

    @contextmanager
    def main_first(self):
        """Run the block in one process of every machine first, then in its others: what that one downloads, they find.
        Raises BadEnvironment where another rank is lost."""
        first = self.main or os.environ.get("LOCAL_RANK") == "0"
        if not first:
            self.all_reduce([0])
        yield
        if first:
            self.all_reduce([0])

    def share(self, indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """This rank's examples of a step, see `shares`; alone, all of them as they are."""
        return shares(indices, lengths, self.size)[self.rank] if self.size > 1 else list(indices)

    def padded(self, cuts: Sequence[list], empty) -> list:
        """This rank's micro-batches out of all ranks' `cuts`, with `empty` ones up to the longest: a sharded base is
        gathered anew for every micro-batch, by all ranks together."""
        return cuts[self.rank] + [empty] * (max(map(len, cuts)) - len(cuts[self.rank]))

    def reduce(self, parameters: Iterable[torch.nn.Parameter], numbers: Sequence[float] = ()) -> list[float]:
        """Sum all `.grad` and a few numbers over the ranks, in one all-reduce; returns the numbers.

        The buffer has the widest dtype of the parameters, at least float32. A gradient that is missing counts as zeros;
        afterwards every parameter has one. Raises BadEnvironment where another rank is lost.
        """
        if self.size == 1:
            return list(numbers)
        parameters = list(parameters)
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        flat = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in parameters]
        buffer = torch.cat([*flat, torch.tensor(numbers, dtype=dtype, device=self.device)])
        *gradients, numbers = self._sum(buffer).split([*(p.numel() for p in parameters), len(numbers)])
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.view_as(p).to(p.dtype)
        return numbers.tolist()

    def all_reduce(self, numbers: Sequence[float]) -> list[float]:
        """Sum a few numbers over the ranks, in float64. Raises BadEnvironment where another rank is lost."""
        if self.size == 1:
            return list(numbers)
        return self._sum(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Write into every rank's tensors what rank 0 has. Raises BadEnvironment where another rank is lost."""
        if self.size > 1:
            for tensor in tensors:
                tensor.copy_(self._sum(tensor if self.main else torch.zeros_like(tensor)))

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        try:
            dist.all_reduce(values)
            if values.is_cuda:
                torch.cuda.synchronize()  # nccl reports an error where the result is waited for
            return values
        except RuntimeError as error:
            raise self.lost(error) from error

    def lost(self, why: object) -> Lost:
        where, fix = f"rank {self.rank} of {self.size}", "See its own error; --resume goes on from the last checkpoint"
        return Lost(f"lost another rank in {where}: {_first_sentence(why)}. {fix}")


def _first_sentence(error: object) -> str:
    """Without the source file that gloo puts before it."""
    return re.sub(r"^\[\S+\] ", "", str(error).split("\n")[0]).split(". ")[0][:160].rstrip(".")


class SharedStop:
    """Sums each step over the ranks, and the requests to stop with it: all ranks know of one after the same step."""

    def __init__(self, context: DistContext, stop: StopFlag):
        self.context, self.stop, self._shared = context, stop, None

    @property
    def code(self) -> int | None:
        """The exit code of a signal that every rank knows of."""
        return self.stop.code if self.context.size == 1 else self._shared

    def reduce(self, parameters: Iterable[torch.nn.Parameter], numbers: Sequence[float]) -> list[float]:
        """As `DistContext.reduce`."""
        codes = tuple(STOP_CODES.values())
        sums = self.context.reduce(parameters, [*numbers, *(float(self.stop.code == code) for code in codes)])
        asked = sums[len(numbers) :]
        self._shared = next((code for code, ranks in zip(codes, asked, strict=True) if ranks), None)
        return sums[: len(numbers)]


def _number(name: str, below: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None:
        raise BadInput(f"missing {name} in the environment: other variables of torchrun are set. Start with torchrun")
    if not text.isdecimal() or (below is not None and int(text) >= below):
        fix = f"a number below {below}" if below is not None else "a number"
        raise BadInput(f"wrong {name} in the environment: {text!r}. Start with torchrun, which gives {fix}")
    return int(text)


def _place(device: torch.device) -> DistContext:
    """Rank, size and device by the variables that torchrun sets. Raises BadInput."""
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return DistContext(0, 1, device)
    size = _number("WORLD_SIZE")
    rank = _number("RANK", size)
    if size == 1:
        return DistContext(0, 1, device)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise BadInput(f"missing {name} in the environment: WORLD_SIZE is {size}. Start with torchrun")
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"wrong --device in the command line: {device.type} serves one process. Give --device cpu")
    if device.type == "cuda":
        local, here = _number("LOCAL_RANK"), torch.cuda.device_count()
        if local >= here:
            raise BadInput(f"too many processes in the command line: LOCAL_RANK {local}, but {here} GPUs. "
                           f"Give torchrun --nproc-per-node {here}")  # fmt: skip
        device = torch.device("cuda", local)
    return DistContext(rank, size, device)


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def _silent():
    with redirect_stdout(_Nowhere()), redirect_stderr(_Nowhere()):
        yield


@contextmanager
def dist_context(device: torch.device):
    """The processes of this run, as a `DistContext`; without torchrun, a single one. The block ends for all together.

    Ranks but 0 print nothing inside, and no error that rank 0 has as well. Raises BadInput for odd variables,
    BadEnvironment where a rank is lost; after an error end the process with `leave`.
    """
    this = _place(device)
    if this.size == 1:
        yield this
        return
    if device.type == "cuda":
        torch.cuda.set_device(this.device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        connected = dist.new_group(backend="gloo")  # nothing is sent over it
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise BadEnvironment(
            f"no way to the other ranks in {where}: {_first_sentence(error)}. Check torchrun's address"
        ) from error
    try:
        with nullcontext() if this.main else _silent():
            yield this
        with signals(_deaf):  # who waits for rank 0 stops with it
            this.all_reduce([0])
    except RuntimeError as error:
        if "gloo" in str(error) or isinstance(error, dist.DistError):  # in a collective that is not ours: FSDP's
            raise this.lost(error) from error
        raise
    except Lost:
        raise
    except tuple(PATIENCE) as error:
        patience = next(seconds for kind, seconds in PATIENCE.items() if isinstance(error, kind))
        if not this.main and (_rank_0_ends(patience, connected) or isinstance(error, Stopped)):
            raise SystemExit(getattr(error, "code", BadEnvironment.code)) from None  # rank 0 has said it
        raise
    dist.destroy_process_group()


def _deaf(number, frame) -> None:
    """To signals: what rank 0 does about them decides."""


def _rank_0_ends(seconds: float, group: dist.ProcessGroup) -> bool:
    """Does rank 0 end within this time? Its connection is closed then, after its last words."""
    begin = time.monotonic()
    with signals(_deaf), suppress(RuntimeError):
        dist.irecv(torch.zeros(1), 0, group=group).wait(timedelta(seconds=seconds))
    return time.monotonic() - begin < seconds


def leave(code: int) -> None:
    """End the process. After an error the ranks' connections are dropped, not closed: closing may wait for the lost."""
    if dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
