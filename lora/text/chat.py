"""Messages to ids and back to what is trained of them, through the model's own chat template.

What the messages say stays text: a control string inside a message (`<|im_end|>`) cannot forge a turn. And training
sees what generation sees: the ids before an answer are those that `generate.py` begins that answer with.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from lora.errors import BadInput
from lora.text.template import OUTPUT, ChatTemplate
from lora.text.tokenizer import Tokenizer

GUARDS = [chr(c) for c in range(0xFDD0, 0xFDF0)]  # "noncharacters": no tokenizer or template has a use for them


class Example(NamedTuple):
    """`tokens[i]` is trained where `trained[i]`; both have one entry a token."""

    tokens: list[int]
    trained: list[bool]


class TokenizedChat(NamedTuple):
    """Ids of a conversation, and where in it are answers to train, and answers that must not be: begin and end, the
    end of turn included."""

    tokens: list[int]
    answers: list[tuple[int, int]]
    masked: list[tuple[int, int]]

    def example(self, everything: bool = False) -> Example:
        """Trained are the answers; or every token but those of masked answers."""
        trained = [everything] * len(self.tokens)
        for spans, flag in ((self.answers, True), (self.masked, False)):
            for begin, end in spans:
                trained[begin:end] = [flag] * (end - begin)
        return Example(self.tokens, trained)

    def within(self, limit: int) -> "TokenizedChat | None":
        """At most `limit` tokens of it, ending with an answer's end of turn; None where no answer is left."""
        if len(self.tokens) <= limit:
            return self
        answers = [(begin, end) for begin, end in self.answers if begin < limit - 1]  # with a token of its own
        if not answers:
            return None
        begin, end = answers[-1]
        masked = [span for span in self.masked if span[0] < begin]
        if end > limit:
            return TokenizedChat(
                [*self.tokens[: limit - 1], self.tokens[end - 1]], [*answers[:-1], (begin, limit)], masked
            )
        return TokenizedChat(self.tokens[:end], answers, masked)


class _Answer(NamedTuple):
    """Where an answer begins and ends in a rendered text, whether the template ends it, and which turn it is."""

    begin: int
    end: int
    ends: bool
    turn: int


class _Text(NamedTuple):
    """A rendered conversation, its answers, the turns to train and not to train; `guard` breaks the control strings of
    its messages ("" where there are none)."""

    text: str
    answers: list[_Answer]
    guard: str
    trained: frozenset[int] = frozenset()
    masked: frozenset[int] = frozenset()

    @property
    def borders(self) -> list[int]:
        """Where the ids are cut if the tokenizer would fuse what is before with what comes after."""
        return [border for a in self.answers for border in ([a.begin] if a.ends else [a.begin, a.end])]


def _before(starts: list[int], border: int) -> int:
    """Where the last control token before a border starts; 0 for none."""
    number = bisect_left(starts, border)
    return starts[number - 1] if number else 0


class Rewritten(BadInput):
    """A template that writes a conversation and its beginning so differently that an answer cannot be found."""


