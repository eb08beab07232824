"""A teacher answers questions: a model behind an endpoint (`endpoint.py`), or a local model.

A journal keeps every reply as it arrives. A run that was killed asks only the questions without a reply there; those
that were under way at the kill are asked again.
"""

import hashlib
import math
import os
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from data_gen.journal import Journal, Question, Reply
from lora import files
from lora.errors import BadInput

MOST_FAILED = 20  # questions in a row; then the teacher, not the question, is at fault
END = object()


# ---- flags -----------------------------------------------------------------------------------------------------------


def add_flags(parser) -> None:
    group = parser.add_argument_group("the teacher")
    add = group.add_argument
    add("--base-url", metavar="URL", default=SUPPRESS, help="an OpenAI-compatible endpoint, http://localhost:8000/v1")
    add("--teacher", metavar="NAME", default=SUPPRESS, help="the endpoint's name of the model")
    add("--key-env", metavar="VARIABLE", default="OPENAI_API_KEY", help="environment variable that holds the key")
    add("--local", metavar="MODEL", default=SUPPRESS, help="instead: a model folder, hub id or .gguf file")
    add("--local-adapter", metavar="DIR", default=SUPPRESS, help="an adapter for --local")
    add("--concurrency", type=int, default=8, help="requests at once; the batch size of --local")
    add("--deadline", type=float, default=120.0, help="seconds a request may take, from start to last byte")
    add("--answer-tokens", type=int, default=1024, help="most tokens of an answer")
    add(
        "--temperature", type=float, default=SUPPRESS, help="of the drawing; without it the endpoint's, or 0 of --local"
    )
    told = "stop asking after so many"  # the journal does not know what earlier runs spent without an answer
    add(
        "--max-requests",
        type=int,
        default=SUPPRESS,
        help=f"{told} requests in all, with those behind earlier answers",
    )
    add("--max-tokens", type=int, default=SUPPRESS,
        help=f"{told} tokens in all, likewise; bytes where the endpoint does not tell")  # fmt: skip


def from_flags(args) -> "Teacher":
    """The teacher that the flags describe. Raises BadInput with everything that is wrong."""
    given, problems = vars(args), []

    def wrong(flag: str, why: str, fix: str) -> None:
        problems.append(f"wrong {flag} in the command line: {why}. {fix}")

    for name, low, high in (("concurrency", 1, 1024), ("deadline", 0, 86400), ("answer_tokens", 1, 2**31),
                            ("temperature", 0, 100), ("max_requests", 1, 2**62), ("max_tokens", 1, 2**62)):  # fmt: skip
        value = given.get(name)
        if value is not None and not (low <= value <= high and math.isfinite(value) and (value or name != "deadline")):
            wrong("--" + name.replace("_", "-"), f"{value} is out of range", f"Give {low or 'more than 0'} to {high}"
                  if name == "deadline" else f"Give {low} to {high}")  # fmt: skip
    remote, local = "base_url" in given, "local" in given
    if remote == local:
        why = "both --base-url and --local" if remote else "neither --base-url nor --local"
        problems.append(f"wrong arguments in the command line: {why}. Give one of them")
    if remote:
        problems += _wrong_url(given["base_url"])
        if not given.get("teacher", "").strip():
            problems.append("missing --teacher in the command line: --base-url needs the name of a model. Add it")
    if local and "teacher" in given:
        wrong("--teacher", "it is the model of --base-url", "Leave it out")
    if "local_adapter" in given and not local:
        wrong("--local-adapter", "it belongs to --local", "Leave it out")
    key = os.environ.get(args.key_env, "").strip()
    if remote and not (key.isascii() and key.isprintable()):
        problems.append(f"wrong key in ${args.key_env}: it has characters that no key has. Set it again")
    if problems:
        raise BadInput(*problems)
    if local:
        return _Local(args)
    from data_gen.endpoint import Endpoint

    return Endpoint(args, key)


