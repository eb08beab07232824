"""`generate.py --serve`: open a base and its adapters, and serve them until it is stopped."""

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

from lora import address, pretrained
from lora import device as machine
from lora.adapter.sets import AdapterSet, read
from lora.errors import BadInput, collecting, say
from lora.inference import several, unpacked
from lora.inference.generate import Sampling
from lora.inference.session import try_adapter
from lora.pretrained import default_model

HERE = (address.LOOPBACK, "::1", "localhost")  # of which one cannot be asked from outside
SECONDS = 30  # in which a request must begin, and its headers must have come
UNREAD_SECONDS = 60  # after which a client that reads nothing is dropped
MOST_CONNECTIONS = 1000


def open_served(
    model: str | None,
    adapters: Sequence[str],
    keys: Sequence[str] = (),
    *,
    quant: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    verify: bool = True,
    feedback: str | None = None,
    slots: int = 32,
    max_new_tokens: int = 256,
    sampling: Sampling,
    **told,
):
    """A `Served` of a base and adapters of it, `told` as `load_chat` is. Raises LoraError for what cannot be used."""
    from lora.serve.app import Served  # which needs the packages of the extra `serve`
    from lora.serve.engine import Engine
    from lora.serve.feedback import Feedback

    kept = Feedback(feedback) if feedback else None
    if adapters:
        base = several.find_base(model, quant, adapters, not verify)
    else:
        base = pretrained.find(model or default_model.NAME, quant)
    say(f"model    {base.described}")
    empty, chats, problems = pretrained.empty_model(base), {}, []
    names = several.column_names(adapters)
    for name, adapter in names.items():
        with collecting(problems):
            chats[name] = try_adapter(empty, name, adapter, base, verify, **told)
    if problems:
        raise BadInput(*dict.fromkeys(problems))
    place = machine.choose_device(device)
    net = pretrained.load_model(base, machine.choose_dtype(dtype, place)[0], place)
    unpacked.unpack(net, machine.free_memory(place))
    sets: dict[str, AdapterSet] = {
        name: read(net, adapter, base.read) for name, adapter in names.items() if adapter is not None
    }
    engine = Engine(net, sets, slots)
    return Served(engine, chats, several.BASE, base.described, sampling, max_new_tokens, tuple(keys), kept)


def listen(host: str, port: int) -> socket.socket:
    """`address.listen`, whose clients must read."""
    listener = address.listen(host, port)
    with suppress(AttributeError, OSError):  # tcp(7): those that are accepted have it, too
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    return listener


def run(served, listener: socket.socket) -> int:
    """Serve until Ctrl-C, which `errors.run` turns into the exit code."""
    served.host = host = listener.getsockname()[0]
    say(f"serving  {address.url(listener)}  ({', '.join(served.chats)}); Ctrl-C ends it")
    if served.feedback:
        say(f"feedback what the page is told of answers goes to {', '.join(map(str, served.feedback.paths.values()))}")
    if host not in HERE and not served.keys:
        say("note     anybody who reaches this address can use it: --api-key asks for a key")
    server_of(served).run(sockets=[listener])
    return 0


def server_of(served):
    """The uvicorn server of a `Served`, with limits."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from lora.serve.app import application

    class Protocol(H11Protocol):
        """uvicorn waits for ever for a request on a new connection, and for the rest of its headers."""

        def connection_made(self, transport):
            super().connection_made(transport)
            self.deadline = self.loop.call_later(SECONDS, self.timeout_keep_alive_handler)

        def handle_events(self):
            super().handle_events()
            if self.cycle is not None:
                self.deadline.cancel()

        def connection_lost(self, exc):
            self.deadline.cancel()
            super().connection_lost(exc)

    class Server(uvicorn.Server):
        def handle_exit(self, number, frame):
            served.engine.close()  # answers under way end now, and their streams say so
            super().handle_exit(number, frame)

    config = uvicorn.Config(
        application(served), http=Protocol, ws="none", log_level="warning", access_log=False, server_header=False,
        timeout_keep_alive=SECONDS, limit_concurrency=MOST_CONNECTIONS, h11_max_incomplete_event_size=64 * 1024,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    return Server(config)


def keys_of(flag: Sequence[str] | None) -> list[str]:
    """Those of --api-key, or of the variable LORA_API_KEY, where no list of processes shows them."""
    found = list(flag or ()) or list(filter(None, [os.environ.get("LORA_API_KEY")]))
    if any(not key.strip() for key in found):
        raise BadInput("empty key in --api-key: anybody would have it. Give a key, or leave the flag out")
    if any(not (key.isascii() and key.isprintable()) or key.strip() != key for key in found):
        raise BadInput("wrong key in --api-key: a header holds printable ASCII. Give another one")
    return found


def packages_missing() -> str | None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        where = f"{sys.executable} -m pip install 'lora[serve]'"
        return f"no package {error.name} for --serve: it is in the extra `serve`. Install it: {where}"
    return None
