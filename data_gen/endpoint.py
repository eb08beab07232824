"""A teacher behind an OpenAI-compatible endpoint, asked by the OpenAI client, several questions at once.

The client tries again after passing trouble (no connection, 408, 409, 429, 5xx), ATTEMPTS times in all. It waits as
Retry-After says, up to two minutes, or else 0.5 s, 1 s, 2 s, ... 8 s. Each of its requests goes through
`Endpoint._attempt`, which does what the client does not: budgets, the deadline, quiet of all while the server wants it.
"""

import asyncio
import json
import sys
from collections.abc import Iterator

from data_gen.asking import Teacher, mend
from data_gen.journal import Question, Reply
from lora import errors
from lora.errors import BadEnvironment, BadInput

ATTEMPTS = 10  # of one question, before it counts as failed
MOST_TOKENS = 2**32  # that an answer can have counted; a server may write any number
FATAL = {  # status -> what is wrong, and the fix; these are the same for every question
    401: ("the key is refused", "Set {key_env} to a valid key, or name another variable by --key-env"),
    402: ("the account has no credit", "Top it up, or use another endpoint"),
    403: ("access is denied", "Check what the key in {key_env} may use"),
    404: ("there is no such place or model", "Check --base-url (it often ends in /v1) and the model's name"),
}


class _Ended(BaseException):
    """Nothing more may be asked. It is no Exception, after which the client might try again."""


