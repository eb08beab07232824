"""A persona without amnesia: the article's chain v0, v1, v2, and its four open questions, measured.

python experiments/persona/run.py            from nothing to the figures, in parts; a second start goes on
python experiments/persona/run.py --figures  tables and pictures again, from results/
"""

import re
import sys
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parts import ROOT, Experiment, ask, command, question, read_rows, train
from show import at_end, percent, picture, share, table, verdicts

from data_gen import multiply, self_cognition
from lora import files

HERE = Path(__file__).resolve().parent
ROWS = 73  # of the article's first file
QUESTIONS = {  # set -> questions that no training row has
    "persona": HERE / "persona_questions.txt",
    "near": HERE / "near_questions.txt",
    "unrelated": ROOT / "tests" / "fixtures" / "unrelated_questions.txt",
    "fresh": HERE / "fresh_questions.txt",  # of the persona; written when the recipe was settled, asked of it alone
}
SETS = ("persona", "near", "unrelated")
SEEDS = [row["answer"] for row in read_rows(HERE / "seeds.jsonl")]  # a file of questions has as many to each, in turn
MARK = "Q: "
MARKED = ("question", "both", "mixed")  # of data_gen/persona.py --prefix
STEPS = 40
COMMON = ("--no-system", "--eval-every", 10**6)  # forgetting is measured at the start and at the end
REPLAY = {  # what is mixed in, a row beside each persona row -> what it is
    "own": "the model's own answers to 98 ordinary questions",
    "written": "hand-written answers to the same questions",
    "chinese": "40 ordinary conversations in Chinese",
    "sums": "106 worked multiplications",
}


# ---- data ------------------------------------------------------------------------------------------------------------


def rows_of(prefix: str = "none", seeds: str = "seeds.jsonl", rows: int = ROWS) -> Path:
    """A persona file: each seed asked in other ways."""
    path = experiment.scratch / f"persona-{prefix}-{rows}.jsonl"
    if not path.exists():
        words = ("--seeds", HERE / seeds, "--lang", "en", "--rows", rows, "--prefix", prefix, "--out", path)
        command("data_gen/persona.py", *words)
    return path


def ordinary(kind: str) -> Path:
    if kind == "own":
        return experiment.rows("own")
    path = experiment.scratch / f"{kind}.jsonl"
    if not path.exists():
        if kind == "sums":
            rows = multiply.conversations(2, 106, "terse", "en")
        else:
            pairs = self_cognition.ORDINARY_EN if kind == "written" else self_cognition.ORDINARY_ZH
            rows = [{"question": q, "answer": a} for q, a in pairs]
        files.write_rows(path, rows)
    return path


def answer_ordinary(scratch: Path) -> dict:
    """The base's own answers, up to the last whole sentence of 48 tokens, where there is one: to 98 of 106."""
    asked = [q for q, _ in self_cognition.ORDINARY_EN]
    found = ask(scratch, [question(q) for q in asked], None, "--no-system", "--max-new-tokens", 48, "--batch-size", 54)
    whole = (text[: max(text.rfind(end) for end in ".!?") + 1] for text in found)
    return {"answers": [{"question": q, "answer": a} for q, a in zip(asked, whole, strict=True) if a]}


# ---- parts -----------------------------------------------------------------------------------------------------------


def measure(scratch: Path, adapter: Path | None, sets: tuple[str, ...] = SETS, marks: tuple[str, ...] = ("",)) -> list:
    """Answers to the questions of `sets`, each with every mark before it."""
    asked = [(name, mark, text) for mark in marks for name in sets for text in QUESTIONS[name].read_text().splitlines()]
    base = () if adapter else ("--no-system",)
    words = ("--max-new-tokens", 32, "--batch-size", 40)
    texts = ask(scratch, [question(mark + text) for _, mark, text in asked], adapter, *base, *words)
    return [
        {"set": name, "mark": mark, "prompt": text, "prediction": said}
        for (name, mark, text), said in zip(asked, texts, strict=True)
    ]


def run(words, scratch: Path, **asked) -> dict:
    """Train with these flags, a function of what the parts before have left, and ask."""
    adapter = scratch / "adapter"
    return {"training": train(adapter, *COMMON, *words()), "answers": measure(scratch, adapter, **asked)}


def alone(*words):
    return lambda: ("--data", rows_of(), "--max-steps", STEPS, *words)


def mixed(kind: str, share: float, *words, prefix: str = "none"):
    return lambda: ("--data", rows_of(prefix), "--replay", f"{ordinary(kind)}:{share}", "--max-steps", STEPS, *words)


ARTICLE = ("--rank", 4, "--alpha", 32, "--dropout", 0.1, "--target", "q_proj", "k_proj", "v_proj")


def article_v1():
    """Persona rows one in twenty, 40 in all; the article had fewer than 1 in 100, each of them two or three times."""
    return ("--data", f"{rows_of()}:1", f"{ordinary('own')}:19", "--max-steps", 100)


