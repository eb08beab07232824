"""The page at `/`: one file, which loads nothing and whose script and style are allowed by their hashes alone.

Who sends a request is checked: no page but this one may, whatever it asks for. A page of another site has another
Origin; one whose name was made to lead here (DNS rebinding) has a Host that is not this machine's.
"""

import base64
import hashlib
import ipaddress
import re
import socket
from collections.abc import Iterable
from pathlib import Path

from starlette.requests import Request

from lora.serve.requests import Wrong

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def policy(page: str) -> str:
    """A Content-Security-Policy under which a page runs only what stands in it, and talks to its own server only.
    https://www.w3.org/TR/CSP3/"""

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return "; ".join((
        "default-src 'none'", f"script-src {hashes('script')}", f"style-src {hashes('style')}", "connect-src 'self'",
        "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "require-trusted-types-for 'script'", "trusted-types 'none'",
    ))  # fmt: skip


HEADERS = {
    "Content-Security-Policy": policy(PAGE),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def check_sender(request: Request, bound: str, keys: Iterable[str]) -> None:
    """Raises Wrong unless a request comes from our own page, or from a program, which sends no Origin.

    An address as Host is never a rebound name. With a key, which other sites do not have, any Host may be ours.
    """
    host = request.headers.get("host", "").lower()
    if not keys and not is_ours(host, bound):
        raise Wrong(403, f"The host {host[:100]!r} is not this machine's. Use its address, or serve with --api-key.")
    origin = request.headers.get("origin")
    if origin is not None and origin.lower().partition("://")[2] != host:
        raise Wrong(403, "The request comes from a page of another site.")


def check_kind(request: Request) -> None:
    """Raises Wrong unless the body is sent as JSON, which no form of another site can."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Wrong(415, "The body is not sent as application/json.")


def is_ours(host: str, bound: str) -> bool:
    """Is HOST or HOST:PORT an address, or a name of this machine: localhost, what it is bound to, its own?"""
    name = re.sub(r":\d+\Z", "", host)
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        return True
    except ValueError:
        own = socket.gethostname().lower()
        return bool(name) and name in ("localhost", bound.lower(), own, f"{own}.local")
