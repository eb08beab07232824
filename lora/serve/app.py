"""The server: routes, keys, limits. OpenAI's API as vLLM and llama-server have it, over an `Engine`."""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from lora.errors import LoraError
from lora.inference.generate import Sampling
from lora.inference.prompts import encode, is_utf8
from lora.serve import engine as decoding
from lora.serve.engine import Engine, Full
from lora.serve.feedback import Feedback
from lora.serve.metrics import Metrics
from lora.serve.page import HEADERS, PAGE, check_kind, check_sender
from lora.serve.requests import Asked, Wrong, read_chat, read_text
from lora.serve.texts import Text
from lora.text.chat import Chat

LARGEST_BODY = 4 * 2**20  # bytes
LARGEST_JUDGEMENT = 2**20
READ_SECONDS = 30  # in which a body must have come
FEW = 8  # characters a token: a text with more is looked at from its beginning before all of it is made tokens


@dataclass
class Served:
    """What the server serves: the base and its adapters by name, each with its chat."""

    engine: Engine
    chats: Mapping[str, Chat]
    base: str  # the name of the base, of which all others are adapters
    described: str
    sampling: Sampling = field(default_factory=Sampling)
    longest: int = 256  # tokens of an answer where a request does not say
    keys: tuple[str, ...] = ()
    feedback: Feedback | None = None  # where the page's judgements go
    host: str = "127.0.0.1"  # to which the server is bound
    since: int = field(default_factory=lambda: int(time.time()))


