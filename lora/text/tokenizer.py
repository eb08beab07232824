"""Text to ids and back, by the `tokenizers` package, with decoding that never shows half a character."""

import hashlib
import json
import re

from tokenizers import Tokenizer as FastTokenizer

from lora import threads
from lora.errors import BadInput

BROKEN = "\ufffd"  # what bytes that are no character (yet) are decoded to


class Tokenizer:
    """A `tokenizer.json`. `control` maps the text of every special token (`<|im_end|>`) to its id, `control_pattern`
    finds them in a text; `fingerprint` is the file's sha256; `rows` is how many embeddings the model has, None where
    that is enough for all tokens.

    Raises BadInput for a file that is no tokenizer; `where` names it.
    """

    def __init__(self, data: bytes, where: str = "tokenizer.json", rows: int | None = None):
        try:
            self._fast = FastTokenizer.from_str(data.decode("utf-8-sig"))
            self._fast.no_truncation()
            self._fast.no_padding()
            added = self._fast.get_added_tokens_decoder()
            ids = self._fast.get_vocab(with_added_tokens=True).values()
            self.size = 1 + max([*ids, *added], default=-1)  # which may skip some
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a Rust panic derives from BaseException
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise BadInput(f"broken tokenizer in {where}: {why}. Download the file again") from None
        self.rows = rows if rows is not None and rows < self.size else None
        self.control = {token.content: i for i, token in added.items() if token.special}
        strings = sorted(self.control, key=len, reverse=True)
        self.control_pattern = re.compile("|".join(map(re.escape, strings)) or r"(?!)")
        self._marked: dict[str, tuple[FastTokenizer, dict[int, int]]] = {}  # by mark, of `encode_marked`
        self.fingerprint = hashlib.sha256(data).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which control strings are control tokens. Nothing is added (no BOS)."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each, on all cores."""
        with threads.unbound():
            return [encoded.ids for encoded in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which control strings are ordinary text."""
        return self._plain(text, False)

    def mark(self, text: str, mark: str) -> str:
        """The text with `mark` behind the first character of each control string."""
        return self.control_pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Ids of a text in which only marked control strings are control tokens."""
        if mark not in self._marked:
            raw = json.loads(self._fast.to_str())
            added = raw["added_tokens"]
            names = {
                self.mark(token["content"], mark) if token["special"] else token["content"]: token for token in added
            }
            ids = {name: token["id"] for name, token in names.items()}
            raw["added_tokens"] = [{**token, "content": name} for name, token in names.items()]
            if isinstance(vocabulary := raw["model"]["vocab"], dict):  # ids may have gaps: no id of a text is a mark's
                vocabulary |= {name: self.size + n for n, name in enumerate(names) if name not in vocabulary}
            twin = FastTokenizer.from_str(json.dumps(raw | {"post_processor": None}))
            self._marked[mark] = twin, {twin.token_to_id(name): i for name, i in ids.items()}
        twin, ids = self._marked[mark]
        return [ids.get(i, i) for i in twin.encode(text, add_special_tokens=False).ids]

    def encode_document(self, text: str, control_tokens: bool = False) -> list[int]:
        """As `encode_plain`, or as `encode` with `control_tokens`; and what the tokenizer puts round any text (BOS),
        unless it stands there."""
        if not control_tokens:
            return self._plain(text, True)
        ids, whole = self.encode(text), self._fast.encode(text, add_special_tokens=True).ids
        first = next(n for n in range(len(whole) - len(ids), -1, -1) if whole[n : n + len(ids)] == ids)
        begin, end = whole[:first], whole[first + len(ids) :]
        begin = [] if ids[: len(begin)] == begin else begin
        return [*begin, *ids, *([] if ids[len(ids) - len(end) :] == end else end)]

    def _plain(self, text: str, add: bool) -> list[int]:
        self._fast.encode_special_tokens = True
        try:
            return self._fast.encode(text, add_special_tokens=add).ids
        finally:
            self._fast.encode_special_tokens = False

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, control tokens left out."""
        return self._fast.decode(ids, skip_special_tokens=True)

    def spell(self, ids: list[int]) -> str:
        """Text of some ids from within a text, control tokens as they are spelled."""
        text, first = self._fast.decode(ids, skip_special_tokens=False), self.token(ids[0]) or ""
        return f" {text}" if first.startswith("▁") and not text.startswith(" ") else text  # which some decoders strip

    def token(self, i: int) -> str | None:
        """The token of an id as the vocabulary spells it."""
        return self._fast.id_to_token(i)

    def id(self, token: str) -> int | None:
        return self._fast.token_to_id(token)

    def without_row(self, ids: list[int]) -> str | None:
        """What is wrong with the first of these ids that the model has no embedding for, if there is one."""
        first = next((i for i in ids if i >= self.rows), None) if self.rows is not None else None
        if first is None:
            return None
        return f"the token {self.token(first)!r} has id {first}, the model has {self.rows} embeddings"


class Stream:
    """Decodes ids as they come: the pieces of `push` and `end`, joined, are exactly `decode` of all ids.

    Only where a model writes bytes that are no text and the tokenizer has byte fallback, may what was shown differ.
    """

    WINDOW, OVERLAP = 48, 16  # tokens; decoding the whole answer for every token would be quadratic

    def __init__(self, tokenizer: Tokenizer):
        self._decode, self._ids, self._shown = tokenizer.decode, [], 0

    def push(self, i: int) -> str:
        """The text that is certain now, perhaps none: a character may need the bytes of several tokens."""
        self._ids.append(i)
        text = self._decode(self._ids)
        certain = text.rstrip(BROKEN)  # byte fallback breaks a whole run of characters until the last one is complete
        piece = certain[self._shown :]
        self._shown += len(piece)
        if len(self._ids) > self.WINDOW and certain == text:
            rest = self._decode(self._ids[-self.OVERLAP :])
            if text.endswith(rest):  # else the cut would go through a character
                self._ids, self._shown = self._ids[-self.OVERLAP :], len(rest)
        return piece

    def end(self) -> str:
        """What is left when no more ids come."""
        piece = self._decode(self._ids)[self._shown :]
        self._shown += len(piece)
        return piece
