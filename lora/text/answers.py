"""Where the answers stand in a rendered conversation.

An answer is what the template writes after the generation prompt of the turns before it, so training begins where
generation begins. Some templates rewrite earlier turns (they drop old thoughts, for example), so that not every answer
stands in the whole text as generation would write it: then each trained answer is rendered by itself, with the turns
before it and none behind. And some never write an answer as generation begins it (their prompt opens a thought, say,
which their whole leaves out): then the example is put together, from the prompt and from what stands in the whole.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from lora.errors import BadInput
from lora.text import thoughts
from lora.text.guard import GUARDS, free_characters, guard_messages
from lora.text.left_out import alike, left_out
from lora.text.template import ChatTemplate
from lora.text.tokenizer import Tokenizer

MARK = GUARDS[0]  # stands for a text where a template is tried


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
    joined: bool = False  # and put together, because the template writes the whole otherwise than it prompts
    unclosed: bool = False  # its prompt opens a thought, and its answer closes none
    missing: tuple[str, ...] = ()  # for each trained answer of which the template leaves something out: that, shortened

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
        return self._find_answers(*guard_messages(self._as_read(messages), self.tokenizer), generate=True)

    def to_train(self, messages: Sequence[dict], train_on: str) -> list[Rendered]:
        """One text that holds all trained answers; or one for each of them, where the template rewrites earlier turns.

        Raises Rewritten where an answer cannot be found at all.
        """
        messages = self._as_read(messages)
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
                text = self._find_answers(guarded[: i + 1], guard)
                if all(answer.turn != i for answer in text.answers):
                    text = self._join(guarded[: i + 1], guard, answers.index(i) + 1)
                texts.append(replace(text, trained=frozenset({i}), alone=True))
        for text in texts:
            text.missing = tuple(self._missing(text, guarded))
        return texts

    def _find_answers(self, messages: Sequence[dict], guard: str, generate: bool = False) -> Rendered:
        """Messages as rendered, with all answers that can be found in the text."""
        text, answers = self._render(messages, generate), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = self._render(messages[:i], generate=True)
                upto = text if i == len(messages) - 1 else self._render(messages[: i + 1])
                upto = upto.removesuffix(self.closing)
            except BadInput:  # the template takes the whole, but no such beginning of it
                continue
            if text.startswith(before) and text.startswith(upto) and len(upto) >= len(before):
                answers.append(self._answer(upto, len(before), i))
        return Rendered(text, answers, list(self.tokenizer.control_pattern.finditer(text)), guard)

    def _answer(self, text: str, begin: int, turn: int) -> Answer:
        """The answer that a text, `closing` apart, ends with."""
        *_, last = [None, *self.tokenizer.control_pattern.finditer(text, begin)]
        return Answer(begin, len(text), bool(last) and not text[last.end() :].strip(), turn)

    # ---- answers that the template writes otherwise than it prompts for them ----

    def _join(self, messages: Sequence[dict], guard: str, number: int) -> Rendered:
        """The last answer as generation would write it: the prompt, what the template writes between a question and an
        answer but for what the prompt has of it, the answer as it writes that, and its end of turn.

        Two marks, in place of question and answer, show which is which. Raises Rewritten without an answer.
        """
        *before, answer = messages
        if not before:
            why = "it writes no prompt for an answer without a turn before it"
            raise Rewritten(f"chat template in {self.template.where}: {why}. Begin with a turn of the user")
        prompt = self._find_answers(before, guard, generate=True)
        content = thoughts.behind(prompt.text, answer["content"])
        question, mark = free_characters(messages, 2)
        asked = [*before[:-1], *({**turn, "content": question} for turn in before[-1:])]
        prompted = self._render(asked, generate=True).rpartition(question)[2]
        written = self._between(asked, question, {**answer, "content": mark})
        if thoughts.KEY in answer and not written.startswith(prompted) and not thoughts.opens(prompt.text):
            answer = {"role": answer["role"], "content": content}  # its prompt has closed a thought already
            written = self._between(asked, question, {**answer, "content": mark})
        begin, found, end = self._render([*before, {**answer, "content": mark}]).rpartition(mark)
        if not found:
            why = f"it does not write answer {number}, nor what it is given in its place"
            raise Rewritten(f"chat template in {self.template.where}: {why}. Give another one by --template")
        whole, body = self._render([*before, {**answer, "content": content}]), content
        if whole.startswith(begin) and whole.endswith(end) and len(whole) >= len(begin + end):
            body = whole[len(begin) : len(whole) - len(end)]
        thought = thoughts.continued(prompt.text, content)
        text = prompt.text + (self._rest(prompted, written) + body if thought is None else thought) + end
        answers = [*prompt.answers, self._answer(text.removesuffix(self.closing), len(prompt.text), len(before))]
        found = Rendered(text, answers, list(self.tokenizer.control_pattern.finditer(text)), guard, joined=True)
        found.unclosed = thoughts.stays_open(prompt.text, text[len(prompt.text) :])
        return found

    def _between(self, asked: Sequence[dict], question: str, answer: dict) -> str:
        """What the template writes between a question and the content of its answer, both of them marks."""
        return self._render([*asked, answer]).rpartition(answer["content"])[0].rpartition(question)[2]

    def _rest(self, prompted: str, written: str) -> str:
        """What is written before an answer and not prompted for."""
        ours, theirs = ([*self.tokenizer.control_pattern.finditer(text)] for text in (prompted, written))
        if ours and [match[0] for match in ours] == [match[0] for match in theirs]:  # what differs before, may
            prompted, written = prompted[ours[-1].end() :], written[theirs[-1].end() :]
        common = written[: alike(prompted, written)]
        if common not in (prompted, written):  # no part of a tag or a word is common
            common = common[: 1 + max(common.rfind(c) for c in ">]:\n ")]
        return written.removeprefix(common)

    def _missing(self, text: Rendered, messages: Sequence[dict]) -> Iterator[str]:
        """For each trained answer of which the template leaves something out or changes it: that. Raises BadInput for
        one of which it writes nothing."""
        places = {answer.turn: (number, answer) for number, answer in enumerate(text.answers, 1)}
        for turn in sorted(text.trained):
            number, place = places.get(turn, (0, None))
            begin, end = (place.begin, place.end) if place else (0, len(text.text))
            written = self.tokenizer.control_pattern.sub(" ", text.text[begin:end])
            if place and not written.strip():
                why = f"it writes nothing for answer {number}"
                raise BadInput(f"chat template in {self.template.where}: {why}. Change the turn, or give --template")
            values = (value for key, value in messages[turn].items() if key != "role")
            if missing := next(filter(None, (left_out(value, text.text[:begin], written) for value in values)), ""):
                yield missing.replace(text.guard, "")

    # ---- what a template writes behind the last turn only, and how it reads thoughts ----

    @cached_property
    def closing(self) -> str:
        """What the template writes behind the end of the last turn only: Phi's `<|end|><|endoftext|>` ends a turn and a
        text. It is no part of an answer, since a conversation goes on without it."""
        talk = [{"role": role, "content": MARK} for role in ("user", "assistant")]
        try:
            text, longer = self.template.render(talk), self.template.render([*talk, talk[0]])
        except BadInput:
            return ""
        controls = self.tokenizer.control_pattern.finditer(text)
        ends = [match.end() for match in controls if match.start() > text.rfind(MARK) >= 0]
        last = max((end for end in ends if longer.startswith(text[:end])), default=len(text))
        return "" if longer.startswith(text) else text[last:]

    def _as_read(self, messages: Sequence[dict]) -> Sequence[dict]:
        """The messages with the system turn that is set, and thoughts where the template looks for them."""
        messages = self._with_system(messages)
        return [thoughts.apart(message) for message in messages] if self._thinks_twice else messages

    @cached_property
    def _thinks_twice(self) -> bool:
        """Does the template write an empty thought before one in the content, though it reads thoughts beside it?"""
        user, answer = ({"role": role, "content": MARK} for role in ("user", "assistant"))
        inside = {**answer, "content": f"<think>\n{thoughts.KEY}\n</think>\n\n{MARK}"}
        try:
            begin, found, _ = self.template.render([user, inside]).rpartition(inside["content"])
            beside = self.template.render([user, thoughts.apart(inside)])
        except BadInput:
            return False
        return bool(found) and bool(thoughts.EMPTY.search(begin)) and thoughts.KEY in beside

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
