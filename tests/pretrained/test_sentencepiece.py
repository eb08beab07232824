"""A SentencePiece vocabulary, in GGUF and in a tokenizer.json, gives the ids of SentencePiece's algorithm."""

import json
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer

from lora.errors import BadInput
from lora.pretrained import sentencepiece
from lora.pretrained.gguf import GGUFFile
from lora.pretrained.gguf_vocab import tokenizer_metadata
from tests.mutation import mutation
from tests.pretrained.test_gguf import HIDDEN, STRINGS, TEXT, refused, write
from tests.pretrained.test_gguf_write import with_tokenizer  # noqa: F401 (a fixture)

SPACE = "\u2581"
CONTROL = ["<unk>", "<s>", "</s>"]
TYPES = {"<unk>": 2, "<s>": 3, "</s>": 3, "<tool>": 4}
SAMPLES = [
    *STRINGS,
    "  a  b",
    "hello</s>",
    "\n\n\tx",
    "\u2581 \u2581",
    "zzzqqq \U0001f642\U0001f642",
    "a<tool> b",
    "<0x41>",
]


def toy():
    """Token -> score: bytes, characters, and common runs of them, the later the rarer."""
    runs, letters = Counter(), sorted(set(TEXT.replace(" ", SPACE)) - set("\n\t你"))  # of those left out only bytes
    for line in TEXT.split("\n"):
        text = SPACE + line.replace(" ", SPACE)
        for size in range(2, 7):
            runs.update(text[i : i + size] for i in range(len(text) - size + 1))
    common = sorted(run for run, count in runs.items() if count > 1 and set(run) <= set(letters))
    random.Random(0).shuffle(common)
    tokens = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *common, "<tool>"]
    return {token: -float(i) for i, token in enumerate(tokens)}


