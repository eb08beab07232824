"""`generate.py --serve` as a person runs it: where it listens, how it ends, what it refuses before a model is read."""

import os
import signal
import socket
import time

import httpx
import openai
import pytest

from lora.address import parse_address
from lora.errors import BadInput
from lora.serve import command
from tests import cli
from tests.cli import call, model_folder
from tests.mutation import mutation

LOOP = (
    "{% if 'forever' in messages[-1].content %}"
    + "{% for i in range(99999) %}" * 3
    + "{% endfor %}" * 3
    + "{% endif %}"
)
SPIN = cli.CHATML + LOOP


class Running:
    """A server in a process of its own, and the lines of its stderr."""

    def __init__(self, folder, *argv, **env):
        self.log = folder / "stderr"
        with open(self.log, "w") as log:
            argv = ("--serve", "0", "--model", model_folder(), *cli.ON_CPU, "--max-new-tokens", 200, *argv)
            self.process = cli.start("generate", *argv, cwd=folder, stderr=log, env=env)
        end = time.monotonic() + cli.SECONDS
        while "Ctrl-C ends it" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)
        self.url = next(word for word in self.log.read_text().split() if word.startswith("http://")).rstrip("/")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def client(self, key="any") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def stop(self, number: int) -> tuple[int, float]:
        """The exit code, and after how many seconds it came."""
        start = time.monotonic()
        self.process.send_signal(number)
        self.process.communicate(timeout=20)
        return self.process.returncode, time.monotonic() - start


@mutation("lora/serve/command.py", "served.engine.close()  # answers", "pass  # answers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_with_open_streams_and_without_a_trace(tmp_path, number):
    with Running(tmp_path, "--api-key", "sk-secret-of-test") as server:
        hello = [{"role": "user", "content": "Hello."}]
        client = server.client("sk-secret-of-test")
        stream = client.chat.completions.create(model="base", messages=hello, stream=True, n=32, temperature=2.0)
        next(iter(stream))
        code, seconds = server.stop(number)
        assert code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number] and seconds < 10
        with pytest.raises(openai.APIError, match="being stopped"):
            list(stream)
        log = server.log.read_text()
        assert "Traceback" not in log and "secret" not in log and "http://127.0.0.1:" in log and "ERROR" not in log


def test_prompts_are_rendered_where_a_template_can_be_stopped(tmp_path):
    """In the main thread, whose alarm clock ends a template that does not end."""
    (tmp_path / "spin.jinja").write_text(SPIN)
    with Running(tmp_path, "--template", "spin.jinja") as server:
        ask = {"model": "base", "max_tokens": 2, "messages": [{"role": "user", "content": "for ever"}]}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=ask, timeout=30).status_code == 200
        ask["messages"][0]["content"] = "forever"
        response = httpx.post(f"{server.url}/v1/chat/completions", json=ask, timeout=30)
        assert response.status_code == 400 and "more than 2 s" in response.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


@mutation("lora/address.py", 'raise BadEnvironment(f"no server at', 'raise BadInput(f"no server at')
def test_a_port_that_is_taken_is_one_line_before_a_model_is_read(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = call("generate", "--serve", port, "--model", model_folder(), cwd=tmp_path)
    assert result.code == 3 and len(result.errors) == 1 and f"127.0.0.1:{port}" in result.errors[0]
    assert "model " not in result.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--serve", "8000", "--prompt", "a"), "--serve and --prompt"),
        (("--serve", "8000", "--prompts", "a"), "--serve and --prompts"),
        (("--serve", "8000", "--compare", "--adapter", "x"), "--serve and --compare"),
        (("--serve", "8000", "--out", "a"), "--serve and --out"),
        (("--serve", "here"), "no PORT or HOST:PORT"),
        (("--serve", "70000"), "no PORT or HOST:PORT"),
        (("--serve", ":80"), "no PORT or HOST:PORT"),
        (("--serve", "0", "--api-key", " "), "empty key"),
        (("--serve", "0", "--api-key", "kéy"), "printable ASCII"),
        (("--api-key", "k"), "it is for --serve"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_flags_that_contradict_it_are_refused(tmp_path, argv, words):
    result = call("generate", "--model", model_folder(), *argv, cwd=tmp_path)
    assert result.code == 2 and any(words in line for line in result.errors), result.err


@mutation("lora/address.py", "if colon else LOOPBACK", 'if colon else "0.0.0.0"')
def test_it_is_bound_to_loopback_unless_asked():
    assert parse_address("8000", "--serve") == ("127.0.0.1", 8000)
    assert parse_address("0.0.0.0:8000", "--serve") == ("0.0.0.0", 8000)
    assert parse_address("[::1]:8000", "--serve") == ("::1", 8000)
    listener = command.listen(*parse_address("0", "--serve"))
    assert listener.getsockname()[0] == "127.0.0.1"
    listener.close()
    with pytest.raises(BadInput):
        parse_address("127.0.0.1:", "--serve")


def test_the_key_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_API_KEY", "of-the-environment")
    assert command.keys_of(None) == ["of-the-environment"] and command.keys_of(["flag"]) == ["flag"]
    assert "of-the-environment" in os.environ.values()
    with pytest.raises(BadInput):
        command.keys_of(["a b\n"])


@mutation(
    "lora/serve/command.py",
    "self.deadline = self.loop.call_later(SECONDS, self.timeout_keep_alive_handler)",
    "self.deadline = self.loop.call_later(10**6, print)",
)
def test_a_connection_that_asks_nothing_is_closed(monkeypatch):
    from tests.serving import served_model, serving

    monkeypatch.setattr(command, "SECONDS", 0.3)
    with serving(served_model()) as url:
        address = httpx.URL(url)
        for begun in (b"", b"GET /health HT"):
            with socket.create_connection((address.host, address.port), timeout=10) as connection:
                connection.sendall(begun)
                assert connection.recv(100) == b""
        with httpx.Client(base_url=url) as http:
            body = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
            assert http.post("/v1/chat/completions", json=body).status_code == 200