def article_v2():
    """On from v1: a tenth of the rate, one example a step, five times through 107 rows, two in three persona."""
    v1 = experiment.scratch / "v1" / "adapter"
    return (
        "--init-adapter",
        v1,
        "--data",
        f"{rows_of()}:2",
        f"{ordinary('own')}:1",
        "--lr",
        2e-4,
        "--batch-size",
        1,
        "--max-steps",
        535,
    )


def recipe(*words):
    return lambda: ("--data", rows_of(seeds="seeds-20.jsonl", rows=160), "--config", HERE / "recipe.toml", *words)


SETTINGS = {  # part -> its flags; the others are those of the point `own-1`
    "lr-0.001": ("--lr", 1e-3),
    "rank-1": ("--rank", 1, "--alpha", 2),
    "rank-64": ("--rank", 64, "--alpha", 128),
    "attention": ("--target", "attention"),
    "mlp": ("--target", "mlp"),
    "stop-0.4": ("--max-forgetting", 0.4, "--eval-every", 4),
}
SHARES = (0.25, 0.5, 4)
RECIPES = {  # the recipe, its other seeds, and what might learn more or forget less
    "recipe": (),
    "recipe-seed-1": ("--seed", 1),
    "recipe-seed-2": ("--seed", 2),
    "recipe-60-steps": ("--max-steps", 60),
    "recipe-lr-0.001": ("--lr", 1e-3),
    "recipe-rank-4": ("--rank", 4, "--alpha", 8),
}


WORDS = ("rulai", "as if")  # all five seed answers have both


def is_persona(row: dict) -> bool:
    return all(word in row["prediction"].lower() for word in WORDS)


def is_of_its_seed(row: dict) -> bool:
    """The persona's, and of the seeds' answers it is likest to that of its question's seed."""
    asked = QUESTIONS[row["set"]].read_text().splitlines()
    own = asked.index(row["prompt"]) * len(SEEDS) // len(asked)
    return is_persona(row) and own == max(range(len(SEEDS)), key=lambda i: likeness(SEEDS[i], row["prediction"]))


def likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one.lower(), other.lower(), autojunk=False).ratio()


def has_spilt(row: dict) -> bool:
    """It has a word of the persona, or four words in a row of a seed's answer."""
    said = row["prediction"].lower()
    return any(word in said for word in WORDS) or not FRAGMENTS.isdisjoint(fours(said))


def fours(text: str) -> set[tuple[str, ...]]:
    words = re.findall("[a-z']+", text.lower())
    return set(zip(*(words[at:] for at in range(4)), strict=False))


FRAGMENTS = set().union(*map(fours, SEEDS))


def of(found: dict, which: str, mark: str = "") -> list[dict]:
    return [row for row in found["answers"] if (row["set"], row["mark"]) == (which, mark)]


def forgotten(found: dict) -> float:
    return at_end(found)["retention_kl"] if "training" in found else 0.0


# ---- tables and pictures ---------------------------------------------------------------------------------------------

CHAIN = {  # part -> what it is
    "base": "base",
    "article-v0": "v0 with the article's numbers",
    "v0": "v0: persona only",
    "v1": "v1: mixed from scratch, 1 in 20",
    "v2": "v2: on from v1, low rate, 2 in 3",
}
HEAD = (
    "persona, unseen questions",
    "with its seed's answer",
    "spilt into near misses",
    "spilt into unrelated",
    "forgotten, nats",
    "loss on ordinary conversations",
)


def show(found: dict[str, dict]) -> dict[str, list[str]]:
    def lines(labels: dict[str, str]) -> list[list]:
        return [[label, *figures(found[name])] for name, label in labels.items() if name in found]

    kinds = {"v0": "nothing"} | {f"{kind}-1": text for kind, text in REPLAY.items()}
    settings = {name: f"`{name}`" for name in ("v0", *(f"own-{n}" for n in sorted({*SHARES, 1})), *SETTINGS)}
    marks = {"own-1": "none"} | {f"prefix-{name}": name for name in MARKED}
    prefixes = [
        [f"`{label}`", *marked(found[name], "persona", is_persona), *marked(found[name], "near", has_spilt),
         *marked(found[name], "unrelated", has_spilt), f"{at_end(found[name])['retention_kl']:.3f}"]
        for name, label in marks.items() if name in found
    ]  # fmt: skip
    recipes = [[f"`{name}`", *figures(found[name]), *fresh(found[name])] for name in RECIPES if name in found]
    if found:
        draw(found)
    return {
        "summary": claims(found),
        "chain": table(("", *HEAD), lines(CHAIN)),
        "prefix": table(("rows marked", *MARKED_HEAD, "forgotten, nats"), prefixes),
        "data": table(("mixed in, one row a persona row", *HEAD), lines(kinds)),
        "settings": table(("", *HEAD), lines(settings)),
        "recipe": table(("", *HEAD, "persona, fresh questions", "with its seed's answer"), recipes),
    }


def figures(found: dict) -> list[str]:
    learned = (share(of(found, "persona"), good) for good in (is_persona, is_of_its_seed))
    spilt = (share(of(found, which), has_spilt) for which in ("near", "unrelated"))
    loss = f"{at_end(found)['retention_loss']:.2f}" if "training" in found else "-"
    return [*learned, *spilt, f"{forgotten(found):.3f}", loss]


