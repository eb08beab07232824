"""Score a model and its adapters side by side: loss, right answers, and what was forgotten.

python evaluate.py --adapter weights/heron --data held-out.jsonl                 your own rows
python evaluate.py --adapter weights/a weights/b --task multiply --out m2.json   a task that grades itself
python evaluate.py --adapter weights/judge --data pairs.jsonl                    a reward model: pairs it gets right
python evaluate.py --adapter weights/heron --data pairs.jsonl --method dpo       which side it came to prefer
"""

from lora.errors import before_imports, run

before_imports(__name__)

import os
import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import torch

from data_gen import multiply
from lora import device as machine
from lora import files, pretrained
from lora.adapter import passport, store, value_head
from lora.adapter.merge import unload
from lora.data import formats, sources
from lora.data.retention import retention_batches
from lora.errors import BadInput, collecting, say
from lora.inference import score, several, unpacked
from lora.inference.prompts import holds_answers
from lora.inference.score import Row
from lora.inference.session import try_adapter, warn_if_unchanged
from lora.methods import METHODS, fill
from lora.pretrained import default_model, hub
from lora.run.measured import Measured, labels, pair_scores
from lora.run.settings import TrainMethod
from lora.run.use_settings import EvaluateSettings
from lora.text.template import read_arguments

TASK_ROWS = 60
ROOM, LEAST_TOKENS = 1.5, 48  # an answer may be so many times the longest target, and so long at least


def main(argv=None) -> int:
    args = EvaluateSettings.resolve(argv, __doc__)
    names = several.column_names(args.adapter or [])
    rows = check(args, names)
    how = TrainMethod(method=args.method, beta=args.beta)
    fill(how)

    # ---- the base on `meta`, on which every adapter and every row is tried before anything is loaded
    adapters = args.adapter or []
    model = args.model or (passport.base_of(adapters[0]) if adapters else default_model.NAME)
    base = several.find_base(model, args.quant, adapters, args.no_verify)
    say(f"model    {base.described}")
    device = machine.choose_device(args.device)
    dtype, _ = machine.choose_dtype(args.dtype, device)
    args.device, args.dtype = device.type, str(dtype).removeprefix("torch.")  # as the report has them
    empty = pretrained.empty_model(base)
    columns, problems = [], []
    for name, adapter in names.items():
        with collecting(problems):
            columns.append(make_column(name, adapter, base, empty, rows, device, args))
    if problems:
        raise BadInput(*dict.fromkeys(problems))
    if not args.no_generate and args.max_new_tokens is None:
        longest = max(len(columns[0].chat.tokenizer.encode_plain(row.target)) for row in rows)
        args.max_new_tokens = max(LEAST_TOKENS, ceil(ROOM * longest))
    say(f"rows     {len(rows):,}" + ("" if args.no_generate else f", answers of up to {args.max_new_tokens} tokens"))

    # ---- one model; each adapter is put on it and taken off again
    model = pretrained.load_model(base, dtype, device)
    dense = unpacked.unpack(model, machine.free_memory(device), copies=2)  # the base's own, and an adapter's sums
    check_head(args, value_head.of(model))
    figures, predictions, faults = {}, {}, {}
    for column in columns:
        if column.adapter:
            store.load(model, column.adapter, read=base.read)
            warn_if_unchanged(model, column.adapter)
        measured = Measured(model, column, how)
        figures[column.name] = score.losses(model, measured, column, args.micro_tokens)
        if args.method == "reward" and value_head.of(model) and predictions_folder(args):
            predictions[column.name] = pair_scores(model, column, args.micro_tokens)
        if not args.no_generate:
            with unpacked.merged_if(dense, model):  # answers come from rounded sums, as those of generate.py do
                ids = score.likeliest_answers(model, column, args.batch_size, args.max_new_tokens)
            texts = [column.chat.tokenizer.decode(i) for i in ids]
            grades, faults[column.name] = grade(rows, texts, args)
            figures[column.name] |= grades | score.describe(model, column, ids, texts, args.max_new_tokens)
            pairs = zip(rows, texts, strict=True)
            predictions[column.name] = [answered(row, text) for row, text in pairs]
        unload(model)

    if folder := predictions_folder(args):
        write_predictions(folder, predictions)
    if args.out:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        report = {
            "figures": figures,
            "rows": len(rows),
            "model": {"name": base.name, "source": base.described},
            "adapters": {name: adapter for name, adapter in names.items() if adapter},
            "settings": args.to_save(),
            "machine": dict(torch=torch.__version__, threads=torch.get_num_threads(), device=where, dtype=args.dtype),
        }
        files.write_json(Path(args.out), report | ({"faults": faults} if args.task and faults else {}))
        say(f"figures  {args.out}")
    print(score.table(figures, len(rows), labels(args.method)))
    return 0


