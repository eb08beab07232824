"""Multiplications of 2 digits in terse lines: the task of the experiments that compare settings."""

from pathlib import Path

from parts import Experiment, ask, command, question

from data_gen import multiply
from lora import files

LOSSES = 40  # unseen pairs whose loss is measured
ROOM = 145  # tokens of an answer; the longest right one has 132


def rows_of(experiment: Experiment, rows: int) -> Path:
    """The file to train on; beside it `unseen.jsonl`, in the wording of training, to measure losses on."""
    path, unseen = experiment.scratch / f"train-{rows}.jsonl", experiment.scratch / "unseen.jsonl"
    if not path.exists():
        command("data_gen/multiply.py", "--digits", 2, "--rows", rows, "--style", "terse", "--out", path)
    if not unseen.exists():
        pairs = multiply.pairs(2, LOSSES, held_out=True)
        asked = ((multiply.question(a, b, "en"), multiply.solve(a, b, "terse", "en")) for a, b in pairs)
        files.write_rows(unseen, ({"question": q, "answer": a} for q, a in asked))
    return path


def answered(scratch: Path, adapter: Path | None, rows: int, *words: object, **who: object) -> list[dict]:
    """Answers to unseen pairs, asked as in training."""
    pairs = multiply.pairs(2, rows, held_out=True)
    prompts = [question(multiply.question(a, b, "en")) for a, b in pairs]
    texts = ask(scratch, prompts, adapter, "--max-new-tokens", ROOM, "--batch-size", rows, *words, **who)
    return [{"a": a, "b": b, "prediction": text} for (a, b), text in zip(pairs, texts, strict=True)]


def right(row: dict) -> bool:
    """The last line states the product."""
    return multiply.final(row["prediction"]) == row["a"] * row["b"]
