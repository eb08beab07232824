"""The endpoint as OpenAI's own client sees it; what it refuses, and in which words; and whom it does not trust."""

import asyncio
import json
import re
import socket
import time
from contextlib import suppress
from functools import partial

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora.inference.session import open_session
from lora.serve import app as product
from lora.serve import requests
from lora.serve.metrics import PATHS
from tests import cli
from tests.mutation import mutation
from tests.serving import adapter_in, served_model, serving

HELLO = [{"role": "user", "content": "Hello."}]
NAMES = ("base", "heron", "crane")
KEY = "sk-of-a-test-1234567890"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    adapter_in(folder, "heron", 1)
    adapter_in(folder, "crane", 2, targets=("attention",), rank=3, system="Be brief.")
    return folder


@pytest.fixture(scope="module")
def served(folder):
    return served_model(folder / "heron", folder / "crane")


@pytest.fixture(scope="module")
def url(served):
    with serving(served) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=30) as http:
        yield http


def ask(client, model="base", **how):
    return client.chat.completions.create(model=model, messages=how.pop("messages", HELLO), **how)


def joined(stream) -> tuple[str, str, list]:
    """Text, why it ended, and the chunks."""
    chunks = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason, chunks


# ---- answers ---------------------------------------------------------------------------------------------------------


@mutation("lora/serve/app.py", 'parent = {} if name == served.base else {"parent": served.base}', "parent = {}")
def test_models_are_the_base_and_each_adapter_with_its_parent(client):
    models = client.models.list().data
    assert [(m.id, m.object, getattr(m, "parent", None)) for m in models] == [
        ("base", "model", None), ("heron", "model", "base"), ("crane", "model", "base")]  # fmt: skip
    assert client.models.retrieve("heron").parent == "base"
    with pytest.raises(openai.NotFoundError, match="there are base, heron, crane") as error:
        client.models.retrieve("egret")
    assert error.value.code == "model_not_found"


@mutation("lora/serve/app.py", "decoding.Request(asked.model, ids", "decoding.Request(served.base, ids")
@mutation(
    "lora/serve/app.py",
    "chat, limit, found = served.chats[known(asked.model, served)]",
    "chat, limit, found = served.chats[served.base]",
)
@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_that_of_generate_py_with_that_adapter_streamed_or_not(client, folder, name):
    session = open_session(
        str(cli.model_folder()), None if name == "base" else str(folder / name), device="cpu", dtype="float32"
    )
    expected = session(HELLO, max_new_tokens=12)
    whole = ask(client, name)
    text, end, chunks = joined(ask(client, name, stream=True))
    assert whole.choices[0].message.content == text == expected and expected
    assert whole.choices[0].finish_reason == end and whole.model == name and whole.object == "chat.completion"
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].choices[0].delta.role == "assistant"


@mutation("lora/serve/app.py", "self.tokens += not text.stopped", "pass")
def test_usage_is_counted_and_comes_last_in_a_stream_that_asks(client):
    usage = ask(client).usage
    assert usage.completion_tokens == 12 and usage.prompt_tokens + 12 == usage.total_tokens
    _, _, chunks = joined(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == usage and chunks[-1].choices == [] and all(c.usage is None for c in chunks[:-1])
    assert all(chunk.usage is None for chunk in joined(ask(client, stream=True))[2])


@mutation("lora/serve/app.py", "seed=(asked.sampling.seed + n) % 2**62", "seed=asked.sampling.seed")
def test_n_answers_are_those_of_n_seeds(client):
    whole = ask(client, "heron", temperature=1.5, seed=7, n=3)
    texts = [choice.message.content for choice in whole.choices]
    alone = [ask(client, "heron", temperature=1.5, seed=7 + i).choices[0].message.content for i in range(3)]
    assert texts == alone and len(set(texts)) == 3 and [c.index for c in whole.choices] == [0, 1, 2]
    assert ask(client, "heron", temperature=1.5).choices != ask(client, "heron", temperature=1.5).choices
    chunks = list(ask(client, "heron", temperature=1.5, seed=7, n=3, stream=True))
    streamed = ["", "", ""]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_a_stop_string_ends_an_answer_and_is_not_shown(client):
    text = ask(client, max_tokens=40).choices[0].message.content
    stop = text[7:10]
    for stream in (False, True):
        got = ask(client, max_tokens=40, stop=[stop, "never"], stream=stream)
        got, end = joined(got)[:2] if stream else (got.choices[0].message.content, got.choices[0].finish_reason)
        assert (got, end) == (text[: text.index(stop)], "stop")


@mutation("lora/serve/requests.py", "most[0] or most[1]", "most[1] or most[0]")
def test_lengths_and_content_in_parts(client):
    assert ask(client, max_tokens=5).usage.completion_tokens == 5
    assert ask(client, max_tokens=5, max_completion_tokens=3).usage.completion_tokens == 3
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]}]
    assert ask(client, messages=parts).choices == ask(client).choices
    developer = [{"role": "developer", "content": "Be brief."}, *HELLO]
    system = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert ask(client, messages=developer).choices == ask(client, messages=system).choices


