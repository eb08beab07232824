"""Text stays text: a control string inside a message (`<|im_end|>`) cannot forge a turn.

Before rendering, a guard character breaks every control string of the messages, so that the only control strings in the
rendered text are the template's own. Before encoding, the two change places: the text is as it was, the template's own
are marked, and a copy of the tokenizer knows its control tokens by the mark. So each takes the white space beside it
that it always takes, and text loses none.
"""

from collections.abc import Iterator, Sequence

from lora.errors import BadInput
from lora.text.tokenizer import Tokenizer

GUARDS = [chr(c) for c in range(0xFDD0, 0xFDF0)]  # "noncharacters": no tokenizer or template has a use for them


def free_characters(messages: Sequence[dict], count: int) -> list[str]:
    """Characters that no message has. Raises BadInput where there are not so many."""
    texts = list(_texts(messages))
    free = [character for character in GUARDS if not any(character in text for text in texts)][:count]
    if len(free) < count:
        raise BadInput("wrong text in the messages: a control token and all of U+FDD0 to U+FDEF. Remove them")
    return free


def guard_messages(messages: Sequence[dict], tokenizer: Tokenizer) -> tuple[list[dict], str]:
    """What a template reads of the messages, every control string broken by a guard character; and that character, ""
    where none is."""
    read, guard = [{key: value for key, value in m.items() if key != "train"} for m in messages], ""
    if any(tokenizer.control_pattern.search(text) for text in _texts(messages)):
        [guard] = free_characters(messages, 1)
        read = [{k: tokenizer.mark(v, guard) if isinstance(v, str) else v for k, v in m.items()} for m in read]
    return read, guard


def encode_guarded(text: str, guard: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of rendered text: unbroken control strings are control tokens, guarded ones the ordinary text they are."""
    if not guard:
        return tokenizer.encode(text)
    pieces, position = [], 0
    for match in [*tokenizer.control_pattern.finditer(text), None]:
        pieces.append(text[position : match.start() if match else len(text)].replace(guard, ""))
        if match:
            pieces.append(tokenizer.mark(match[0], guard))
            position = match.end()
    return tokenizer.encode_marked("".join(pieces), guard)


def _texts(messages: Sequence[dict]) -> Iterator[str]:
    return (text for message in messages for text in message.values() if isinstance(text, str))