def by_definition(scores, text, prefix=True):
    """SentencePiece's BPE: of all neighbours, join those with the highest score, the left-most first."""
    ids = {token: i for i, token in enumerate(scores)}
    found = []
    for n, part in enumerate(text.split("<tool>")):
        found += [ids["<tool>"]] * bool(n)
        symbols = list(((" " if prefix else "") + part).replace(" ", SPACE)) if part else []
        while True:
            pairs = [(scores.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(pairwise(symbols))]
            best, at = max(pairs, default=(-np.inf, 0))
            if best == -np.inf:
                break
            symbols[-at : -at + 2] = ["".join(symbols[-at : -at + 2])]
        for symbol in symbols:
            found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def metadata_of(vocabulary, **more):
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(vocabulary),
        "tokenizer.ggml.scores": list(vocabulary.values()),
        "tokenizer.ggml.token_type": [6 if t.startswith("<0x") else TYPES.get(t, 1) for t in vocabulary],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def gguf_of(path, vocabulary, **more):
    tensors = {"token_embd.weight": np.zeros((len(vocabulary), HIDDEN), np.float32)}
    return write(path, metadata=metadata_of(vocabulary, **more), tensors=tensors)


def tokenizer_json(path, **more):
    return GGUFFile(gguf_of(path, toy(), **more)).files()["tokenizer.json"].decode()


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_from_scores_are_those_of_the_algorithm(tmp_path, prefix):
    fast = FastTokenizer.from_str(tokenizer_json(tmp_path / "a.gguf", add_space_prefix=prefix))
    fast.encode_special_tokens = True  # text that spells a control token is text
    joined = 0
    for text in SAMPLES:
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == by_definition(toy(), text, prefix), text
        joined += len(text) - len(ids)
        if SPACE not in text and "<tool>" not in text:
            assert fast.decode(ids, skip_special_tokens=False) == text
    assert joined > 50
    assert fast.encode("hello").ids == [1, *by_definition(toy(), "hello", prefix)]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_json_becomes_the_scores_it_was_made_from(with_tokenizer, tmp_path, prefix):  # noqa: F811
    data = tokenizer_json(tmp_path / "a.gguf", add_space_prefix=prefix)
    base = with_tokenizer(data, size=len(toy()), settings={"eos_token": "</s>", "chat_template": "{{ messages }}"})
    metadata, expected = tokenizer_metadata(base), metadata_of(toy())
    joint = {"".join(pair) for pair in json.loads(data)["model"]["merges"]}
    order = lambda of: sorted(joint, key=dict(zip(of["tokenizer.ggml.tokens"], of["tokenizer.ggml.scores"])).get)  # noqa: E731, B905
    assert order(metadata) == order(expected)
    for key in ("model", "pre", "tokens", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id"):
        assert metadata[f"tokenizer.ggml.{key}"] == expected[f"tokenizer.ggml.{key}"], key
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix and metadata["tokenizer.ggml.add_bos_token"] is True


def changed(path, **parts):
    data = json.loads(tokenizer_json(path))
    return data | {key: part(data[key]) for key, part in parts.items()}


def merges(change):
    return lambda model: model | {"merges": change(model["merges"])}


STRANGE = {
    "a pair missing": ({"model": merges(lambda pairs: pairs[1:])}, "no scores of tokens"),
    "pairs of one token apart": ({"model": merges(lambda pairs: [*pairs[1:], pairs[0]])}, "no scores of tokens"),
    "a byte missing": (
        {"model": lambda m: m | {"vocab": {t: i for t, i in m["vocab"].items() if t != "<0x00>"}}}, "for every byte"),
    "a letter missing": (
        {"model": lambda m: m | {"vocab": {t: i for t, i in m["vocab"].items() if t != "h"},
                                 "merges": [pair for pair in m["merges"] if "h" not in pair]}}, "no scores of tokens"),
    "another normalizer": ({"normalizer": lambda n: {"type": "NFKC"}}, "it prepares text by ['NFKC']"),
    "a space before the first text only": (
        {"normalizer": lambda n: None, "pre_tokenizer": lambda p: {
            "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}},
        "it prepares text by ['Metaspace']"),
    "a normalized token": (
        {"added_tokens": lambda a: [token | {"normalized": True} for token in a]}, "a normalized added token"),
}  # fmt: skip


@mutation("lora/pretrained/sentencepiece.py", "return scores if same else None", "return scores")
@pytest.mark.parametrize("name", STRANGE)
def test_merges_that_no_scores_can_say_are_refused_with_the_reason(with_tokenizer, tmp_path, name):  # noqa: F811
    parts, words = STRANGE[name]
    data = changed(tmp_path / "a.gguf", **parts)
    first = json.loads(tokenizer_json(tmp_path / "a.gguf"))["model"]["merges"]
    assert "".join(first[0]) == "".join(first[1])  # so that moving one pair away takes a token's pairs apart
    with pytest.raises(BadInput, match=r"unsupported tokenizer in .*tokenizer\.json") as caught:
        tokenizer_metadata(with_tokenizer(data, size=len(toy())))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scores": None}, "tokenizer.ggml.scores: it is missing"),
        ({"scores": [0.0] * 3}, "3 scores for"),
        ({"scores": [0.0] * len(toy())}, "two tokens have one score"),
        ({"scores": [float("nan")] * len(toy())}, "two tokens have one score"),
        ({"scores": ["a"] * len(toy())}, "tokenizer.ggml.scores"),
        ({"tokens": ["Q" if t == "h" else t for t in toy()]}, "'h' is in tokens and no token itself"),
        ({"add_space_prefix": 1}, "tokenizer.ggml.add_space_prefix"),
        ({"tokens": [t.replace("<0x00>", "<0x0>") for t in toy()]}, "1 tokens of single bytes are missing"),
    ],
)
def test_scores_that_say_nothing_are_refused_by_their_key(tmp_path, change, words):
    assert words in refused(gguf_of(tmp_path / "a.gguf", toy(), **change))


def test_a_very_long_token_costs_no_time():
    scores = {token: float(i) for i, token in enumerate(["a", *("a" * n for n in (2, 64, 65, 300_000))])}
    assert set(map("".join, sentencepiece.merges_of(scores))) == {"aa"}