def test_completions_take_texts_ids_and_lists_of_them(client, served):
    create = partial(client.completions.create, model="heron", max_tokens=9)
    ids = served.chats["heron"].tokenizer.encode_document("What is 1")
    one = create(prompt="What is 1")
    assert one.object == "text_completion" and one.usage.prompt_tokens == len(ids)
    assert create(prompt=ids).choices[0].text == one.choices[0].text
    two = create(prompt=["What is 1", "It is"]).choices
    assert [c.text for c in two] == [one.choices[0].text, create(prompt="It is").choices[0].text]
    chunks = list(create(prompt="What is 1", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == one.choices[0].text
    assert len(create(prompt="").choices[0].text) > 0


@mutation(
    "lora/serve/app.py",
    "lambda event: self.loop.call_soon_threadsafe(self.events.put_nowait, (i, event))",
    "lambda event: self.loop.call_soon_threadsafe(self.events.put_nowait, (0, event))",
)
def test_thirty_two_clients_at_once_get_what_each_gets_alone(url, client):
    how = [
        {"model": NAMES[i % 3], "messages": [{"role": "user", "content": f"What is {i} and {i % 5}?"}], "seed": i,
         "temperature": (0, 1.2)[i % 2], "max_tokens": 5 + i % 11, "n": 1 + i % 2}
        for i in range(32)
    ]  # fmt: skip
    alone = [[c.message.content for c in client.chat.completions.create(**one).choices] for one in how]

    async def crowd():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:

            async def one(number: int) -> list[str]:
                if number % 3:
                    whole = await client.chat.completions.create(**how[number])
                    return [choice.message.content for choice in whole.choices]
                texts = [""] * how[number]["n"]
                async for chunk in await client.chat.completions.create(**how[number], stream=True):
                    for choice in chunk.choices:
                        texts[choice.index] += choice.delta.content or ""
                return texts

            return await asyncio.gather(*map(one, range(32)))

    assert asyncio.run(crowd()) == alone
    assert len({str(texts) for texts in alone}) > 25


# ---- refusals --------------------------------------------------------------------------------------------------------

PART, TOO_LONG = {"type": "image_url"}, "context_length_exceeded"
REFUSED = [  # changes to a right body, status, param, code, words of the sentence
    ({"model": "egret"}, 404, "model", "model_not_found", "there are base"),
    ({"model": None}, 400, "model", None, "missing"),
    ({"model": 3}, 400, "model", None, "name of a model"),
    ({"messages": []}, 400, "messages", None, "at least one"),
    ({"messages": None}, 400, "messages", None, "missing"),
    ({"messages": "Hello."}, 400, "messages", None, "list"),
    ({"messages": [7]}, 400, "messages[0]", None, "object"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, 400, "messages[0].role", None, "role"),
    ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0].role", None, "role"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", None, "text"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", None, "text"),
    ({"messages": [{"role": "user", "content": [PART]}]}, 400, "messages[0].content[0]", None, "image"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, 400, "messages[0].name", None, "name"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "b"}]}, 400, "messages", None, "user's"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", None, "UTF-8"),
    ({"messages": [{"role": "user", "content": "a" * 5000}]}, 400, "messages", TOO_LONG, "room for 256"),
    ({"messages": [{"role": "user", "content": "ab " * 300}]}, 400, "messages", TOO_LONG, "room for 256"),
    ({"max_tokens": 256}, 400, "messages", TOO_LONG, "256 of the answer"),
    ({"max_tokens": 0}, 400, "max_tokens", None, "from 1"),
    ({"max_tokens": True}, 400, "max_tokens", None, "whole number"),
    ({"max_tokens": 1.5}, 400, "max_tokens", None, "whole number"),
    ({"max_completion_tokens": -1}, 400, "max_completion_tokens", None, "from 1"),
    ({"temperature": -0.1}, 400, "temperature", None, "from 0"),
    ({"temperature": "hot"}, 400, "temperature", None, "number"),
    ({"top_p": 0}, 400, "top_p", None, "to 1"),
    ({"top_p": float("nan")}, 400, "top_p", None, "to 1"),
    ({"seed": 2**64}, 400, "seed", None, "whole number"),
    ({"n": 0}, 400, "n", None, "from 1"),
    ({"n": 33}, 400, "n", None, "to 32"),
    ({"stop": ["a"] * 17}, 400, "stop", None, "16 texts"),
    ({"stop": [""]}, 400, "stop", None, "characters"),
    ({"stop": [3]}, 400, "stop", None, "texts"),
    ({"stream": "yes"}, 400, "stream", None, "true or false"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", None, "with stream"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options", None, "true or false"),
    ({"stream": True, "stream_options": {"chunks": True}}, 400, "stream_options", None, "include_usage"),
    ({"logprobs": True}, 400, "logprobs", "unsupported_parameter", "not supported"),
    ({"tools": [{}]}, 400, "tools", "unsupported_parameter", "not supported"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "unsupported_parameter", "not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter", "not supported"),
    ({"temprature": 1}, 400, "temprature", "unknown_parameter", "no parameter"),
    ({"\ud800": 1}, 400, "\ud800", "unknown_parameter", "no parameter"),
]  # fmt: skip
TAKEN = [
    {"frequency_penalty": 0.0}, {"presence_penalty": 0}, {"logprobs": False}, {"logit_bias": {}}, {"tools": []},
    {"user": "x"}, {"metadata": {"a": "b"}}, {"response_format": {"type": "text"}}, {"seed": -5}, {"stop": None},
    {"top_k": -1}, {"min_p": 0.1, "temperature": 1.0}, {"repetition_penalty": 1.1}, {"stream": None}, {"n": 1},
    {"stream_options": None}, {"temperature": 1e-30}, {"messages": [{**HELLO[0], "name": None}]},
]  # fmt: skip


