"""An engine whose turns a test takes itself, in one thread; tiny adapters of a model; and a server on a free port.

Import as `from tests.serving import ...`.
"""

import random
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lora import address
from lora.adapter import inject
from lora.adapter.layer import LoRALinear
from lora.adapter.sets import AdapterSet, take_out
from lora.adapter.targets import find_targets
from lora.inference.generate import GREEDY, Sampling
from lora.serve import command
from lora.serve.engine import Engine, Request
from tests import cli
from tests.adapters import write_adapter
from tests.helpers import randomise_adapter

STOP = 3


@dataclass
class Job:
    """What is asked, and what came: tokens, why it ended, and the logits that each token was taken from."""

    adapter: str
    ids: list[int]
    most: int = 12
    sampling: Sampling = GREEDY
    events: list = field(default_factory=list)
    logits: list = field(default_factory=list)

    def request(self) -> Request:
        self.events, self.logits = [], []
        return Request(self.adapter, self.ids, self.most, {STOP}, self.sampling, self.events.append)

    @property
    def tokens(self) -> list[int]:
        return [event for event in self.events if isinstance(event, int)]

    @property
    def bits(self) -> torch.Tensor:
        return torch.stack(self.logits).clone()


def adapter(model, targets=("q_proj",), seed: int = 1, rank: int = 3, kind=LoRALinear, dtype=torch.float32, **alphas):
    """An adapter with random weights, not in place. `alphas`: other alphas, and ranks twice theirs, of some layers."""
    layers = {}
    for path in find_targets(model, targets):
        alpha = alphas.get(path.rpartition(".")[2])
        its_rank, alpha = (rank, 8) if alpha is None else (2 * alpha, alpha)
        layers[path] = kind(model.get_submodule(path), its_rank, alpha, dtype=torch.promote_types(dtype, torch.float32))
    inject.patch(model, layers)
    randomise_adapter(model, seed)
    found: AdapterSet = take_out(model)
    for layer in found.layers.values():
        layer.requires_grad_(False).eval()
    return found


def engine_of(model, sets=None, slots: int = 8, **how) -> Engine:
    """An engine without its thread."""
    return Engine(model, sets or {}, slots, **how)


def turn(engine: Engine) -> None:
    """What its thread does between two tokens."""
    with torch.inference_mode():
        while not engine.inbox.empty():
            engine.take()
        engine.step()


def answer(engine: Engine, jobs: list[Job], crowd: int | None = None) -> list[Job]:
    """Answers one after another; or together, where with the seed `crowd` they come at random turns."""
    of, take_tokens = {}, engine.take_tokens

    def watched(requests, logits):
        for request, row in zip(requests, logits, strict=True):
            of[request].logits.append(row.clone())
        take_tokens(requests, logits)

    engine.take_tokens, draw, left = watched, random.Random(crowd), list(jobs)
    while left or engine.open:
        count = (not engine.open) if crowd is None else draw.choice((0, 0, 1, 2, 3))
        for job in [left.pop(0) for _ in range(min(count, len(left)))]:
            of[request := job.request()] = job
            engine.submit(request)
        turn(engine)
    del engine.take_tokens
    return jobs


def some_jobs(names, vocab: int, count: int = 16, seed: int = 0, lengths=(1, 5, 33), most: int = 14) -> list[Job]:
    """Prompts of different lengths to several adapters, some sampled, some with a penalty."""
    draw = random.Random(seed)
    return [
        Job(
            draw.choice(names),
            [draw.randrange(vocab) for _ in range(draw.choice(lengths))],
            draw.randint(1, most),
            draw.choice(
                (GREEDY, Sampling(1.0, seed=i), Sampling(0.7, 20, 0.9, 0.01, 1.3, i), Sampling(0, 0, 1, 0, 1.2))
            ),
        )
        for i in range(count)
    ]


def served_model(*adapters, keys=(), model=None, **how):
    """The model of `cli.model_folder` in float32 with these adapters, opened as `generate.py --serve` opens it."""
    told = {"device": "cpu", "dtype": "float32", "slots": 8, "sampling": GREEDY, "max_new_tokens": 12} | how
    return command.open_served(str(model or cli.model_folder()), [str(one) for one in adapters], keys, **told)


def adapter_in(folder, name: str, seed: int, **how):
    """An adapter with random weights in a folder of this name."""
    return write_adapter(folder / name, seed, **how)


@contextmanager
def serving(served):
    """Inside the block it is served on a free port of this machine, http://127.0.0.1:PORT."""
    server, listener = command.server_of(served), command.listen(address.LOOPBACK, 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        served.engine.close()
        server.should_exit = True
        thread.join(20)
        listener.close()
