"""A conversation becomes ids and training flags, through the model's own chat template.

The mask is made here and nowhere else, together with the ids: `Chat._place_answers` finds each answer among the ids,
and `TokenizedChat.example` makes one flag a token of that. `data/batch.py` only shifts the flags by one.

The clever parts have files of their own: `answers.py` finds answers in the rendered text, `guard.py` keeps text that
spells a control token from becoming one, `borders.py` counts the ids before an answer.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lora.errors import BadInput
from lora.text import borders
from lora.text.answers import Rendered, Renderer, Rewritten
from lora.text.template import OUTPUT, ChatTemplate
from lora.text.tokenizer import Tokenizer

CONTROL_LIKE = re.compile(r"<\|[\w/-]{1,30}\|>|<｜[^<>｜]{1,30}｜>|<(?:start|end)_of_turn>")  # of any model


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
    missing: tuple[str, ...] = ()  # as in `Rendered`

    def example(self, everything: bool = False) -> Example:
        """The mask. Trained are the answers; with `everything`, every token but those of masked answers."""
        trained = [everything] * len(self.tokens)
        for begin, end in self.answers:
            trained[begin:end] = [True] * (end - begin)
        for begin, end in self.masked:
            trained[begin:end] = [False] * (end - begin)
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
        if end <= limit:
            return TokenizedChat(self.tokens[:end], answers, masked)
        tokens = [*self.tokens[: limit - 1], self.tokens[end - 1]]
        return TokenizedChat(tokens, [*answers[:-1], (begin, limit)], masked)


class WithoutRow(BadInput):
    """A text has a token that the tokenizer knows and the model has no embedding for: `what` says which."""

    def __init__(self, what: str):
        super().__init__(f"{what}. Leave it out")
        self.what = what


class Chat:
    """A tokenizer with a chat template: `prompt` for generation, `tokenize` for training, which agree by construction.

    `system`: a text to begin with where the messages have no system turn; None leaves that to the template (some
    insert one of their own); False has none at all. `control_tokens`: those that documents spell are read as tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        eos: Sequence[int] = (),
        system: str | bool | None = None,
        control_tokens: bool = False,
    ):
        self.control_tokens = control_tokens
        self.tokenizer, self.template, self.system = tokenizer, template, system
        self._renderer = Renderer(tokenizer, template, system)
        self.end_of_document = self.end_of_turn = next(iter(eos), None)
        if self.end_of_turn is None:
            raise BadInput(
                f"wrong model in {template.where}: no eos_token_id, so no answer could end. Add it to config.json"
            )
        self.cuts = self.guarded = self.split = self.joined = self.unclosed = 0
        self.end_is_written = False  # does the template itself end a turn?
        try:
            [probe] = self.tokenize([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
            self.end_of_turn, self.end_is_written = probe.tokens[probe.answers[0][1] - 1], True
        except Rewritten:  # it can still be talked to
            pass
        except WithoutRow as error:
            fix = "Give the tokenizer of this model"
            raise BadInput(f"chat template in {template.where}: {error.what}. {fix}") from None
        self.stops = {*eos, self.end_of_turn}
        self.cuts = 0  # texts in which the tokenizer would have fused an answer with the prompt before it
        self.guarded = 0  # conversations with text that spells a control token
        self.split = 0  # conversations of which the template rewrites earlier turns: an example for each answer
        self.joined = 0  # examples put together, because the template never writes prompt and answer so
        self.unclosed = 0  # those of them whose answer does not close the thought that its prompt opens
        self.documents = 0  # documents that spell a control token
        self.spelled, self.foreign = Counter(), Counter()  # which, and which of other models: in how many documents

    @property
    def own_system(self) -> str:
        """The system turn that the template inserts where the messages have none, as rendered; "" for none."""
        return self._renderer.own_system

    def prompt(self, messages: Sequence[dict], where: str = "this conversation") -> list[int]:
        """Ids of a conversation up to where the next answer begins. Raises BadInput, naming `where`."""
        try:
            return self.tokenize_prompt(messages).tokens
        except WithoutRow as error:
            raise BadInput(f"wrong prompt in {where}: {error}") from None

    def tokenize_prompt(self, messages: Sequence[dict]) -> TokenizedChat:
        """`prompt` as an example without an answer."""
        text = self._renderer.prompt(messages)
        self.guarded += bool(text.guard)
        ids = self._place_answers(text, borders.encode(text, self.tokenizer)).tokens
        if not ids:
            why = "it writes nothing for this conversation, so no answer can begin"
            raise BadInput(f"chat template in {self.template.where}: {why}. Repair or replace it")
        return TokenizedChat(ids, [], [])

    def tokenize(self, messages: Sequence[dict], train_on: str = "assistant") -> list[TokenizedChat]:
        """The examples of one conversation, as `tokenize_all`. Raises what is wrong with it."""
        [examples] = self.tokenize_all([messages], train_on)
        if isinstance(examples, BadInput):
            raise examples
        return examples

    def tokenize_all(
        self, conversations: Sequence[Sequence[dict]], train_on: str = "assistant"
    ) -> list[list[TokenizedChat] | BadInput]:
        """For each conversation its examples, or the BadInput that says why there are none.

        Trained are the answers that `train_on` chooses ("assistant": all but those with "train": False, "last", "all"),
        up to and including their end of turn. One example holds them all, unless the template rewrites earlier turns:
        then each answer has an example of its own. The ids before an answer are those of `prompt` for the turns before.
        """
        rendered = [_or_error(self._render, messages, train_on) for messages in conversations]
        texts = [text for found in rendered if isinstance(found, list) for text in found]
        encoded = iter(borders.encode_all(texts, self.tokenizer))
        results = []
        for messages, found in zip(conversations, rendered, strict=True):
            if isinstance(found, list):
                pairs = [(text, next(encoded)) for text in found]
                found = _or_error(self._place_all, pairs) if pairs else _or_error(self._document, messages)
            results.append(found)
        return results

    def _render(self, messages: Sequence[dict], train_on: str) -> list[Rendered]:
        """The texts of a conversation's examples; none for a document, which no template touches."""
        if messages and messages[0]["role"] == "text":
            return []
        texts = self._renderer.to_train(messages, train_on)
        self.guarded += bool(texts[0].guard)
        self.split += texts[0].alone and len(texts) > 1
        self.joined += sum(text.joined for text in texts)
        self.unclosed += sum(text.unclosed for text in texts)
        return texts

    def _place_all(self, pairs: Sequence[tuple[Rendered, borders.Encoded]]) -> list[TokenizedChat]:
        return [self._place_answers(text, encoded) for text, encoded in pairs]

    def _place_answers(self, text: Rendered, encoded: borders.Encoded) -> TokenizedChat:
        """Answers as places among the ids, from places in the text. An answer without an end of turn is given one."""
        self.cuts += encoded.cut
        before, tokens = dict(zip(text.borders, encoded.counts, strict=True)), encoded.tokens
        spans, added = {}, 0
        for answer in text.answers:
            first = before[answer.begin] + added
            if answer.ends:  # up to the last control token that the template wrote there
                last = first - 1
                for name in self.tokenizer.control_pattern.findall(text.text, answer.begin, answer.end):
                    try:
                        last = tokens.index(self.tokenizer.control[name], last + 1)
                    except ValueError:
                        why = f"the tokenizer makes no token of its {name}"
                        raise BadInput(f"chat template in {self.template.where}: {why}. Give --template") from None
            else:  # the answer still has to learn to end
                last = before[answer.end] + added
                tokens.insert(last, self.end_of_turn)
                added += 1
            spans[answer.turn] = (first, last + 1)
        self._check_rows(tokens)
        answers, masked = ([spans[turn] for turn in spans if turn in turns] for turns in (text.trained, text.masked))
        return TokenizedChat(tokens, answers, masked, text.missing)

    def _document(self, messages: Sequence[dict]) -> list[TokenizedChat]:
        """A plain document, all of it trained: what the tokenizer puts before any text, the text, the end."""
        text = messages[0]["content"]
        if len(text) > OUTPUT:
            raise BadInput(f"a document of over {OUTPUT >> 20} M characters. Cut it")
        spelled = self.tokenizer.control_pattern.findall(text)
        self.spelled.update(dict.fromkeys(spelled, 1))
        self.foreign.update(dict.fromkeys((s for s in CONTROL_LIKE.findall(text) if s not in spelled), 1))
        self.documents += bool(spelled)
        tokens = self.tokenizer.encode_document(text, self.control_tokens)
        ended = self.control_tokens and spelled and text.rstrip().endswith(spelled[-1])
        if not (ended and self.tokenizer.control[spelled[-1]] in self.stops) and tokens[-1:] != [self.end_of_document]:
            tokens.append(self.end_of_document)
        if len(tokens) < 2:
            raise BadInput("a document of which the tokenizer keeps nothing. Remove it")
        self._check_rows(tokens)
        return [TokenizedChat(tokens, [(0, len(tokens))], [])]

    def _check_rows(self, tokens: list[int]) -> None:
        if problem := self.tokenizer.without_row(tokens):
            raise WithoutRow(problem)


def _or_error(make, *given):
    """What `make` gives, or the BadInput that it raises: one wrong conversation does not hide the others."""
    try:
        return make(*given)
    except BadInput as error:
        return error
