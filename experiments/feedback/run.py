"""AI feedback: our default model as a judge of pairs against a rule as the perfect one, and a reward model from each.

python experiments/feedback/run.py            from nothing to the figures, in parts; a second start goes on
python experiments/feedback/run.py --figures  tables and picture again, from results/

The pairs, the rule and the answers that are judged at last are those of experiments/preferences.
"""

import random
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import chain, combinations, islice
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parts import MODEL, Experiment, by_step, command, read_rows, train
from preferences import pairs, rule
from show import picture, share, table, verdicts

from data_gen import candidates, journal
from data_gen.verdicts import LABELS, sides, verdict_of
from lora import errors, files

HERE = Path(__file__).resolve().parent
PREFERENCES = HERE.parent / "preferences"
PAIRS = 160
SEED = 0  # of data_gen/judge.py: which side is shown first
WANTED = "which speaks as a lighthouse keeper, decides and makes no list"
JUDGES = {  # judge -> flags of data_gen/judge.py
    "rule": ("--rule", f"{PREFERENCES / 'rule.py'}:better"),
    "helpful": ("--local", MODEL),
    "told": ("--local", MODEL, "--criterion", WANTED),
    "helpful-calibrated": ("--local", MODEL, "--calibrate"),
    "told-calibrated": ("--local", MODEL, "--criterion", WANTED, "--calibrate"),
}
TOLD = {
    "rule": "the rule",
    "helpful": "the default model, asked for the more helpful answer",
    "told": "the default model, told what is wanted",
    "helpful-calibrated": "asked for the more helpful answer, calibrated",
    "told-calibrated": "told what is wanted, calibrated",
    "once": "told what is wanted, asked once",
}
MODELS = {"once": "told"} | {name: name for name in ("rule", "helpful-calibrated", "told-calibrated")}  # -> its judge
ANSWERS = 96  # pairs of answers that models gave
SETS = {"voice": "voice lost", "hedge": "hedged", "list": "listed", "all": "all three", "given": "models' own answers"}


# ---- data ------------------------------------------------------------------------------------------------------------


def held_out() -> dict[str, list[dict]]:
    """Unseen pairs by what is wrong with the rejected answer; and answers that the models of experiments/preferences
    gave to the same question, in the rule's order."""
    found = {kind: [] for kind in SETS}
    for row, kind in zip(pairs.pairs(unseen=True), pairs.KINDS * 48, strict=True):
        found[kind].append(row)
    said = [read_rows(path) for path in sorted((PREFERENCES / "results").glob("*.jsonl"))]
    for one, other in combinations(said, 2):
        for a, b in zip(one, other, strict=True):
            if better := rule.better(a["prompt"], a["prediction"], b["prediction"]):
                sides = (a, b) if better == "a" else (b, a)
                chosen, rejected = (row["prediction"] for row in sides)
                found["given"].append({"prompt": a["prompt"], "chosen": chosen, "rejected": rejected})
    found["given"] = random.Random(0).sample(found["given"], ANSWERS)
    return found


# ---- parts -----------------------------------------------------------------------------------------------------------


def judge(name: str, scratch: Path) -> dict:
    """Verdicts on the same pairs. The file's own order is the rule's, so the report says how often the judge has it."""
    data, out = scratch / "pairs.jsonl", scratch / "judged.jsonl"
    files.write_rows(data, islice(pairs.pairs(unseen=False), PAIRS))
    try:
        command("data_gen/judge.py", "--data", data, *JUDGES[name], "--out", out)
    except errors.BadEnvironment:  # no two verdicts agree: the report says so
        files.write_rows(out, [])
    report = files.read_json(out.with_name(out.name + ".report.json"))
    kept = ("agreed", "disagreed", "first_side_share", "longer_share", "given_order_share")
    kept_pairs = (row | {"agreed": True} for row in read_rows(out))
    rows = first_verdicts(data, out) if name in ("helpful", "told") else kept_pairs
    return {"report": {key: report[key] for key in kept}, "answers": list(rows)}


def first_verdicts(data: Path, out: Path) -> Iterator[dict]:
    """Every pair in the order of the judge's first verdict, and whether the second one agreed."""
    agreed = read_rows(out)
    with closing(sqlite3.connect(journal.beside(out))) as replies:
        found = replies.execute("select key, text, finish, tokens from replies")
        said = {reply.key: verdict_of(reply) for reply in (journal.Reply(*row) for row in found)}
    for pair in candidates.read(data):
        if (label := said.get(f"{pair.key}.0.1")) in LABELS:
            row = pair.row(sides(pair, 0, SEED)[LABELS.index(label)])
            yield row | {"agreed": row in agreed}


def reward(name: str, scratch: Path) -> dict:
    """A reward model from a judge's pairs, and its accuracy on pairs whose order the rule knows."""
    rows = read_rows(experiment.rows(f"judge-{MODELS[name]}"))
    data, adapter = scratch / "pairs.jsonl", scratch / "adapter"
    files.write_rows(data, ({side: row[side] for side in ("prompt", "chosen", "rejected")} for row in rows))
    training = train(adapter, "--config", HERE / "recipe.toml", "--data", data)
    steps = by_step(adapter, "accuracy", "score_margin")
    return {"training": training, "steps": steps, "pairs": len(rows), "accuracy": accuracies(scratch, adapter)}


