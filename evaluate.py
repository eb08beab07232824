"""Score a model and its adapters side by side: loss, right answers, and what was forgotten.

python evaluate.py --adapter weights/heron --data held-out.jsonl                 your own rows
python evaluate.py --adapter weights/a weights/b --task multiply --out m2.json   a task that grades itself
"""

from lora.errors import quiet_imports, run

quiet_imports(__name__)

import os
import sys
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from data_gen import multiply
from generate import collecting, holds_answers, load_chat
from generate import encode as encode_prompt
from lora import device as machine
from lora import files, flags, pretrained, settings
from lora.adapter import passport, store
from lora.adapter.inject import disabled, lora_layers
from lora.adapter.merge import merge, merged_weight, unload, unmerge
from lora.data import formats
from lora.data.batch import Batch, micro_batches
from lora.data.encode import Encoded, encode
from lora.data.retention import retention_batches
from lora.errors import BadInput, say
from lora.export import receipt
from lora.inference import several
from lora.inference.generate import generate
from lora.ops import cross_entropy
from lora.pretrained import hub
from lora.run import answers
from lora.text.chat import Chat
from lora.train.evaluate import Retention, mean_loss

TASK_ROWS = 60
ROOM, LEAST_TOKENS = 1.5, 48  # an answer may be so many times the longest target, and so long at least
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
    """What is scored: the base (`adapter` None) or the base with an adapter, and the rows as its chat lays them."""

    name: str
    adapter: str | None
    chat: Chat
    examples: Encoded
    prompts: list[list[int]]
    ordinary: list[Batch]  # for the meter of forgetting; none of them for the base


def story(argv) -> int:
    s = settings.resolve(flags.EVALUATE, argv, __doc__)
    names = several.column_names(s.adapter or [])
    rows = check(s, names)

    # ---- the base on `meta`, on which every adapter and every row is tried before anything is loaded
    checkpoint = pretrained.find(s.model or (passport.base_of(s.adapter[0]) if s.adapter else hub.DEFAULT))
    say(f"model    {checkpoint.described}")
    device = machine.choose_device(s.device)
    dtype, _ = machine.choose_dtype(s.dtype, device)
    s.device, s.dtype = device.type, str(dtype).removeprefix("torch.")
    empty = pretrained.empty_model(checkpoint)
    columns, problems = [], []
    for name, adapter in names.items():
        with collecting(problems):
            if adapter:
                say(f"adapter  {name}: {adapter}")
                several.dry_load(empty, adapter, checkpoint, not s.no_verify)
            columns.append(lay_out(name, adapter, checkpoint, empty, rows, device, s))
    if problems:
        raise BadInput(*dict.fromkeys(problems))
    if not s.no_generate and s.max_new_tokens is None:
        longest = max(len(columns[0].chat.tokenizer.encode_plain(row.target)) for row in rows)
        s.max_new_tokens = max(LEAST_TOKENS, ceil(ROOM * longest))
    say(f"rows     {len(rows):,}" + ("" if s.no_generate else f", answers of up to {s.max_new_tokens} tokens"))

    # ---- one model; each adapter is put on it and taken off again
    model = pretrained.load_model(checkpoint, dtype, device)
    figures, predictions, faults = {}, {}, {}
    for column in columns:
        if column.adapter:
            store.load(model, column.adapter)
            receipt.prove(model, column.adapter)
        figures[column.name] = losses(model, column, device, s)
        if not s.no_generate:
            merge(model)  # answers come from rounded sums, as those of generate.py do
            ids = answer_all(model, column, s)
            texts = [column.chat.tokenizer.decode(i) for i in ids]
            grades, faults[column.name] = grade(rows, texts, s)
            figures[column.name] |= grades | describe(model, column, ids, texts, s.max_new_tokens)
            predictions[column.name] = texts
            if column.adapter:
                unmerge(model)
        unload(model)

    # ---- what is left of it
    if folder := predictions_folder(s):
        folder.mkdir(exist_ok=True)
        for name, texts in predictions.items():
            pairs = zip(rows, texts, strict=True)
            answered = ({"prompt": r.asked[-1]["content"], "target": r.target, "prediction": t} for r, t in pairs)
            files.write_rows(folder / f"{name}.jsonl", answered)
        say(f"answers  {folder}")
    if s.out:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        report = {
            "figures": figures,
            "rows": len(rows),
            "model": {"name": checkpoint.name, "source": checkpoint.described},
            "adapters": {name: adapter for name, adapter in names.items() if adapter},
            "settings": settings.to_save(flags.EVALUATE, s),
            "machine": dict(torch=torch.__version__, threads=torch.get_num_threads(), device=name, dtype=s.dtype),
        }
        files.write_json(Path(s.out), report | ({"faults": faults} if s.task and faults else {}))
        say(f"figures  {s.out}")
    print(table(figures, len(rows)))
    return 0


