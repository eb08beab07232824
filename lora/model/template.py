"""Messages to ids with trained flags, through the model's own chat template.

The template is a program from a file we do not trust: it runs in jinja2's immutable sandbox with limits of time, memory
and output. What the messages say stays text: a control string inside a message (`<|im_end|>`) cannot forge a turn.
"""

import json
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from lora.errors import BadInput, Refused
from lora.model.tokenizer import Tokenizer

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS, OUTPUT, MEMORY = 2.0, 16 * 2**20, 512 * 2**20  # limits of one rendering; characters, bytes
GUARDS = [chr(c) for c in range(0xFDD0, 0xFDF0)]  # "noncharacters": no tokenizer or template has a use for them
FROZEN_DATE = date(2025, 1, 1)  # what `strftime_now` says, so that a prompt is the same tomorrow

ROLES = ("system", "user", "assistant")


class Example(NamedTuple):
    """`tokens[i]` is trained where `trained[i]`; both have one entry a token."""

    tokens: list[int]
    trained: list[bool]


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


def _tojson(value, indent=None, **_):
    return json.dumps(value, ensure_ascii=False, indent=indent)


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
    """A jinja template with the special token strings it may use. `where` names its file in errors."""

    def __init__(self, source: str, tokens: dict[str, str] | None = None, where: str = "chat template"):
        self.source, self.tokens, self.where = source, tokens or {}, where
        sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        sandbox.filters["tojson"] = _tojson
        sandbox.globals["raise_exception"] = _raise_exception
        sandbox.globals["strftime_now"] = FROZEN_DATE.strftime
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
        roles = "/".join(message["role"] for message in messages)
        try:
            with limits():
                copies = [dict(message) for message in messages]
                text = self._template.render(messages=copies, add_generation_prompt=generate, **self.tokens)
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


