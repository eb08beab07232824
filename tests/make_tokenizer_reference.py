"""Write tests/fixtures/tokenizer_strings.json: 2,000 strings and the ids llama.cpp gives them.

    pip install xllamacpp==2026.10.11549 regex && python -m tests.make_tokenizer_reference MODEL.gguf

MODEL is the default model's GGUF file. A second witness is `Definition` below, which does what the tokenizer.json of
SmolLM2 says: every digit by itself, then GPT-2's byte-level BPE. The two must agree on every string, save where its
bytes have no letter in the vocabulary: the definition drops those before merging, llama.cpp afterwards. There the
definition counts, and the row holds both. For the toy vocabularies llama.cpp is the only witness.
"""

import ctypes
import hashlib
import json
import random
import sys
import tempfile
import unicodedata
from collections import Counter
from ctypes import POINTER, Structure, c_bool, c_char, c_char_p, c_int32, c_void_p
from itertools import pairwise
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

from lora.files import write_bytes

TARGET = Path(__file__).resolve().parent / "fixtures" / "tokenizer_strings.json"
REFERENCE = "llama.cpp, vocabulary only, as built into xllamacpp"
COUNT = 80  # strings of each class

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<empty_output>"]
SPACES = [*map(chr, (0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000, 0x85)), *map(chr, range(0x2000, 0x200B))]
INVISIBLE = [*map(chr, (0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0x180E, 0xAD, 0x34F, 0x61C, 0x115F, 0x3164))]
RAW = [*map(chr, range(32)), *map(chr, range(0x7F, 0xA0))]
MARKS = [*map(chr, range(0x300, 0x370)), *map(chr, (0x5B0, 0x64E, 0x93C, 0x94D, 0xE31, 0x1DC4, 0x20D0, 0x3099, 0xFE20))]
BIDI = [*map(chr, (0x200E, 0x200F, 0x202A, 0x202B, 0x202C, 0x202E, 0x2066, 0x2067, 0x2069))]
OUTSIDE = [*map(chr, (0xE000, 0xE0A0, 0xF8FF, 0xF0000, 0x10FFFD, 0x10FFFF, 0xFFFD, 0xFFFE, 0xFDD0, 0x40000))]
FULL = [*map(chr, range(0xFF01, 0xFF5F)), *map(chr, range(0xFF61, 0xFFA0)), *"￠￡￥￦￨￩ﾡﾤ"]


def number(r: random.Random) -> str:
    return "".join(r.choices("0123456789", k=r.choice([1, 2, 3, 4, 5, 7, 10, 16, 40])))


def long_word(r: random.Random) -> str:
    alphabet = r.choice(["ab", "etaoin", "abcdefghijklmnopqrstuvwxyz", "XYZxyz", "äß", "漢"])
    return "".join(r.choices(alphabet, k=r.choice([30, 90])))


def any_character(r: random.Random) -> str:
    """One that Unicode 3.2 had: about newer ones, tokenizers disagree until their tables are renewed."""
    while True:
        character = chr(r.randrange(r.choice([128, 0x800, 0x3000, 0x10000, 0x110000])))
        if unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs"):
            return character


