"""A style: trained on an author's raw answers, against answers that a teacher wrote in his style; failures as numbers.

python experiments/style/run.py            from nothing to the figures, in parts; a second start goes on
python experiments/style/run.py --figures  table and picture again, from results/

The teacher is the default model. TEACHER="--base-url http://localhost:8000/v1 --teacher NAME" takes a better one.
"""

import os
import shlex
import sys
from functools import partial
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parts import MODEL, Experiment, ask, command, question, read_rows, relative, train
from show import at_end, picture, table, verdicts

from data_gen import distill
from lora import files
from lora.inference import answers as texts_of

HERE = Path(__file__).resolve().parent
RAW, UNSEEN = HERE / "raw.jsonl", HERE / "questions.txt"
DISTILLED = 240  # three for each question of the author's file, each with other examples
LENGTH = 160  # tokens of an answer
HABITS = ("depends.", "but then again", "anyway,")  # of the author; most of his answers have one
SHORT = 8  # words; the article's first sign of failure
ENDS = tuple(".!?)\"'")  # of a sentence; an answer that goes on to the limit breaks off before one
WAYS = {
    "author": "the author himself, on his own 80 questions",
    "base": "the base",
    "prompted": "the base with three of his answers in the prompt",
    "raw": "trained on his 80 answers",
    "distilled": "trained on the teacher's answers",
    "distilled-tuned": "trained on those of a teacher that was trained on his 80",
}

# ---- parts -----------------------------------------------------------------------------------------------------------


def teach(scratch: Path, adapter: Path | None = None) -> dict:
    """The teacher's answers. Its journal keeps every reply, so that a stopped part asks nothing twice."""
    out, who = scratch / "distilled.jsonl", shlex.split(os.environ.get("TEACHER", f"--local {MODEL}"))
    if adapter:
        who = ["--local", MODEL, "--local-adapter", adapter]
    command("data_gen/distill.py", "--data", RAW, "--rows", DISTILLED, "--answer-tokens", LENGTH, "--out", out, *who)
    return {"teacher": relative(who), "answers": read_rows(out)}


def teach_tuned(scratch: Path) -> dict:
    return teach(scratch, experiment.scratch / "raw" / "adapter")


def tuned(data: Path, scratch: Path) -> dict:
    adapter = scratch / "adapter"
    training = train(adapter, "--config", HERE / "recipe.toml", "--data", data)
    return {"training": training} | judged(scratch, [question(q) for q in asked()], adapter)


def untuned(name: str, scratch: Path) -> dict:
    rows = [question(q) for q in asked()]
    if name == "prompted":
        pairs = read_rows(RAW)
        rows = [prompt([pairs[(3 * i + k) % len(pairs)] for k in range(3)], q) for i, q in enumerate(asked())]
    return judged(scratch, rows, None)


def prompt(examples: list[dict], asked: str) -> dict:
    """What data_gen/distill.py asks a teacher."""
    frame, example = distill.FRAMES["en"]
    shown = "\n\n".join(distill.fill(example, **pair) for pair in examples)
    return question(distill.fill(frame, n=str(len(examples)), examples=shown, question=asked))


def asked() -> list[str]:
    return UNSEEN.read_text().splitlines()


def judged(scratch: Path, rows: list[dict], adapter: Path | None) -> dict:
    """Answers to the unseen questions, and their `likelihood`."""
    words = () if adapter else ("--no-system",)
    found = ask(scratch, rows, adapter, *words, "--max-new-tokens", LENGTH, "--batch-size", 40)
    answers = [{"question": q, "prediction": t} for q, t in zip(asked(), found, strict=True)]
    return {"losses": likelihood(scratch, answers), "answers": answers}


def author(scratch: Path) -> dict:
    """His own answers, to his own questions."""
    answers = [{"question": row["question"], "prediction": row["answer"]} for row in read_rows(RAW)]
    return {"losses": likelihood(scratch, answers), "answers": answers}


def likelihood(scratch: Path, answers: list[dict]) -> dict[str, float]:
    """The base's loss on answers, in nats a token: each after its own question, and each after another's. An answer
    that says nothing to its question is as likely after any other."""
    said, losses = [row for row in answers if row["prediction"].strip()], {}
    for name, shift in (("own", 0), ("other", 1)):
        data, out = scratch / f"{name}.jsonl", scratch / f"{name}.json"
        pairs = ((said[i - shift]["question"], row["prediction"]) for i, row in enumerate(said))
        files.write_rows(data, ({"question": q, "answer": a} for q, a in pairs))
        command("evaluate.py", "--model", MODEL, "--data", data, "--no-generate", "--no-system", "--out", out)
        (figures,) = files.read_json(out)["figures"].values()
        losses[name] = figures["loss"]
    return losses