class Chat:
    """A tokenizer with a chat template: `prompt` for generation, `example` for training, which agree by construction.

    `system`: a text to begin with where the messages have no system turn; None leaves that to the template (some
    insert one of their own); False has none at all.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, eos: Sequence[int] = (), system=None):
        self.tokenizer, self.template, self.system = tokenizer, template, system
        strings = sorted(tokenizer.control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, strings)) or r"(?!)")
        self.cuts = 0  # conversations in which the tokenizer would have fused an answer with the prompt before it
        self.guarded = 0  # conversations with text that spells a control token
        self.end_of_turn = next(iter(eos), None)
        if self.end_of_turn is None:
            raise BadInput(
                f"wrong model in {template.where}: no eos_token_id, so no answer could end. Add it to config.json"
            )
        probe = self.example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        self.end_of_turn = probe.tokens[max(i for i, trained in enumerate(probe.trained) if trained)]
        self.stops = {*eos, self.end_of_turn}
        self.cuts = self.guarded = 0

    # ---- rendering ----

    def _render(self, messages: Sequence[dict], generate: bool = False) -> str:
        has_system = bool(messages) and messages[0]["role"] == "system"
        text = self.template.render(messages, generate)
        if self.system is False and not has_system and self.own_system:
            bos = self.template.tokens.get("bos_token", "")
            return (
                text.replace(self.own_system, "", 1)
                if text.startswith((self.own_system, bos + self.own_system))
                else text
            )
        return text

    @cached_property
    def own_system(self) -> str:
        """The system turn that the template inserts where the messages have none, as rendered; "" for none."""
        system, user = {"role": "system", "content": "x"}, {"role": "user", "content": "x"}
        try:
            alone, both = self.template.render([system]), self.template.render([system, user])
            implicit = self.template.render([user])
        except BadInput:  # a template that knows no system turn inserts none
            return ""
        rest = both.removeprefix(alone)
        inserted = implicit.removesuffix(rest) if rest and implicit.endswith(rest) else ""
        return inserted.removeprefix(self.template.tokens.get("bos_token", ""))

    def _guard(self, messages: Sequence[dict]) -> tuple[list[dict], str]:
        """Messages, the system text of this chat among them, whose control strings are broken by a guard character;
        and that character ("" where none is)."""
        if self.system and not (messages and messages[0]["role"] == "system"):
            messages = [{"role": "system", "content": self.system}, *messages]
        texts = [message["content"] for message in messages]
        if not any(self._control.search(text) for text in texts):
            return list(messages), ""
        guard = next((g for g in GUARDS if not any(g in text for text in texts)), "")
        if not guard:
            raise BadInput("wrong text in the messages: a control token and all of U+FDD0 to U+FDEF. Remove them")
        self.guarded += 1
        broken = [self._control.sub(lambda m: m[0][0] + guard + m[0][1:], text) for text in texts]
        return [{**message, "content": text} for message, text in zip(messages, broken, strict=True)], guard

    def _encode(self, text: str, guard: str) -> list[int]:
        """Ids of rendered text; guarded strings are mended and encoded as the ordinary text they are."""
        if not guard:
            return self.tokenizer.encode(text)
        ids, position = [], 0
        for match in [*self._control.finditer(text), None]:
            plain = text[position : match.start() if match else len(text)].replace(guard, "")
            ids += self.tokenizer.encode_plain(plain) if plain else []
            if match:
                ids.append(self.tokenizer.control[match[0]])
                position = match.end()
        return ids

    # ---- what the scripts call ----

    def prompt(self, messages: Sequence[dict]) -> list[int]:
        """Ids of a conversation up to where the next answer begins."""
        ids = self._ids(messages, generate=True).tokens
        if not ids:
            why = "it writes nothing for this conversation, so no answer can begin"
            raise BadInput(f"chat template in {self.template.where}: {why}. Repair or replace it")
        return ids

    def example(self, messages: Sequence[dict]) -> Example:
        """Ids of a whole conversation; trained is every answer, up to and including its end of turn.

        The ids before an answer are those of `prompt` for the turns before it. Raises BadInput where the template
        writes a conversation and its beginning so differently that no answer can be found in it.
        """
        return self._ids(messages)

    def _ids(self, messages: Sequence[dict], generate: bool = False) -> Example:
        messages, guard = self._guard(messages)
        text = self._render(messages, generate)
        answers = []  # where each begins and ends in the text, and whether the template writes an end of turn
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, upto = self._render(messages[:i], generate=True), self._render(messages[: i + 1])
            if text.startswith(before) and text.startswith(upto) and len(upto) >= len(before):
                answers.append((len(before), len(upto), bool(self._control.search(upto, len(before)))))
            elif not generate:
                why = f"it rewrites the turns before answer {i + 1}, so no answer can be found"
                raise BadInput(f"chat template in {self.template.where}: {why}. Give conversations of one answer")
        borders = [border for begin, end, ends in answers for border in ([begin] if ends else [begin, end])]
        tokens, counts = self._cut(text, borders, guard)
        trained, before = [False] * len(tokens), dict(zip(borders, counts, strict=True))
        control = set(self.tokenizer.control.values())
        for begin, end, ends in reversed(answers):
            first = before[begin]
            if ends:  # up to the last control token that the template wrote there
                count = len(self._control.findall(text, begin, end))
                last = [i for i in range(first, len(tokens)) if tokens[i] in control][count - 1]
            else:  # the answer still has to learn to end
                last = before[end]
                tokens.insert(last, self.end_of_turn)
                trained.insert(last, False)
            trained[first : last + 1] = [True] * (last + 1 - first)
        return Example(tokens, trained)

    def _cut(self, text: str, borders: Sequence[int], guard: str) -> tuple[list[int], list[int]]:
        """Ids of a text, and how many of them lie before each border. Ids are those of the whole text, unless the
        tokenizer would fuse characters across a border: there it is cut, because generation starts there."""
        cuts, counts, ends = [0], [], [*borders, len(text)]
        ids = self._encode(text[: ends[0]], guard)
        for border, end in pairwise(ends):
            counts.append(len(ids))
            longer = [i for a, b in pairwise([*cuts, end]) for i in self._encode(text[a:b], guard)]
            if longer[: len(ids)] != ids:
                cuts.append(border)
                longer = ids + self._encode(text[border:end], guard)
            ids = longer
        self.cuts += len(cuts) > 1
        return ids, counts