class Endpoint(Teacher):
    """Any number of requests at once over one event loop, which runs only while a reply is waited for."""

    def __init__(self, args, key: str):
        super().__init__(args)
        self.url, self.model, self.deadline = args.base_url, args.teacher, args.deadline
        self._key, self._key_env = key, args.key_env
        self.about = {"teacher": self.model, **self.about}  # without the URL: an address may change
        self._limit = "max_tokens"
        self._told, self._reached, self._unreached = False, False, 0
        self._quiet: set[asyncio.Task] = set()  # questions that were told to wait
        try:
            import openai
        except ImportError:
            fix = "Install it: pip install -e '.[distill]'"
            raise BadEnvironment(f"missing package in this environment: --base-url needs openai. {fix}") from None
        self._openai = openai
        self._http = sys.modules[openai.DefaultAsyncHttpxClient.__bases__[0].__module__]  # httpx, or its successor

    def _changes(self, waiting: Iterator[tuple[int, Question]]) -> Iterator[None]:
        with asyncio.Runner() as runner:
            loop, client, asking = runner.get_loop(), self._client(), set()
            stop = loop.create_future()

            def on_signal(number, frame):
                stopped = errors.Stopped(errors.STOP_CODES[number])
                loop.call_soon_threadsafe(lambda: stop.done() or stop.set_exception(stopped))

            async def first(tasks):
                return (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0]

            try:
                while True:
                    while len(asking) < self.concurrency and self._may_ask() and (row := next(waiting, None)):
                        asking.add(loop.create_task(self._answer(client, row[1])))
                    if not asking:
                        return
                    with errors.signals(on_signal):
                        done = runner.run(first({stop, *asking}))
                    asking -= done
                    for error in filter(None, [task.exception() for task in done]):
                        raise error
                    if self.stopped:
                        asking -= {task for task in self._quiet if task.cancel()}  # they only wait
                    yield
            finally:
                runner.run(_end(asking, client))

    def _client(self):
        teacher = self

        class Http(self._openai.DefaultAsyncHttpxClient):
            async def send(self, request, **how):
                return await teacher._attempt(super().send, request, how)

        return self._openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=self.url, http_client=Http(), timeout=None, max_retries=ATTEMPTS - 1
        )

    async def _attempt(self, send, request, how):
        """One request to the endpoint: counted, held back while the server wants quiet, ended at the deadline.

        Raises _Ended; and a network error, after which the client tries again, also for an answer of another kind.
        """
        task, response = asyncio.current_task(), None
        self._quiet.discard(task)
        while self._quiet and not self.stopped:
            await asyncio.sleep(0.05)
        if not self._may_ask():
            raise _Ended
        self.requests += 1
        try:
            async with asyncio.timeout(self.deadline):
                response = await send(request, **how)
            self._reached, trouble = True, self._trouble_in(response)
        except TimeoutError:
            trouble = f"no answer within {self.deadline:g} s"
        except self._http.RequestError as error:
            trouble = f"no connection: {error}"
            self._unreached += 1
            if self._unreached == 3 * self.concurrency and not self._reached:
                self.stopped = self.stopped or "nothing answers at --base-url"
        if trouble and not self._told and not _fatal(response):  # or a wrong address would look like a slow teacher
            self._told = True
            errors.say(f"the endpoint's first trouble: {self._safe(trouble)}")
        if response is None or (trouble and response.is_success):
            raise self._http.ReadError(trouble, request=request)
        if _wants_quiet(response):
            self._quiet.add(task)
        if _no_credit(response):
            response.headers["x-should-retry"] = "false"  # the client obeys
        return response

    async def _answer(self, client, question: Question) -> None:
        """Ask until there is a reply, the question has failed for good, or the run ends.

        Raises BadInput for what is the same for every question.
        """
        openai, limit = self._openai, self._limit
        extra = {} if self.temperature is None else {"temperature": self.temperature}
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=self.model, messages=question.messages, **extra, **{limit: self.answer_tokens}
            )
            return self._keep(question, self._reply(question.key, raw.http_response.content), 1 + raw.retries_taken)
        except _Ended:
            return None
        except openai.APIStatusError as error:
            response, trouble = error.response, self._trouble_in(error.response)
            if fatal := _fatal(response):
                why, fix = fatal[0], fatal[1].format(key_env="$" + self._key_env)
                raise BadInput(f"refused request in {self.url}: {why} ({self._safe(trouble)}). {fix}") from None
            if limit == "max_tokens" and limit in trouble and "max_completion_tokens" in trouble:
                self._limit = "max_completion_tokens"  # what newer models of OpenAI call it
                return await self._answer(client, question)
            if _wants_quiet(response):
                wait = self._safe(f"Retry-After: {response.headers.get('retry-after', 'not given')}")
                self.stopped = self.stopped or f"the endpoint asks to wait ({wait})"
                return None
        except (openai.APIConnectionError, ValueError) as error:  # ValueError: text that is no UTF-8
            trouble = str(error.__cause__ or error)
        finally:
            self._quiet.discard(asyncio.current_task())
        return self._lose(question, self._safe(trouble.partition(": ")[0]), self._safe(trouble))

    def _trouble_in(self, response) -> str:
        """What is wrong with a response, in the server's words; nothing where it is a completion."""
        if response.is_success:
            try:
                return self._reply("", response.content) and ""
            except ValueError as error:
                return str(error)
        try:
            body = response.json()
            body = body.get("error", body)
            return f"HTTP {response.status_code}: {body['message'] if isinstance(body, dict) else body}"
        except (ValueError, KeyError, AttributeError, RecursionError):
            return f"HTTP {response.status_code}: {response.text}"

    def _reply(self, key: str, content: bytes) -> Reply:
        """Raises ValueError where the content is no chat completion."""
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError("no JSON: the answer is something else") from None
        try:
            choice, usage = body["choices"][0], body.get("usage") or {}
            text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
            finish = "refusal" if refusal and not text else choice.get("finish_reason") or "stop"
            tokens = usage.get("total_tokens") or 0
            if not isinstance(text or "", str) or not isinstance(finish, str) or type(tokens) is not int:
                raise TypeError
        except (TypeError, KeyError, IndexError, AttributeError):
            raise ValueError("no chat completion: the answer is other JSON") from None
        return Reply(key, self._clean(text or ""), self._clean(finish), min(max(0, tokens), MOST_TOKENS))

    def _clean(self, text: str) -> str:
        """Without the key, unless that is a placeholder such as "x", which may occur in any text."""
        return mend(text.replace(self._key, "[key]") if len(self._key) >= 8 else text)

    def _safe(self, words: str) -> str:
        """A server's words as a short line, without the key."""
        words = words.replace(self._key, "[key]") if self._key else words
        return errors.one_line(" ".join(words.split()))[:200]


def _wants_quiet(response) -> bool:
    return not response.is_success and (response.status_code == 429 or "retry-after" in response.headers)


def _fatal(response) -> tuple[str, str] | None:
    """What is wrong, and the fix, where it is the same for every question."""
    return response and FATAL.get(402 if _no_credit(response) else response.status_code)


def _no_credit(response) -> bool:
    """OpenAI's rate limit that does not pass."""
    return response.status_code == 429 and b"insufficient_quota" in response.content


async def _end(asking: set[asyncio.Task], client) -> None:
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await client.close()
