"""What a training decided of the chat, in every file of a model that says it: the template, and what ends an answer.

A folder has one template, in chat_template.jinja. The end of turn is added to the ids that end an answer in config.json
and generation_config.json, where old ones stay, and `eos_token` of the tokenizer's settings names it: so transformers
and vLLM stop where the training did.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple, Self

from lora import files
from lora.errors import say
from lora.text.chat import Chat

TEMPLATE, OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
SETTINGS = TOKENIZER, MAP, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"


class Spoken(NamedTuple):
    """The template that was trained, the id of its end of turn, and what `eos_token` names; None is not known."""

    template: str
    end: int | None = None
    eos_token: str | None = None

    @classmethod
    def of(cls, chat: Chat) -> Self:
        """A template that uses `eos_token` for something else than the end of turn keeps the one that it was given."""
        eos_token = chat.tokenizer.token(chat.end_of_turn) if chat.end_is_written else None
        if chat.template.uses("eos_token"):
            eos_token = chat.template.tokens.get("eos_token")
        return cls(chat.template.source, chat.end_of_turn, eos_token)

    def written(self, beside: dict[str, bytes], config: dict) -> tuple[dict[str, bytes], dict]:
        """The files beside a model's weights, and its config.json, with this in them; others stay byte for byte."""
        given = {name: files.read_json(Path(name), beside[name]) for name in SETTINGS if name in beside}
        now = deepcopy(given)
        templates = now.get(TOKENIZER, {}).pop("chat_template", None)
        if isinstance(templates, list) and len(templates) > 1:
            names = [one.get("name") for one in templates if isinstance(one, dict)]
            say(f"note     of the base's chat templates {names} only the one that was trained is written")
        for settings in (now[name] for name in (TOKENIZER, MAP) if name in now and self.eos_token):
            old = settings.get("eos_token")
            if (old.get("content") if isinstance(old, dict) else old) != self.eos_token:
                settings["eos_token"] = self.eos_token
        if self.end is not None:
            old = config.get("eos_token_id")
            config = config | {"eos_token_id": _with(old, self.end)}
            like_config = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
            generation = now.setdefault(GENERATION, like_config)
            generation["eos_token_id"] = _with(generation.get("eos_token_id", old), self.end)
        changed = [name for name, settings in now.items() if settings != given.get(name)]
        beside = {name: data for name, data in beside.items() if name != OLD_TEMPLATE}
        beside |= {name: (json.dumps(now[name], indent=2) + "\n").encode() for name in changed}
        return beside | {TEMPLATE: self.template.encode()}, config


def _with(ids: object, end: int) -> object:
    """The ids that end an answer, an int or a list, with one more."""
    known = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return ids if end in known else [*known, end] if known else end
