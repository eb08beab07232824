"""Where do a training step's time and memory go?   python bench/where.py

Two steps of the short chats of bench/train_speed.py, as train.py takes them, under PyTorch's profiler: the seconds of
each operation go to the part of the model that it is of. A profiled step takes longer than another, most where
operations are small. Memory is what the process holds before the first step, what each part keeps for the backward pass
of the largest micro-batch, and what the peak has beyond that: gradients on their way, and holes in the heap.

Prints both tables; bench/results/where.json gets them, for this kind of CPU, and docs/figures.py draws them.
"""

import argparse
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine, techniques  # noqa: E402
from lora import files, heap  # noqa: E402
from lora.data import batch  # noqa: E402
from lora.train.step import train_step  # noqa: E402

RESULT = ROOT / "bench" / "results" / "where.json"
MICRO_TOKENS, WARM, NARROW = 2048, 3, 64  # products with a side of at most so many numbers are LoRA's
# of autograd's nodes and the profiler's ranges, by how their names begin
PARTS = {
    "_Causal": "attention", "_LoRALinears": "linears", "_GatedLoRALinear": "linears", "_RMSNorm": "norms",
    "_LogProbs": "loss", "Optimizer": "clip and AdamW",
}  # fmt: skip
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
OTHERS = "RoPE, residuals, the rest"


def part_of(name: str) -> str | None:
    return next((part for start, part in PARTS.items() if name.startswith(start)), None)


def parts_of_time(events) -> Counter:
    """Seconds by part: each event's own, for the innermost range of a part that it is in."""
    found = Counter()
    for event in events:
        above, part = event, None
        while above is not None and part is None:
            above, part = above.cpu_parent, part_of(above.name)
        part = part or OTHERS
        if part == "linears":
            shapes = [size for shape in event.input_shapes or () for size in shape]
            if event.name not in PRODUCTS:
                part = "linears, the rest"
            else:
                part = "LoRA's products" if min(shapes) <= NARROW else "frozen products"
        elif part == "attention":
            part = "attention's products" if event.name in PRODUCTS else "attention, the rest"
        found[part] += event.self_cpu_time_total / 1e6
    return found


def nodes(loss: torch.Tensor) -> Iterator:
    """Those of autograd's graph, each once."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            yield node


def parts_of_memory(objective, largest, own: set[int]) -> Counter:
    """Bytes that are kept for the backward pass, by part; what two parts keep counts for the first that is found.
    `own` are the storages that are there anyway."""
    kept, found = {}, Counter()

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(largest)
    for node in nodes(loss):
        part = part_of(node.name())
        for tensor in node.saved_tensors if part else ():
            place = tensor.untyped_storage().data_ptr() if tensor is not None else None
            found[part] += 0 if place in own else kept.pop(place, 0)
    found[OTHERS] = sum(size for place, size in kept.items() if place not in own)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="profiled ones")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of results")
    chosen = parser.parse_args()
    begun = machine.resident()
    here = torch.device("cpu")
    heap.keep_memory(here)
    model = techniques.adapted()
    loaded = machine.resident()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=techniques.LR, weight_decay=0.0, fused=True)
    objective = techniques.objective_of(model)
    steps = [batch.micro_batches(step, MICRO_TOKENS) for step in techniques.some_steps(WARM + chosen.steps)]
    for step in steps:
        train_step(objective, step, optimizer, techniques.LR, 1.0)
    peak = machine.peak()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        for step in steps[WARM:]:
            train_step(objective, step, optimizer, techniques.LR, 1.0)
    seconds = time.perf_counter() - start
    spent = parts_of_time(seen.events())
    largest = max((b for step in steps for b in step), key=lambda b: len(b.tokens))
    kept = parts_of_memory(objective, largest, techniques.storages(model))
    held = {"Python, torch, libraries": begun, "weights, adapter": loaded - begun}
    held |= {f"kept: {part}": size for part, size in kept.most_common()}
    held["on the way, and holes"] = peak - sum(held.values())
    print(f"{chosen.steps} steps in {seconds:.2f} s under the profiler")
    for part, value in spent.most_common():
        print(f"  {part:28}{value:8.2f} s {value / sum(spent.values()):6.0%}")
    print(f"peak {peak / 1e9:.2f} GB, the largest micro-batch of {len(largest.tokens)} tokens")
    for part, value in held.items():
        print(f"  {part:28}{value / 1e6:8.0f} MB {value / peak:5.0%}")
    head = {"machine": machine.described(), "command": shlex.join(["python", "bench/where.py", *sys.argv[1:]]),
            "date": f"{datetime.now():%Y-%m-%d %H:%M}", "steps": chosen.steps, "seconds": seconds}  # fmt: skip
    kind = "with AMX" if machine.with_amx() else "without AMX"
    known = files.read_json(chosen.out) if chosen.out.exists() else {}
    found = head | {"time": dict(spent.most_common()), "tokens": len(largest.tokens), "memory": held}
    files.write_json(chosen.out, known | {kind: found})


if __name__ == "__main__":
    heap.restart(__name__)  # as train.py
    main()
