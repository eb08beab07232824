"""Text stays text: a control string inside a message (`<|im_end|>`) cannot forge a turn.

Before rendering, a guard character breaks every control string of the messages, so that the only control strings in the
rendered text are the template's own. Before encoding, the guards are taken out again, and what they guarded is encoded
as ordinary text.
"""

from collections.abc import Sequence

from lora.errors import BadInput
from lora.text.tokenizer import Tokenizer

GUARDS = [chr(c) for c in range(0xFDD0, 0xFDF0)]  # "noncharacters": no tokenizer or template has a use for them


def guard_messages(messages: Sequence[dict], tokenizer: Tokenizer) -> tuple[list[dict], str]:
    """Roles and contents, every control string broken by a guard character; and that character, "" where none is."""
    texts = [message["content"] for message in messages]
    guard = ""
    if any(tokenizer.control_pattern.search(text) for text in texts):
        guard = next((g for g in GUARDS if not any(g in text for text in texts)), "")
        if not guard:
            raise BadInput("wrong text in the messages: a control token and all of U+FDD0 to U+FDEF. Remove them")
        texts = [tokenizer.control_pattern.sub(lambda m: m[0][0] + guard + m[0][1:], text) for text in texts]
    return [{"role": m["role"], "content": text} for m, text in zip(messages, texts, strict=True)], guard


def encode_guarded(text: str, guard: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of rendered text: unbroken control strings are control tokens, guarded ones the ordinary text they are."""
    if not guard:
        return tokenizer.encode(text)
    ids, position = [], 0
    for match in [*tokenizer.control_pattern.finditer(text), None]:
        plain = text[position : match.start() if match else len(text)].replace(guard, "")
        ids += tokenizer.encode_plain(plain) if plain else []
        if match:
            ids.append(tokenizer.control[match[0]])
            position = match.end()
    return ids