def write_predictions(folder: Path, predictions: dict[str, list[dict]]) -> None:
    folder.mkdir(exist_ok=True)
    for name, found in predictions.items():
        files.write_rows(folder / f"{name}.jsonl", found)
    say(f"answers  {folder}")


def answered(row: Row, text: str) -> dict:
    return {"prompt": row.asked[-1]["content"], "target": row.target, "prediction": text}


# ---- what is wrong, before anything is loaded ------------------------------------------------------------------------


def check(args: EvaluateSettings, names: dict[str, str | None]) -> list[Row]:
    """The rows to score. Raises BadInput with everything that is wrong with the flags and files."""
    problems = []
    if bool(args.data) == bool(args.task):
        what = "contradiction" if args.data else "nothing to score"
        problems.append(f"{what} in the command line: there must be --data or --task. Give one of them")
    with collecting(problems):
        args.method = args.method or default_method(args)
    problems += sources.key_problems(args, METHODS[args.method or "sft"].KIND)
    problems += wrong_for_method(args)
    for off, flag in (("no_generate", "predictions"), ("no_retention", "retention")):
        if getattr(args, off) and getattr(args, flag) and (args.method == "sft" or flag == "retention"):
            both = f"--{off.replace('_', '-')} and --{flag}"
            problems.append(f"contradiction in the command line: {both}. Give one of them")
    problems += several.unfit("--adapter", args.adapter or [])
    rows = read_rows(args, problems) if args.method else []
    if args.retention:
        with collecting(problems):
            formats.read([Path(args.retention)])
    problems += unwritable(args, names)
    if problems:
        raise BadInput(*problems)
    args.rows = len(rows[: args.rows])
    return rows[: args.rows]


def default_method(args: EvaluateSettings) -> str:
    """`reward` where --data is for a value head, else `sft`."""
    folders = [Path(folder) for folder in (*(args.adapter or ()), args.model) if folder]
    scores = any(value_head.has(folder) and not passport.of_policy(folder) for folder in folders)
    return "reward" if args.data and scores else "sft"


def check_head(args: EvaluateSettings, of_base: value_head.ValueHead | None) -> None:
    """Raises BadInput where there is no value head to score with; says where there is one that does not."""
    if args.method == "reward" and not of_base and not any(map(value_head.has, map(Path, args.adapter or ()))):
        fix = "Give an adapter or a model that was trained with --method reward"
        raise BadInput(f"no value head in the command line: nothing here scores. {fix}")
    if of_base and args.data and args.method == "sft" and "method" not in args.given:
        say("note     the model has a value head: --method reward scores pairs with it")


def wrong_for_method(args: EvaluateSettings) -> Iterator[str]:
    """What the flags contradict; rows that are not conversations get no answers."""
    line, method = "contradiction in the command line:", args.method
    if method in (None, "sft"):
        if args.beta is not None:
            yield f"{line} --beta, which is for --method dpo and kto. Leave it out"
        return
    args.no_generate = True
    if args.task:
        yield f"{line} --task, which makes conversations, and --method {method}. Leave out one of them"
    if args.beta is not None and method == "reward":
        yield f"{line} --beta, which is for dpo and kto, and --method reward. Leave it out"
    if args.predictions and method != "reward":
        yield f"{line} --predictions, answers or scores, and --method {method}, which has none. Leave it out"


