"""Answers to requests as they come: decoded together, each as it would be alone.

One thread computes. In turn it takes a piece of a prompt that waits (so that a long one stalls nobody), then a token of
every answer that is under way. Rows join and leave between tokens.

Every row has a cache of its own, so attention sees nothing of other rows; what rows share are products with weights,
of which see `rows`.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch.nn import functional as F

from lora.adapter.sets import AdapterSet
from lora.errors import LoraError
from lora.inference.generate import Sampling, sample
from lora.network.cache import Cache
from lora.network.decoder import Model
from lora.serve.rows import place, steady

PIECE = 256  # tokens of a prompt that are computed between two tokens of the answers under way


class Full(Exception):
    """There is no room in the queue."""


@dataclass(eq=False)
class Request:
    """A prompt, and what becomes of it: `push` is called in the engine's thread with each token, and at the end with
    why it ended: "stop", "length", "cancelled", or "error"."""

    adapter: str
    ids: list[int]
    max_new: int
    stops: set[int]
    sampling: Sampling
    push: Callable[[int | str], None]
    cancelled: bool = False
    answer: list[int] = field(default_factory=list)
    read: int = 0  # tokens of the prompt that are in the cache
    cache: Cache | None = None
    generator: torch.Generator | None = None


class RowCaches:
    """The caches of several rows as one for a pass in which each has one new position."""

    def __init__(self, caches: Sequence[Cache]):
        self.caches = caches

    @property
    def lengths(self) -> list[int]:
        return [cache.lengths[0] for cache in self.caches]

    def begin(self, new: list[int]) -> None:
        for cache, count in zip(self.caches, new, strict=False):
            cache.begin([count])

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        for row, cache in enumerate(self.caches):
            cache.append(layer, k[row : row + 1], v[row : row + 1])

    def attend(self, layer: int, q: torch.Tensor, window: int | None = None, cap: float | None = None) -> torch.Tensor:
        return torch.cat([
            cache.attend(layer, q[row : row + 1], window, cap) for row, cache in enumerate(self.caches)
        ])  # fmt: skip

    def recall(self, layer: int, count: int = 2) -> tuple[torch.Tensor | None, ...]:
        states = [cache.recall(layer, count) for cache in self.caches]
        return tuple(None if states[0][i] is None else torch.cat([row[i] for row in states]) for i in range(count))

    def remember(self, layer: int, *state: torch.Tensor) -> None:
        for row, cache in enumerate(self.caches):
            cache.remember(layer, *(x[row : row + 1].clone() for x in state))

    def advance(self) -> None:
        for cache in self.caches:
            cache.advance()


class Engine:
    """A model whose answers to several requests are computed together.

    `slots` are the answers under way at once, `waiting` the requests that may wait beyond them.
    """

    def __init__(self, model: Model, sets: Mapping[str, AdapterSet], slots: int = 32, waiting: int = 64):
        self.model, self.rows, self.slots, self.room = model, place(model, sets), slots, slots + waiting
        self.inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.prompts: deque[Request] = deque()
        self.active: list[Request] = []
        self.known, self.lock = 0, threading.Lock()  # requests that have not ended
        self.steps = self.tokens = 0
        self.filled = 0 if steady(model, model.head_weight, slots) else slots
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> "Engine":
        self.thread.start()
        return self

    def stop(self) -> None:
        """End the thread; requests under way are cancelled."""
        self.inbox.put(None)
        self.thread.join()

    def submit(self, *requests: Request) -> None:
        """All or none. Raises Full where there is no room for all."""
        with self.lock:
            if self.known + len(requests) > self.room:
                raise Full
            self.known += len(requests)
        for request in requests:
            self.inbox.put(request)

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while self._take():
                self.drop_cancelled()
                try:
                    self.step()
                except (LoraError, RuntimeError, MemoryError) as error:  # a bug, or no memory: those under way end
                    self.fail(error)
        for request in [*self.active, *self.prompts]:
            self.end(request, "cancelled")

    def _take(self) -> bool:
        """What came in; waits where there is nothing to do. False is the end."""
        while True:
            idle = not self.active and not self.prompts
            try:
                request = self.inbox.get(block=idle)
            except queue.Empty:
                return True
            if request is None:
                return False
            self.prompts.append(request)

    def drop_cancelled(self) -> None:
        for request in [r for r in (*self.active, *self.prompts) if r.cancelled]:
            self.end(request, "cancelled")

    def fail(self, error: BaseException) -> None:
        for request in [*self.active, *(r for r in self.prompts if r.read)] or [*self.prompts]:
            request.error = error
            self.end(request, "error")

    def end(self, request: Request, why: str) -> None:
        for those in (self.active, self.prompts):
            if request in those:
                those.remove(request)
        request.cache = None
        with self.lock:
            self.known -= 1
        request.push(why)

    def step(self) -> None:
        """A piece of the first prompt that waits, if there is a slot for it; then a token of each answer."""
        if self.prompts and len(self.active) < self.slots:
            self.read_piece(self.prompts[0])
        if self.active:
            self.steps += 1
            for request, logits in zip([*self.active], self.next_logits(self.active), strict=True):
                self.take_token(request, logits)

    def read_piece(self, request: Request) -> None:
        """The next tokens of a prompt into its cache; after the last, the first token of its answer."""
        if request.cache is None:
            request.cache = self.model.new_cache(1, min(len(request.ids) + request.max_new, self.limit))
            request.generator = torch.Generator().manual_seed(request.sampling.seed)
        piece = request.ids[request.read : request.read + PIECE]
        with self.rows.of([(request.adapter, len(piece))]):
            hidden = self.model.trunk(self.tensor(piece), [len(piece)], cache=request.cache)
        request.read += len(piece)
        if request.read == len(request.ids):
            self.prompts.popleft()
            self.active.append(request)
            with self.rows.of([(request.adapter, 1)], self.filled):
                logits = self.head(hidden[-1:])
            self.take_token(request, logits[0])

    def next_logits(self, requests: list[Request]) -> torch.Tensor:
        """One new position of each row, rows of one adapter side by side -> logits (B, V)"""
        requests.sort(key=lambda request: request.adapter)
        groups = [(name, len([*those])) for name, those in groupby(request.adapter for request in requests)]
        tokens, caches = [request.answer[-1] for request in requests], [request.cache for request in requests]
        with self.rows.of(groups, self.filled):
            hidden = self.model.trunk(self.tensor(tokens), [1] * len(requests), cache=RowCaches(caches))
            return self.head(hidden)

    def take_token(self, request: Request, logits: torch.Tensor) -> None:
        token = sample(logits, request.sampling, request.generator, [*request.ids, *request.answer])
        if token in request.stops:
            return self.end(request, "stop")
        request.answer.append(token)
        self.tokens += 1
        request.push(token)
        if len(request.answer) == request.max_new or len(request.ids) + len(request.answer) >= self.limit:
            self.end(request, "length")
        return None

    @property
    def limit(self) -> int:
        return self.model.config.max_position_embeddings

    def tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, device=self.model.device)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, D) -> logits (B, V)"""
        rows = len(hidden)
        hidden = F.pad(hidden, (0, 0, 0, max(0, self.filled - rows)))
        return self.model.head(hidden)[:rows]