# ---- what is wrong, before anything is loaded ------------------------------------------------------------------------


def check(s, names: dict[str, str | None]) -> list[Row]:
    """The rows to score. Raises BadInput with everything that is wrong with the flags and files."""
    problems, rows = [], []
    if bool(s.data) == bool(s.task):
        what = "contradiction" if s.data else "nothing to score"
        problems.append(f"{what} in the command line: there must be --data or --task. Give one of them")
    for off, flag in (("no_generate", "predictions"), ("no_retention", "retention")):
        if getattr(s, off) and getattr(s, flag):
            both = f"--{off.replace('_', '-')} and --{flag}"
            problems.append(f"contradiction in the command line: {both}. Give one of them")
    problems += several.unfit("--adapter", s.adapter or [])
    for path in s.data or []:
        with collecting(problems):
            for conversation in formats.read([hub.dataset_file(path)]):
                rows.append(cut(conversation, problems, s.no_generate))
    if s.task and not s.data:
        try:
            made = multiply.held_out_conversations(s.digits, s.rows or TASK_ROWS, s.style, s.lang, s.seed)
        except BadInput as error:
            made, problems = [], [*problems, str(error).replace("--test-rows", "--rows")]
        for number, row in enumerate(made, 1):
            conversation = formats.Conversation(row["messages"], f"row {number}")
            rows.append(cut(conversation, problems)._replace(numbers=(row["a"], row["b"])))
    if s.retention:
        with collecting(problems):
            formats.read([Path(s.retention)])
    problems += unwritable(s, names)
    if problems:
        raise BadInput(*problems)
    s.rows = len(rows[: s.rows])
    return rows[: s.rows]


def cut(conversation: formats.Conversation, problems: list[str], loss_only: bool = False) -> Row:
    """Where the last answer to learn begins, and what it is."""
    messages = conversation.messages
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
    if not places and not loss_only:
        problems.append(f"wrong row in {conversation.where}: a document has no answer. Remove it or add --no-generate")
    last = places[-1] if places else 0
    return Row(conversation, messages[:last], messages[last]["content"])


def unwritable(s, names: dict[str, str | None]) -> list[str]:
    """Why the results could not be written where they are to go."""
    inputs = [Path(path) for path in (*(s.data or []), *filter(None, [s.retention]))]
    problems, outputs, folder = [], [("--out", Path(s.out))] if s.out else [], predictions_folder(s)
    if folder and folder.is_dir():
        outputs += [("--predictions", folder / f"{name}.jsonl") for name in names]
    elif folder and folder.exists():
        problems.append(f"wrong --predictions in {folder}: it is not a folder. Choose another name")
    elif s.predictions:
        outputs.append(("--predictions", folder))
    for flag, path in outputs:
        found = files.unwritable(flag, path, *inputs)
        problems += found
        if not found and flag == "--out" and path.is_file() and not is_report(path):
            problems.append(f"wrong --out in {path}: it is there and no report of this program. Choose another name")
        if not found and flag == "--predictions" and path.is_file() and not holds_answers(path):
            problems.append(f"wrong --predictions in {path}: it holds no predictions. Choose another folder")
        if path.parent.is_dir() and not os.access(path.parent, os.W_OK | os.X_OK):
            problems.append(f"wrong {flag} in {path}: its folder cannot be written to. Choose another one")
    return problems


def is_report(path: Path) -> bool:
    try:
        return "figures" in files.read_json(path)
    except BadInput:
        return False


def predictions_folder(s) -> Path | None:
    if s.predictions or s.no_generate or not s.out:
        return Path(s.predictions) if s.predictions else None
    return Path(s.out).with_name(Path(s.out).name.removesuffix(".json") + ".predictions")