@mutation(
    "lora/serve/requests.py", "isinstance(value, bool) == isinstance(neutral, bool)", "type(value) is type(neutral)"
)
@mutation(
    "lora/serve/app.py", 'return json.dumps(content, separators=(",", ":")).encode()', "return super().render(content)"
)
@mutation(
    "lora/serve/requests.py",
    "not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)",
    "not isinstance(value, kinds)",
)
@mutation(
    "lora/serve/requests.py",
    'role = "system" if message.get("role") == "developer" else message.get("role")',
    'role = {"developer": "system"}.get(message.get("role"), message.get("role"))',
)
def test_what_is_wrong_is_refused_by_name_and_what_is_neutral_is_taken(http):
    for change, status, param, code, words in REFUSED:
        body = {"model": "base", "messages": HELLO, **change}
        response = http.post("/v1/chat/completions", content=json.dumps(body))
        error = response.json().get("error")
        assert error is not None, change
        assert (response.status_code, error["param"], error["code"]) == (status, param, code), (change, error)
        assert words in error["message"] and error["type"] == "invalid_request_error", (change, error)
    for change in TAKEN:
        body = {"model": "base", "messages": HELLO, "max_tokens": 1, **change}
        assert http.post("/v1/chat/completions", json=body).status_code == 200, change


