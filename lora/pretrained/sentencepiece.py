"""SentencePiece's BPE in its two forms: scores of tokens (GGUF), and a list of merges (tokenizer.json).

It joins the two adjacent tokens whose joint token has the highest score. A list of merges does the same where
it has every pair of tokens that makes a token, the pairs of one token in a row, and the highest score first.
"""

from collections.abc import Iterable

LONGEST = 64  # characters of a token that others join to; SentencePiece's own limit is 16
SPACE, BYTES = "▁", tuple(f"<0x{byte:02X}>" for byte in range(256))
_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
NORMALIZERS = {  # a space before every text? -> the steps of the normalizer
    True: [_PREPEND, _ESCAPE],
    False: [_ESCAPE],
}


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The list of merges, from the score of every token."""
    found = []
    for token in sorted((token for token in scores if len(token) <= LONGEST), key=scores.get, reverse=True):
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        found += [(left, right) for left, right in pairs if left in scores and right in scores]
    return found


def missing_letters(vocabulary: Iterable[str]) -> list[str]:
    """Characters that are in tokens and no token: SentencePiece joins them, and a list of merges cannot."""
    return sorted({letter for token in vocabulary for letter in token} - set(vocabulary))


def scores_of(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, float] | None:
    """`merges_of` the other way; None where no scores do what the list does."""
    if missing_letters(vocabulary):
        return None
    ranks = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(merges)))}  # of its first pair
    scores = {token: ranks.get(token, -float(len(merges))) for token in vocabulary}
    again = merges_of(scores)
    same = set(again) == set(merges) and ["".join(pair) for pair in again] == ["".join(pair) for pair in merges]
    return scores if same else None


def tokenizer_parts(vocabulary: dict[str, int], scores: dict[str, float], unknown: str, prefix: bool) -> dict:
    """The parts of a tokenizer.json that are SentencePiece's; as transformers' converter for Llama writes them."""
    unescape = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decode = [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decode.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": NORMALIZERS[prefix]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decode},
        "model": {
            "type": "BPE", "unk_token": unknown, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocabulary, "merges": [list(pair) for pair in merges_of(scores)],
        },
    }  # fmt: skip
