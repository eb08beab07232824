"""Forgetting is measured on ordinary conversations: those that ship with the project, or a file's."""

from collections.abc import Iterable
from pathlib import Path

from lora.data import formats, lint
from lora.data.batch import Batch, micro_batches
from lora.data.encode import encode
from lora.errors import BadInput
from lora.text.chat import Chat

SHIPPED = Path(__file__).with_name("retention.jsonl")


def retention_batches(
    chat: Chat,
    path: str | Path | None,
    limit: int,
    micro_tokens: int,
    device="cpu",
    without: Iterable[formats.Conversation] = (),
) -> tuple[list[Batch], int, int]:
    """Batches in which every next token counts, how many conversations they hold, and how many were left out.

    A conversation is left out if it has over `limit` tokens, or asks or says what a row of `without` does (as `lint`
    compares them, near-duplicates aside): what is trained must not be taken for what is remembered. Raises BadInput for
    a file that cannot be used, or of which nothing is left.
    """
    rows = formats.read([Path(path or SHIPPED)])
    known = {asked for row in without for asked in lint.asked(row)}
    kept = [row for row in rows if not known.intersection(lint.asked(row))]
    examples = encode(kept, chat, limit, "all")
    if not len(examples):
        why = f"all of its {len(rows)} conversations are in the training data, or over {limit} tokens"
        raise BadInput(f"nothing to remember in {path or SHIPPED}: {why}. Give another file")
    return micro_batches(list(examples), micro_tokens, device), len(examples), len(rows) - len(examples)
