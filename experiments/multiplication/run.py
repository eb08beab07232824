"""Multiplication in worked steps: before, with one example in the prompt, during training; what rows and settings do.

python experiments/multiplication/run.py            from nothing to the figures, in parts; a second start goes on
python experiments/multiplication/run.py --figures  tables and pictures again, from results/
"""

import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parts import MODEL, Experiment, ask, command, question, train
from show import percent, picture, share, table, verdicts
from sums import right

from data_gen import multiply
from lora import files, pretrained

HERE = Path(__file__).resolve().parent
DIGITS = (2, 3)
FINAL, INTERMEDIATE = 200, 50  # unseen pairs behind a figure
ROOM = 1.5  # answers of a model that was not trained are cut at so many times the longest worked answer
CHECKPOINTS = (50, 100, 200, 300, 400)  # steps of 8 rows, of 500
TRAINING = {"train3.jsonl": (3, 3200), "train2.jsonl": (2, 800)}  # of the recipe: file -> digits, rows
AMOUNTS = (40, 160, 640)  # rows of 2 digits, each amount a run of its own
ARTICLE_ROWS = 640


# ---- questions and answers -------------------------------------------------------------------------------------------


def unseen(digits: int, rows: int, style: str = "terse", reworded: bool = False) -> list[dict]:
    """Held-out pairs, in the wording of training or, in turn, in four that no training row has."""
    asked = multiply.held_out_conversations(digits, rows, style, "en")
    about = {"digits": digits, "style": style}
    return [about | {"a": row["a"], "b": row["b"], "wording": row["wording"] if reworded else None} for row in asked]


def answers(
    scratch: Path, adapter: Path | None, rows: list[dict], *before: tuple[str, str], cut: float = 1.1
) -> list[dict]:
    """The rows with what the model answers; `cut` is its room, over the longest right answer."""
    tokenizer = pretrained.load_chat(pretrained.find(MODEL)).tokenizer
    longest = max(len(tokenizer.encode_plain(multiply.solve(r["a"], r["b"], r["style"], "en"))) for r in rows)
    asked = [question(multiply.question(r["a"], r["b"], "en", r["wording"]), *before) for r in rows]
    words = () if adapter else ("--no-system",)
    texts = ask(scratch, asked, adapter, *words, "--max-new-tokens", ceil(cut * longest), "--batch-size", 50)
    return [row | {"prediction": text} for row, text in zip(rows, texts, strict=True)]


def untrained(scratch: Path, example: str = "") -> dict:
    """The base, asked as in training; after one multiplication that is worked in the style `example`, if any."""
    found = []
    for digits in DIGITS:
        (a, b), *_ = multiply.pairs(digits, 1)
        before = [(multiply.question(a, b, "en"), multiply.solve(a, b, example, "en"))] if example else []
        found += answers(scratch, None, unseen(digits, INTERMEDIATE, example or "terse"), *before, cut=ROOM)
    return {"answers": found}


# ---- training --------------------------------------------------------------------------------------------------------


def rows_of(name: str, digits: int, rows: int, style: str = "terse") -> Path:
    path = experiment.scratch / name
    if not path.exists():
        words = ("--digits", digits, "--rows", rows, "--style", style, "--out", path)
        command("data_gen/multiply.py", *words)
    return path


def best(scratch: Path) -> dict:
    """The recipe, with all its checkpoints."""
    for name, (digits, rows) in TRAINING.items():
        rows_of(name, digits, rows)
    training = train(scratch / "adapter", "--config", HERE / "recipe.toml")
    return {"training": training, "forgetting": forgetting(scratch, scratch / "adapter")}


def end(reworded: bool, scratch: Path) -> dict:
    """Of the recipe's adapter, 200 pairs of each size."""
    adapter = experiment.scratch / "best" / "adapter"
    return {"answers": [row for d in DIGITS for row in answers(scratch, adapter, unseen(d, FINAL, reworded=reworded))]}


def checkpoint(step: int, scratch: Path) -> dict:
    """The recipe's adapter after so many steps, on 50 pairs of each size."""
    adapter, found = experiment.scratch / "best" / "adapter" / "checkpoints" / f"{step:06}", []
    for digits in DIGITS:
        found += answers(scratch, adapter, unseen(digits, INTERMEDIATE))
    return {"step": step, "rows": 8 * step, "forgetting": forgetting(scratch, adapter), "answers": found}


