"""A teacher answers questions: a model behind any OpenAI-compatible endpoint, or a local model of ours.

Every reply becomes a durable line of a journal as it arrives. So a run that was killed asks only what has no line yet:
nothing that was answered is asked again, and what was under way at the kill is.
"""

import asyncio
import hashlib
import json
import math
import os
import random
import time
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from email.utils import parsedate_to_datetime
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from data_gen.journal import Journal, Question, Reply
from lora import errors, files
from lora.errors import BadEnvironment, BadInput

ATTEMPTS = 8  # of one question, before it counts as failed
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second attempt, doubled for each further one, up to a limit
LONGEST_OBEYED = 600.0  # seconds; a server that asks for more patience ends the run
MOST_FAILED = 20  # questions in a row; then the endpoint, not the question, is at fault
FATAL = {  # status -> what is wrong, and the fix; these are the same for every question
    401: ("the key is refused", "Set {key_env} to a valid key, or name another variable by --key-env"),
    402: ("the account has no credit", "Top it up, or use another endpoint"),
    403: ("access is denied", "Check what the key in {key_env} may use"),
    404: ("there is no such place or model", "Check --base-url (it often ends in /v1) and --teacher"),
}
AGAIN = {408, 409, 425, 429}  # and every 5xx


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
    return _Local(args) if local else _Remote(args, key)


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


END = object()


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


def _text(value: str) -> str:
    """Half surrogate pairs, which JSON can spell and UTF-8 cannot, become question marks."""
    return value.encode(errors="replace").decode()


# ---- an endpoint -----------------------------------------------------------------------------------------------------


class _Trouble(Exception):
    """An attempt without an answer: what kind, in whose words, worth another one or not, and after how many seconds if
    the server said that."""

    def __init__(self, kind: str, words: str = "", again: bool = True, wait: float | None = None):
        self.kind, self.words, self.again, self.wait = kind, words or kind, again, wait


