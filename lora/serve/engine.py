"""Answers to requests as they come: decoded together, each as it would be alone.

One thread computes. In turn it takes pieces of prompts that wait (a piece of each in turn, so that a long one stalls
nobody), then a token of every answer that is under way. Rows join and leave between tokens.

Every row has a cache of its own, so attention sees nothing of other rows; what rows share are products with weights,
of which see `rows`.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch.nn import functional as F

from lora.adapter.sets import AdapterSet
from lora.errors import say
from lora.inference.generate import Sampling, sample
from lora.network.cache import Cache
from lora.network.decoder import Model
from lora.ops import soft_cap, wide
from lora.serve.rows import ByRows, Product, is_ragged, place, try_out

PIECE = 256  # tokens of a prompt in one pass; after so many it is the answers' turn
ROOM = 64  # positions of a cache at first beyond the prompt; when they are full, twice as many


class Full(Exception):
    """There is no room in the queue, or the engine is being stopped."""


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
    error: Exception | None = None
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
        for cache, count in zip(self.caches, new, strict=True):
            cache.begin([count])

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        for cache, k1, v1 in zip(self.caches, k.split(1), v.split(1), strict=True):
            cache.append(layer, k1, v1)

    def attend(self, layer: int, q: torch.Tensor, window: int | None = None, cap: float | None = None) -> torch.Tensor:
        rows = zip(self.caches, q.split(1), strict=True)
        return torch.cat([cache.attend(layer, q1, window, cap) for cache, q1 in rows])

    def recall(self, layer: int, count: int = 2) -> tuple[torch.Tensor | None, ...]:
        states = [cache.recall(layer, count) for cache in self.caches]
        return tuple(None if states[0][i] is None else torch.cat([row[i] for row in states]) for i in range(count))

    def remember(self, layer: int, *state: torch.Tensor) -> None:
        for row, cache in enumerate(self.caches):
            cache.remember(layer, *(x[row : row + 1].clone() for x in state))

    def advance(self) -> None:
        for cache in self.caches:
            cache.advance()


def grow(cache: Cache, most: int) -> None:
    """Make room for twice as many positions, or for `most`."""
    for kept in (cache.keys, cache.values):
        for layer, x in kept.items():
            kept[layer] = F.pad(x, (0, 0, 0, min(most, 2 * x.shape[2]) - x.shape[2]))


class Engine:
    """A model whose answers to several requests are computed together.

    `slots` are the answers under way at once, `waiting` the requests that may wait beyond them.
    """

    def __init__(self, model: Model, sets: Mapping[str, AdapterSet], slots: int = 32, waiting: int = 64):
        self.model, self.rows, self.slots, self.room = model, place(model, sets), slots, slots + waiting
        self.inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.waiting: deque[Request] = deque()  # for a slot
        self.reading: deque[Request] = deque()  # their prompts are being read
        self.active: list[Request] = []  # their answers are under way
        self.known, self.closed, self.lock = 0, False, threading.Lock()  # requests that have not ended
        self.steps = self.tokens = self.prompt_tokens = 0
        self.head = Product(model.head_weight, model.dtype)
        try_out(model, self.head, slots)
        self.ragged = model.device.type == "cpu" and is_ragged(model.config)
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> "Engine":
        self.thread.start()
        return self

    def close(self) -> None:
        """Take no more requests; those under way are cancelled after this token."""
        with self.lock:
            self.closed = True
        self.inbox.put(None)

    def stop(self) -> None:
        """`close`, and wait for the end of the thread."""
        self.close()
        self.thread.join()

    def submit(self, *requests: Request) -> None:
        """All or none. Raises Full where there is no room for all."""
        with self.lock:
            if self.closed or self.known + len(requests) > self.room:
                raise Full
            self.known += len(requests)
            for request in requests:
                self.inbox.put(request)

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self.take():
                    self.step()
        finally:
            with self.lock:  # nobody waits for what will not come
                self.closed = True
            while not self.inbox.empty():
                self.waiting.extend(filter(None, [self.inbox.get()]))
            for request in self.open:
                self.end(request, "cancelled")

    @property
    def open(self) -> list[Request]:
        return [*self.active, *self.reading, *self.waiting]

    def take(self) -> bool:
        """What came in; waits where there is nothing to do. False is the end."""
        while True:
            try:
                request = self.inbox.get(block=not self.open)
            except queue.Empty:
                return True
            if request is None:
                return False
            self.waiting.append(request)

    def step(self) -> None:
        """Some of the prompts that wait, then a token of each answer."""
        for request in self.open:
            if request.cancelled:
                self.end(request, "cancelled")
        self.read_prompts()
        if self.active:
            self.next_tokens()

    def end(self, request: Request, why: str) -> None:
        for those in (self.active, self.reading, self.waiting):
            if request in those:
                those.remove(request)
        request.cache = None
        with self.lock:
            self.known -= 1
        self.tell(request, why)

    def fail(self, requests: Sequence[Request], error: Exception) -> None:
        """These end; the engine goes on."""
        why = (str(error).splitlines() or [""])[0][:300]
        say(f"error: {len(requests)} answers ended early in the server: {type(error).__name__}: {why}")
        for request in requests:
            request.error = error
            self.end(request, "error")

    def tell(self, request: Request, event: int | str) -> None:
        try:
            request.push(event)
        except Exception:  # who asked is no longer there
            request.cancelled = True

    def read_prompts(self) -> None:
        """Prompts by pieces in turn, as far as there are slots, until PIECE tokens are read."""
        while self.waiting and len(self.active) + len(self.reading) < self.slots:
            self.reading.append(self.waiting.popleft())
        left = PIECE
        while self.reading and left > 0:
            request, before = self.reading[0], self.reading[0].read
            try:
                logits = self.read_piece(request)
            except Exception as error:
                self.fail([request], error)
                continue
            left -= request.read - before
            self.reading.popleft()
            if logits is None:
                self.reading.append(request)
            else:
                self.active.append(request)
                self.take_tokens([request], logits)

    def read_piece(self, request: Request) -> torch.Tensor | None:
        """The next tokens of a prompt into its cache -> after the last, logits (1, V). Pieces end at the same places
        whoever else is there."""
        if request.cache is None:
            room = min(len(request.ids) + min(request.max_new, ROOM), self.limit)
            request.cache = self.model.new_cache(1, room)
            request.generator = torch.Generator().manual_seed(request.sampling.seed)
        piece = request.ids[request.read : request.read + PIECE]
        with self.rows.of([(request.adapter, len(piece))], apart=False):
            hidden = self.model.trunk(self.tensor(piece), [len(piece)], cache=request.cache)
        request.read += len(piece)
        self.prompt_tokens += len(piece)
        if request.read < len(request.ids):
            return None
        with self.rows.of([(request.adapter, 1)]):
            return self.logits(hidden[-1:])

    def next_tokens(self) -> None:
        for request in [*self.active]:
            try:
                if request.cache.lengths[0] == room_of(request.cache):
                    grow(request.cache, self.limit)
            except Exception as error:  # no memory for this one
                self.fail([request], error)
        self.steps += 1
        self.active.sort(key=lambda request: request.adapter)
        requests = [*self.active]
        try:
            logits = self.next_logits(requests)
        except Exception as error:
            return self.fail(requests, error)
        self.take_tokens(requests, logits)
        return None

    def next_logits(self, requests: list[Request]) -> torch.Tensor:
        """One new position of each row, rows of one adapter side by side -> logits (B, V)"""
        groups = [(name, len([*those])) for name, those in groupby(request.adapter for request in requests)]
        tokens = self.tensor([request.answer[-1] for request in requests])
        caches = RowCaches([request.cache for request in requests])
        with self.rows.of(groups), ByRows() if self.ragged else nullcontext():
            return self.logits(self.model.trunk(tokens, [1] * len(requests), cache=caches))

    def take_tokens(self, requests: Sequence[Request], logits: torch.Tensor) -> None:
        """The next token of each from logits (B, V)."""
        likeliest = logits.to(wide(logits.dtype)).argmax(-1).tolist()
        for request, row, token in zip(requests, logits, likeliest, strict=True):
            how = request.sampling
            try:
                if not how.greedy or how.repetition_penalty != 1:
                    seen = () if how.repetition_penalty == 1 else [*request.ids, *request.answer]
                    token = sample(row, how, request.generator, seen)
            except Exception as error:
                self.fail([request], error)
                continue
            self.take_token(request, token)

    def take_token(self, request: Request, token: int) -> None:
        if token in request.stops:
            return self.end(request, "stop")
        request.answer.append(token)
        self.tokens += 1
        self.tell(request, token)
        if len(request.answer) == request.max_new or len(request.ids) + len(request.answer) >= self.limit:
            self.end(request, "length")
        return None

    @property
    def limit(self) -> int:
        return self.model.config.max_position_embeddings

    def tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, device=self.model.device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, D) -> (B, V)"""
        if self.model.config.tie_word_embeddings:
            return soft_cap(self.head(hidden, True), self.model.config.final_logit_softcapping)
        return self.model.head(hidden)  # a `RowsLinear`


def room_of(cache: Cache) -> int:
    return next((x.shape[2] for x in cache.keys.values()), -1)
