"""The server of the page: four addresses, the runs by their number, nothing by a path.

While a run goes on it is a process of its own. Training starts it and says nothing to it; it may be slow, fail or be
killed, and no step is another one. It ends when the run does.

python -m lora.watch.app SOCKET FOLDER REPLACES
"""

import base64
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from lora.address import is_loopback
from lora.watch.reading import Run

PAGE = Path(__file__).with_name("page.html")
GRACE = 5.0  # seconds after the end of the run, for pages to see it
AT_ONCE = 32  # connections
SECONDS = 10  # that a client may be silent
LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
ROWS = re.compile(r"/runs/(\d{1,4})/(rows|data)")


def policy(page: str) -> str:
    """The page runs its own script and style, known by their hashes, and speaks with this server alone."""

    def hashed(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts)

    rules = ("default-src 'none'", f"script-src {hashed('script')}", f"style-src {hashed('style')}")
    return "; ".join((*rules, "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"))


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket, runs: list[Run]):
        super().__init__(listener.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.runs, self.room = listener, runs, threading.Semaphore(AT_ONCE)
        self.local = is_loopback(listener.getsockname()[0])
        self.page = PAGE.read_text(encoding="utf-8")
        self.policy = policy(self.page)

    def process_request(self, request, client_address) -> None:
        if not self.room.acquire(blocking=False):
            self.shutdown_request(request)  # it may come again
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    timeout = SECONDS

    def do_GET(self) -> None:
        runs, asked = self.server.runs, urlsplit(self.path)
        found = ROWS.fullmatch(asked.path)
        if self.server.local and not LOCAL.fullmatch(self.headers.get("Host", "")):
            self._send(403, "text/plain", b"This server is for its own machine.\n")  # a name that leads here by a trick
        elif asked.path == "/":
            self._send(200, "text/html", self.server.page.encode())
        elif asked.path == "/runs":
            self._send_json([run.about() for run in runs])
        elif found and int(found[1]) < len(runs):
            run = runs[int(found[1])]
            self._send_json(run.data() if found[2] == "data" else run.rows(*self._place(asked.query)))
        else:
            self._send(404, "text/plain", b"There is nothing here.\n")

    @staticmethod
    def _place(query: str) -> tuple[int, int]:
        """`from` and `mark`; the beginning where they make no sense."""
        given = parse_qs(query[:200])
        texts = [given.get(name, ["0"])[0] for name in ("from", "mark")]
        return tuple(int(text) if re.fullmatch(r"[0-9]{1,15}", text) else 0 for text in texts)

    def _send_json(self, value: object) -> None:
        self._send(200, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": self.server.policy,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "lora"

    def log_message(self, *what) -> None:
        """Nothing is printed: the terminal is the run's."""


def main(argv: list[str]) -> None:
    """Beside a run: serve until its process has ended, which closes our stdin, and GRACE seconds more."""
    listener = socket.socket(fileno=int(argv[0]))
    with suppress(OSError, AttributeError):
        os.nice(10)  # the run comes first
    server = Server(listener, [Run(Path(argv[1]), replaces=argv[2] == "True")])

    def end() -> None:
        with suppress(OSError):
            sys.stdin.buffer.read()
        time.sleep(GRACE)
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
