"""The tokenizers that are built from GGUF metadata give llama.cpp's ids on the 2,000 strings of tokenizer_strings.json.

Here with a toy vocabulary for each pre-tokenizer; test_parity_tokenizer.py has the default model's own.
"""

import json
import unicodedata
from collections import Counter

import pytest

from lora.pretrained.gguf import GGUFFile
from lora.pretrained.gguf_tokenizer import PRE_TOKENIZERS
from lora.text.tokenizer import Tokenizer
from tests.make_tokenizer_reference import CLASSES, CONTROL, COUNT, INVISIBLE, PRE, TARGET, digest, strings, toy_gguf
from tests.mutation import mutation

REFERENCE = json.loads(TARGET.read_text())
ROWS = REFERENCE["rows"]
TEXTS = [row["text"] for row in ROWS]


def some(*wanted: str):
    """Whether a text has one of these strings."""
    return lambda text: any(piece in text for piece in wanted)


def named(*words: str):
    """Whether a text has a character beyond ASCII with one of these words in its name."""
    return lambda text: any(word in unicodedata.name(c, "") for c in text if not c.isascii() for word in words)


def category(*wanted: str):
    return lambda text: any(unicodedata.category(c) in wanted for c in text)


HAS = {  # what nearly every string of a class has, said in other words than the class is made with
    "digits": category("Nd"),
    "other digits": lambda text: any(unicodedata.numeric(c, None) is not None and not c.isascii() for c in text),
    "cjk": named("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC"),
    "emoji": category("So", "Sk"),
    "spaces": some("  "),
    "tabs and new lines": some("\t", "\n", "\r"),
    "unicode spaces": lambda text: any((c.isspace() and c not in " \t\r\n") or c in INVISIBLE for c in text),
    "mixed scripts": lambda text: len({unicodedata.name(c).split()[0] for c in text if c.isalpha()}) > 1,
    "code": some("(", "[", "{", "_", ">", "//", "\\", "N", "L"),
    "punctuation": lambda text: sum(unicodedata.category(c)[0] in "PS" for c in text) * 2 > len(text.strip()),
    "combining": category("Mn", "Mc"),
    "right to left": lambda text: any(unicodedata.bidirectional(c) in ("R", "AL", "RLE", "RLO", "RLI") for c in text),
    "contractions": some("'", "’"),
    "long words": lambda text: max(map(len, text.split())) >= 30,
    "control look-alikes": lambda text: some("<", "＜", "[", "|")(text) and not some(*CONTROL)(text),
    "control tokens": some(*CONTROL),
    "raw controls": category("Cc"),
    "outside": category("Co", "Cn"),
    "half and full width": named("FULLWIDTH", "HALFWIDTH"),
    "latin": named("LATIN", "ORDINAL"),
    "other scripts": lambda text: not any("LATIN" in unicodedata.name(c, "") for c in text),
    "mathematics": category("Sm", "So", "Sc", "No", "Lu"),
    "addresses": some("/", "@", ".", ":", "#", "*", "-", "|", "~", "`", ">"),
    "prose": lambda text: text.isascii() or "ï" in text,
    "anything": lambda text: not text.isascii(),
}  # fmt: skip


def test_the_strings_are_those_that_the_program_makes():
    assert [(row["class"], row["text"]) for row in ROWS] == strings()
    assert len(set(TEXTS)) == len(TEXTS) == 2000 == COUNT * len(CLASSES)
    # those that came later are judged by llama.cpp itself, in tests/parity/test_parity_llama.py
    assert set(REFERENCE["toys"]) == set(PRE) <= set(PRE_TOKENIZERS)
    assert PRE_TOKENIZERS["glm4"][0] == PRE_TOKENIZERS["llama-bpe"][0]  # which cuts text alike, and is in the reference


def test_every_class_has_what_its_name_says():
    held = Counter(row["class"] for row in ROWS if HAS[row["class"]](row["text"]))
    assert HAS.keys() == CLASSES.keys()
    assert {name: held[name] for name in HAS if held[name] < 0.8 * COUNT} == {}


HARD = (
    "\0", "\u2028", "\ue000", "\u200d", "👍🏽", "🇩🇪", "🇯🇵", "\r\n", "\xa0", "\u3000", "\ufeff", "\x16", " " * 64,
    "0" * 120, "<|im_end|>", "<|im_end", "e\u0301", "'re", "'ſ", "Ａ", "ﾊ", "שלום", "\u202e",
)  # fmt: skip


def test_the_hard_cases_are_among_them():
    assert [piece for piece in HARD if not any(piece in text for text in TEXTS)] == []


def test_the_rows_where_llama_cpp_is_not_followed_are_few_and_lose_characters():
    apart = [row for row in ROWS if "llama.cpp" in row]
    assert 0 < len(apart) < 50
    for row in apart:
        assert row["decoded"] != row["text"] and row["llama.cpp"] != row["ids"]
        assert any(c < " " or "\U00040000" <= c < "\U000c0000" for c in row["text"])


@mutation(
    "lora/pretrained/gguf_tokenizer.py",
    'DIGITS = [{"type": "Digits", "individual_digits": True}',
    'DIGITS = [{"type": "Digits", "individual_digits": False}',
    case="smollm",
)
@mutation(
    "lora/pretrained/gguf_tokenizer.py",
    '"individual_digits": True}, BYTE_LEVEL]',
    '"individual_digits": True}, BYTE_LEVEL | {"use_regex": False}]',
    case="smollm",
)
@mutation(
    "lora/pretrained/gguf_tokenizer.py",
    '"qwen2": (_words(r"\\p{N}"), NFC,',
    '"qwen2": (_words(r"\\p{N}"), None,',
    case="qwen2",
)
@mutation(
    "lora/pretrained/gguf_tokenizer.py",
    '        r"|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"',
    '        r"|\\s*[\\r\\n]+|\\s+"',
    case="llama-bpe",
)
@mutation(
    "lora/pretrained/gguf_tokenizer.py",
    '"llama-bpe": (_words(r"\\p{N}{1,3}")',
    '"llama-bpe": (_words(r"\\p{N}{1,4}")',
    case="llama-bpe",
)
@mutation(
    "lora/pretrained/gguf_tokenizer.py",
    "if kind in (CONTROL, USER_DEFINED)",
    "if kind in (USER_DEFINED,)",
    case="smollm",
)
@pytest.mark.parametrize("pre", PRE)
def test_every_pre_tokenizer_gives_the_ids_of_llama_cpp(tmp_path, pre):
    files = GGUFFile(toy_gguf(tmp_path / "toy.gguf", pre, TEXTS)).files()
    tokenizer, expected = Tokenizer(files["tokenizer.json"]), REFERENCE["toys"][pre]
    found = [digest(tokenizer.encode(text)) for text in TEXTS]
    assert len(expected) == sum(map(len, found))
    size = len(found[0])
    wrong = [text for n, text in enumerate(TEXTS) if found[n] != expected[n * size : (n + 1) * size]]
    assert wrong == []