class Json(JSONResponse):
    """In ASCII: a text may hold half of a surrogate pair, which has no UTF-8."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def refused(wrong: Wrong) -> Response:
    headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(wrong.status)
    return Json(wrong.body, wrong.status, headers)


def application(served: Served) -> Starlette:
    metrics = Metrics(served.engine)

    @asynccontextmanager
    async def lifespan(app):
        served.engine.start()
        yield
        served.engine.stop()

    def guarded(handler, open_to_all: bool = False):
        async def handle(request: Request) -> Response:
            begun = time.monotonic()
            try:
                check_sender(request, served.host, served.keys)
                if not open_to_all:
                    check_key(request, served.keys)
                response = await handler(request)
            except Wrong as wrong:
                response = refused(wrong)
            metrics.saw(request.scope["path"], response.status_code, time.monotonic() - begun)
            return response

        return handle

    async def health(request: Request) -> Response:
        alive = served.engine.thread.is_alive()
        return Json({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def show_metrics(request: Request) -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def card(name: str) -> dict:
        parent = {} if name == served.base else {"parent": served.base}
        return {"id": name, "object": "model", "created": served.since, "owned_by": "lora", "root": name, **parent}

    async def models(request: Request) -> Response:
        return Json({"object": "list", "data": [card(name) for name in served.chats]})

    async def model(request: Request) -> Response:
        return Json(card(known(request.path_params["name"], served)))

    async def chat(request: Request) -> Response:
        asked = read_chat(await read_body(request), served.sampling)
        return await answer(request, served, metrics, asked, ChatForm)

    async def completions(request: Request) -> Response:
        asked = read_text(await read_body(request), served.sampling)
        return await answer(request, served, metrics, asked, TextForm)

    async def page(request: Request) -> Response:
        return Response(PAGE, media_type="text/html; charset=utf-8", headers=HEADERS)

    async def settings(request: Request) -> Response:
        kept = served.feedback and served.feedback.state()
        return JSONResponse(
            {"temperature": served.sampling.temperature, "max_tokens": served.longest, "feedback": kept}
        )

    async def judge(request: Request) -> Response:
        check_kind(request)
        if served.feedback is None:
            raise Wrong(404, "The server was started with --no-feedback.")
        body = await read_body(request, LARGEST_JUDGEMENT)
        return JSONResponse(await asyncio.to_thread(served.feedback.add, body, served.chats))

    routes = [
        Route("/", guarded(page, open_to_all=True)),
        Route("/settings", guarded(settings)),
        Route("/feedback", guarded(judge), methods=["POST"]),
        Route("/health", guarded(health, open_to_all=True)),
        Route("/metrics", guarded(show_metrics)),
        Route("/v1/models", guarded(models)),
        Route("/v1/models/{name:path}", guarded(model)),
        Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
        Route("/v1/completions", guarded(completions), methods=["POST"]),
    ]

    async def not_there(request: Request, error) -> Response:
        wrong = Wrong(error.status_code, f"There is no {request.method} {request.scope['path'][:100]} here.")
        metrics.saw(request.scope["path"], wrong.status, 0)
        return Json(wrong.body, wrong.status, error.headers)

    async def broken(request: Request, error: Exception) -> Response:
        return refused(Wrong(500, "The server failed; its log says why."))

    handlers = {404: not_there, 405: not_there, 500: broken}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


# ---- what comes in ---------------------------------------------------------------------------------------------------


def check_key(request: Request, keys: tuple[str, ...]) -> None:
    given = request.headers.get("authorization", "")
    given = given[7:].strip() if given[:7].lower() == "bearer " else ""
    if keys and not any(hmac.compare_digest(given.encode(), key.encode()) for key in keys):
        raise Wrong(401, "The API key is missing or wrong: send Authorization: Bearer KEY.", code="invalid_api_key")


async def read_body(request: Request, largest: int = LARGEST_BODY) -> object:
    """The JSON of a body that is not too large and comes in time."""
    parts, size = [], 0
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > largest:
        raise Wrong(413, f"The body is larger than {largest >> 20} MB.")
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > largest:
                    raise Wrong(413, f"The body is larger than {largest >> 20} MB.")
                parts.append(part)
    except TimeoutError:
        raise Wrong(408, f"The body did not come in {READ_SECONDS} seconds.") from None
    except ClientDisconnect:
        raise Wrong(400, "The client went away.") from None
    try:
        return json.loads(b"".join(parts))
    except (ValueError, RecursionError):
        raise Wrong(400, "The body is not JSON.") from None


def known(name: str, served: Served) -> str:
    if name not in served.chats:
        there = ", ".join(served.chats)
        raise Wrong(404, f"There is no model {name[:100]!r} here; there are {there}.", "model", "model_not_found")
    return name


def prompt_ids(served: Served, asked: Asked) -> list[list[int]]:
    """The ids of each prompt. Raises Wrong where one is too long, or asks for what the model has no room for."""
    chat, limit, found = served.chats[known(asked.model, served)], served.engine.limit, []
    for prompt in asked.prompts:
        field = "messages" if isinstance(prompt, list) and isinstance(prompt[0], dict) else "prompt"
        try:
            check_length(chat, limit, prompt, field)
            ids = ids_of(served, chat, prompt)
        except LoraError as error:
            code = "context_length_exceeded" if "too long" in str(error) else None
            raise Wrong(400, str(error.problems[0]), field, code) from None
        if len(ids) + (asked.most or 1) > limit:
            more = f" and {asked.most} of the answer" if asked.most else ""
            why = f"The prompt has {len(ids)} tokens{more}; the model has room for {limit}."
            raise Wrong(400, why, field, "context_length_exceeded")
        found.append(ids)
    return found


def ids_of(served: Served, chat: Chat, prompt) -> list[int]:
    if isinstance(prompt, str):
        if not is_utf8(prompt):
            raise Wrong(400, "prompt is not UTF-8.", "prompt")
        return chat.tokenizer.encode_document(prompt) or [min(chat.stops)]
    if isinstance(prompt[0], dict):
        return encode(chat, served.engine.limit, prompt, "messages")
    if not all(0 <= i < served.engine.model.config.vocab_size for i in prompt):
        raise Wrong(400, "prompt has ids that the model has not.", "prompt")
    return prompt


def check_length(chat: Chat, limit: int, prompt, field: str) -> None:
    """Raises Wrong for a prompt that is too long without making all of it tokens, a second for 1 MB: others wait."""
    texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt if isinstance(m, dict)]
    for text in filter(is_utf8, texts):
        if len(text) > FEW * limit and len(chat.tokenizer.encode(text[: FEW * limit])) > limit:
            why = f"The prompt has {len(text)} characters; the model has room for {limit} tokens."
            raise Wrong(400, why, field, "context_length_exceeded")
    if not texts and len(prompt) > limit:
        why = f"The prompt has {len(prompt)} tokens; the model has room for {limit}."
        raise Wrong(400, why, field, "context_length_exceeded")


# ---- what goes out ---------------------------------------------------------------------------------------------------


class ChatForm:
    prefix, whole, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @staticmethod
    def choice(text: str) -> dict:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    @staticmethod
    def delta(text: str | None, first: bool = False) -> dict:
        role = {"role": "assistant"} if first else {}
        return {"delta": role | ({} if text is None else {"content": text})}


class TextForm:
    prefix, whole, piece = "cmpl", "text_completion", "text_completion"

    @staticmethod
    def choice(text: str) -> dict:
        return {"text": text}

    @staticmethod
    def delta(text: str | None, first: bool = False) -> dict:
        return {"text": text or ""}


class Answers:
    """The answers to one request: tokens come from the engine's thread, pieces of text go to the client."""

    def __init__(self, served: Served, asked: Asked, prompts: list[list[int]]):
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue()
        chat = served.chats[asked.model]
        self.texts, self.requests = [], []
        for ids in prompts:
            for n in range(asked.count):
                i = len(self.requests)
                most = min(asked.most or served.longest, served.engine.limit - len(ids))
                how = replace(asked.sampling, seed=(asked.sampling.seed + n) % 2**62)
                self.texts.append(Text(chat.tokenizer, asked.stop))
                self.requests.append(decoding.Request(asked.model, ids, most, chat.stops, how, self.pusher(i)))
        self.left, self.prompt_tokens, self.tokens = len(self.requests), sum(len(ids) for ids in prompts), 0
        served.engine.submit(*self.requests)

    def pusher(self, i: int):
        return lambda event: self.loop.call_soon_threadsafe(self.events.put_nowait, (i, event))

    def cancel(self) -> None:
        for request in self.requests:
            request.cancelled = True

    async def pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(number of the answer, text, why it ended or None)"""
        while self.left:
            i, event = await self.events.get()
            text = self.texts[i]
            if isinstance(event, int):
                self.tokens += not text.stopped
                stopped, piece = text.stopped, text.push(event)
                if text.stopped and not stopped:  # by a string: what the engine still says of it does not count
                    self.requests[i].cancelled = True
                    self.left -= 1
                    yield i, piece, "stop"
                elif piece:
                    yield i, piece, None
            elif not text.stopped:
                self.left -= 1
                if event == "error":
                    raise Wrong(500, "The server failed; its log says why.")
                if event == "cancelled":
                    raise Wrong(503, "The server is being stopped.", code="stopped")
                yield i, text.end(), event

    def usage(self) -> dict:
        """What the answers took; tokens behind a stop string do not count."""
        total = self.prompt_tokens + self.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}


async def answer(request: Request, served: Served, metrics: Metrics, asked: Asked, form) -> Response:
    prompts = prompt_ids(served, asked)
    try:
        answers = Answers(served, asked, prompts)
    except Full:
        raise Wrong(503, "Too many requests are waiting. Try again in a moment.", code="overloaded") from None
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
    if asked.stream:
        return Events(answers, stream(answers, asked, form, head))
    gone = asyncio.create_task(until_gone(request))
    whole = asyncio.create_task(collect(answers))
    try:
        await asyncio.wait({gone, whole}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            raise Wrong(499, "The client went away.")
        texts, ends = await whole
    finally:
        answers.cancel()
        gone.cancel()
        whole.cancel()
    choices = [
        {"index": i, **form.choice(text), "logprobs": None, "finish_reason": end}
        for i, (text, end) in enumerate(zip(texts, ends, strict=True))
    ]
    return Json(head | {"object": form.whole, "choices": choices, "usage": answers.usage()})


class Events(StreamingResponse):
    """Server-sent events. Where the client goes away, be it before the first, its answers are cancelled."""

    def __init__(self, answers: Answers, events: AsyncIterator[bytes]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answers = answers

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.cancel()


async def until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def collect(answers: Answers) -> tuple[list[str], list[str]]:
    texts, ends = [""] * len(answers.requests), ["stop"] * len(answers.requests)
    async for i, piece, end in answers.pieces():
        texts[i] += piece
        ends[i] = end or ends[i]
    return texts, ends


async def stream(answers: Answers, asked: Asked, form, head: dict) -> AsyncIterator[bytes]:
    """The events, as the answers come."""
    head = head | {"object": form.piece}
    usage = {"usage": None} if asked.include_usage else {}

    def event(i: int, delta: dict, end: str | None = None) -> bytes:
        choice = {"index": i, **delta, "logprobs": None, "finish_reason": end}
        return data(head | {"choices": [choice]} | usage)

    if form is ChatForm:
        for i in range(len(answers.requests)):
            yield event(i, form.delta("", first=True))
    try:
        async for i, piece, end in answers.pieces():
            if piece:
                yield event(i, form.delta(piece))
            if end:
                yield event(i, form.delta(None), end)
    except Wrong as wrong:
        yield data(wrong.body)
        return
    if asked.include_usage:
        yield data(head | {"choices": [], "usage": answers.usage()})
    yield b"data: [DONE]\n\n"


def data(content: dict) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
