"""What each technique gains: a training step with it switched off, over the step as it is.   python bench/techniques.py

On the default model, with the short chats of bench/train_speed.py. All variants take the same steps in one process by
turns: who is first rotates from round to round, and each has met a step's shapes before it is timed. Two techniques
that belong to a whole process have processes of their own. Compiled blocks are on in long runs only: there the step as
it is counts as the one without. Above 1 a technique makes steps faster. Beside it: the bytes that autograd keeps for
the backward pass. Writes JSON, those of CPUs with AMX and without side by side, and keeps what was not asked for.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections import defaultdict, deque
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.autograd.graph import saved_tensors_hooks

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


from bench import machine, train_speed  # noqa: E402
from lora import files, heap, ops, pretrained  # noqa: E402
from lora.adapter.inject import inject  # noqa: E402
from lora.data import batch  # noqa: E402
from lora.network.compiled import as_written, compile_blocks  # noqa: E402
from lora.pretrained import default_model  # noqa: E402
from lora.text.chat import Example  # noqa: E402
from lora.train.step import train_step  # noqa: E402

RESULT = ROOT / "bench" / "results" / "techniques.json"
LR = 1e-4
MICRO = SimpleNamespace(tokens=2048)


def objective_of(model):
    def objective(b):
        return ops.cross_entropy(model.trunk(b.tokens, b.lengths)[b.trained], model.head_weight, b.targets)

    return objective


def one_by_one(q, k, v, lengths, *bounds):
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([ops.attend(*part, *bounds) for part in parts])


def separately(x, modules):
    return tuple(module(x) for module in modules)


# name -> what is replaced while a step is made: (object, attribute, by what)
OFF = {
    "documents end to end": [(MICRO, "tokens", 1)],
    "loss in chunks": [(ops, "cross_entropy", ops.plain.cross_entropy)],
    "attention's own gradient": [(ops, "attention", one_by_one)],
    "norm's own gradient": [(ops, "rms_norm", ops.plain.rms_norm)],
    "LoRA's own gradient": [(ops, "lora_linear", ops.plain.lora_linear), (ops, "linears", ops.plain.linears)],
    "LoRA grouped": [(ops, "linears", separately)],
    "silu(gate) up formed again": [(ops, "gated_linear", lambda gate, up, a, module: module(ops.swiglu(gate, up, a)))],
    "sizes rounded up": [(batch, "ROUND", 1)],
}
COMPILED = "compiled blocks"
ALONE = {"freed memory kept": "malloc", "fused AdamW": "optimizer"}  # belong to a process
STEPS = 2  # different ones, each met by all variants before the first is timed


def some_steps(count: int) -> list[list[Example]]:
    tokenizer = pretrained.load_chat(pretrained.find(str(default_model.folder()))).tokenizer
    text = tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))
    steps = train_speed.make_steps(train_speed.WORKLOADS["short"], text, count, seed="techniques")
    return [[Example(*example) for example in step] for step in steps]


def adapted():
    model = pretrained.load_model(pretrained.find(str(default_model.folder())), torch.bfloat16)
    torch.manual_seed(0)
    inject(model)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.01)
    return model.train()


def storages(model) -> set[int]:
    """Those of the weights, which are there whether autograd refers to them or not."""
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def kept_bytes(model, batches) -> int:
    """Bytes that autograd keeps of a micro-batch for the backward pass."""
    kept, own = {}, storages(model)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        objective_of(model)(batches[0])
    return sum(size for place, size in kept.items() if place not in own)


def by_turns(rounds: int, techniques: list[str]) -> tuple[dict, dict]:
    """Seconds of each variant's steps, the same in all, and the bytes that autograd keeps.

    Who is first changes from round to round, and every variant has met the shapes of a step before it is timed: a CPU
    compiles products for each shape that it meets.
    """
    heap.keep_memory(torch.device("cpu"))
    model, steps, seconds, kept = adapted(), some_steps(STEPS), defaultdict(list), {}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    variants, forwards = deque(["as it is", *techniques]), {}
    if COMPILED in techniques:
        compile_blocks(model)
        forwards = {block: vars(block)["forward"] for block in model.model.layers}
        as_written(model)
    for number in range(-STEPS, rounds):
        for name in variants:
            with ExitStack() as stack:
                for replaced in OFF.get(name, ()):
                    stack.enter_context(patch.object(*replaced))
                for block, forward in forwards.items() if name == COMPILED else ():
                    block.forward = forward
                    stack.callback(as_written, model)
                start = time.perf_counter()
                batches = batch.micro_batches(steps[number % STEPS], MICRO.tokens)
                train_step(objective_of(model), batches, optimizer, LR, 1.0)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
                elif name not in kept:
                    kept[name] = kept_bytes(model, batches)
        variants.rotate()
    return seconds, kept


def alone(rounds: int, way: str) -> list[float]:
    """Seconds of steps in a process of its own."""
    if way != "malloc":
        heap.keep_memory(torch.device("cpu"))
    model, seconds = adapted(), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=way != "optimizer")
    objective = objective_of(model)
    for examples in some_steps(rounds + 2):
        start = time.perf_counter()
        train_step(objective, batch.micro_batches(examples, MICRO.tokens), optimizer, LR, 1.0)
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def child(rounds: int, way: str) -> list[float]:
    command = [sys.executable, __file__, "--rounds", str(rounds), "--alone", way]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=18)
    parser.add_argument("--out", type=Path, default=RESULT)
    techniques = [*OFF, COMPILED, *ALONE]
    parser.add_argument("--only", nargs="+", choices=techniques, default=techniques)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.alone is not None:
        print(json.dumps(alone(chosen.rounds, chosen.alone)))
        return
    in_turns = [name for name in (*OFF, COMPILED) if name in chosen.only]
    seconds, kept = by_turns(chosen.rounds, in_turns)
    rows = {name: [b / a for a, b in zip(seconds["as it is"], seconds[name], strict=True)] for name in in_turns}
    if COMPILED in rows:  # which it is not, as it is
        rows[COMPILED] = [1 / ratio for ratio in rows[COMPILED]]
    for name in (name for name in ALONE if name in chosen.only):
        runs = [child(chosen.rounds, one) for one in ("", ALONE[name], ALONE[name], "")]
        rows[name] = [b / a for a, b in zip(runs[0] + runs[3], runs[1] + runs[2], strict=True)]
    head = {"machine": machine.described(), "command": shlex.join(sys.argv), "date": f"{datetime.now():%Y-%m-%d %H:%M}"}
    known = files.read_json(chosen.out) if chosen.out.exists() else {}
    print(f"{'switched off':30}  step time, median (lowest to highest)   kept for backward")
    for name, ratios in rows.items():
        memory = kept[name] / kept["as it is"] if name in kept else None
        memory = 1 / memory if name == COMPILED else memory
        print(f"{name:30}  {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})   {memory or 0:.2f}")
        known[machine.keyed(name)] = head | {
            "step time over as it is": ratios,
            "kept for backward over as it is": memory,
        }
    files.write_json(chosen.out, known)


if __name__ == "__main__":
    main()