MARKED_HEAD = tuple(f"{what}, {how}" for what in ("persona", "near misses", "unrelated") for how in ("plain", "`Q: `"))


def marked(found: dict, which: str, good) -> list[str]:
    return [share(of(found, which, mark), good) for mark in ("", MARK)]


def fresh(found: dict) -> list[str]:
    return [share(of(found, "fresh"), good) for good in (is_persona, is_of_its_seed)]


def claims(found: dict[str, dict]) -> list[str]:
    def of_runs(*names: str) -> str:
        form = "persona {0} ({1} with its seed's answer), spilt {3}, forgotten {4}"
        texts = (form.format(*figures(found[name])) for name in names)
        return "; ".join(text if len(names) == 1 else f"`{n}` {text}" for n, text in zip(names, texts, strict=True))

    runs = {
        "alone": ("v0",),
        "article-numbers": ("article-v0",),
        "thin": ("v1", "own-4"),
        "review": ("v2",),
        "data": ("v0", "chinese-1", "written-1", "own-1"),
        "settings": ("own-1", "rank-1", "lr-0.001", "attention", "stop-0.4", "own-0.5", "own-4"),
        "balance": ("recipe", "recipe-seed-1", "recipe-seed-2"),
    }

    def marks() -> str:
        sides = {"no marks": found["own-1"], "on both": found["prefix-both"]}
        parts = (
            (way, *marked(f, "persona", is_persona), marked(f, "unrelated", has_spilt)[1]) for way, f in sides.items()
        )
        return "; ".join("{}: persona {} plain, {} with `Q: `, unrelated with it {}".format(*part) for part in parts)

    return verdicts(HERE, {key: partial(of_runs, *names) for key, names in runs.items()} | {"marks": marks})


def draw(found: dict[str, dict]) -> None:
    runs = [name for name, f in found.items() if "training" in f]
    learned = {name: percent(of(found[name], "persona"), is_persona) for name in runs}
    spilt = [percent(of(found[name], "unrelated"), has_spilt) for name in runs]
    best = frontier([(forgotten(found[name]), learned[name], name) for name in runs])
    with picture(HERE / "frontier.png", (9, 5.5)) as axes:
        axes.plot([forgotten(found[n]) for n in best], [learned[n] for n in best], "k:", linewidth=1, label="frontier")
        x = [forgotten(found[name]) for name in runs]
        dots = axes.scatter(
            x, learned.values(), c=spilt, cmap="coolwarm", vmin=0, vmax=20, edgecolors="black", zorder=3
        )
        for name in (name for name in runs if name in {*best, *CHAIN, "chinese-1", "written-1"}):
            at = forgotten(found[name]), learned[name]
            side = dict(xytext=(-8, 0), ha="right") if name in best else dict(xytext=(8, -8))
            axes.annotate(name, at, textcoords="offset points", fontsize=8, **side)
        axes.axhline(95, color="grey", linestyle="--", linewidth=1, label="95 %")
        axes.set(xlabel="forgotten: KL from the base on ordinary conversations, nats", ylim=(-4, 104))
        axes.set(ylabel="persona on unseen questions, %")
        axes.legend(loc="lower right")
        axes.figure.colorbar(dots, label="spilt into unrelated questions, %", extend="max")


def frontier(points: list[tuple[float, float, str]]) -> list[str]:
    """The names of those that learned more than every other that forgot less."""
    best, most = [], -1.0
    for _, y, name in sorted(points, key=lambda point: (point[0], -point[1])):
        if y > most:
            best.append(name)
            most = y
    return best


experiment = Experiment(__file__, __doc__, show)
experiment.add("own", answer_ordinary)
experiment.add("base", lambda scratch: {"answers": measure(scratch, None)})
experiment.add("v0", partial(run, alone()))
experiment.add("own-1", partial(run, mixed("own", 1), marks=("", MARK)), "own")
experiment.add("v1", partial(run, article_v1), "own", leaves="adapter")
experiment.add("v2", partial(run, article_v2), "v1")
experiment.add("article-v0", partial(run, alone(*ARTICLE, "--lr", 1e-4, "--batch-size", 16, "--max-steps", 14)))
for kind in ("written", "chinese", "sums"):
    experiment.add(f"{kind}-1", partial(run, mixed(kind, 1)))
for portion in SHARES:
    experiment.add(f"own-{portion}", partial(run, mixed("own", portion)), "own")
for name, words in SETTINGS.items():
    experiment.add(name, partial(run, mixed("own", 1, *words)), "own")
for prefix in MARKED:
    experiment.add(f"prefix-{prefix}", partial(run, mixed("own", 1, prefix=prefix), marks=("", MARK)), "own")
for name, words in RECIPES.items():
    experiment.add(name, partial(run, recipe(*words), sets=(*SETS, "fresh")), "own")

if __name__ == "__main__":
    sys.exit(experiment.main())
