"""Ordinary conversations on which forgetting is measured: those that ship with the project, or a file's."""

from collections.abc import Iterable
from pathlib import Path

from lora.data import formats, lint
from lora.data.batch import Batch, micro_batches
from lora.data.encode import encode
from lora.errors import BadInput
from lora.model.chat import Chat

SHIPPED = Path(__file__).with_name("retention.jsonl")
NO_LIMIT = 2**31  # tokens of a conversation


def retention_batches(
    chat: Chat, path: str | Path | None, micro_tokens: int, device="cpu", without: Iterable[formats.Conversation] = ()
) -> tuple[list[Batch], int, int]:
    """Batches in which every next token counts, how many conversations they hold, and how many were left out.

    Left out are those that ask or say what a row of `without` does, as `lint` compares them, near-duplicates aside; so
    what is trained is not taken for what is remembered. Raises BadInput for a file that cannot be used, or all used up.
    """
    rows = formats.read([Path(path or SHIPPED)])
    known = {asked for row in without for asked in _asked(row)}
    kept = [row for row in rows if not known.intersection(_asked(row))]
    if not kept:
        why = f"all of its {len(rows)} conversations are in the training data"
        raise BadInput(f"nothing to remember in {path or SHIPPED}: {why}. Give another file")
    examples = encode(kept, chat, NO_LIMIT, "all")
    return micro_batches(list(examples), micro_tokens, device), len(kept), len(rows) - len(kept)


def _asked(row: formats.Conversation) -> set[bytes]:
    return set(lint.asked(row))
