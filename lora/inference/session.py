"""Talk to a model, as its adapter was trained.

chat = lora.open("smollm2-135m-instruct", adapter="weights/heron")
chat("Who are you?")                                  the answer; the conversation goes on with the next call
chat.score([*chat.messages])                          with a reward model: a number for a conversation
for piece in chat.stream("And who made you?"): ...    the answer as it comes
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import date as Date
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from lora import device as machine
from lora import pretrained
from lora.adapter import passport, store, value_head
from lora.adapter.inject import lora_layers
from lora.adapter.merge import changes_a_weight
from lora.errors import BadInput, collecting, say
from lora.inference import several, unpacked
from lora.inference.generate import GREEDY, Sampling, generate_all, stream_tokens
from lora.inference.prompts import encode
from lora.network.decoder import Model
from lora.pretrained import default_model
from lora.text.chat import Chat
from lora.text.template import FROZEN_DATE, spell_arguments
from lora.text.tokenizer import Stream, Tokenizer


class Session:
    """A model, its chat template, and a conversation, `messages`.

    A prompt is a text, which goes on with the conversation, or a list of messages, a conversation of its own. What the
    keywords do not say (`max_new_tokens` and the fields of `Sampling`) is as the session was opened.
    """

    def __init__(
        self,
        model: Model,
        chat: Chat,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 256,
        before: Callable[[], None] = lambda: None,
    ):
        """`before` is called before each answer: where sessions share a model, it puts the adapter in place."""
        self.model, self.chat, self.sampling, self.max_new_tokens = model, chat, sampling, max_new_tokens
        self.before = before
        self.messages: list[dict] = []

    def __call__(self, prompt: str | Sequence[dict], **how) -> str:
        """The whole answer, as `stream` yields it."""
        return "".join(self.stream(prompt, **how))

    def stream(
        self,
        prompt: str | Sequence[dict],
        where: str = "this conversation",
        max_new_tokens: int | None = None,
        **sampling,
    ) -> Iterator[str]:
        """Yield the answer in pieces. It is part of the conversation once it is whole; one broken off is forgotten.

        Raises BadInput, naming `where`, for a prompt that is too long for the model.
        """
        goes_on = isinstance(prompt, str)
        messages = [*self.messages, {"role": "user", "content": prompt}] if goes_on else list(prompt)
        ids, sampling = self.encode(messages, where), replace(self.sampling, **sampling)
        longest = max_new_tokens or self.max_new_tokens

        def pieces() -> Iterator[str]:
            self.before()
            answer = ""
            tokens = stream_tokens(self.model, [ids], self.chat.stops, longest, sampling)
            for piece in decode(self.chat.tokenizer, (token for _, token in tokens)):
                answer += piece
                yield piece
            if goes_on:
                self.messages = [*messages, {"role": "assistant", "content": answer}]

        return pieces()

    def reset(self) -> None:
        """Begin a new conversation."""
        self.messages = []

    def encode(self, prompt: str | Sequence[dict], where: str = "this conversation") -> list[int]:
        """The ids of a conversation of its own, up to where the answer begins. Raises BadInput, naming `where`."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return encode(self.chat, self.model.config.max_position_embeddings, messages, where)

    @torch.no_grad()
    def score(self, messages: Sequence[dict], where: str = "this conversation") -> float:
        """What a reward model says of a conversation that ends with an answer, read at its end of turn as in training.

        Raises BadInput where there is no value head, or no answer, or more than the model has room for.
        """
        self.before()
        head, limit = value_head.of(self.model), self.model.config.max_position_embeddings
        if head is None:
            fix = "Open an adapter or a model that was trained with --method reward"
            raise BadInput(f"no value head in this model: it scores nothing. {fix}")
        if not messages or messages[-1]["role"] != "assistant":
            raise BadInput(f"no answer in {where}: its last turn is not the assistant's. Add the answer to be scored")
        [chat] = self.chat.tokenize(messages, "last")
        end = chat.answers[-1][1]
        if end > limit:
            raise BadInput(f"too long in {where}: {end} tokens, the model has room for {limit}. Shorten it")
        tokens = torch.tensor(chat.tokens[:end], device=self.model.device)
        return head(self.model.trunk(tokens)[-1:]).item()

    def answers(self, prompts: Sequence[list[int]], batch_size: int = 16, doing: str = "answering") -> Iterator[str]:
        """Yield the answers to several prompts, as `encode` gives them, in batches; number i uses seed + i."""
        self.before()
        with tqdm(total=len(prompts), desc=doing, unit="prompt", disable=None) as bar:
            how = (self.chat.stops, self.max_new_tokens, self.sampling, batch_size, bar)
            yield from map(self.chat.tokenizer.decode, generate_all(self.model, prompts, *how))


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens as it becomes certain; a character may need several tokens."""
    decoder = Stream(tokenizer)
    yield from filter(None, map(decoder.push, tokens))
    if rest := decoder.end():
        yield rest


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_session(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    quant: str | None = None,
    system: str | bool | None = None,
    template: str | None = None,
    template_args: dict | None = None,
    date: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    verify: bool = True,
    max_new_tokens: int = 256,
    **sampling,
) -> Session:
    """A model that is ready to talk, with an adapter or without one: merged into plain Linears where there is room.

    `model` is a folder, a hub id or a .gguf file: by default the base that the adapter remembers, or else the default
    model. `system`, `template`, `template_args` (as {"enable_thinking": False}) and `date` are by default those of the
    training (see `load_chat`); `sampling` are fields of `Sampling`. Raises LoraError for what cannot be used and, if
    `verify`, for another base than the adapter's.
    """
    how = Sampling(**sampling)
    name = str(model or (passport.base_of(adapter) if adapter else default_model.NAME))
    base = pretrained.find(name, passport.packing(quant, adapter))
    say(f"model    {base.described}")
    place = machine.choose_device(device)
    chat = load_chat(base, adapter, system, template, date, verify, template_args)
    net = pretrained.load_model(base, machine.choose_dtype(dtype, place)[0], place)
    if adapter:
        store.load(net, adapter, read=base.read)
        if verify:
            layers = lora_layers(net)
            passport.verify(adapter, base, layers, passport.held_or_read(base, layers))
        warn_if_unchanged(net, adapter)
        say(f"adapter  {adapter}")
    unpacked.unpack(net, machine.free_memory(place))  # plain Linears: the adapter costs nothing from here on
    _tell_head(net, adapter or base.name)
    return Session(net, chat, how, max_new_tokens)


def open_sessions(
    model: str | None,
    adapters: Sequence[str],
    asked: Sequence[tuple[list[dict], str]] = (),
    *,
    quant: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    verify: bool = True,
    system: str | bool | None = None,
    template: str | None = None,
    template_args: dict | None = None,
    date: str | None = None,
    max_new_tokens: int = 256,
    **sampling,
) -> dict[str, Session]:
    """Sessions of a base and of each adapter of it, by name, as `open_session` opens one; all share one model.

    Raises BadInput with everything that is wrong with the adapters and with the prompts that will be `asked`, which are
    (messages, where), before the model is loaded.
    """
    how = Sampling(**sampling), max_new_tokens
    told = {"system": system, "template": template, "template_args": template_args, "date": date}
    base = several.find_base(model, quant, adapters, not verify)
    say(f"model    {base.described}")
    place = machine.choose_device(device)
    empty = pretrained.empty_model(base)
    names, chats, problems = several.column_names(adapters), {}, []
    for name, adapter in names.items():
        with collecting(problems):
            chats[name] = try_adapter(empty, name, adapter, base, verify, **told)
            for messages, where in asked:
                encode(chats[name], empty.config.max_position_embeddings, messages, where)
    if problems:
        raise BadInput(*dict.fromkeys(problems))
    net = pretrained.load_model(base, machine.choose_dtype(dtype, place)[0], place)
    merged = unpacked.unpack(net, machine.free_memory(place), copies=2)  # the base's own, and the sums of one adapter
    sets = several.Several(net)
    for name, adapter in names.items():
        if adapter:
            sets.add(name, adapter, base.read)
            sets.switch(name)
            warn_if_unchanged(net, adapter)
            _tell_head(net, adapter)
    return {name: Session(net, chat, *how, partial(sets.switch, name, merged)) for name, chat in chats.items()}


def _tell_head(model: Model, name: str | Path) -> None:
    if value_head.of(model) and not passport.of_policy(name):
        say(f"note     {name} is a reward model: evaluate.py, or score() in Python, has its scores")


def try_adapter(
    empty: nn.Module, name: str, adapter: str | None, base: pretrained.ModelFiles, verify: bool = True, **told
) -> Chat:
    """Try an adapter on the base on `meta`, and return its chat, `told` as `load_chat` is. Raises BadInput where it
    does not fit."""
    if adapter:
        say(f"adapter  {name}: {adapter}")
        several.dry_load(empty, adapter, base, verify)
    return load_chat(base, adapter, verify=verify, **told)


def load_chat(
    base: pretrained.ModelFiles,
    adapter: str | Path | None = None,
    system: str | bool | None = None,
    template: str | None = None,
    date: str | None = None,
    verify: bool = True,
    template_args: dict | None = None,
    control_tokens: bool = False,
) -> Chat:
    """The chat as an adapter was trained with it, unless arguments say otherwise.

    `system`: a text, False for none at all, None for that of the training. `template_args` are added to those of the
    training, which do not hold for another `template`. Raises BadInput for a tokenizer whose ids stand for other tokens
    than in training, unless not `verify`.
    """
    trained = ((passport.read(adapter) if adapter else None) or {}).get("chat", {})
    if system is None:
        system = trained.get("system")
        if isinstance(system, str):
            say(f"system   as in training: {' '.join(system.split())[:100]}")
    remembered = {} if template else trained.get("template_args", {})
    if remembered:
        say(f"template as in training: {' '.join(spell_arguments(remembered))[:100]}")
    template_args = {**remembered, **(template_args or {})}
    template = template or (passport.template_of(adapter) if adapter else None)
    today = Date.fromisoformat(date or trained.get("date") or str(FROZEN_DATE))
    control_tokens = control_tokens or trained.get("control_tokens", False)
    chat = pretrained.load_chat(base, system, template, today, template_args, control_tokens)
    if adapter:
        passport.verify_chat(adapter, base.name, chat.tokenizer, chat.template.source, not verify)
    return chat


def warn_if_unchanged(model: Model, adapter: str | Path) -> None:
    """Warn where the adapter on `model` changes no weight, and no logit of a short text either.

    Beside the weights it may change logits though it is too small to change a weight. One token is soonest done; but a
    token alone attends to itself whatever queries and keys are, so then four.
    """
    if changes_a_weight(model):
        return
    for count in (1, 4):
        tokens = torch.arange(count, device=model.device)
        with machine.few_rows(count, model.device):
            if passport.changes(model, lambda: model.head(model.trunk(tokens)[-1:])):  # noqa: B023 (called here)
                return
    passport.warn_unchanged(adapter)