def _wrong_url(url: str) -> list[str]:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True) and url.isprintable()
    except ValueError:
        fine = False
    if not fine:
        return ["wrong --base-url in the command line: no URL. Give one such as http://localhost:8000/v1"]
    if parts.username or parts.password or parts.query:
        why = "it holds a user name, a password or a query"
        return [f"wrong --base-url in the command line: {why}. Give the key by --key-env"]
    if parts.path.rstrip("/").endswith("/chat/completions"):
        return ["wrong --base-url in the command line: it ends in /chat/completions. Leave that out"]
    return []


# ---- what both teachers do -------------------------------------------------------------------------------------------


class Teacher:
    """Answers questions within a budget. After `ask`: `failed` (what went wrong -> how often), `problem` (the last
    one), and `stopped`, why it ended before all questions were asked, if it did."""

    def __init__(self, args):
        self.concurrency, self.answer_tokens = args.concurrency, args.answer_tokens
        self.temperature = getattr(args, "temperature", None)
        self.max_requests = getattr(args, "max_requests", math.inf)
        self.max_tokens = getattr(args, "max_tokens", math.inf)
        self.about = {"answer_tokens": args.answer_tokens, "temperature": self.temperature}
        self.failed: Counter[str] = Counter()
        self.stopped, self.problem = "", ""
        self.requests = self.tokens = self._in_a_row = 0

    def ask(self, questions: Sequence[Question], journal: Path, about: dict | None = None) -> Iterator[Reply]:
        """Replies in the order of `questions`, which may be made as they are looked at: nothing of them is kept.

        A question that fails for good has a reply that says so, and is asked again by the next run; those that the
        budget did not reach have none. `about` (name -> value) is kept in the journal with the teacher's own settings.
        Raises BadInput where the journal has replies to something else, or the endpoint refuses every question.
        """
        with closing(Journal(journal, {**self.about, **(about or {})})) as book:
            there = _compare(questions, book)
            self._book, self._lost, self.requests = book, set(), 0
            waiting = ((place, question) for place, question in enumerate(questions) if question.key not in book)
            self._bar = tqdm(total=len(questions), initial=there, unit="answer", disable=None)
            with self._bar, closing(self._changes(waiting)) as changes:
                for question in questions:
                    while question.key not in book and question.key not in self._lost:
                        if next(changes, END) is END:
                            break
                    self.tokens = book.tokens
                    if question.key in book:
                        yield book[question.key]
                    elif question.key in self._lost:
                        self._lost.remove(question.key)
                        yield Reply(question.key, "", "failed", 0)

    def account(self) -> str:
        """What it cost, and what went wrong, in words."""
        text = f"{self.requests:,} requests, {self.tokens:,} tokens with those of earlier answers"
        if self.failed:
            kinds = ", ".join(f"{kind}: {times:,}" for kind, times in self.failed.most_common())
            text += f", {self.failed.total():,} questions without answer ({kinds}; the last one: {self.problem})"
        return text

    def _changes(self, waiting: Iterator[tuple[int, Question]]) -> Iterator[None]:
        """Asks the questions, each with its place, and yields after some have been kept or lost."""
        raise NotImplementedError

    def _may_ask(self) -> bool:
        if not self.stopped:
            if self._book.requests + self.requests >= self.max_requests:
                self.stopped = f"--max-requests {self.max_requests} is reached"
            elif self._book.cost >= self.max_tokens:
                self.stopped = f"--max-tokens {self.max_tokens} is reached"
        return not self.stopped

    def _keep(self, question: Question, reply: Reply, requests: int) -> None:
        asked = sum(len(message["content"].encode()) for message in question.messages)
        self._book.add(question, reply, requests, reply.tokens or asked + len(reply.text.encode()))
        self._in_a_row = 0
        self._bar.update()

    def _lose(self, question: Question, kind: str, problem: str) -> None:
        self._lost.add(question.key)
        self.failed[kind] += 1
        self.problem = problem
        self._bar.update()
        self._in_a_row += 1
        if self._in_a_row >= MOST_FAILED:
            self.stopped = self.stopped or f"{MOST_FAILED} questions in a row failed"


