"""A chat template: a jinja program that writes a conversation as the model was taught to read it."""

import json
from collections.abc import Callable, Sequence
from datetime import date
from functools import cached_property

import jinja2
from jinja2 import meta, nodes

from lora.errors import BadInput, Refused
from lora.text import sandbox, thoughts
from lora.text.sandbox import why

OUTPUT = 16 * 2**20  # characters that one rendering may write
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


GIVEN = {"messages", "add_generation_prompt", "tools", "documents", "raise_exception", "strftime_now"}
ASKS = ("defined", "undefined", "default", "d")
PYTHON = {"True": True, "False": False, "None": None}  # "False" as a text would be true


def is_switch(name: str) -> bool:
    """May --template-arg set it? Not what every rendering is given, nor the special tokens."""
    return name.isidentifier() and name not in GIVEN and not name.endswith("_token")


def is_argument(text: str) -> bool:
    """Is it NAME=VALUE, for a switch?"""
    name, sign, _ = text.partition("=")
    return bool(sign) and is_switch(name)


def read_arguments(texts: Sequence[str] | None) -> dict:
    """`[enable_thinking=false]` as a dict: values are JSON, or as Python spells it, or else text. Raises BadInput."""
    found = {}
    for name, _, text in (text.partition("=") for text in texts or ()):
        if name in found:
            raise BadInput(
                f"contradiction in the command line: --template-arg sets {name} twice. Leave out one of them"
            )
        found[name] = PYTHON[text] if text in PYTHON else _json_or_text(text)
    return found


def spell_arguments(arguments: dict) -> list[str] | None:
    """The texts that `read_arguments` reads so."""
    return [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items()] or None


def _json_or_text(text: str) -> object:
    try:
        return json.loads(text, parse_constant=lambda word: word)  # NaN is text
    except (ValueError, RecursionError):
        return text


class ChatTemplate:
    """A jinja template with the special token strings it may use, and what switches of its own are set to
    (`enable_thinking`). `where` names its file in errors, `today` is what `strftime_now` believes.

    Raises BadInput for a switch that it has not.
    """

    def __init__(
        self,
        source: str,
        tokens: dict[str, str] | None = None,
        where: str = "chat template",
        today: date = FROZEN_DATE,
        arguments: dict | None = None,
    ):
        self.source, self.tokens, self.where, self.arguments = source, tokens or {}, where, arguments or {}
        self._environment = sandbox.environment(today)
        self._template = self._compile(self._environment.from_string)
        if unknown := self.arguments and self.arguments.keys() - self.switches:
            has = f"it has {', '.join(sorted(self.switches))}" if self.switches else "it has none"
            raise BadInput(f"unknown --template-arg in {where}: no {', '.join(sorted(unknown))}; {has}. Leave it out")

    @cached_property
    def switches(self) -> set[str]:
        """The names that the template reads and nobody gives: what `arguments` may set."""
        tree, undeclared = self._undeclared
        tests = [*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter)]
        names = {word: {n.name for n in tree.find_all(nodes.Name) if n.ctx == word} for word in ("store", "param")}
        asked = {getattr(n.node, "name", "") for n in tests if n.name in ASKS} - names["param"]  # before it sets them
        its_own = names["store"] - asked
        return {name for name in undeclared - its_own - self._environment.globals.keys() if is_switch(name)}

    def uses(self, name: str) -> bool:
        """Does the template read this name?"""
        return name in self._undeclared[1]

    @cached_property
    def _undeclared(self) -> tuple[nodes.Template, set[str]]:
        """The template as jinja reads it, and the names in it that it does not set first."""

        def find(source: str):
            tree = self._environment.parse(source)
            return tree, meta.find_undeclared_variables(tree)

        return self._compile(find)

    def _compile(self, make: Callable):
        """What `make` makes of the source, within the limits: jinja computes constants already when it compiles."""
        try:
            with sandbox.limits():
                return make(self.source)
        except sandbox.Forbidden as error:
            raise self._refused(error) from None
        except Exception as error:
            raise BadInput(f"broken chat template in {self.where}: {why(error)}. Repair or replace it") from None

    def render(self, messages: Sequence[dict], generate: bool = False) -> str:
        """The conversation as one string; with `generate` it ends where an answer begins.

        Raises BadInput with the order of roles; Refused where the template breaks out of the sandbox or its limits.
        """
        roles = "/".join(message["role"] for message in messages[:8])
        if sum(len(text) for m in messages for text in m.values() if isinstance(text, str)) > OUTPUT // 2:
            raise BadInput(f"a conversation of over {OUTPUT >> 21} M characters. Cut it")
        messages = [thoughts.placed(message, self.source) for message in messages]
        for key in {key for message in messages for key in message} - {"role", "content", "train"}:
            if key not in self.source:
                fix = "Put it into the content, or give another one by --template"
                raise BadInput(f"chat template in {self.where}: it never reads {key} of a message. {fix}")
        try:
            with sandbox.limits():
                given = self.tokens | self.arguments
                text = self._template.render(
                    messages=messages, tools=None, documents=None, add_generation_prompt=generate, **given
                )
                text.encode()  # half a surrogate pair is no character
        except sandbox.Forbidden as error:
            raise self._refused(error) from None
        except (sandbox.TemplateError, jinja2.TemplateError, RecursionError) as error:
            raise BadInput(f"chat template in {self.where}: {why(error)} (turns: {roles}). Change the turns") from None
        except Exception as error:  # of any kind: nothing but the template's own code runs here
            raise BadInput(f"chat template in {self.where}: {why(error)} (turns: {roles}). Repair it") from None
        if len(text) > OUTPUT:
            raise self._refused(f"it wrote over {OUTPUT >> 20} MB")
        return text

    def _refused(self, reason: object) -> Refused:
        return Refused(f"chat template in {self.where}: {reason}. Replace it by one you trust")
