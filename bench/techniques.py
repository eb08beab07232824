"""What each technique gains: a training step with it switched off, over the step as it is.   python bench/techniques.py

On the default model, with the short chats of bench/train_speed.py. All variants take the same steps in one process by
turns, so that a slow minute meets all alike; two that belong to a whole process have processes of their own. Above 1 a
technique makes steps faster. Beside it: the bytes that autograd keeps for the backward pass. Writes JSON, which keeps
what it has of techniques that were not asked for. With --rounds 5 it took ten minutes on 2 cores.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from datetime import datetime
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.autograd.graph import saved_tensors_hooks

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora.ops.loss import plain_loss  # noqa: E402

import train  # noqa: E402
from bench import machine, train_speed  # noqa: E402
from lora import device, files, ops, pretrained  # noqa: E402
from lora.adapter.inject import inject  # noqa: E402
from lora.adapter.layer import LoRALinear  # noqa: E402
from lora.data import batch  # noqa: E402
from lora.network import decoder  # noqa: E402
from lora.ops import attention  # noqa: E402
from lora.pretrained import hub  # noqa: E402
from lora.text.chat import Example  # noqa: E402
from lora.train.step import train_step  # noqa: E402

RESULT = ROOT / "bench" / "results" / "techniques.json"
S = SimpleNamespace(lr=1e-4, weight_decay=0.0, checkpoint_activations=False, micro_tokens=2048)
MICRO = SimpleNamespace(tokens=S.micro_tokens)  # apart from S, whose number also says which examples are recomputed


def one_by_one(q, k, v, documents, *_):
    parts = zip(*(x.split(documents.lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attention.one_document(*part) for part in parts])


def all_rows(model):
    """The last block, norm and head's input at every position."""
    return lambda b: ops.cross_entropy(model.trunk(b.tokens, b.lengths)[b.trained], model.head_weight, b.targets)


def all_logits(model):
    """Logits of all trained positions at once, and autograd's gradient."""
    return lambda b: plain_loss(model.trunk(b.tokens, b.lengths)[b.trained], model.head_weight, b.targets)


def separately(x, layers):
    return tuple(LoRALinear.together(x, [layer])[0] for layer in layers)


# name -> what is replaced while a step is made: (object, attribute, by what)
OFF = {
    "documents end to end": (MICRO, "tokens", 1),
    "last block at trained rows": (train, "objective_of", lambda model, s: all_rows(model)),
    "loss in chunks": (train, "objective_of", lambda model, s: all_logits(model)),
    "attention's own gradient": (decoder, "attend", one_by_one),
    "norm's own gradient": (decoder.RMSNorm, "forward", decoder.RMSNorm.plain),
    "LoRA's own gradient": (LoRALinear, "together", staticmethod(lambda x, layers: [m.plain(x) for m in layers])),
    "LoRA grouped": (decoder, "together", separately),
    "gate * up formed again": (decoder, "formed_again", lambda *_: nullcontext()),
    "sizes rounded up": (batch, "ROUND", 1),
}
ALONE = {"freed memory kept": "malloc", "fused AdamW": "optimizer"}  # belong to a process


def some_steps(count: int) -> list[list[Example]]:
    tokenizer = pretrained.load_chat(pretrained.find(str(hub.default_model()))).tokenizer
    text = tokenizer.encode(machine.prose())
    steps = train_speed.make_steps(train_speed.WORKLOADS["short"], text, count, seed="techniques")
    return [[Example(*example) for example in step] for step in steps]


def adapted():
    model = pretrained.load_model(pretrained.find(str(hub.default_model())), torch.bfloat16)
    torch.manual_seed(0)
    inject(model)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.01)
    return model.train()


def kept_bytes(objective, batches) -> int:
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(batches[0])
    return sum(kept.values())


def by_turns(rounds: int, techniques: list[str]) -> tuple[dict, dict]:
    """Seconds of each variant's steps, the same in all, and the bytes that autograd keeps."""
    device.keep_memory(torch.device("cpu"))
    model, steps, seconds, kept = adapted(), some_steps(rounds + 1), {}, {}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = train.optimizer_of(parameters, S, torch.device("cpu"))
    for number, examples in enumerate(steps):
        for name in ("as it is", *techniques):
            with ExitStack() as stack:
                if name in OFF:
                    stack.enter_context(patch.object(*OFF[name]))
                start = time.perf_counter()
                batches = batch.micro_batches(examples, MICRO.tokens)
                train_step(train.objective_of(model, S), batches, optimizer, S.lr, 1.0)
                if number:
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
                else:  # for warm-up
                    kept[name] = kept_bytes(train.objective_of(model, S), batches)
    return seconds, kept


def alone(rounds: int, way: str) -> list[float]:
    """Seconds of steps in a process of its own."""
    if way != "malloc":
        device.keep_memory(torch.device("cpu"))
    model, seconds = adapted(), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=S.lr, weight_decay=0.0, fused=way != "optimizer")
    objective = train.objective_of(model, S)
    for examples in some_steps(rounds + 2):
        start = time.perf_counter()
        train_step(objective, batch.micro_batches(examples, MICRO.tokens), optimizer, S.lr, 1.0)
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def child(rounds: int, way: str) -> list[float]:
    command = [sys.executable, __file__, "--rounds", str(rounds), "--alone", way]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULT)
    techniques = [*OFF, *ALONE]
    parser.add_argument("--only", nargs="+", choices=techniques, default=techniques)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.alone is not None:
        print(json.dumps(alone(chosen.rounds, chosen.alone)))
        return
    in_turns = [name for name in OFF if name in chosen.only]
    seconds, kept = by_turns(chosen.rounds, in_turns)
    rows = {name: [b / a for a, b in zip(seconds["as it is"], seconds[name], strict=True)] for name in in_turns}
    for name in (name for name in ALONE if name in chosen.only):
        runs = [child(chosen.rounds, one) for one in ("", ALONE[name], ALONE[name], "")]
        rows[name] = [b / a for a, b in zip(runs[0] + runs[3], runs[1] + runs[2], strict=True)]
    head = {"machine": machine.described(), "command": shlex.join(sys.argv), "date": f"{datetime.now():%Y-%m-%d %H:%M}"}
    known = files.read_json(chosen.out) if chosen.out.exists() else {}
    print(f"{'switched off':30}  step time, median (lowest to highest)   kept for backward")
    for name, ratios in rows.items():
        memory = kept[name] / kept["as it is"] if name in kept else None
        print(f"{name:30}  {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})   {memory or 0:.2f}")
        known[name] = head | {"step time over as it is": ratios, "kept for backward over as it is": memory}
    files.write_json(chosen.out, known)


if __name__ == "__main__":
    main()
