"""A tokenizer.json as the metadata of a GGUF file; `gguf_tokenizer` is the other way.

Conventions: llama.cpp's convert_hf_to_gguf.py. A tokenizer that cuts text in a way without a name in GGUF is refused.
"""

from pathlib import Path
from typing import Any

from lora import files
from lora.errors import BadInput, say
from lora.pretrained import gguf_tokenizer as ggml
from lora.pretrained import sentencepiece
from lora.pretrained.chat import load_chat
from lora.pretrained.folder import ModelFiles
from lora.pretrained.gguf_header import show
from lora.pretrained.spoken import Spoken
from lora.text.chat import Chat

FIX = "Write a model folder, or the adapter alone (--adapter-only)"


def tokenizer_metadata(base: ModelFiles, template: str | None = None) -> dict[str, Any]:
    """The `tokenizer.*` keys of a model, with the chat template in the file `template` or its own.

    Raises BadInput naming what GGUF, or we, cannot say.
    """
    try:
        chat = load_chat(base, template=template)
        source = chat.template.source
    except BadInput as missing:
        chat, source = load_chat(base, template="plain"), ""  # raises what is wrong apart from the template
        say(f"note     the file has no chat template: {missing.problems[0]}")
    where = f"{base.name}/tokenizer.json"
    raw = files.read_json(Path(where), base.files()["tokenizer.json"])
    tokens, types = _tokens(raw, base, where)
    bos = _added_bos(chat, where)
    of_kind = _sentencepiece if raw["model"].get("byte_fallback") else _byte_level
    metadata = of_kind(raw, tokens, types, where) | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": bos is not None,
        "tokenizer.chat_template": source,
    }
    return metadata | {f"tokenizer.ggml.{name}_token_id": i for name, i in _special(chat, base, bos).items()}


def _refuse(where: str, why: str) -> None:
    raise BadInput(f"unsupported tokenizer in {where}: {why}. {FIX}")


