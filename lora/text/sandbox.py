"""Where chat templates run: jinja2's immutable sandbox with limits of time and memory, for files we do not trust."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import date

from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS, MEMORY = 2.0, 512 * 2**20  # limits of one rendering; bytes beyond what the process has
AGAIN = 0.2  # seconds to the next alarm, if one was dropped (in a __del__, say)


class Forbidden(Exception):
    """The template broke out of the sandbox or of its limits; the text says how."""


class TemplateError(Exception):
    """The template's own `raise_exception`."""


class _Late(BaseException):
    """The time is over. No `Exception`: jinja tries constant expressions when it compiles, and drops those."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks answers for other tools; here it means its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's way)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["**"])

    def call_binop(self, context, operator, left, right):
        if operator == "**" and (abs(left) > 2**32 or abs(right) > 64):
            raise SecurityError("power of large numbers")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message):
    raise TemplateError(str(message))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment(today: date) -> ImmutableSandboxedEnvironment:
    """What transformers offers to chat templates, in a sandbox; `strftime_now` believes in `today`."""
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": today.strftime}
    return sandbox


@contextmanager
def limits() -> Iterator[None]:
    """Run the block within SECONDS and MEMORY, where system and thread allow that. Raises Forbidden."""
    try:
        with ExitStack() as undo:
            _limit_memory(undo)
            _limit_time(undo)
            yield
    except _Late:
        raise Forbidden(f"it took more than {SECONDS:g} s") from None
    except MemoryError:
        raise Forbidden("it used too much memory") from None
    except SecurityError as error:
        raise Forbidden(f"it does what a template may not: {why(error)}") from None


def _on_alarm(number, frame):
    raise _Late


def _limit_time(undo: ExitStack) -> None:
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        undo.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, _on_alarm))
        undo.callback(signal.setitimer, signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_REAL, SECONDS, AGAIN)


def _limit_memory(undo: ExitStack) -> None:
    with suppress(AttributeError, OSError, ValueError):  # no `resource`, no /proc
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
            undo.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))


def why(error: BaseException) -> str:
    """The first line of an error, short."""
    return (str(error).splitlines() or [""])[0][:200].rstrip(".") or type(error).__name__