# class -> what its strings are made of, and what may stand between two pieces. A function makes a piece.
CLASSES = {
    "digits": (
        [number, "1,234.56", "0x1F", "1e-9", "-5", "3.14159", "24/7", "12:34:56", "+49 30 901820", "v1.2.3", "007"],
        ["", " ", "  ", "+", " = ", "a", "."],
    ),
    "other digits": ([*"٠١٢٣۴۵६७৮௯๓༤០０１２９²³¹½¾⅓ⅧⅫⅷ①⑳㉟㈠〇一二三十百千万零壹𝟘𝟙𝟡𐒠", number], ["", "", " ", "x"]),
    "cjk": (
        [*"你好世界的一是不了人我在有他这中大来上国，。！？「」《》、…", "日本語", "こんにちは",
         "カタカナ", "漢字かな交じり文",
         "안녕하세요", "한국어", "𠀀", "𠮷野家", "㐂", "々〆ヶ", "ㄅㄆㄇ"],
        ["", "", "", " ", "\u3000", "1"],
    ),
    "emoji": (
        ["🙂", "😀", "👍🏽", "👨‍👩‍👧‍👦", "👩🏿‍🚀", "🏳️‍🌈", "🏴‍☠️", "🇩🇪", "🇯🇵", "🇺", "1️⃣", "#️⃣", "☺️", "☺︎", "❤️", "🏴󠁧󠁢󠁳󠁣󠁴󠁿",
         "🧑🏻‍❤️‍💋‍🧑🏾", "🤷🏼‍♀️", "🫠", "🪿", "\u200d", "\ufe0f", "🏽", "©", "™️", "ok"],
        ["", "", "", " ", "!"],
    ),
    "spaces": (
        [*(" " * n for n in (1, 2, 3, 4, 5, 7, 8, 15, 16, 31, 64)), "a", "word", "1", ".", "é", "字"],
        [""],
    ),
    "tabs and new lines": (
        ["\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\r", "\n\r", " \n", "\n ", "\t \n", " ", "a",
         "b c", "1", "}", "- x"],
        [""],
    ),
    "unicode spaces": (
        [*SPACES, *INVISIBLE, *"\v\f\x1c\x1d\x1e\x1f", "  ", "a", "B", "1", "!", "字"],
        ["", "", " "],
    ),
    "mixed scripts": (
        ["hello", "мир", "κόσμε", "世界", "עולם", "عالم", "नमस्ते", "안녕", "ไทย", "ሰላም", "ქართ", "🙂", "42", "Ω", "ß"],
        ["", " ", "-", "/", ", "],
    ),
    "code": (
        ["def f(x):\n    return x + 1\n", "for (int i=0;i<n;++i) {\n\ta[i] += b[i]*2;\n}\n",
         "<div class=\"x\">&amp;</div>", "{\"key\": [1, 2.5, null]}", "SELECT * FROM t WHERE id>=10;",
         "if x == 'y':\n        pass", "#include <stdio.h>", "$ ls -la | grep -v '^d' > /dev/null 2>&1",
         "fn main() -> Result<(), E> {}", "camelCaseName", "snake_case_name", "__init__", "a[i:j]", "=>", "!==",
         "/* c */", "// x", "\\n\\t\\\"", "%5d", "${HOME}", "λx.x", "    ", "\t", "0xFF"],
        ["", " ", "\n", "\n    ", ";"],
    ),
    "punctuation": (
        [*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "...", "!!!", "?!", "--", "---", "***", "###", "====", "____", "``",
         "''", "»«", "“”", "‘’", "—", "–", "…", "¿¡", "。、", "·", "•", "†", "§", "a", "1"],
        ["", "", "", " "],
    ),
    "combining": (
        ["e\u0301", "A\u030a", "n\u0303", "o\u0302\u0323", "क्षि", "நி", "ก็", "ญี่", "각", "が", "שָׁלוֹם", "مُحَمَّد",
         "x", "1", " ", *MARKS],
        ["", "", "", " "],
    ),
    "right to left": (
        ["שלום", "עולם", "מה שלומך?", "السلام", "عليكم", "العربية", "۱۲۳", "٤٥٦", "فارسی", "اردو", "ܫܠܡܐ", "ދިވެހި",
         "ﷺ", "لا", "ـــ", "abc", "12", "(", ")", *BIDI],
        [" ", " ", "", "، "],
    ),
    "contractions": (
        ["I'm", "don't", "we'll", "they've", "you're", "he'd", "it's", "I'M", "DON'T", "WE'LL", "YOU'RE", "it’s",
         "don’t", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'ſ", "'LL", "'''", "y'all'd've", "1's", "字's",
         "rock'n'roll", "'tis", "o'clock", "’ll", "''s", "s'", "é's"],
        [" ", "", "'", "\n"],
    ),
    "long words": (
        [long_word, "Donaudampfschifffahrtsgesellschaftskapitän", "pneumonoultramicroscopicsilicovolcanoconiosis",
         "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogoch", "a" * 200, "ha" * 60, "ACGT" * 40, "=" * 120,
         "0" * 120, "가나다" * 20, "ไม่มีช่องว่าง" * 5],
        [" ", "", "-"],
    ),
    "control look-alikes": (
        ["<|im_end", "|im_end|>", "< |im_end|>", "<|im_end |>", "<|IM_END|>", "<|im__end|>", "<|eot_id|>", "</s>",
         "<s>", "<|endoftext>", "<im_end>", "<|im_\u200bend|>", "＜|im_end|＞", "<｜im_end｜>", "<repo name>", "<|>",
         "[INST]", "<think>", "<0x0A>", "<unk>", "&lt;|im_end|&gt;", "<<|im_start", "x"],
        ["", " ", "\n"],
    ),
    "control tokens": (
        [*CONTROL, "<", "|>", " ", "\n", "user\n", "assistant\n", "hi", "1", "字", "🙂"],
        ["", "", " ", "  "],
    ),
    "raw controls": (
        [*RAW, "\0", "\0", "\x1b[31m", "\x7f", "a", "B", ".", "..", "1", ".\x16.", "=\x04=", " \x06-"],
        ["", "", " "],
    ),
    "outside": (
        [*OUTSIDE, "\U000a7ec9\U0001f143", "\u2a1e\U0008b5b4\U000bc1ec\n", any_character, "a", ".", "1", "字"],
        ["", "", " "],
    ),
    "half and full width": (
        [*FULL, "ＡＢＣ", "ｈｅｌｌｏ", "１２３", "ﾊﾛｰ", "ｶﾞｷﾞ", "！？", "abc", "12", "カ"],
        ["", "", " ", "\u3000"],
    ),
    "latin": (
        ["Übergröße", "façade", "jalapeño", "Příliš", "žluťoučký", "kůň", "Łódź", "zażółć", "gęślą", "İstanbul",
         "ığdır", "Dvořák", "Ærøskøbing", "Þórr", "Việt", "Nguyễn", "ﬁne", "ǅ", "ªº", "Ĳssel", "ẞ", "São", "El", "và",
         "der", "på"],
        [" ", ", ", "-", ""],
    ),
    "other scripts": (
        ["Привет", "ЁЖИК", "їжак", "Ελλάδα", "ςσΣ", "Հայերեն", "ქართული", "हिन्दी", "বাংলা", "தமிழ்", "తెలుగు",
         "ಕನ್ನಡ", "മലയാളം", "සිංහල", "ไทยแลนด์", "ລາວ", "བོད་", "မြန်မာ", "ខ្មែរ", "አማርኛ", "ᏣᎳᎩ", "ᚠᚢᚦ", "𐌰𐍄𐍄𐌰", "𓀀𓂀",
         "𒀀", "ᠮᠣᠩᠭᠣᠯ", "ꦗꦮ", "𞤀𞤣"],
        [" ", "", " ", "; "],
    ),
    "mathematics": (
        [*"∀∃∈∑∏∫√∞≈≠≤≥±×÷°µπΩ→⇒⟨⟩∂∇⊗ℝℕ𝔸𝒙𝐀₁₂ⁿ€£¥₿♠♣★☃│┼█▀⠿", "E=mc²", "x₁+x₂", "10⁻⁹ m", "5°C", "a²+b²=c²",
         "\\frac{1}{2}", "$x^2$", "100%", "№5", "§3"],
        ["", " ", " + "],
    ),
    "addresses": (
        ["https://example.com/a/b?c=1&d=%20#e", "www.example.org", "me@example.com", "C:\\Users\\x", "/usr/bin/env",
         "192.168.0.1", "::1", "2024-02-29T23:59:59Z", "#hashtag", "@user", "`code`", "**bold**", "# Title", "- item",
         "1. one", "> quote", "[a](b.md)", "| a | b |", "~~x~~", "file.tar.gz", "a_b-c.d"],
        [" ", "\n", ", ", ""],
    ),
    "prose": (
        ["the", "of", "and", "to", "is", "you", "Hello", "world", "HTTPServer", "naïve", "co-op", "e.g.", "A.M.",
         *"ABC", "What is 874*265?", "It's 5 o'clock.", "Fine!", "\"Yes,\"", "she said.", "Dr.", "(2024)",
         "two  spaces", "don't"],
        [" ", " ", "\n", ", "],
    ),
    "anything": ([any_character], ["", "", "", " ", "a"]),
}  # fmt: skip


def strings() -> list[tuple[str, str]]:
    """(class, text) of every string, the same in every run; no text twice."""
    found = {}
    for name, (pieces, between) in CLASSES.items():
        r, mine = random.Random(name), [piece for piece in pieces if isinstance(piece, str)][: COUNT // 4]
        while len(found) < COUNT * (list(CLASSES).index(name) + 1):
            glue, size = r.choice(between), r.choice([1, 2, 3, 4, 5, 6, 8, 12, 20])
            chosen = [piece if isinstance(piece, str) else piece(r) for piece in r.choices(pieces, k=size)]
            text = mine.pop(0) if mine else glue.join(chosen)
            found.setdefault(text[:240], name)
    return [(name, text) for text, name in found.items()]


# ---- toy vocabularies, so that every pre-tokenizer is tried without a model -----------------------------------------

PRE = ("smollm", "gpt-2", "qwen2", "llama-bpe")


def letters() -> list[str]:
    """GPT-2's letter of every byte: printable ones are themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in printable)}
    return [others.get(byte, chr(byte)) for byte in range(256)]


def toy_gguf(path: Path, pre: str, texts: list[str]) -> Path:
    """A GGUF file of a vocabulary without weights, whose tokens are runs of 2 or 3 bytes that are common in `texts`.

    They take no notice of words: a token like `1 2` or `a\\n` is found where a pre-tokenizer forgets to cut.
    """
    alphabet = letters()
    spelled = ["".join(alphabet[byte] for byte in text.encode()) for text in texts]
    merges, known = [], set(alphabet)
    for size in (2, 3):
        counts = Counter(s[i : i + size] for s in spelled for i in range(len(s) - size + 1))
        common = sorted((-n, run) for run, n in counts.items() if n > 1 and run[:-1] in known)[:5000]
        merges += [(run[:-1], run[-1]) for _, run in common]
        known.update(run for _, run in common)
    tokens = [*alphabet, *("".join(pair) for pair in merges), *CONTROL]
    writer = GGUFWriter(path, "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 4)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_llama_cpp_needs(pre: str, text: str) -> str:
    """Qwen2's tokenizer normalises text, llama.cpp does not."""
    return unicodedata.normalize("NFC", text) if pre == "qwen2" else text


def digest(ids: list[int]) -> str:
    """What is committed of ids that nobody reads: 4 characters."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:4]


# ---- the two witnesses -----------------------------------------------------------------------------------------------


class LlamaCpp:
    """llama.cpp's tokenizer of a GGUF file, through its C functions (include/llama.h)."""

    class Params(Structure):
        """llama_model_params; passed in memory, so it may be larger than the library's, never smaller."""

        _fields_ = (
            *((name, c_void_p) for name in ("devices", "overrides")),
            *((name, c_int32) for name in ("gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
            *((name, c_void_p) for name in ("split", "callback", "data", "pairs")),
            ("vocab_only", c_bool), ("spare", c_char * 127),
        )  # fmt: skip

    def __init__(self, path: Path):
        import xllamacpp

        self.version, self._lib = xllamacpp.__version__, ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        lib, ids = self._lib, POINTER(c_int32)
        lib.llama_model_default_params.restype = self.Params
        lib.llama_model_load_from_file.restype = lib.llama_model_get_vocab.restype = c_void_p
        lib.llama_model_load_from_file.argtypes = [c_char_p, self.Params]
        lib.llama_model_get_vocab.argtypes = [c_void_p]
        lib.llama_tokenize.argtypes = [c_void_p, c_char_p, c_int32, ids, c_int32, c_bool, c_bool]
        lib.llama_detokenize.argtypes = [c_void_p, ids, c_int32, c_char_p, c_int32, c_bool, c_bool]
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.vocab_only = True
        self._vocab = lib.llama_model_get_vocab(lib.llama_model_load_from_file(str(path).encode(), params))

    def encode(self, text: str, control: bool) -> list[int]:
        """Nothing added; whether the text of a control token is that token."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 1))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, control)
        assert count >= 0
        return ids[:count]

    def decode(self, ids: list[int]) -> str:
        """Control tokens left out."""
        buffer = ctypes.create_string_buffer(256 * (len(ids) + 1))
        count = self._lib.llama_detokenize(
            self._vocab, (c_int32 * len(ids))(*ids), len(ids), buffer, len(buffer), False, False
        )
        assert count >= 0
        return buffer.raw[:count].decode("utf-8", "replace")


class Definition:
    """SmolLM2's tokenizer from its definition, with the vocabulary, merges and control tokens of a GGUF file."""

    WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def __init__(self, path: Path):
        names = ("tokens", "token_type", "merges")
        tokens, types, merges = (GGUFReader(path).fields[f"tokenizer.ggml.{name}"].contents() for name in names)
        self._ids = {token: i for i, token in enumerate(tokens)}
        self._ranks = {tuple(pair.split(" ")): rank for rank, pair in enumerate(merges)}
        self.control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
        self._letters = letters()

    def encode(self, text: str, control: bool) -> list[int]:
        import regex

        pattern = "|".join(map(regex.escape, self.control)) if control else r"(?!)"
        ids = []
        for n, part in enumerate(regex.split(f"({pattern})", text)):
            if n % 2:
                ids.append(self._ids[part])
                continue
            for digits in regex.split(r"(\p{N})", part):
                for word in regex.findall(self.WORD, digits):
                    ids += self._bpe([self._letters[byte] for byte in word.encode()])
        return ids

    def _bpe(self, parts: list[str]) -> list[int]:
        parts = [part for part in parts if part in self._ids]
        while pairs := [(self._ranks[pair], n) for n, pair in enumerate(pairwise(parts)) if pair in self._ranks]:
            n = min(pairs)[1]
            parts[n : n + 2] = ["".join(parts[n : n + 2])]
        return [self._ids[part] for part in parts]

    def loses(self, text: str) -> bool:
        return any(self._letters[byte] not in self._ids for byte in text.encode())


# ---- the file --------------------------------------------------------------------------------------------------------


def row(name: str, text: str, llama: LlamaCpp, definition: Definition) -> dict:
    """Ids with control strings as text (`ids`) and as tokens (`control`, where they differ), and `decoded` where it is
    not the text. `llama.cpp` has what that says where the definition says otherwise."""
    ids, other = ([witness.encode(text, control) for control in (False, True)] for witness in (definition, llama))
    assert ids == other or definition.loses(text), ascii(text)
    found = {"class": name, "text": text, "ids": ids[0]}
    if ids[1] != ids[0]:
        found["control"] = ids[1]
    if (decoded := llama.decode(ids[1])) != text:
        found["decoded"] = decoded
    if ids != other:
        found["llama.cpp"] = other[0]
        assert ids[0] == ids[1] and other[0] == other[1] and llama.decode(other[0]) == decoded
    return found


def main(model: Path) -> None:
    llama, definition, texts = LlamaCpp(model), Definition(model), strings()
    rows = [row(name, text, llama, definition) for name, text in texts]
    toys = {}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRE:
            toy = LlamaCpp(toy_gguf(Path(folder) / pre, pre, [text for _, text in texts]))
            toys[pre] = "".join(digest(toy.encode(as_llama_cpp_needs(pre, text), True)) for _, text in texts)
    with open(model, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    head = {"reference": f"{REFERENCE} {llama.version}", "model": model.name, "sha256": sha256, "toys": toys}
    lines = ",\n".join(json.dumps(found, separators=(",", ":")) for found in rows)
    write_bytes(TARGET, f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n'.encode())
    print(f"{TARGET}: {len(rows):,} strings, on {sum('llama.cpp' in found for found in rows)} the witnesses differ")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