def lay_out(name: str, adapter: str | None, checkpoint, empty, rows: list[Row], device, s) -> Column:
    chat, most = load_chat(checkpoint, adapter, s), empty.config.max_position_embeddings
    examples = encode((row.conversation for row in rows), chat, most)
    if examples.overlong:
        where, length = examples.overlong
        raise BadInput(f"too long in {where}: {length} tokens, the model has room for {most}. Remove the row")
    prompts = [] if s.no_generate else [encode_prompt(empty, chat, r.asked, r.conversation.where) for r in rows]
    ordinary = []
    if adapter and not s.no_retention:
        ordinary, count, _ = retention_batches(chat, s.retention, most, s.micro_tokens, device)
        say(f"kept     {count} ordinary conversations, {sum(len(b.tokens) - b.padding for b in ordinary):,} tokens")
    return Column(name, adapter, chat, examples, prompts, ordinary)


# ---- the figures -----------------------------------------------------------------------------------------------------


def losses(model, column: Column, device, s) -> dict[str, float]:
    """Loss on the rows and, of an adapter, what it changed elsewhere."""
    cap = model.config.final_logit_softcapping

    def trunk(b) -> torch.Tensor:
        return model.trunk(b.tokens, b.lengths)[b.trained]  # (N, D)

    def objective(b) -> torch.Tensor:
        return cross_entropy(trunk(b), model.head_weight, b.targets, cap=cap)

    batches = micro_batches(column.examples, s.micro_tokens, device)
    bar = tqdm(batches, desc=f"{column.name}: loss", unit="batch", leave=False, disable=None)
    with merged_head(model):
        figures = {"loss": mean_loss(objective, bar)}
        if column.ordinary:
            retained = Retention(trunk, lambda: model.head_weight, column.ordinary, lambda: disabled(model), cap)()
            figures |= {f"retention_{key}": value for key, value in retained._asdict().items()}
    return figures


@contextmanager
def merged_head(model):
    """An adapter on the head is merged inside the block: losses read the head's weight and do not call it."""
    head = lora_layers(model).get("lm_head")
    if head:  # of an adapter made elsewhere: train.py refuses it
        head.merged_weight = merged_weight(head.base.weight, head.delta())
    try:
        yield
    finally:
        if head:
            head.merged_weight = None


def answer_all(model, column: Column, s) -> list[list[int]]:
    """The likeliest answer to every prompt, as ids."""
    found, prompts = [], column.prompts
    with tqdm(total=len(prompts), desc=f"{column.name}: answers", unit="row", leave=False, disable=None) as bar:
        for start in range(0, len(prompts), s.batch_size):
            batch = prompts[start : start + s.batch_size]
            found += generate(model, batch, column.chat.stops, s.max_new_tokens)
            bar.update(len(batch))
    return found


def grade(rows: list[Row], texts: list[str], s) -> tuple[dict[str, float], list[dict]]:
    """Shares of right answers, and of a task the first wrong line of every answer that has one."""
    if not s.task:
        matches = sum(answers.exact_match(text, row.target) for row, text in zip(rows, texts, strict=True))
        return {"exact_match": matches / len(rows)}, []
    faults, right = [], 0
    for row, text in zip(rows, texts, strict=True):
        a, b = row.numbers
        right += multiply.final(text) == a * b
        if fault := multiply.check(a, b, text.strip(), s.style, s.lang):
            faults.append({"a": a, "b": b, **fault._asdict()})
    return {"working_right": (len(rows) - len(faults)) / len(rows), "result_right": right / len(rows)}, faults


def describe(model, column: Column, ids: list[list[int]], texts: list[str], most: int) -> dict[str, float]:
    """What the answers look like, right or wrong."""
    room = model.config.max_position_embeddings
    ended = (len(i) < min(most, room - len(p)) for p, i in zip(column.prompts, ids, strict=True))
    return {
        "distinct_1": answers.distinct_n(texts, 1),
        "distinct_2": answers.distinct_n(texts, 2),
        "repetition": sum(map(answers.repetition, ids)) / len(ids),
        "length": answers.mean_length(ids),
        "ended": sum(ended) / len(ids),
    }


# ---- the results -----------------------------------------------------------------------------------------------------


def table(figures: dict[str, dict[str, float]], rows: int) -> str:
    """A line a figure, a column a model; what was not measured has a dash."""
    lines = [[f"{rows:,} rows", *figures]]
    for key, (label, form) in FIGURES.items():
        values = [form.format(found[key]) if key in found else "-" for found in figures.values()]
        if any(value != "-" for value in values):
            lines.append([label, *values])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
        for cells in lines
    )


def main(argv=None) -> int:
    return run(story, argv)


if __name__ == "__main__":
    sys.exit(main())