def test_what_is_wrong_with_completions_is_refused_by_name(http):
    for prompt, words in (
        (None, "missing"), ([], "missing"), (7, "not a text"), ([[]], "not a text"), (["a", [1]], None), ([1.5], "not"),
        ([10**30], "ids that"), ([-1], "ids that"), ([1] * 5000, "room for 256"), ("a" * 5000, "room for 256"),
        (["a"] * 33, "33 answers"), ("\ud800", "UTF-8"), ([True], "not a text"), ([["a"]], "not a text"),
    ):  # fmt: skip
        body = {"model": "base", "prompt": prompt, "max_tokens": 1}
        response = http.post("/v1/completions", content=json.dumps(body))
        assert response.status_code == (200 if words is None else 400), (prompt, response.text)
        assert words is None or words in response.json()["error"]["message"], response.text
    assert http.post("/v1/completions", json={"model": "base", "prompt": "a", "messages": HELLO}).status_code == 400


def test_errors_are_the_exceptions_of_openais_client(client):
    for how, kind in (
        ({"model": "egret"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"stream": True, "n": 99}, openai.BadRequestError),
    ):
        with pytest.raises(kind) as error:
            ask(client, **how)
        assert error.value.type == "invalid_request_error" and error.value.body["message"].endswith(".")


def test_any_json_is_answered_or_refused_in_openais_form(url):
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    scalars |= st.sampled_from([0, 1, -1, 2**63, 10**400, "\ud800", "base", "user", "text", "heron"])
    anything = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=8,
    )  # fmt: skip
    names = st.sampled_from(sorted(requests.COMMON | set(requests.NEUTRAL) | requests.WITHOUT_EFFECT))
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant"]) | scalars},
        optional={"content": st.text(max_size=9) | anything, "tool_calls": anything, "name": scalars},
    )
    bodies = anything | st.builds(
        dict, st.dictionaries(names, anything, max_size=2),
        model=st.sampled_from(["base", "heron"]) | anything, max_tokens=st.just(1) | scalars,
        messages=st.lists(message | anything, max_size=3) | anything, prompt=st.just("a") | anything,
    )  # fmt: skip

    with httpx.Client(base_url=url, timeout=30) as http:

        @settings(
            max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
        )
        @given(bodies, st.sampled_from(["/v1/chat/completions", "/v1/completions"]), st.booleans())
        def check(body, path, only):
            if only and isinstance(body, dict):
                body.pop("messages" if path == "/v1/completions" else "prompt", None)
            response = http.post(path, content=json.dumps(body))
            if response.status_code != 200:
                error = response.json()["error"]
                assert 400 <= response.status_code < 500 and error["message"] and "type" in error, (body, error)

        check()


def test_bodies_that_are_no_json_are_refused(http):
    for body in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b'"model"', b"null"):
        for path in ("/v1/chat/completions", "/v1/completions"):
            response = http.post(path, content=body)
            assert response.status_code == 400 and "JSON" in response.json()["error"]["message"], body[:20]


@mutation("lora/serve/app.py", "                if size > largest:\n", "                if False:\n")
@mutation("lora/serve/app.py", "if length.isdecimal() and int(length) > largest:", "if False:")
def test_a_body_that_is_too_large_is_refused_whether_it_says_its_length_or_not(http):
    large = b" " * (product.LARGEST_BODY + 1)
    for body in (large, (large[i : i + 2**20] for i in range(0, len(large), 2**20))):
        response = http.post("/v1/chat/completions", content=body)
        assert response.status_code == 413 and "4 MB" in response.json()["error"]["message"]
        http.close()
        http.__init__(base_url=http.base_url, timeout=30)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(large)
    assert raw(str(http.base_url), head, 5).startswith(b"HTTP/1.1 413")  # before it has come
    assert http.get("/health").status_code == 200