def _parts(step: dict | None, inner: str) -> list[dict]:
    """The steps of a (nested) Sequence, one after the other, without what changes no id."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for one in step[inner] for part in _parts(one, inner)]
    part = {key: value for key, value in step.items() if key != "trim_offsets"}
    return [{"use_regex": True} | part if step["type"] == "ByteLevel" else part]


def _model(raw: dict, where: str) -> dict:
    """The BPE of a tokenizer.json, its merges as pairs."""
    model = raw["model"]
    if model.get("type") != "BPE":
        _refuse(where, f"{show(model.get('type'))} is not implemented, only BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            _refuse(where, f"{key} {show(model[key])} is not implemented")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    if any(" " in part for pair in merges for part in pair):
        _refuse(where, "a merge with a space in it")
    return model | {"merges": merges}


def _byte_level(raw: dict, tokens: list[str], types: list[int], where: str) -> dict[str, Any]:
    """Merges, and the name in PRE_TOKENIZERS under which llama.cpp cuts text as this tokenizer does."""
    model = _model(raw, where)
    normalizer, cut = _parts(raw.get("normalizer"), "normalizers"), _parts(raw.get("pre_tokenizer"), "pretokenizers")
    for name, (steps, known_normalizer, ignore_merges, _) in ggml.PRE_TOKENIZERS.items():
        known = [part for step in steps for part in _parts(step, "pretokenizers")]
        same = cut == known and normalizer == _parts(known_normalizer, "normalizers")
        if same and bool(model.get("ignore_merges")) == ignore_merges:
            merges = [" ".join(pair) for pair in model["merges"]]
            return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}
    names, steps = ", ".join(ggml.PRE_TOKENIZERS), show([part["type"] for part in normalizer + cut])
    _refuse(where, f"it cuts text by {steps}, which is none of the known ways {names}")


def _sentencepiece(raw: dict, tokens: list[str], types: list[int], where: str) -> dict[str, Any]:
    """Scores; and the types of bytes and of the unknown token, put into `types`."""
    model, normalizer = _model(raw, where), _parts(raw.get("normalizer"), "normalizers")
    prefix = next((prefix for prefix, steps in sentencepiece.NORMALIZERS.items() if steps == normalizer), None)
    if prefix is None or raw.get("pre_tokenizer") or model.get("ignore_merges"):
        steps = show([part["type"] for part in normalizer + _parts(raw.get("pre_tokenizer"), "pretokenizers")])
        _refuse(where, f"it prepares text by {steps}, which is not SentencePiece's way as llama.cpp knows it")
    if any(token.get("normalized") for token in raw.get("added_tokens") or []):
        _refuse(where, "a normalized added token is not implemented")
    kinds = dict.fromkeys(sentencepiece.BYTES, ggml.BYTE) | {model.get("unk_token"): ggml.UNKNOWN}
    if not kinds.keys() <= set(tokens):
        _refuse(where, "it has no token for every byte and none for what is unknown")
    types[:] = [kinds.get(token, kind) for token, kind in zip(tokens, types, strict=True)]
    normal = {token: i for i, token in enumerate(tokens) if types[i] == ggml.NORMAL}
    merges = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= normal.keys()]
    scores = sentencepiece.scores_of(normal, merges)
    if scores is None:
        _refuse(where, "no scores of tokens would join them in the order of its merges")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [scores.get(token, 0.0) for token in tokens],
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.unknown_token_id": tokens.index(model["unk_token"]),
    }


def _tokens(raw: dict, base: ModelFiles, where: str) -> tuple[list[str], list[int]]:
    """Token and type of every row of the embedding; rows without a token get a name that no text contains."""
    added = raw.get("added_tokens") or []
    for token in added:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if flags:
            _refuse(where, f"{flags[0]} of the token {show(token['content'])} is not implemented")
    types = {token["content"]: ggml.CONTROL if token["special"] else ggml.USER_DEFINED for token in added}
    known = raw["model"]["vocab"] | {token["content"]: token["id"] for token in added}
    by_id = {i: token for token, i in known.items()}
    if len(by_id) < len(known):
        _refuse(where, "two tokens have one id")
    size = base.config["vocab_size"]
    if any(i >= size for i in raw["model"]["vocab"].values()):
        _refuse(where, f"the model has {size} embeddings, and tokens that others join to have higher ids")
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    if len(set(tokens)) < size:
        _refuse(where, "a token is called as one that is missing, [PAD...]")
    return tokens, [types.get(token, ggml.NORMAL) if i in by_id else ggml.UNUSED for i, token in enumerate(tokens)]


def _added_bos(chat: Chat, where: str) -> int | None:
    """The token that the tokenizer puts before every text, if it does."""
    plain, whole = chat.tokenizer.encode_plain("a"), chat.tokenizer.encode_document("a")
    if whole == plain:
        return None
    if whole[1:] != plain:
        _refuse(where, f"it makes {show(whole)} of {show(plain)}, which is more than a token before the text")
    return whole[0]


def _special(chat: Chat, base: ModelFiles, bos: int | None) -> dict[str, int]:
    """GGUF's name -> id. Of several ends of an answer what `eos_token` is to name comes first, then the end of turn."""
    names, size = chat.template.tokens, base.config["vocab_size"]
    ids = {theirs: chat.tokenizer.id(names.get(f"{ours}_token", "")) for ours, theirs in ggml.SPECIAL.items()}
    candidates = [bos, ids["bos"], base.config.get("bos_token_id")]  # Qwen's tokenizer has none, its config has
    ids["bos"] = next((i for i in candidates if type(i) is int and 0 <= i < size), None)
    ends = chat.stops & {chat.end_of_document, *chat.tokenizer.control.values()}
    ids = {name: None if i is None or i >= size else i for name, i in ids.items()}
    first = [i for i in (chat.tokenizer.id(Spoken.of(chat).eos_token or ""), chat.end_of_turn, ids["eos"]) if i in ends]
    ends = list(dict.fromkeys([*(first or [chat.end_of_document]), *sorted(ends)]))
    if len(ends) > len(ggml.ENDS):
        room, left = len(ggml.ENDS), ends[len(ggml.ENDS) :]
        say(f"note     GGUF has room for {room} tokens that end an answer; left out: {left}")
    return {name: i for name, i in (ids | dict(zip(ggml.ENDS, ends, strict=False))).items() if i is not None}
