"""A local OpenAI-compatible server that misbehaves as it is told, and remembers what it was asked.

    with TeacherServer(script) as server: ...           server.url, server.asked, server.most_at_once

`script(prompt, attempt)` says how the `attempt`-th request (from 1) with this last message is answered: a Say.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Say(NamedTuple):
    """One response. Without `body` it is a chat completion of `text`; `delay` in seconds; `drip` pauses that long after
    every byte; `cut` ends the connection in the middle; `echo` puts the Authorization header into an error body."""

    text: str = "fine"
    status: int = 200
    headers: dict = {}  # noqa: RUF012
    body: bytes | None = None
    finish: str = "stop"
    usage: dict | None = {"total_tokens": 10}  # noqa: RUF012
    delay: float = 0.0
    drip: float = 0.0
    cut: bool = False
    echo: bool = False
    more: dict = {}  # noqa: RUF012


class Asked(NamedTuple):
    """A request: when it came (time.monotonic), its path, its body and its Authorization header."""

    time: float
    path: str
    body: dict
    key: str

    @property
    def prompt(self) -> str:
        return self.body["messages"][-1]["content"]


def wrong(status: int, message: str = "no", *, code: str | None = None, **how) -> Say:
    """An error as the API words it."""
    return Say(status=status, body=json.dumps({"error": {"message": message, "code": code}}).encode(), **how)


HTML = Say(body=b"<html><body>502 Bad Gateway</body></html>", headers={"Content-Type": "text/html"})
AT_ONCE = {"retry-after-ms": "1"}  # no waiting between attempts


class TeacherServer:
    def __init__(self, script: Callable[[str, int], Say] = lambda prompt, attempt: Say(f"answer to {prompt}")):
        self.script, self.asked, self.most_at_once = script, [], 0
        self._attempts, self._at_once, self._lock = Counter(), 0, threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def prompts(self) -> list[str]:
        with self._lock:
            return [asked.prompt for asked in self.asked]

    def begin(self, asked: Asked) -> Say:
        with self._lock:
            self.asked.append(asked)
            self._attempts[asked.prompt] += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            attempt = self._attempts[asked.prompt]
        return self.script(asked.prompt, attempt)

    def end(self) -> None:
        with self._lock:
            self._at_once -= 1


def _handler(server: TeacherServer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers.get("Authorization", "")
            say = server.begin(Asked(time.monotonic(), self.path, body, key))
            ended = False
            try:
                time.sleep(say.delay)
                data = say.body
                if say.echo:
                    data = json.dumps({"error": {"message": f"bad request with {key}, {key}"}}).encode()
                elif data is None:
                    message = {"role": "assistant", "content": say.text, **say.more}
                    choice = {"index": 0, "message": message, "finish_reason": say.finish}
                    data = json.dumps({"choices": [choice], "usage": say.usage}).encode()
                self.send_response(say.status)
                for name, value in ({"Content-Type": "application/json"} | say.headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if say.cut:
                    data, self.close_connection = data[: len(data) // 2], True
                server.end()  # before the last byte: the next request may come before this thread goes on
                ended = True
                for part in [data] if not say.drip else [data[i : i + 1] for i in range(len(data))]:
                    self.wfile.write(part)
                    self.wfile.flush()
                    time.sleep(say.drip)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                if not ended:
                    server.end()

        def handle(self):
            with suppress(ConnectionResetError, BrokenPipeError):  # the client was killed
                super().handle()

        def log_message(self, *words):
            pass

    return Handler