def some(words, style: str, scratch: Path) -> dict:
    """A run of its own on 2 digits."""
    adapter = scratch / "adapter"
    training = train(adapter, *words())
    found = answers(scratch, adapter, unseen(2, INTERMEDIATE, style))
    return {"training": training, "forgetting": forgetting(scratch, adapter), "answers": found}


def forgetting(scratch: Path, adapter: Path) -> dict:
    """What evaluate.py says of ordinary conversations."""
    rows, out = scratch / "row.jsonl", scratch / "forgetting.json"
    files.write_rows(rows, multiply.conversations(2, 1, "terse", "en"))  # it wants some
    command("evaluate.py", "--adapter", adapter, "--data", rows, "--no-generate", "--out", out)
    (figures,) = (f for name, f in files.read_json(out)["figures"].items() if "retention_kl" in f)
    return {key: figures[key] for key in ("retention_kl", "retention_loss_before", "retention_loss")}


def amount(rows: int):
    """The recipe's numbers on fewer rows."""
    return lambda: ("--data", rows_of(f"train2-{rows}.jsonl", 2, rows), "--no-system", "--rank", 32, "--alpha", 64,
                    "--lr", 2e-3, "--epochs", 1)  # fmt: skip


def article(style: str):
    name = f"train2-{style}-{ARTICLE_ROWS}.jsonl"
    return lambda: ("--data", rows_of(name, 2, ARTICLE_ROWS, style), "--config", HERE / "article.toml")


# ---- scores ----------------------------------------------------------------------------------------------------------


NUMBER = re.compile("[0-9]+")


def mentions(row: dict) -> bool:
    """The product is a number of the answer, anywhere: as much as can be said for an answer of no fixed form. Ask this
    of pairs without a 1 only: there the product stands in the question."""
    return any(int(n) == row["a"] * row["b"] for n in NUMBER.findall(row["prediction"].replace(",", "")))


def fault(row: dict) -> multiply.Fault | None:
    return multiply.check(row["a"], row["b"], row["prediction"].strip(), row["style"], "en")


def mentioned(found: dict, digits: int) -> str:
    return share((row for row in of(found, digits) if 1 not in (row["a"], row["b"])), mentions)


def of(found: dict, digits: int) -> list[dict]:
    return [row for row in found["answers"] if row["digits"] == digits]


# ---- tables and pictures ---------------------------------------------------------------------------------------------


def show(found: dict[str, dict]) -> dict[str, list[str]]:
    course = [found[name] for step in CHECKPOINTS if (name := f"step-{step}") in found]
    if {"best", "end"} <= found.keys():
        course.append({"rows": sum(rows for _, rows in TRAINING.values()), **found["best"], **found["end"]})
    digits = tuple(f"up to {n} digits" for n in DIGITS)
    before = {
        "before": "before, asked plainly",
        "example": "before, with one example in our terse lines in the prompt",
        "example-article": "before, with one example as the article works it",
    }
    lines = [[text, *(mentioned(found[n], d) for d in DIGITS)] for n, text in before.items() if n in found]
    lines += [[f"after {f['rows']:,} rows", *(share(of(f, d), right) for d in DIGITS)] for f in course]
    wordings = []
    for number, text in enumerate(multiply.WORDINGS["en"] if "reworded" in found else ()):
        asked = (worded(found["reworded"], d, number) for d in DIGITS)
        wordings.append([f"`{text.format('a', 'b')}`", *(share(rows, right) for rows in asked)])
    keys = ("retention_kl", "retention_loss_before", "retention_loss")
    forgotten = [[f"{f['rows']:,}", *(f"{f['forgetting'][key]:.3f}" for key in keys)] for f in course]
    settings = {f"rows-{n}": f"rank 32, 8 a step, {n} terse rows" for n in AMOUNTS} | {
        "article-terse": f"the article's rank 128 and 32 a step, {ARTICLE_ROWS} terse rows",
        "article": f"the article's, {ARTICLE_ROWS} rows worked as the article does",
    }
    others = []
    for name in (name for name in settings if name in found):
        f, t = found[name], found[name]["training"]
        spent = f"{t['tokens']:,}", f"{t['training_seconds'] / 60:.0f}"
        others.append([settings[name], share(of(f, 2), right), *spent, f"{f['forgetting']['retention_kl']:.3f}"])
    if course:
        draw(course, found.get("best"))
    return {
        "summary": claims(found),
        "accuracy": table(("right on unseen pairs", *digits), lines),
        "wordings": table(("asked", *digits), wordings),
        "faults": table(
            ("rows", "answers with a wrong line", "how far into the work, median", "what it is"),
            map(first_faults, course),
        ),
        "forgetting": table(("rows", "forgotten, nats", "loss on ordinary conversations, before", "now"), forgotten),
        "settings": table(("", "right, 2 digits", "tokens", "minutes", "forgotten, nats"), others),
    }