def _compare(questions: Iterable[Question], book: Journal) -> int:
    """How many of the questions are answered already. Raises BadInput where one of those was another question."""
    seen, there = set(), 0
    for question in questions:
        if question.key in seen:
            raise ValueError(f"two questions have the key {question.key}")
        seen.add(question.key)
        there += question.key in book
        if question.key in book and not book.fits(question):
            fix = "Give the same arguments, choose another --out, or delete the journal to start afresh"
            why = f"question {question.key} was another one"
            raise BadInput(f"journal of another run in {book.path}: {why}. {fix}")
    return there


def mend(text: str) -> str:
    """Half surrogate pairs, which JSON can spell and UTF-8 cannot, become question marks."""
    return text.encode(errors="replace").decode()


# ---- a local model ---------------------------------------------------------------------------------------------------


class _Local(Teacher):
    """A model of ours, a batch at a time. What is drawn for a question depends on the seed and the question's place."""

    def __init__(self, args):
        super().__init__(args)
        from lora import pretrained
        from lora.adapter import store

        self._seed, self._adapter = getattr(args, "seed", 0), getattr(args, "local_adapter", None)
        self._checkpoint = pretrained.find(args.local)
        self.about = {"local": self._checkpoint.name, **self.about}
        if self.temperature:
            self.about["drawing"] = self._seed
        if self._adapter:
            store.read_config(self._adapter)
            weights = files.read_bytes(Path(self._adapter) / store.WEIGHTS, 2**40)
            self.about["adapter"] = hashlib.sha256(weights).hexdigest()[:16]

    def _load(self):
        from lora import device as machine
        from lora import pretrained
        from lora.adapter import passport, store
        from lora.adapter.inject import lora_layers
        from lora.adapter.merge import merge_and_unload
        from lora.inference.session import load_chat

        device = machine.choose_device("auto")
        model = pretrained.load_model(self._checkpoint, machine.choose_dtype("auto", device)[0], device)
        if not self._adapter:
            return model, pretrained.load_chat(self._checkpoint)
        store.load(model, self._adapter)
        base = self._checkpoint
        passport.verify(self._adapter, base.name, base.header, base.read, lora_layers(model))
        merge_and_unload(model)
        return model, load_chat(base, self._adapter)  # as it was trained

    def _changes(self, waiting: Iterator[tuple[int, Question]]) -> Iterator[None]:
        model, batch = None, []
        for place, question in waiting:
            if not self._may_ask():
                break
            if model is None:
                model, chat = self._load()
                most = model.config.max_position_embeddings
            ids = chat.prompt(question.messages)
            if len(ids) >= most:
                words = f"a prompt of {len(ids)} tokens, the model has room for {most}"
                self._lose(question, "prompt too long", words)
                yield
                continue
            self.requests += 1
            if batch and (len(batch) == self.concurrency or place != batch[-1][0] + 1):
                self._generate(model, chat, batch)
                batch = []
                yield
            batch.append((place, question, ids))
        if batch:
            self._generate(model, chat, batch)
            yield

    def _generate(self, model, chat, batch: list[tuple[int, Question, list[int]]]) -> None:
        """Answers to questions in neighbouring places: row i is drawn with the seed + its place."""
        from lora.inference.generate import Sampling, generate

        how = Sampling(self.temperature or 0.0, seed=self._seed + batch[0][0])
        answers = generate(model, [ids for _, _, ids in batch], chat.stops, self.answer_tokens, how)
        for (_, question, ids), answer in zip(batch, answers, strict=True):
            whole = len(answer) < self.answer_tokens and len(ids) + len(answer) < model.config.max_position_embeddings
            text = mend(chat.tokenizer.decode(answer))
            reply = Reply(question.key, text, "stop" if whole else "length", len(ids) + len(answer))
            self._keep(question, reply, 1)
