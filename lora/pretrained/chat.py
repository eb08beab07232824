"""The chat of a model: its tokenizer, its special tokens, what ends an answer, and its chat template or another one."""

import json
from datetime import date
from pathlib import Path

from lora import files
from lora.errors import BadInput
from lora.network.config import ModelConfig
from lora.pretrained.folder import ModelFiles
from lora.text.chat import Chat
from lora.text.template import BUILT_IN, FROZEN_DATE, ChatTemplate
from lora.text.tokenizer import Tokenizer

TEMPLATE_LIMIT = 2**20  # bytes


def load_chat(
    base: ModelFiles,
    system: str | bool | None = None,
    template: str | None = None,
    today: date = FROZEN_DATE,
    template_args: dict | None = None,
    control_tokens: bool = False,
) -> Chat:
    """Tokenizer and chat template of a model; or the `template` of that name (BUILT_IN) or in that file. `system` and
    `control_tokens` as in `Chat`, `today` and `template_args` for templates that ask. Raises BadInput for what is
    missing."""
    beside, config = base.files(), ModelConfig.from_json(base.config, f"{base.name}/config.json")
    tokenizer = _tokenizer(base.name, beside, config)
    settings = {file: files.read_json(Path(base.name) / file, beside[file]) for file in SETTINGS if file in beside}
    special = _special_tokens(base.name, settings)
    eos = _ends(config, settings, special, tokenizer)
    if template is None:
        where, source = _own_template(base.name, beside, settings)
    else:
        if special.get("eos_token") not in tokenizer.control and eos:
            special["eos_token"] = tokenizer.token(eos[0]) or ""
        where, source = _given_template(base.name, template, tokenizer, special)
    if not isinstance(source, str):
        fix = f"Give an instruct or chat model, or --template {', '.join(BUILT_IN)} or a file"
        raise BadInput(f"no chat template in {base.name}: it seems to be a base model. {fix}")
    _no_half_characters(source, where)
    jinja = ChatTemplate(source, special, where, today, template_args)
    return Chat(tokenizer, jinja, eos, system, control_tokens)


SPECIAL_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # the second is believed
SETTINGS = (*SPECIAL_FILES, "generation_config.json")


def _tokenizer(name: str, beside: dict[str, bytes], config: ModelConfig) -> Tokenizer:
    if "tokenizer.json" not in beside:
        raise BadInput(f"no tokenizer in {name}: there is no tokenizer.json. Convert it with its original library")
    tokenizer = Tokenizer(beside["tokenizer.json"], f"{name}/tokenizer.json")
    if tokenizer.size > config.vocab_size:
        why = f"{tokenizer.size} tokens, the model has {config.vocab_size}"
        raise BadInput(f"wrong tokenizer in {name}/tokenizer.json: {why}. Give the tokenizer of this model")
    return tokenizer


def _special_tokens(name: str, settings: dict[str, dict]) -> dict[str, str]:
    """The strings that a template may use: `eos_token`, `bos_token` and the like."""
    special = {}
    for file in SPECIAL_FILES:
        for key, value in settings.get(file, {}).items():
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str):
                _no_half_characters(value, f"{name}/{file}:{key}")
                special[key] = value
    return special


def _ends(config: ModelConfig, settings: dict, special: dict[str, str], tokenizer: Tokenizer) -> list[int]:
    """The ids that end an answer: those of config.json, of generation_config.json, and the tokenizer's `eos_token`."""
    ids = settings.get("generation_config.json", {}).get("eos_token_id")
    eos = [*config.eos_token_ids, *(ids if isinstance(ids, list) else [ids])]
    eos.append(tokenizer.id(special["eos_token"]) if "eos_token" in special else None)
    return list(dict.fromkeys(i for i in eos if type(i) is int and 0 <= i < config.vocab_size))


def _own_template(name: str, beside: dict[str, bytes], settings: dict[str, dict]) -> tuple[str, object]:
    """The file that has the model's template, and its source."""
    if "chat_template.jinja" in beside:
        return f"{name}/chat_template.jinja", beside["chat_template.jinja"].decode(errors="replace")
    file = "tokenizer_config.json"
    if "chat_template.json" in beside:
        file = "chat_template.json"
        settings = {file: files.read_json(Path(name) / file, beside[file])}
    source = settings.get(file, {}).get("chat_template")
    if isinstance(source, list):  # several by name; "default" is the one for chats
        named = (one for one in source if isinstance(one, dict) and one.get("name") == "default")
        source = next((one.get("template") for one in named), None)
    return f"{name}/{file}", source


def _given_template(name: str, template: str, tokenizer: Tokenizer, special: dict[str, str]) -> tuple[str, str]:
    """A built-in template, or one in a file, as `--template` names it."""
    if template in BUILT_IN:
        where = f"--template {template}"
        if template == "chatml" and "<|im_end|>" not in tokenizer.control:
            others = ", ".join(other for other in BUILT_IN if other != template)
            raise BadInput(f"wrong {where} in {name}: its tokenizer has no token <|im_end|>. Give {others} or a file")
        return where, _header(tokenizer, special) + BUILT_IN[template]
    if not Path(template).exists() and "." not in template:
        raise BadInput(f"unknown template in the command line: {template}. Give {', '.join(BUILT_IN)} or a file")
    return template, files.read_bytes(Path(template), TEMPLATE_LIMIT).decode("utf-8-sig", "replace")


def _header(tokenizer: Tokenizer, special: dict[str, str]) -> str:
    """What a built-in template needs to be whole wherever it is read: this model's end, and its BOS if it has one."""
    eos, begin = special.get("eos_token", ""), tokenizer.encode_document("a")[:1]
    bos = next((name for name, i in tokenizer.control.items() if [i] == begin), None)
    header = f"{{% set eos_token = {json.dumps(eos, ensure_ascii=False)} %}}"
    if bos is None:
        return header
    special["bos_token"] = bos
    return f"{header}{{% set bos_token = {json.dumps(bos, ensure_ascii=False)} %}}{{{{ bos_token }}}}"


def _no_half_characters(text: str, where: str) -> None:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise BadInput(f"wrong text in {where}: half a surrogate pair, which is no character. Repair it")
