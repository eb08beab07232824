"""One process of bench/ranks.py, alone or started by torchrun:   python bench/rank_sides.py JOB.json RESULT.json

`speed` trains with the functions that train.py calls, this rank's share of every step; before a sum over ranks all wait
for the slowest, so that waiting and summing are two figures. `memory` loads a sharded base and makes one step of a few
tokens; how much the process has grown is noted on the way.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine  # noqa: E402
from bench.train_sides import Ours, trained_in  # noqa: E402
from lora import files, pretrained  # noqa: E402
from lora.adapter.inject import inject  # noqa: E402
from lora.data.batch import micro_batches  # noqa: E402
from lora.methods import sft  # noqa: E402
from lora.methods.objective import Objective  # noqa: E402
from lora.text.chat import Example  # noqa: E402
from lora.train import distributed  # noqa: E402


class Rank(Ours):
    """This rank's part of each step."""

    def __init__(self, job, processes: distributed.DistContext):
        super().__init__(job)
        self.processes, self.waited, self.summed = processes, 0.0, 0.0

    def step(self, examples: list[Example]) -> None:
        lengths = [len(example.tokens) for example in examples]
        mine = [examples[i] for i in self.processes.share(range(len(examples)), lengths)]
        batches, job, self.waited, self.summed = self.cut(mine), self.job, 0.0, 0.0
        count = trained_in(examples)
        self.train_step(self.objective, batches, self.optimizer, job.lr, job.clip, count, self.reduce)

    def reduce(self, parameters, numbers):
        start = time.perf_counter()
        self.processes.all_reduce([0])
        together = time.perf_counter()
        result = self.processes.reduce(parameters, numbers)
        self.waited, self.summed = together - start, time.perf_counter() - together
        return result


def speed(job, processes: distributed.DistContext) -> dict:
    side, rows = Rank(job, processes), []
    for step in job.steps:
        examples = [Example(*example) for example in step]
        start = time.perf_counter()
        side.step(examples)
        rows.append({"seconds": time.perf_counter() - start, "waited": side.waited, "summed": side.summed,
                     "tokens": sum(len(example.tokens) for example in examples)})  # fmt: skip
    return {"rows": rows, "peak": machine.peak()}


def memory(job, processes: distributed.DistContext) -> dict:
    """Bytes by which the process is larger than before the base was loaded, at the end and at most, after each phase;
    and what the base's parts take. A tiny base goes before, so that code is not counted."""
    from lora.pretrained import shard  # it is slow to import

    job.checkpoint_activations = False

    def step(model) -> None:
        example = Example(list(range(4)), [True] * 4)
        loss = Objective(sft, model, job)(micro_batches([example], job.micro_tokens)[0])
        loss.backward()

    def load(folder: str):
        model = shard.load_sharded(pretrained.find(folder), torch.bfloat16)
        now("loaded")
        inject(model, job.rank, job.alpha)
        return model

    phases, before = {}, 0

    def now(phase: str) -> None:
        found = {"now": machine.of_status("VmRSS") - before, "most": machine.of_status("VmHWM") - before}
        phases[phase] = found
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    step(load(job.small))
    Path("/proc/self/clear_refs").write_text("5")
    before = machine.of_status("VmRSS")
    model = load(job.base)
    step(model.train())
    now("a step")
    block = [p for p in model.model.layers[0].parameters() if not p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return {
        "phases": phases,
        "base": sum(p.nbytes for p in frozen),
        "block": sum(p.nbytes for p in block),
        "head": model.head_weight.nbytes,
        "adapter": 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad),  # with its gradients
    }


if __name__ == "__main__":
    job = SimpleNamespace(**files.read_json(sys.argv[1]))
    torch.set_num_threads(job.threads)
    with distributed.dist_context(torch.device("cpu")) as processes:
        found = {"speed": speed, "memory": memory}[job.what](job, processes)
        if processes.main:
            files.write_json(sys.argv[2], found)
    distributed.leave(0)
