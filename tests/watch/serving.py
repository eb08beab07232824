"""Runs' folders as tests write them, and a server of them in a process of its own."""

import http.client
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from lora import address
from tests import cli

STEP = {"step": 1, "loss": 2.5, "lr": 0.001, "tokens_per_second": 10.0, "seconds": 1.0}
EVALUATION = {"step": 1, "retention_kl": 0.1, "samples": {"Who?": "<script>alert(1)</script>"}, "seconds": 2.0}


def write_run(folder: Path, *rows: dict, ended: str | None = "all steps are done") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"method": "sft", "rank": 4} | ({"ended": ended} if ended else {})
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


@contextmanager
def served(*folders: Path, host: str = address.LOOPBACK):
    """A server of these runs, in a process of its own as beside a run; yields its port."""
    with address.listen(host, 0) as listener:
        runs = "; ".join(["import sys", "sys.path[:0] = [sys.argv[2]]", "import socket", "from pathlib import Path",
                          "from lora.watch import app", "from lora.watch.reading import Run",
                          "app.Server(socket.socket(fileno=int(sys.argv[1])), "
                          "[Run(Path(p)) for p in sys.argv[3:]]).serve_forever()"])  # fmt: skip
        words = [sys.executable, "-c", runs, str(listener.fileno()), str(cli.ROOT), *map(str, folders)]
        process = subprocess.Popen(words, pass_fds=(listener.fileno(),))
        port = listener.getsockname()[1]
    try:
        yield port
    finally:
        process.kill()
        process.wait()


def ask(port: int, path: str, **headers) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode()
