"""Where a program listens: [HOST:]PORT as flags give it. Without a host it is loopback: this machine alone."""

import socket

from lora.errors import BadEnvironment, BadInput

LOOPBACK = "127.0.0.1"


def parse_address(text: str, flag: str) -> tuple[str, int]:
    """Host and port. Raises BadInput."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if colon else LOOPBACK
    if not host or not (port.isascii() and port.isdecimal()) or not int(port) < 65536:
        raise BadInput(f"wrong {flag} in the command line: {text!r} is no PORT or HOST:PORT. Give one, as 8000")
    return host, int(port)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free. Raises BadEnvironment for an address that is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(256)
    except (OSError, UnicodeError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise BadEnvironment(f"no server at {host}:{port}: {why}. Give another address") from None
    return listener


def is_loopback(host: str) -> bool:
    return host in (LOOPBACK, "::1", "localhost")


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