class Chat:
    """A tokenizer with a chat template: `prompt` for generation, `tokenize` for training, which agree by construction.

    `system`: a text to begin with where the messages have no system turn; None leaves that to the template (some
    insert one of their own); False has none at all.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, eos: Sequence[int] = (), system=None):
        self.tokenizer, self.template, self.system = tokenizer, template, system
        strings = sorted(tokenizer.control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, strings)) or r"(?!)")
        self.end_of_document = self.end_of_turn = next(iter(eos), None)
        if self.end_of_turn is None:
            raise BadInput(
                f"wrong model in {template.where}: no eos_token_id, so no answer could end. Add it to config.json"
            )
        self.cuts = self.guarded = self.split = 0
        try:
            [probe] = self.tokenize([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
            self.end_of_turn = probe.tokens[probe.answers[0][1] - 1]
        except Rewritten:  # it can still be talked to
            pass
        self.stops = {*eos, self.end_of_turn}
        self.cuts = 0  # texts in which the tokenizer would have fused an answer with the prompt before it
        self.guarded = 0  # conversations with text that spells a control token
        self.split = 0  # conversations of which the template rewrites earlier turns: an example for each answer

    # ---- rendering ----

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

    def _guard(self, messages: Sequence[dict]) -> tuple[list[dict], str]:
        """Messages, the system text of this chat among them, whose control strings are broken by a guard character;
        and that character ("" where none is)."""
        messages = [{"role": m["role"], "content": m["content"]} for m in messages]
        if self.system and not (messages and messages[0]["role"] == "system"):
            messages = [{"role": "system", "content": self.system}, *messages]
        texts = [message["content"] for message in messages]
        if not any(self._control.search(text) for text in texts):
            return messages, ""
        guard = next((g for g in GUARDS if not any(g in text for text in texts)), "")
        if not guard:
            raise BadInput("wrong text in the messages: a control token and all of U+FDD0 to U+FDEF. Remove them")
        broken = [self._control.sub(lambda m: m[0][0] + guard + m[0][1:], text) for text in texts]
        return [{**message, "content": text} for message, text in zip(messages, broken, strict=True)], guard

    def _answer(self, text: str, messages: Sequence[dict], i: int) -> _Answer | None:
        """Turn `i` in a rendered text: what the template writes after the generation prompt for the turns before."""
        before = self._render(messages[:i], generate=True)
        upto = text if i == len(messages) - 1 else self._render(messages[: i + 1])
        if not (text.startswith(before) and text.startswith(upto) and len(upto) >= len(before)):
            return None
        *_, last = [None, *self._control.finditer(upto, len(before))]
        return _Answer(len(before), len(upto), bool(last) and not upto[last.end() :].strip(), i)

    def _text(self, messages: Sequence[dict], guard: str, generate: bool = False) -> _Text:
        """Messages as rendered, with all answers that can be found in the text."""
        text = self._render(messages, generate)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return _Text(text, [answer for i in turns if (answer := self._answer(text, messages, i))], guard)

    def _texts(self, messages: Sequence[dict], train_on: str) -> list[_Text]:
        """One rendered text that holds all trained answers, or one for each where the template rewrites earlier turns.

        Raises Rewritten where even the last turn of a conversation does not begin with its generation prompt.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        masked = {i for i in answers if messages[i].get("train") is False}
        trained = [i for i in answers if i not in masked]
        trained = trained[-1:] if train_on == "last" else trained
        guarded, guard = self._guard(messages)
        shift = len(guarded) - len(messages)  # 1 where the system text of this chat came before them
        trained, masked = {i + shift for i in trained}, frozenset(i + shift for i in masked)
        whole = self._text(guarded, guard)
        found = {answer.turn for answer in whole.answers}
        if train_on == "all" and not masked <= found:
            why = 'an answer with "train": false is rewritten, so it cannot be left out of --train-on all'
            raise Rewritten(f"chat template in {self.template.where}: {why}. Give another one by --template")
        if train_on == "all" or trained <= found:
            return [self._check(whole._replace(trained=frozenset(trained), masked=masked))]
        texts = []
        for i in sorted(trained):
            texts.append(self._check(self._text(guarded[: i + 1], guard)._replace(trained=frozenset({i}))))
            if all(answer.turn != i for answer in texts[-1].answers):
                why = f"answer {answers.index(i - shift) + 1} does not begin with the prompt that generation gives"
                raise Rewritten(f"chat template in {self.template.where}: {why}. Give another one by --template")
        self.split += 1
        return texts

    def _check(self, text: _Text) -> _Text:
        """The text, if there is something to learn in each of its trained answers."""
        for number, answer in enumerate(text.answers, 1):
            if answer.turn in text.trained and answer.begin == answer.end:
                why = f"it writes nothing for answer {number}"
                raise BadInput(f"chat template in {self.template.where}: {why}. Change the turn, or give --template")
        return text

    # ---- ids ----

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

    def _counts(self, text: _Text, tokens: list[int], parts: list[list[int]], starts: list[int]) -> list[int] | None:
        """How many ids lie before each border, from the ids between it and the last control token before it; None
        where the tokenizer fuses characters across a border."""
        places, last = {0: 0}, -1  # where a control token starts in the text -> its place among the ids
        for start in starts:
            name = self._control.match(text.text, start)[0]
            try:
                last = tokens.index(self.tokenizer.control[name], last + 1)
            except ValueError:  # not where the tokenizer sees it
                return None
            places[start] = last
        counts = []
        for border, ids in zip(text.borders, parts, strict=True):
            begin = places[_before(starts, border)]
            counts.append(begin + len(ids))
            if tokens[begin : counts[-1]] != ids:
                return None
        return counts

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

    def _laid(self, text: _Text, tokens: list[int], counts: Sequence[int]) -> TokenizedChat:
        """Answers as places among the ids, from places in the text. An answer without an end of turn is given one."""
        before, spans, added = dict(zip(text.borders, counts, strict=True)), {}, 0
        for a in text.answers:
            first = before[a.begin] + added
            if a.ends:  # up to the last control token that the template wrote there
                last = first - 1
                for name in self._control.findall(text.text, a.begin, a.end):
                    try:
                        last = tokens.index(self.tokenizer.control[name], last + 1)
                    except ValueError:
                        why = f"the tokenizer makes no token of its {name}"
                        raise BadInput(f"chat template in {self.template.where}: {why}. Give --template") from None
            else:  # the answer still has to learn to end
                last = before[a.end] + added
                tokens.insert(last, self.end_of_turn)
                added += 1
            spans[a.turn] = (first, last + 1)
        return TokenizedChat(
            tokens, *([spans[i] for i in spans if i in turns] for turns in (text.trained, text.masked))
        )

    def _document(self, text: str) -> TokenizedChat:
        """A plain document, all of it trained: what the tokenizer puts before any text, the text, the end."""
        if len(text) > OUTPUT:
            raise BadInput(f"a document of over {OUTPUT >> 20} M characters. Cut it")
        self.guarded += bool(self._control.search(text))
        tokens = self.tokenizer.encode_document(text)
        if tokens[-1:] != [self.end_of_document]:
            tokens.append(self.end_of_document)
        if len(tokens) < 2:
            raise BadInput("a document of which the tokenizer keeps nothing. Remove it")
        return TokenizedChat(tokens, [(0, len(tokens))], [])

    # ---- what the scripts call ----

    def prompt(self, messages: Sequence[dict]) -> list[int]:
        """Ids of a conversation up to where the next answer begins."""
        messages, guard = self._guard(messages)
        text = self._text(messages, guard, generate=True)
        ids = self._laid(text, *self._cut(text.text, text.borders, guard)).tokens
        if not ids:
            why = "it writes nothing for this conversation, so no answer can begin"
            raise BadInput(f"chat template in {self.template.where}: {why}. Repair or replace it")
        return ids

    def tokenize(self, messages: Sequence[dict], train_on: str = "assistant") -> list[TokenizedChat]:
        """The examples of one conversation, as `tokenize_all`. Raises what is wrong with it."""
        [laid] = self.tokenize_all([messages], train_on)
        if isinstance(laid, BadInput):
            raise laid
        return laid

    def tokenize_all(self, conversations: Sequence[Sequence[dict]], train_on: str = "assistant") -> list:
        """For each conversation its examples, or the BadInput that says why there are none.

        Trained are the answers that `train_on` chooses ("assistant": all but those with "train": False, "last", "all"),
        up to and including their end of turn. One example holds them all, unless the template rewrites earlier turns:
        then each answer has an example of its own. The ids before an answer are those of `prompt` for the turns before.
        """
        results, texts = [], []
        for messages in conversations:
            try:
                if messages and messages[0]["role"] == "text":
                    results.append([self._document(messages[0]["content"])])
                    continue
                found = self._texts(messages, train_on)
                self.guarded += bool(found[0].guard)
                results.append(found)
                texts += [text for text in found if not text.guard]
            except BadInput as error:
                results.append(error)
        # most texts have no control strings and no fused borders: they are encoded together, on all cores
        starts = [[match.start() for match in self._control.finditer(t.text)] for t in texts]
        pieces = [
            piece
            for t, at in zip(texts, starts, strict=True)
            for piece in (t.text, *(t.text[_before(at, border) : border] for border in t.borders))
        ]
        starts = iter(starts)
        encoded = iter(self.tokenizer.encode_all(pieces))
        for i, found in enumerate(results):
            if not isinstance(found, list) or not isinstance(found[0], _Text):
                continue
            examples = []
            for text in found:
                tokens, prefixes = None, []
                if not text.guard:
                    tokens, prefixes, at = next(encoded), [next(encoded) for _ in text.borders], next(starts)
                    counts = self._counts(text, tokens, prefixes, at)
                if tokens is None or counts is None:
                    tokens, counts = self._cut(text.text, text.borders, text.guard)
                examples.append((text, tokens, counts))
            try:
                results[i] = [self._laid(*example) for example in examples]
            except BadInput as error:
                results[i] = error
        return results
