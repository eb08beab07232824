"""The server as it is, with answers that are written down: tokens of them come one by one, and no model computes."""

import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import uvicorn

from lora import pretrained
from lora.inference.session import load_chat
from lora.serve.app import Served, application
from lora.serve.feedback import Feedback
from tests import cli


class Script:
    """In place of an `Engine`: model `name` answers `answers[name]`, a token every `pause` seconds."""

    limit, model = 100_000, SimpleNamespace(config=SimpleNamespace(vocab_size=300))

    def __init__(self, answers: dict[str, str], tokenizer, pause: float = 0.0):
        self.answers, self.tokenizer, self.pause = answers, tokenizer, pause
        self.thread, self.asked = threading.current_thread(), []
        self.active, self.known, self.steps, self.tokens = [], 0, 0, 0

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def submit(self, *requests) -> None:
        for request in requests:
            self.asked.append((request.adapter, self.tokenizer.decode(request.ids)))
            threading.Thread(target=self.play, args=(request,), daemon=True).start()

    def play(self, request) -> None:
        for token in self.tokenizer.encode_plain(self.answers[request.adapter])[: request.max_new]:
            if request.cancelled:
                return request.push("cancelled")
            time.sleep(self.pause)
            request.answer.append(token)
            request.push(token)
        whole = len(request.answer) < request.max_new
        return request.push("stop" if whole else "length")


def served(answers: dict[str, str], feedback=None, pause: float = 0.0, keys: tuple[str, ...] = ()) -> Served:
    """`answers` are those of the base and of its adapters; `feedback` names the files of judgements."""
    chat = load_chat(pretrained.find(str(cli.model_folder())))
    engine = Script(answers, chat.tokenizer, pause)
    return Served(engine, dict.fromkeys(answers, chat), "base", "a script", longest=2000, keys=keys,
                  feedback=feedback and Feedback(str(feedback)))  # fmt: skip


@contextmanager
def serving(what: Served):
    """The address of a server, over HTTP, until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(application(what), log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