def first_faults(found: dict) -> list:
    """Of 3 digits: where answers first go wrong, as a share of the lines that a right one has."""
    faults = [(row, f) for row in of(found, 3) if (f := fault(row))]
    kinds = Counter(f.kind for _, f in faults).most_common()
    where = f"{median(f.line_number / lines_of(row) for row, f in faults):.0%}" if faults else "-"
    count = f"{len(faults)} of {len(of(found, 3))}"
    return [f"{found['rows']:,}", count, where, ", ".join(f"{kind} {n}" for kind, n in kinds) or "-"]


def lines_of(row: dict) -> int:
    return len(multiply.solve(row["a"], row["b"], row["style"], "en").splitlines())


def claims(found: dict[str, dict]) -> list[str]:
    def accuracy(count: Callable[[int], str]) -> str:
        return ", ".join(f"up to {d} digits {count(d)}" for d in DIGITS)

    def after() -> str:
        return f"after 4,000 rows, once: {accuracy(lambda d: share(of(found['end'], d), right))}"

    def wordings() -> str:
        asked = ((text, worded(found["reworded"], 3, n)) for n, text in enumerate(multiply.WORDINGS["en"]))
        return "up to 3 digits: " + "; ".join(f"`{text.format('a', 'b')}` {share(rows, right)}" for text, rows in asked)

    def others() -> str:
        lost = found["best"]["forgetting"]
        course = f"{lost['retention_loss_before']:.2f} → {lost['retention_loss']:.2f}"
        return f"forgotten {lost['retention_kl']:.2f} nats; loss on ordinary conversations {course}"

    return verdicts(
        HERE,
        {
            "before": lambda: accuracy(partial(mentioned, found["before"])),
            "example": lambda: accuracy(partial(mentioned, found["example-article"])),
            "after": after,
            "wordings": wordings,
            "others": others,
        },
    )


def worded(found: dict, digits: int, wording: int) -> list[dict]:
    return [row for row in of(found, digits) if row["wording"] == wording]


def draw(course: list[dict], best: dict | None) -> None:
    rows = [f["rows"] for f in course]
    with picture(HERE / "course.png", (8, 6), nrows=2, sharex=True) as (above, below):
        for digits in DIGITS:
            above.plot(rows, [percent(of(f, digits), right) for f in course], "o-", label=f"{digits} digits")
        above.set(ylabel="right on unseen pairs, %", ylim=(-3, 103))
        above.legend()
        if best:
            losses = best["training"]["losses"]
            below.semilogy(
                [8 * step for step in range(1, len(losses) + 1)], losses, linewidth=0.8, label="training loss"
            )
        below.plot(rows, [f["forgetting"]["retention_kl"] for f in course], "s-", label="forgotten")
        below.set(xlabel="rows trained on", ylabel="nats")
        below.legend()


experiment = Experiment(__file__, __doc__, show)
experiment.add("before", untrained)
experiment.add("example", partial(untrained, example="terse"))
experiment.add("example-article", partial(untrained, example="article"))
experiment.add("best", best, leaves="adapter")
experiment.add("end", partial(end, False), "best")
experiment.add("reworded", partial(end, True), "best")
for step in CHECKPOINTS:
    experiment.add(f"step-{step}", partial(checkpoint, step), "best")
for rows in AMOUNTS:
    experiment.add(f"rows-{rows}", partial(some, amount(rows), "terse"))
experiment.add("article-terse", partial(some, article("terse"), "terse"))
experiment.add("article", partial(some, article("article"), "article"))

if __name__ == "__main__":
    sys.exit(experiment.main())