def accuracies(scratch: Path, adapter: Path) -> dict[str, float]:
    """How many unseen pairs of each kind it scores in the rule's order."""
    data, folder, tried = scratch / "unseen.jsonl", scratch / "scores", held_out()
    files.write_rows(data, chain(*tried.values()))
    command("evaluate.py", "--adapter", adapter, "--data", data, "--no-retention", "--predictions", folder)
    scores = iter(read_rows(folder / f"{adapter.name}.jsonl"))
    return {kind: mean(s["chosen"] > s["rejected"] for s in islice(scores, len(rows))) for kind, rows in tried.items()}


# ---- tables and picture ----------------------------------------------------------------------------------------------


def show(found: dict[str, dict]) -> dict[str, list[str]]:
    judges = {name: found[f"judge-{name}"] for name in JUDGES if f"judge-{name}" in found}
    models = {name: found[name] for name in MODELS if name in found}
    if models:
        draw(models)
    return {
        "summary": claims(found),
        "judges": table(JUDGES_HEAD, [[TOLD[name], *verdict(f["report"])] for name, f in judges.items()]),
        "kinds": table(KINDS_HEAD, [[TOLD[name], *by_fault(f)] for name, f in judges.items()]),
        "models": table(MODELS_HEAD, [[TOLD[name], *accuracy(f)] for name, f in models.items()]),
    }


JUDGES_HEAD = (
    "judge",
    "pairs left, of both verdicts the same",
    "of these, the rule's",
    "right if asked once",
    "for the side shown first",
    "for the longer answer",
)
KINDS_HEAD = ("the rule's, of the pairs left whose faulty answer has", *list(SETS.values())[:4])
MODELS_HEAD = ("judge", "pairs", *SETS.values())


def verdict(report: dict) -> list[str]:
    left, shares = report["agreed"], (report[key] for key in ("first_side_share", "longer_share"))
    right = f"{same(report)} of {left}"
    return [f"{left} of {PAIRS}", right, f"{once(report):.0%}", *(f"{part:.0%}" for part in shares)]


def same(report: dict) -> int:
    """Pairs whose two verdicts are both the rule's."""
    return round(report["agreed"] * (report["given_order_share"] or 0))


def once(report: dict) -> float:
    """How many single verdicts are the rule's: of a pair with two different ones, one of them is."""
    return (2 * same(report) + report["disagreed"]) / (2 * (report["agreed"] + report["disagreed"]))


def by_fault(found: dict) -> list[str]:
    def of(kind: str) -> list[dict]:
        wrong = ["voice", "hedge", "list"] if kind == "all" else [kind]
        sides = ((row, rule.faults(row["chosen"]) or rule.faults(row["rejected"])) for row in found["answers"])
        return [row for row, faults in sides if row["agreed"] and faults == wrong]

    return [share(of(kind), lambda row: rule.is_right(row["chosen"])) for kind in list(SETS)[:4]]


def accuracy(found: dict) -> list[str]:
    return [found["pairs"], *(f"{found['accuracy'][kind]:.0%}" for kind in SETS)]


def claims(found: dict[str, dict]) -> list[str]:
    def told(name: str) -> str:
        report = found[f"judge-{name}"]["report"]
        return f"{TOLD[name]}: {once(report):.0%} right, {report['first_side_share']:.0%} for the side shown first"

    def right(name: str) -> str:
        f = found[name]
        shares = ", ".join(f"{f['accuracy'][kind]:.0%} {label}" for kind, label in SETS.items())
        return f"{TOLD[name]} ({f['pairs']} pairs): {shares}"

    return verdicts(
        HERE,
        {
            "cheap": lambda: "; ".join(map(told, [name for name in JUDGES if name != "rule"])),
            "labels": lambda: "; ".join(map(right, ("once", "helpful-calibrated", "told-calibrated"))),
            "head": partial(right, "rule"),
        },
    )


def draw(models: dict[str, dict]) -> None:
    height = 0.8 / len(models)
    with picture(HERE / "reward.png", (9, 5)) as axes:
        for at, (name, f) in enumerate(models.items()):
            places = [row - height * at for row in range(len(SETS), 0, -1)]
            bars = axes.barh(places, [100 * f["accuracy"][kind] for kind in SETS], height * 0.9, label=TOLD[name])
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
        axes.set_yticks([row - 0.4 + height / 2 for row in range(len(SETS), 0, -1)], SETS.values())
        axes.axvline(50, color="grey", linestyle="--", linewidth=1)
        axes.set(xlabel="pairs in the rule's order, %; dashed: chance", xlim=(0, 105))
        axes.legend(title="pairs judged by", loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8)


experiment = Experiment(__file__, __doc__, show)
for name in JUDGES:
    experiment.add(f"judge-{name}", partial(judge, name))
for name, judged in MODELS.items():
    experiment.add(name, partial(reward, name), f"judge-{judged}")

if __name__ == "__main__":
    sys.exit(experiment.main())