def raw(url: str, text: bytes, seconds: float = 20) -> bytes:
    """What the server answers to these bytes, until it closes or says no more."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port), timeout=seconds) as connection:
        connection.sendall(text)
        got = b""
        with suppress(TimeoutError, ConnectionResetError):
            while part := connection.recv(65536):
                got += part
                if b"\r\n\r\n" in got and b"error" in got:
                    break
        return got


@mutation("lora/serve/app.py", "asyncio.timeout(READ_SECONDS)", "asyncio.timeout(None)")
def test_a_body_that_does_not_come_is_not_waited_for(url, monkeypatch):
    monkeypatch.setattr(product, "READ_SECONDS", 0.2)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    got = raw(url, head, 5)
    assert got.startswith(b"HTTP/1.1 408") and b"did not come" in got


def test_long_prompts_are_refused_before_all_of_them_is_made_tokens(http, served):
    tokenizer, longest = served.chats["base"].tokenizer, []
    encode = tokenizer.encode
    tokenizer.encode = lambda text: longest.append(len(text)) or encode(text)
    try:
        body = {"model": "base", "messages": [{"role": "user", "content": "long " * 200_000}]}
        response = http.post("/v1/chat/completions", json=body)
    finally:
        del tokenizer.encode
    assert response.json()["error"]["code"] == "context_length_exceeded" and longest == [product.FEW * 256]


# ---- paths, keys, pages of others ------------------------------------------------------------------------------------


def test_paths_that_are_not_there_and_methods_that_are_not_for_them(http, url):
    for method, path, status in (
        ("GET", "/nothing", 404), ("GET", "/v1/models/", 404), ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405), ("OPTIONS", "/v1/chat/completions", 405), ("DELETE", "/health", 405),
        ("PUT", "/v1/completions", 405), ("GET", "/v1/chat/completions/", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404), ("GET", "/v1/models/%2e%2e%2fsetup.cfg", 404),
        ("GET", "//etc/passwd", 404), ("GET", "/v1/models/heron%00", 404),
    ):  # fmt: skip
        target = path.encode()
        got = raw(url, method.encode() + b" " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert int(got.split(b" ")[1]) == status, (method, path, got)
        body = json.loads(got.partition(b"\r\n\r\n")[2])
        assert body["error"]["message"] and b"root:" not in got and b"access-control" not in got.lower()
    assert http.head("/health").status_code == 200 and http.head("/health").content == b""


def test_strange_requests_end_in_an_error_and_not_in_a_trace(url, capfd):
    for head in (b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", b"GET /v1/models/ HTTP/1.1\r\nHost: a b\r\n\r\n",
                 b"GET /nothing/ HTTP/1.1\r\nHost: [\r\n\r\n", b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n"):  # fmt: skip
        assert raw(url, head, 2).startswith((b"HTTP/1.1 4", b"")), head
    assert "Traceback" not in capfd.readouterr().err


@mutation("lora/serve/app.py", "check_sender(request, served.host, served.keys)", "pass")
def test_pages_of_other_hosts_may_not_ask(http, url):
    port = httpx.URL(url).port
    body = {"model": "base", "messages": HELLO, "max_tokens": 1}
    for headers, status in (
        ({}, 200), ({"Origin": url}, 200), ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
        ({"Host": f"evil.example:{port}"}, 403), ({"Host": f"localhost:{port}"}, 200), ({"Host": f"[::1]:{port}"}, 200),
        ({"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}, 403),
    ):  # fmt: skip
        response = http.post("/v1/chat/completions", json=body, headers=headers)
        assert response.status_code == status, (headers, response.text)
        assert "access-control-allow-origin" not in response.headers


@mutation("lora/serve/app.py", "if keys and not any(", "if False and not any(")
def test_a_key_is_asked_for_and_never_logged(folder, capfd):
    served = served_model(folder / "heron", keys=("sk-other", KEY))
    with serving(served) as url:
        for given in ("", "Bearer", KEY, "Bearer sk-", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", "Bearer ké"):
            response = httpx.get(f"{url}/v1/models", headers={"Authorization": given.encode()})
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key" and KEY not in response.text
        with pytest.raises(openai.AuthenticationError):
            ask(openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0))
        assert ask(openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0), max_tokens=1).choices
        assert httpx.get(f"{url}/metrics").status_code == 401 and httpx.get(f"{url}/health").status_code == 200
        served.engine.next_tokens = lambda: 1 / 0  # what fails is logged
        httpx.post(f"{url}/v1/chat/completions", headers={"Authorization": f"Bearer {KEY}"}, json={"model": 1})
        raw(url, f"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode(), 2)
    captured = capfd.readouterr()
    assert KEY not in captured.err + captured.out


# ---- clients that go, wait, or are too many --------------------------------------------------------------------------


def until(what, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(what())


@pytest.fixture
def ends(served, monkeypatch):
    """Why answers ended; and tokens come slowly."""
    ends, end, next_tokens = [], served.engine.end, served.engine.next_tokens
    monkeypatch.setattr(served.engine, "end", lambda request, why: ends.append(why) or end(request, why))
    monkeypatch.setattr(served.engine, "next_tokens", lambda: time.sleep(0.01) or next_tokens())
    return ends


@mutation(
    "lora/serve/app.py", "        finally:\n            self.answers.cancel()\n", "        finally:\n            pass\n"
)
@mutation(
    "lora/serve/app.py",
    "    finally:\n        answers.cancel()\n",
    "    finally:\n        pass\n",
)
def test_a_client_that_goes_away_frees_its_row(url, served, ends):
    address = httpx.URL(url)
    for stream in (True, False):
        del ends[:]
        body = json.dumps({"model": "heron", "messages": HELLO, "max_tokens": 200, "stream": stream, "n": 2}).encode()
        connection = socket.create_connection((address.host, address.port))
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert connection.recv(4096) if stream else until(lambda: len(served.engine.active) == 2)
        connection.close()
        assert until(lambda: served.engine.known == 0) and ends == ["cancelled"] * 2, (stream, ends)


def test_a_reader_that_does_not_read_stalls_nobody(url, client, served):
    address = httpx.URL(url)
    body = json.dumps({"model": "base", "messages": HELLO, "max_tokens": 200, "stream": True, "n": 32}).encode()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.connect((address.host, address.port))
    slow.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    assert ask(client, "heron", max_tokens=3).choices
    assert until(lambda: served.engine.known == 0)  # its rows are free though it has not read
    slow.close()


@mutation("lora/serve/app.py", '{503: {"Retry-After": "1"}, ', "{")
@mutation("lora/serve/app.py", "    except Full:\n", "    except ZeroDivisionError:\n")
def test_what_the_queue_cannot_hold_is_told_to_come_again(client, served, monkeypatch):
    monkeypatch.setattr(served.engine, "room", 1)
    with pytest.raises(openai.InternalServerError) as error:
        ask(client, n=2)
    assert error.value.status_code == 503 and error.value.response.headers["retry-after"] == "1"
    assert error.value.code == "overloaded"
    assert ask(client).choices


@mutation("lora/serve/app.py", '                if event == "error":\n', '                if event == "other":\n')
def test_a_failure_is_told_and_the_server_lives_on(client, served, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "next_logits", lambda requests: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="log says why"):
            ask(client)
        with pytest.raises(openai.APIError, match="log says why"):
            joined(ask(client, stream=True))
    assert ask(client).choices
    err = capfd.readouterr().err
    assert err.count("error: 1 answers ended early in the server: ZeroDivisionError") == 2 and "Traceback" not in err


def test_metrics_are_prometheus_text_and_count(http, client):
    def read() -> dict[str, float]:
        response = http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = response.text.splitlines()
        assert all(re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{[^}]*\})? [\d.]+", line) for line in lines)
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = read()
    ask(client, max_tokens=4, n=2)
    http.get("/elsewhere")
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert grown["lora_tokens_total"] == 8 and grown["lora_response_seconds_count"] == 1
    assert grown['lora_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    assert after["lora_requests_open"] == after["lora_answers_active"] == 0 and "/health" in PATHS
    assert grown['lora_requests_total{path="other",status="404"}'] == 1
