"""The tokenizer of a GGUF file as a tokenizer.json; `gguf_vocab` is the other way.

A byte-level BPE is held as tokens, merges and the *name* of a way to cut text; SentencePiece's BPE as tokens and
scores. A tokenizer that cuts text in another way is refused.
"""

import json
import math

import numpy as np

from lora.pretrained import sentencepiece
from lora.pretrained.gguf_header import AGAIN, Metadata, show
from lora.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types
TOKEN_TYPES = {"gpt2": {NORMAL, CONTROL, USER_DEFINED, UNUSED}, "llama": set(range(1, 7))}  # by tokenizer.ggml.model
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # the hub's name -> GGUF's
ENDS = ("eos", "eot", "eom")  # all of them end an answer
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _splits(*patterns: str) -> list[dict]:
    """Text is cut by each in turn, then letter by letter of its bytes."""
    steps = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in patterns
    ]
    return [*steps, BYTE_LEVEL | {"use_regex": False}]


def _words(number: str, letter: str = r"\p{L}", marks: str = "") -> list[dict]:
    """GPT-4's way, with numbers cut so; Qwen3.5 counts combining marks to the letters."""
    return _splits(
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{number}| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = _splits(
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = _splits(
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
NFC = {"type": "NFC"}
DIGITS = [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]

# tokenizer.ggml.pre -> pre-tokenizers, normalizer, ignore_merges, and whether BOS is added if the file does not say.
# Of several names for one way the first is written. Sources: tokenizer.json of SmolLM2, GPT-2, Qwen2.5 and Llama 3,
# transformers' tokenization_qwen3_5.py; for the others and the last column src/llama-vocab.cpp.
PRE_TOKENIZERS = {
    "smollm": (DIGITS, None, False, False),
    "gpt-2": ([BYTE_LEVEL], None, False, False),
    "qwen2": (_words(r"\p{N}"), NFC, False, False),
    "llama-bpe": (_words(r"\p{N}{1,3}"), None, True, True),
    "glm4": (_words(r"\p{N}{1,3}"), None, False, False),
    "qwen35": (_words(r"\p{N}", r"[\p{L}\p{M}]", r"\p{M}"), NFC, False, False),
    "tekken": (TEKKEN, None, True, True),
    "hunyuan-dense": (DEEPSEEK, None, False, False),
    "refact": (DIGITS, None, False, False),  # Granite 3
    "exaone4": ([BYTE_LEVEL], None, False, False),
    "deepseek-r1-qwen": (_words(r"\p{N}"), None, False, False),
    "lfm2": (_words(r"\p{N}{1,3}"), None, True, True),
    "dbrx": (_words(r"\p{N}{1,3}"), None, False, False),  # OLMo 2 and 3, Granite 4
    "smaug-bpe": (_words(r"\p{N}{1,3}"), None, False, False),  # SmolLM3
}


def special_ids(metadata: Metadata) -> dict[str, int | None]:
    """GGUF's name of a special token -> its id."""
    ids, count = {}, len(metadata.get("tokenizer.ggml.tokens", list, []))
    for name in (*SPECIAL.values(), *ENDS[1:]):
        ids[name] = i = metadata.values.get(key := f"tokenizer.ggml.{name}_token_id")
        right = i is None or (type(i) is int and 0 <= i < count)
        metadata.check(right, key, f"{show(i)} is none of the {count:,} tokens", AGAIN)
    return ids


def tokenizer_files(metadata: Metadata, config: dict) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json with the chat template, generation_config.json. Raises BadInput."""
    get, check = metadata.get, metadata.check
    model, pre = get("tokenizer.ggml.model", str), get("tokenizer.ggml.pre", str, "missing")
    why = f"{show(model)} with {show(pre)}; implemented is 'gpt2' with {', '.join(PRE_TOKENIZERS)}, and 'llama'"
    check(model == "llama" or (model == "gpt2" and pre in PRE_TOKENIZERS), "tokenizer.ggml.pre", why)
    ids, tokens = special_ids(metadata), get("tokenizer.ggml.tokens", list, [])
    named = {f"{name}_token": ids[theirs] for name, theirs in SPECIAL.items()}
    settings = {name: tokens[i] for name, i in named.items() if i is not None}
    add_bos = get("tokenizer.ggml.add_bos_token", bool, model == "llama" or PRE_TOKENIZERS[pre][-1])
    check(not add_bos or "bos_token" in settings, "tokenizer.ggml.bos_token_id", "it is missing", AGAIN)
    add_eos = get("tokenizer.ggml.add_eos_token", bool, False)
    check(not add_eos, "tokenizer.ggml.add_eos_token", "it is not implemented")
    if "tokenizer.chat_template" in metadata.values:
        settings["chat_template"] = get("tokenizer.chat_template", str)
    settings |= {
        "add_bos_token": add_bos, "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"], "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    contents = {
        "tokenizer.json": _tokenizer_json(metadata, tokens, settings["bos_token"] if add_bos else None, ids["unknown"]),
        "tokenizer_config.json": settings,
        "generation_config.json": {key: value for key, value in config.items() if key.endswith("_token_id")},
    }
    encoded = {name: json.dumps(value, indent=2, ensure_ascii=False).encode() for name, value in contents.items()}
    Tokenizer(encoded["tokenizer.json"], f"{metadata.path}:tokenizer.ggml")  # raises if the merges are wrong
    return encoded


def _tokenizer_json(metadata: Metadata, tokens: list[str], bos: str | None, unknown: int | None) -> dict:
    """The content of tokenizer.json; `bos` is the token before every text."""
    model = metadata.get("tokenizer.ggml.model", str)
    types = metadata.get("tokenizer.ggml.token_type", np.ndarray).tolist()
    right = len(types) == len(tokens) and set(types) <= TOKEN_TYPES[model]
    why = f"{len(types):,} types for {len(tokens):,} tokens, or unknown ones: {show(set(types))}"
    metadata.check(right, "tokenizer.ggml.token_type", why, AGAIN)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    metadata.check(len(vocabulary) == len(tokens), "tokenizer.ggml.tokens", "a token is there twice", AGAIN)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": kind == CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    with_bos = {
        "type": "TemplateProcessing", "single": [start, first], "pair": [start, first, start, second],
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary.get(bos)], "tokens": [bos]}},
    }  # fmt: skip
    frame = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    frame["post_processor"] = with_bos if bos else None
    if model == "llama":
        return frame | _sentencepiece(metadata, vocabulary, types, tokens[unknown or 0])
    pre_tokenizers, normalizer, ignore_merges, _ = PRE_TOKENIZERS[metadata.get("tokenizer.ggml.pre", str)]
    merges = metadata.get("tokenizer.ggml.merges", list)
    return frame | {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "ignore_merges": ignore_merges, "vocab": vocabulary, "merges": merges},
    }


def _sentencepiece(metadata: Metadata, vocabulary: dict[str, int], types: list[int], unknown: str) -> dict:
    check, key = metadata.check, "tokenizer.ggml.scores"
    values = metadata.get(key, np.ndarray).tolist()
    check(len(values) == len(types), key, f"{len(values):,} scores for {len(types):,} tokens", AGAIN)
    scores = {t: values[i] for t, i in vocabulary.items() if types[i] == NORMAL}
    joint = {"".join(pair) for pair in sentencepiece.merges_of(scores)}
    distinct = len({scores[token] for token in joint}) == len(joint) and all(map(math.isfinite, scores.values()))
    check(distinct, key, "two tokens have one score, so it does not say which comes first")
    letters = sentencepiece.missing_letters(scores)
    check(not letters, "tokenizer.ggml.tokens", f"{show(letters[:1])[1:-1]} is in tokens and no token itself")
    missing = [token for token in sentencepiece.BYTES if token not in vocabulary]
    check(not missing, "tokenizer.ggml.tokens", f"{len(missing)} tokens of single bytes are missing")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", bool, True)
    return sentencepiece.tokenizer_parts(vocabulary, scores, unknown, prefix)