def read_rows(args: EvaluateSettings, problems: list[str]) -> list[Row]:
    """The rows of --data, or those that --task makes; what is wrong with them is added to `problems`."""
    rows = []
    for path in args.data or []:
        with collecting(problems):
            for conversation in formats.read([hub.dataset_file(path)], **sources.how(args, METHODS[args.method].KIND)):
                row = score.cut(conversation) if args.method == "sft" else None
                if not row and not args.no_generate:
                    fix = "Remove it or add --no-generate"
                    problems.append(f"wrong row in {conversation.where}: a document has no answer. {fix}")
                rows.append(row or Row(conversation, [], ""))
    if args.task and not args.data:
        try:
            made = multiply.held_out_conversations(
                args.digits, args.rows or TASK_ROWS, args.style, args.lang, args.seed
            )
        except BadInput as error:
            made, problems[:] = [], [*problems, str(error).replace("--test-rows", "--rows")]
        for number, row in enumerate(made, 1):
            conversation = formats.Conversation(row["messages"], f"row {number}")
            rows.append(score.cut(conversation)._replace(numbers=(row["a"], row["b"])))
    return rows


def unwritable(args: EvaluateSettings, names: dict[str, str | None]) -> list[str]:
    """Why the results could not be written where they are to go."""
    inputs = [Path(path) for path in (*(args.data or []), *filter(None, [args.retention]))]
    problems, outputs, folder = [], [("--out", Path(args.out))] if args.out else [], predictions_folder(args)
    if folder and folder.is_dir():
        outputs += [("--predictions", folder / f"{name}.jsonl") for name in names]
    elif folder and folder.exists():
        problems.append(f"wrong --predictions in {folder}: it is not a folder. Choose another name")
    elif args.predictions:
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


def predictions_folder(args: EvaluateSettings) -> Path | None:
    without = args.no_generate and args.method != "reward"
    if args.predictions or without or not args.out:
        return Path(args.predictions) if args.predictions else None
    return Path(args.out).with_name(Path(args.out).name.removesuffix(".json") + ".predictions")


def make_column(
    name: str, adapter: str | None, base, empty, rows: list[Row], device, args: EvaluateSettings
) -> score.Column:
    """What is scored in a column. Raises BadInput for an adapter or a row that does not fit."""
    told = {"system": False if args.no_system else args.system, "template": args.template, "date": args.date}
    told |= {"template_args": read_arguments(args.template_arg), "control_tokens": args.control_tokens}
    chat = try_adapter(empty, name, adapter, base, not args.no_verify, **told)
    limit, retention = empty.config.max_position_embeddings, []
    examples, prompts = score.encode_rows(rows, chat, limit, not args.no_generate, METHODS[args.method].KIND)
    if examples.equal:
        say(f"note     {examples.equal} pairs are left out: their sides are equal")
    if adapter and not args.no_retention:
        retention, count, _ = retention_batches(chat, args.retention, limit, args.micro_tokens, device)
        say(f"kept     {count} ordinary conversations, {sum(len(b.tokens) - b.padding for b in retention):,} tokens")
    return score.Column(name, adapter, chat, examples, prompts, retention)


def grade(rows: list[Row], texts: list[str], args: EvaluateSettings) -> tuple[dict[str, float], list[dict]]:
    """Shares of right answers, and of a task the first wrong line of every answer that has one."""
    if not args.task:
        return {"exact_match": score.exact_matches(rows, texts)}, []
    faults, right = [], 0
    for row, text in zip(rows, texts, strict=True):
        a, b = row.numbers
        right += multiply.final(text) == a * b
        if fault := multiply.check(a, b, text.strip(), args.style, args.lang):
            faults.append({"a": a, "b": b, **fault._asdict()})
    return {"working_right": (len(rows) - len(faults)) / len(rows), "result_right": right / len(rows)}, faults


if __name__ == "__main__":
    sys.exit(run(main))
