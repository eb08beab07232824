"""Where the answers stand in a rendered conversation.

An answer is what the template writes after the generation prompt of the turns before it, so training begins where
generation begins. Some templates rewrite earlier turns (they drop old thoughts, for example), so that not every answer
stands in the whole text as generation would write it: then each trained answer is rendered by itself, with the turns
before it and none behind.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from lora.errors import BadInput
from lora.text.guard import guard_messages
from lora.text.template import ChatTemplate
from lora.text.tokenizer import Tokenizer


class Answer(NamedTuple):
    """An answer is `text[begin:end]`; `ends`: the template writes an end of turn behind it; `turn`: its message."""

    begin: int
    end: int
    ends: bool
    turn: int


@dataclass
class Rendered:
    """A conversation as text: its answers, the turns to train and not to train, the control strings that the template
    wrote, and the character that breaks those of its messages ("" where there are none)."""

    text: str
    answers: list[Answer]
    controls: list[re.Match]
    guard: str = ""
    trained: frozenset[int] = frozenset()
    masked: frozenset[int] = frozenset()
    alone: bool = False  # made for one answer, without the turns behind it

    @property
    def borders(self) -> list[int]:
        """Where the ids are cut if the tokenizer would fuse what is before with what comes after."""
        return [border for a in self.answers for border in ([a.begin] if a.ends else [a.begin, a.end])]


class Rewritten(BadInput):
    """A template that writes a conversation and its beginning so differently that an answer cannot be found."""


class Renderer:
    """Renders conversations through a template and finds their answers; `system` as in `Chat`."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, system: str | bool | None):
        self.tokenizer, self.template, self.system = tokenizer, template, system

    def prompt(self, messages: Sequence[dict]) -> Rendered:
        """The conversation up to where the next answer begins."""
        return self._find_answers(*guard_messages(self._with_system(messages), self.tokenizer), generate=True)

    def to_train(self, messages: Sequence[dict], train_on: str) -> list[Rendered]:
        """One text that holds all trained answers; or one for each of them, where the template rewrites earlier turns.

        Raises Rewritten where even the last turn of a conversation does not begin with its generation prompt.
        """
        messages = self._with_system(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        masked = frozenset(i for i in answers if messages[i].get("train") is False)
        trained = [i for i in answers if i not in masked]
        trained = trained[-1:] if train_on == "last" else trained
        guarded, guard = guard_messages(messages, self.tokenizer)
        whole = self._find_answers(guarded, guard)
        found = {answer.turn for answer in whole.answers}
        if train_on == "all" and not masked <= found:
            why = 'an answer with "train": false is rewritten, so it cannot be left out of --train-on all'
            raise Rewritten(f"chat template in {self.template.where}: {why}. Give another one by --template")
        if train_on == "all" or found.issuperset(trained):
            texts = [replace(whole, trained=frozenset(trained), masked=masked)]
        else:
            texts = []
            for i in trained:
                text = replace(self._find_answers(guarded[: i + 1], guard), trained=frozenset({i}), alone=True)
                texts.append(text)
                if all(answer.turn != i for answer in text.answers):
                    why = f"answer {answers.index(i) + 1} does not begin with the prompt that generation gives"
                    raise Rewritten(f"chat template in {self.template.where}: {why}. Give another one by --template")
        for text in texts:
            for number, answer in enumerate(text.answers, 1):
                if answer.turn in text.trained and answer.begin == answer.end:
                    why = f"it writes nothing for answer {number}"
                    raise BadInput(
                        f"chat template in {self.template.where}: {why}. Change the turn, or give --template"
                    )
        return texts

    def _find_answers(self, messages: Sequence[dict], guard: str, generate: bool = False) -> Rendered:
        """Messages as rendered, with all answers that can be found in the text."""
        text, control = self._render(messages, generate), self.tokenizer.control_pattern
        answers = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], generate=True)
            upto = text if i == len(messages) - 1 else self._render(messages[: i + 1])
            if text.startswith(before) and text.startswith(upto) and len(upto) >= len(before):
                *_, last = [None, *control.finditer(upto, len(before))]
                ends = bool(last) and not upto[last.end() :].strip()
                answers.append(Answer(len(before), len(upto), ends, i))
        return Rendered(text, answers, list(control.finditer(text)), guard)

    # ---- system turns: the one that is set, and the one that a template inserts by itself ----

    def _with_system(self, messages: Sequence[dict]) -> Sequence[dict]:
        has_system = bool(messages) and messages[0]["role"] == "system"
        return [{"role": "system", "content": self.system}, *messages] if self.system and not has_system else messages

    def _render(self, messages: Sequence[dict], generate: bool = False) -> str:
        has_system = bool(messages) and messages[0]["role"] == "system"
        text = self.template.render(messages, generate)
        if self.system is False and not has_system and self.own_system:
            bos = self.template.tokens.get("bos_token", "")
            if text.startswith((self.own_system, bos + self.own_system)):
                return text.replace(self.own_system, "", 1)
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
        if alone.startswith(inserted):  # what begins every conversation is no system turn
            return ""
        bos = self.template.tokens.get("bos_token", "")
        return inserted if rest.startswith(bos) else inserted.removeprefix(bos)  # some begin every turn with it
