"""A chat template: a jinja program that writes a conversation as the model was taught to read it.

It comes from a file we do not trust, so it runs in jinja2's immutable sandbox with limits of time, memory and output.
"""

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from lora.errors import BadInput, Refused

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS, OUTPUT, MEMORY = 2.0, 16 * 2**20, 512 * 2**20  # limits of one rendering; characters, bytes
FROZEN_DATE = date(2025, 1, 1)  # what `strftime_now` says by default, so that a prompt is the same tomorrow

BUILT_IN = {  # for base models, which have none; `eos_token` ends an answer
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca; a system turn takes the place of the first line
    "alpaca": "{% if messages[0].role != 'system' %}Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}"
    "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    # the marks are not written twice where the data has them already
    "qa": "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '答：' + m.content.removeprefix('答：') + eos_token + '\n' }}"
    "{% elif m.role == 'user' %}{{ '问：' + m.content.removeprefix('问：') + '\n' }}"
    "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '答：' }}{% endif %}",
    "plain": "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}{% endfor %}",
}


class _TemplateError(Exception):
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
    raise _TemplateError(str(message))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _on_alarm(number, frame):
    raise _Late


@contextmanager
def limits() -> Iterator[None]:
    """Time (_Late) and memory (MemoryError) limits, where the system and the thread allow them."""
    timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, _on_alarm) if timed else None
    roomy = None
    try:
        if resource is not None:
            try:
                with open("/proc/self/statm") as file:
                    used = int(file.read().split()[0]) * resource.getpagesize()
                soft, hard = resource.getrlimit(resource.RLIMIT_AS)
                if hard == resource.RLIM_INFINITY or used + MEMORY < hard:
                    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
                    roomy = (soft, hard)
            except (OSError, ValueError):
                pass
        if timed:
            signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.2)  # again, if it was dropped (in a __del__, say)
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if roomy:
            resource.setrlimit(resource.RLIMIT_AS, roomy)


class ChatTemplate:
    """A jinja template with the special token strings it may use. `where` names its file in errors, `today` is what
    `strftime_now` believes."""

    def __init__(
        self,
        source: str,
        tokens: dict[str, str] | None = None,
        where: str = "chat template",
        today: date = FROZEN_DATE,
    ):
        self.source, self.tokens, self.where = source, tokens or {}, where
        sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        sandbox.filters["tojson"] = _tojson
        sandbox.globals["raise_exception"] = _raise_exception
        sandbox.globals["strftime_now"] = today.strftime
        try:
            with limits():
                self._template = sandbox.from_string(source)
        except (_Late, MemoryError) as error:
            raise self._refused(error) from None
        except Exception as error:
            raise BadInput(f"broken chat template in {where}: {_why(error)}. Repair or replace it") from None

    def render(self, messages: Sequence[dict], generate: bool = False) -> str:
        """The conversation as one string; with `generate` it ends where an answer begins.

        Raises BadInput with the order of roles; Refused where the template breaks out of the sandbox or its limits.
        """
        roles = "/".join(message["role"] for message in messages[:8])
        if sum(len(message["content"]) for message in messages) > OUTPUT // 2:
            raise BadInput(f"a conversation of over {OUTPUT >> 21} M characters. Cut it")
        try:
            with limits():
                copies = [dict(message) for message in messages]
                text = self._template.render(
                    messages=copies, tools=None, documents=None, add_generation_prompt=generate, **self.tokens
                )
                text.encode()  # half a surrogate pair is no character
        except (SecurityError, _Late, MemoryError) as error:
            raise self._refused(error) from None
        except (_TemplateError, jinja2.TemplateError, RecursionError) as error:
            raise BadInput(f"chat template in {self.where}: {_why(error)} (turns: {roles}). Change the turns") from None
        except Exception as error:  # of any kind: nothing but the template's own code runs here
            raise BadInput(f"chat template in {self.where}: {_why(error)} (turns: {roles}). Repair it") from None
        if len(text) > OUTPUT:
            raise Refused(
                f"chat template in {self.where}: it wrote over {OUTPUT >> 20} MB. Replace it by one you trust"
            )
        return text

    def _refused(self, error: BaseException) -> Refused:
        why = {_Late: f"it took more than {SECONDS:g} s", MemoryError: "it used too much memory"}
        why = why.get(type(error), f"it does what a template may not: {_why(error)}")
        return Refused(f"chat template in {self.where}: {why}. Replace it by one you trust")


def _why(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200].rstrip(".") or type(error).__name__