# ---- tables and pictures ---------------------------------------------------------------------------------------------


def figures(texts: list[str], losses: dict[str, float]) -> dict[str, float]:
    words = [text.split() for text in texts]
    return {
        "habit": mean(any(habit in text.lower() for habit in HABITS) for text in texts),
        "words": median(map(len, words)),
        "short": mean(len(of_one) < SHORT for of_one in words),
        "different": len(set(texts)) / len(texts),
        "endless": mean(not text.rstrip().endswith(ENDS) for text in texts),
        "repetition": mean(map(texts_of.repetition, texts)),
        "distinct": texts_of.distinct_n(texts, 2),
        "loss": losses["own"],
        "relevance": losses["other"] - losses["own"],
    }


FORMS = {
    "habit": ("has a habit of his", "{:.0%}"),
    "words": ("median words", "{:.0f}"),
    "short": (f"under {SHORT} words", "{:.0%}"),
    "different": ("different answers", "{:.0%}"),
    "endless": ("no full stop at the end", "{:.0%}"),
    "repetition": ("repeated 4-grams", "{:.1%}"),
    "distinct": ("distinct-2", "{:.2f}"),
    "loss": ("unlikely to the base, nats a token", "{:.2f}"),
    "relevance": ("likelier after its own question than another, nats", "{:+.3f}"),
    "forgotten": ("forgotten, nats", "{:.2f}"),
}


def show(found: dict[str, dict]) -> dict[str, list[str]]:
    measured = {}
    for name in (name for name in WAYS if name in found):
        f = found[name]
        measured[WAYS[name]] = figures([row["prediction"] for row in f["answers"]], f["losses"])
        if "training" in f:
            measured[WAYS[name]]["forgotten"] = at_end(f)["retention_kl"]
    lines = [
        [label, *(form.format(f[key]) if f.get(key) is not None else "-" for key, (_, form) in FORMS.items())]
        for label, f in measured.items()
    ]
    if measured:
        draw(measured)
    return {
        "summary": claims(found, measured),
        "signs": table(("answers to 40 unseen questions", *(what for what, _ in FORMS.values())), lines),
    }


def claims(found: dict[str, dict], measured: dict[str, dict]) -> list[str]:
    def signs(way: str) -> str:
        found[way]  # or it is not done yet
        shown = ("habit", "short", "different", "repetition", "relevance")
        return ", ".join(f"{FORMS[key][0]} {FORMS[key][1].format(measured[WAYS[way]][key])}" for key in shown)

    measured_by = {"raw": partial(signs, "raw"), "strong": lambda: "not measured", "self": partial(signs, "distilled")}
    return verdicts(HERE, measured_by)


def draw(measured: dict[str, dict]) -> None:
    signs, height = ("habit", "short", "different", "repetition"), 0.8 / len(measured)
    rows = range(len(signs), 0, -1)
    with picture(HERE / "style.png", (9, 6)) as axes:
        for at, (label, f) in enumerate(measured.items()):
            bars = axes.barh(
                [row - height * at for row in rows], [100 * f[s] for s in signs], height * 0.9, label=label
            )
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
        axes.set_yticks([row - 0.4 + height / 2 for row in rows], [FORMS[sign][0] for sign in signs])
        axes.set(xlabel="% of answers; in the last line, of 4-grams", xlim=(0, 105))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize=8)


experiment = Experiment(__file__, __doc__, show)
experiment.add("base", partial(untuned, "base"))
experiment.add("prompted", partial(untuned, "prompted"))
experiment.add("author", author)
experiment.add("teacher", teach)
experiment.add("raw", partial(tuned, RAW), leaves="adapter")
experiment.add("distilled", partial(tuned, experiment.rows("teacher")), "teacher")
experiment.add("teacher-tuned", teach_tuned, "raw")
experiment.add("distilled-tuned", partial(tuned, experiment.rows("teacher-tuned")), "teacher-tuned")

if __name__ == "__main__":
    sys.exit(experiment.main())
