"""Figures of a model, or of a model with an adapter, on rows with known answers; and the table of them."""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from tqdm import tqdm

from lora.adapter.inject import disabled, lora_layers
from lora.adapter.merge import merged_weight
from lora.data import formats
from lora.data.batch import Batch, micro_batches
from lora.data.encode import Encoded, encode
from lora.errors import BadInput
from lora.inference import answers, prompts
from lora.inference.generate import GREEDY, generate_all
from lora.text.chat import Chat
from lora.train.evaluate import Retention

FIGURES = {  # in the JSON -> in the table, with its format
    "loss": ("loss, nats per token of the answers", "{:.4f}"),
    "exact_match": ("answers that match exactly", "{:.1%}"),
    "working_right": ("whole working right", "{:.1%}"),
    "result_right": ("result right", "{:.1%}"),
    "retention_kl": ("forgotten: KL from the base, nats", "{:.4f}"),
    "retention_loss_before": ("ordinary conversations: loss of the base", "{:.4f}"),
    "retention_loss": ("ordinary conversations: loss now", "{:.4f}"),
    "distinct_1": ("distinct-1, words", "{:.3f}"),
    "distinct_2": ("distinct-2, words", "{:.3f}"),
    "repetition": ("repeated 4-grams, tokens", "{:.1%}"),
    "length": ("answer length, tokens", "{:.1f}"),
    "ended": ("answers that ended by themselves", "{:.1%}"),
}


class Row(NamedTuple):
    """A conversation, cut into the turns before its last answer and that answer; of a task its two numbers."""

    conversation: formats.Conversation
    asked: list[dict]
    target: str
    numbers: tuple[int, int] | None = None


class Column(NamedTuple):
    """What is scored: the base (`adapter` None) or the base with an adapter, and the rows as its chat encodes them."""

    name: str
    adapter: str | None
    chat: Chat
    examples: Encoded
    prompts: list[list[int]]
    retention: list[Batch]  # conversations that show what was forgotten; none for the base


def cut(conversation: formats.Conversation) -> Row | None:
    """The row whose target is the last answer to learn; None where there is no such answer."""
    messages = conversation.messages
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
    return Row(conversation, messages[: places[-1]], messages[places[-1]]["content"]) if places else None


def encode_rows(
    rows: list[Row], chat: Chat, limit: int, with_prompts: bool, kind: str = "conversation"
) -> tuple[Encoded, list[list[int]]]:
    """The rows as examples of a `kind` and, if `with_prompts`, as prompts. Raises BadInput for one over `limit` tokens,
    and for pairs of which all have equal sides."""
    examples = encode((row.conversation for row in rows), chat, limit, kind=kind)
    if examples.overlong:
        where, length = examples.overlong
        raise BadInput(f"too long in {where}: {length} tokens, the model has room for {limit}. Remove the row")
    if not len(examples):
        raise BadInput(f"nothing to score in {rows[0].conversation.where}: all pairs have equal sides. Give others")
    asked = rows if with_prompts else []
    return examples, [prompts.encode(chat, limit, row.asked, row.conversation.where) for row in asked]


def losses(model, measure: Callable[[Iterable[Batch]], dict], column: Column, micro_tokens: int) -> dict[str, float]:
    """What a method measures on the rows, and, for an adapter, what it changed elsewhere."""
    cap = model.config.final_logit_softcapping

    def trunk(b: Batch) -> torch.Tensor:
        return model.trunk(b.tokens, b.lengths)[b.trained]  # (N, D)

    batches = micro_batches(column.examples, micro_tokens, model.device)
    bar = tqdm(batches, desc=f"{column.name}: loss", unit="batch", leave=False, disable=None)
    with merged_head(model):
        figures = measure(bar)
        if column.retention:
            found = Retention(trunk, lambda: model.head_weight, column.retention, lambda: disabled(model), cap)()
            figures |= {f"retention_{key}": value for key, value in found._asdict().items()}
    return figures


@contextmanager
def merged_head(model):
    """Merge an adapter on the head inside the block: losses read the head's weight and do not call it."""
    head = lora_layers(model).get("lm_head")
    if head:  # of an adapter made elsewhere: train.py refuses it
        head.merged_weight = merged_weight(head.base.weight, head.delta())
    try:
        yield
    finally:
        if head:
            head.merged_weight = None


def likeliest_answers(model, column: Column, batch_size: int, max_new_tokens: int) -> list[list[int]]:
    """The likeliest answer to every prompt, as ids."""
    how = (column.chat.stops, max_new_tokens, GREEDY, batch_size)
    with tqdm(total=len(column.prompts), desc=f"{column.name}: answers", unit="row", leave=False, disable=None) as bar:
        return list(generate_all(model, column.prompts, *how, bar))


def exact_matches(rows: Iterable[Row], texts: Iterable[str]) -> float:
    """The share of answers that are their targets."""
    right = [answers.exact_match(text, row.target) for row, text in zip(rows, texts, strict=True)]
    return sum(right) / len(right)


def describe(model, column: Column, ids: list[list[int]], texts: list[str], max_new_tokens: int) -> dict[str, float]:
    """What the answers look like, right or wrong."""
    room = model.config.max_position_embeddings
    ended = (len(i) < min(max_new_tokens, room - len(p)) for p, i in zip(column.prompts, ids, strict=True))
    return {
        "distinct_1": answers.distinct_n(texts, 1),
        "distinct_2": answers.distinct_n(texts, 2),
        "repetition": sum(map(answers.repetition, ids)) / len(ids),
        "length": answers.mean_length(ids),
        "ended": sum(ended) / len(ids),
    }


def table(figures: dict[str, dict[str, float]], rows: int, labels: dict[str, tuple[str, str]] = FIGURES) -> str:
    """A line for each figure, a column for each model; what was not measured has a dash. `labels` as FIGURES."""
    lines = [[f"{rows:,} rows", *figures]]
    for key, (label, form) in labels.items():
        values = [form.format(found[key]) if key in found else "-" for found in figures.values()]
        if any(value != "-" for value in values):
            lines.append([label, *values])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
        for cells in lines
    )