class _Remote(Teacher):
    """Any number of requests at once over one event loop, which runs only while a reply is waited for."""

    def __init__(self, args, key: str):
        super().__init__(args)
        self.url, self.model, self.deadline = args.base_url, args.teacher, args.deadline
        self._key, self._key_env = key, args.key_env
        self.about = {"teacher": self.model, **self.about}  # not where it is: an address may change
        self._limit = "max_tokens"
        self._told, self._reached, self._unreached = False, False, 0
        self._open_at = 0.0  # nothing is asked before this moment: the server said so
        self._openai = _client_library()

    def _changes(self, waiting: Iterator[tuple[int, Question]]) -> Iterator[None]:
        ended: list[BaseException | None] = []  # why there is no more to come; None for a good end
        with asyncio.Runner() as runner:
            loop, news = runner.get_loop(), asyncio.Event()

            def on_signal(number, frame):
                ended.append(errors.Stopped(errors.STOP_CODES[number]))
                loop.call_soon_threadsafe(news.set)

            async def change():
                await news.wait()
                news.clear()

            client = self._openai.AsyncOpenAI(
                api_key=self._key or "none", base_url=self.url, max_retries=0, timeout=self.deadline
            )
            asking = loop.create_task(self._ask_all(client, waiting, news, ended))
            try:
                while not ended:
                    with errors.signals(on_signal):
                        runner.run(change())
                    yield
                for error in filter(None, ended):
                    raise error
            finally:
                runner.run(_end(asking, client))

    async def _ask_all(self, client, waiting, news: asyncio.Event, ended: list) -> None:
        async def one_after_another():
            for _, question in waiting:
                if not self._may_ask() or not await self._answer(client, question):
                    return
                news.set()

        workers = [asyncio.ensure_future(one_after_another()) for _ in range(self.concurrency)]
        try:
            await asyncio.gather(*workers)
            ended.append(None)
        except BaseException as error:
            ended.append(error)
            raise
        finally:
            news.set()
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _answer(self, client, question: Question) -> bool:
        """Ask until there is a reply or it has failed for good; false where the run ends first."""
        for attempt in count(1):
            await self._sleep(lambda: self._open_at)
            if not self._may_ask():
                return False
            self.requests += 1
            try:
                reply = await asyncio.wait_for(self._request(client, question), self.deadline)
                self._reached = True
                self._keep(question, reply, attempt)
                return True
            except TimeoutError:
                trouble = _Trouble(f"no answer within {self.deadline:g} s")
            except _Trouble as error:
                trouble = error
            words = self.problem = self._safe(trouble.words)
            if not self._told:  # or a wrong address would look like a slow teacher
                self._told = True
                errors.say(f"the endpoint's first trouble: {words}")
            self._unreached = self._unreached + 1 if trouble.kind == "no connection" else 0
            if self._unreached == 3 * self.concurrency and not self._reached:
                self.stopped = self.stopped or "nothing answers at --base-url"
            if not trouble.again or attempt == ATTEMPTS:
                self._lose(question, trouble.kind, words)
                return True
            if trouble.wait is None:
                until = time.monotonic() + pause(attempt)
                await self._sleep(lambda until=until: until)
            elif trouble.wait > LONGEST_OBEYED:
                self.stopped = self.stopped or f"the endpoint asks to wait {trouble.wait:.0f} s"
                return False
            else:  # it holds for every request, not only for this one
                spread = random.uniform(0, min(trouble.wait, 1))  # and not all at the same moment
                self._open_at = max(self._open_at, time.monotonic() + trouble.wait + spread)

    async def _sleep(self, until: Callable[[], float]) -> None:
        while (left := until() - time.monotonic()) > 0 and not self.stopped:
            await asyncio.sleep(min(left, 1))

    async def _request(self, client, question: Question) -> Reply:
        """One attempt. Raises _Trouble, or BadInput for what is the same for every question."""
        openai, extra = self._openai, {}
        if self.temperature is not None:
            extra["temperature"] = self.temperature
        extra[self._limit] = self.answer_tokens
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=self.model, messages=question.messages, **extra
            )
            return self._reply(question.key, json.loads(raw.http_response.content))
        except openai.APIStatusError as error:
            raise self._trouble(error) from None
        except openai.APIConnectionError as error:
            raise _Trouble("no connection", f"no connection: {error.__cause__ or error}") from None
        except (openai.OpenAIError, ValueError, RecursionError):
            raise _Trouble("no JSON", "the answer is no JSON") from None

    def _reply(self, key: str, body: object) -> Reply:
        try:
            choice, usage = body["choices"][0], body.get("usage") or {}
            text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
            finish = "refusal" if refusal and not text else choice.get("finish_reason") or "stop"
            tokens = usage.get("total_tokens") or 0
            if not isinstance(text or "", str) or not isinstance(finish, str) or type(tokens) is not int:
                raise TypeError
        except (TypeError, KeyError, IndexError, AttributeError):
            raise _Trouble("no chat completion", "the answer is JSON, but no chat completion") from None
        return Reply(key, self._clean(text or ""), self._clean(finish), max(0, tokens))

    def _trouble(self, error) -> _Trouble:
        status, body = error.status_code, error.body
        words = body.get("message") if isinstance(body, dict) else None
        words = words if isinstance(words, str) else str(error)
        if status in FATAL:
            why, fix = FATAL[status]
            why = f"{why} (HTTP {status}: {self._safe(words)})"
            raise BadInput(f"refused request in {self.url}: {why}. {fix.format(key_env='$' + self._key_env)}") from None
        if status == 429 and error.code == "insufficient_quota":
            raise BadInput(f"refused request in {self.url}: {FATAL[402][0]} (HTTP 429). {FATAL[402][1]}") from None
        if status == 400 and self._limit in words and "max_completion_tokens" in words:
            self._limit = "max_completion_tokens"  # what newer models of OpenAI call it
            return _Trouble("HTTP 400", words, wait=0)
        again = status in AGAIN or status >= 500
        return _Trouble(f"HTTP {status}", f"HTTP {status}: {words}", again, asked_pause(error.response.headers))

    def _clean(self, text: str) -> str:
        """Without the key, unless that is a placeholder such as "x", which may occur in any text."""
        return _text(text.replace(self._key, "[key]") if len(self._key) >= 8 else text)

    def _safe(self, words: str) -> str:
        """A server's words as a short line, without the key."""
        words = words.replace(self._key, "[key]") if self._key else words
        return errors.one_line(" ".join(words.split()))[:200]


def _client_library():
    try:
        import openai
    except ImportError:
        fix = "Install it: pip install -e '.[distill]'"
        raise BadEnvironment(f"missing package in this environment: --base-url needs openai. {fix}") from None
    return openai


async def _end(asking: asyncio.Task, client) -> None:
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await client.close()


def pause(attempt: int) -> float:
    """Seconds after a failed attempt (1, 2, ...): doubled each time up to a limit, less a random part up to half."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1)


def asked_pause(headers, now: float | None = None) -> float | None:
    """Seconds that a server asks to wait: retry-after-ms, or Retry-After in seconds or as a date; None if it does not
    or if that is no time. RFC 9110, section 10.2.3.
    """
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = headers.get(name, "")
        seconds = None
        with suppress(ValueError):
            seconds = float(value) / unit
        if seconds is None and name == "retry-after":
            with suppress(ValueError, TypeError, OverflowError):
                seconds = parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now)
        if seconds is not None and seconds > 0:
            return seconds
    return None


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
            text = _text(chat.tokenizer.decode(answer))
            reply = Reply(question.key, text, "stop" if whole else "length", len(ids) + len(answer))
            self._keep(question, reply, 1)
