"""Preference pairs: SFT on the chosen answers, against DPO from there with three values of β, judged by a rule.

python experiments/preferences/run.py            from nothing to the figures, in parts; a second start goes on
python experiments/preferences/run.py --figures  table and pictures again, from results/
"""

import sys
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parts import Experiment, ask, by_step, question, train
from preferences import pairs, rule
from show import at_end, percent, picture, share, table, verdicts

from lora import files
from lora.inference import answers as texts_of

HERE = Path(__file__).resolve().parent
SETS = {  # set -> its questions, none of them in the pairs
    "decisions": list(dict.fromkeys(row["prompt"] for row in pairs.pairs(unseen=True))),
    "others": (HERE / "questions.txt").read_text().splitlines(),
}
LENGTH = 64  # tokens of an answer; the longest chosen one has 45
BETAS = ("0.05", "0.1", "0.5")
SFT = ("--lr", 1e-3)
DPO = ("--method", "dpo", "--lr", 5e-5)
SIDES = ("log_prob_chosen", "log_prob_rejected", "reward_chosen", "reward_rejected", "accuracy")
WINDOW = 10  # steps, of the curves' running mean
ARMS = {
    "base": "the base",
    "sft": "SFT on the chosen answers, 20 steps",
    "sft-more": "20 more steps of that",
    **{f"dpo-{beta}": f"DPO from `sft`, β {beta}, 20 steps" for beta in BETAS},
    "dpo-sft": "with β 0.1 and `--sft-weight 1`",
    "dpo-fast": "with β 0.1 and four times the rate",
}


# ---- parts -----------------------------------------------------------------------------------------------------------


def data() -> dict[str, Path]:
    """Pairs, their chosen answers as rows for SFT, and unseen pairs, one a question, to measure both sides on."""
    made = {name: experiment.scratch / f"{name}.jsonl" for name in ("pairs", "chosen", "unseen")}
    rows, unseen = list(pairs.pairs(unseen=False)), pairs.pairs(unseen=True)
    files.write_rows(made["pairs"], rows)
    files.write_rows(made["chosen"], ({"prompt": row["prompt"], "completion": row["chosen"]} for row in rows))
    files.write_rows(made["unseen"], islice(unseen, 0, None, len(pairs.KINDS) + 1))  # each kind of fault in turn
    return made


def measure(scratch: Path, adapter: Path | None) -> list[dict]:
    asked = [(name, text) for name, texts in SETS.items() for text in texts]
    base = () if adapter else ("--no-system",)
    words = ("--max-new-tokens", LENGTH, "--batch-size", len(asked) // 2)
    said = ask(scratch, [question(text) for _, text in asked], adapter, *base, *words)
    return [
        {"set": name, "prompt": text, "prediction": answer} for (name, text), answer in zip(asked, said, strict=True)
    ]


def imitate(words, scratch: Path) -> dict:
    adapter = scratch / "adapter"
    training = train(adapter, "--data", data()["chosen"], "--config", HERE / "recipe.toml", *SFT, *words())
    return {"training": training, "answers": measure(scratch, adapter)}


def prefer(words, scratch: Path) -> dict:
    adapter, made = scratch / "adapter", data()
    words = (*DPO, "--data", made["pairs"], "--eval-data", made["unseen"], *from_sft(), *words)
    training = train(adapter, "--config", HERE / "recipe.toml", *words)
    return {"training": training, "sides": by_step(adapter, *SIDES), "answers": measure(scratch, adapter)}


def from_sft() -> tuple:
    return "--init-adapter", experiment.scratch / "sft" / "adapter"


# ---- scores ----------------------------------------------------------------------------------------------------------


def of(found: dict, which: str) -> list[dict]:
    return [row for row in found["answers"] if row["set"] == which]


def is_right(row: dict) -> bool:
    return rule.is_right(row["prediction"])


def wins(found: dict, other: dict, which: str) -> tuple[int, int, int]:
    """Answers that the rule finds better than the other's to the same question, as good, and worse."""
    both = zip(of(found, which), of(other, which), strict=True)
    verdicts = [rule.better(a["prompt"], a["prediction"], b["prediction"]) for a, b in both]
    return verdicts.count("a"), verdicts.count(None), verdicts.count("b")


def change(found: dict, side: str) -> list[float]:
    """By how much the answers of one side have become likelier since the start, in nats an answer, step by step."""
    command = found["training"]["command"]
    beta = float(command[command.index("--beta") + 1])
    return [reward / beta for reward in found["sides"][f"reward_{side}"]]


def moved(found: dict, side: str) -> tuple[float, float]:
    """The log-probability of one side of the unseen pairs, at the start and at the end."""
    evaluations = found["training"]["evaluations"]
    return tuple(row[f"eval_log_prob_{side}"] for row in (evaluations[0], evaluations[-1]))


# ---- tables and pictures ---------------------------------------------------------------------------------------------

HEAD = (
    "",
    "right, unseen decisions",
    "right, other questions",
    "better, as good, worse than `sft`: decisions",
    "other questions",
    "median words",
    "repeated 4-grams",
    "forgotten, nats",
    "loss on ordinary conversations",
)
SIDES_HEAD = ("", "log p, chosen", "log p, rejected", "chosen of unseen pairs", "rejected", "unseen pairs in order")


def show(found: dict[str, dict]) -> dict[str, list[str]]:
    there = {name: label for name, label in ARMS.items() if name in found}
    by_pairs = {name: found[name] for name in there if "sides" in found[name]}
    if by_pairs:
        draw_sides(by_pairs)
        draw_frontier({name: found[name] for name in there if "training" in found[name]})
    return {
        "summary": claims(found),
        "arms": table(HEAD, [[f"`{name}`: {label}", *figures(found, name)] for name, label in there.items()]),
        "faults": table(("", *faults_head()), [[f"`{name}`", *faults(found[name])] for name in there]),
        "sides": table(SIDES_HEAD, [[f"`{name}`", *both_sides(f)] for name, f in by_pairs.items()]),
    }


def figures(found: dict[str, dict], name: str) -> list[str]:
    f = found[name]
    right = (share(of(f, which), is_right) for which in SETS)
    won = ("-", "-")
    if name != "sft" and "sft" in found:
        won = (", ".join(map(str, wins(f, found["sft"], which))) for which in SETS)
    texts = [row["prediction"] for row in f["answers"]]
    signs = f"{median(len(t.split()) for t in texts):.0f}", f"{mean(map(texts_of.repetition, texts)):.1%}"
    cost = (f"{at_end(f)['retention_kl']:.3f}", f"{at_end(f)['retention_loss']:.2f}") if "training" in f else ("-", "-")
    return [*right, *won, *signs, *cost]


def faults_head() -> list[str]:
    return [f"{fault}, {which}" for which in SETS for fault in ("voice lost", "hedged", "listed")]


def faults(found: dict) -> list[str]:
    """How many answers have each fault."""
    return [
        share(of(found, which), lambda row, fault=fault: fault in rule.faults(row["prediction"]))
        for which in SETS
        for fault in ("voice", "hedge", "list")
    ]


def both_sides(found: dict) -> list[str]:
    trained = (mean(change(found, side)[-WINDOW:]) for side in ("chosen", "rejected"))
    unseen = (moved(found, side) for side in ("chosen", "rejected"))
    order = f"{at_end(found)['eval_accuracy']:.0%}"
    return [*(f"{by:+.1f}" for by in trained), *(f"{a:.1f} → {b:.1f}" for a, b in unseen), order]


def claims(found: dict[str, dict]) -> list[str]:
    arms = [f"dpo-{beta}" for beta in BETAS]

    def each(tell, *names: str) -> str:
        return "; ".join(f"`{name}` {tell(found[name])}" for name in names)

    def right(f: dict) -> str:
        return " and ".join(f"{share(of(f, which), is_right)} {which}" for which in SETS)

    def tax(f: dict) -> str:
        return f"forgotten {at_end(f)['retention_kl']:.2f} nats, loss {at_end(f)['retention_loss']:.2f}"

    def near(f: dict) -> str:
        return f"forgotten {at_end(f)['retention_kl']:.2f} nats, right {right(f)}"

    def fall(f: dict) -> str:
        return " and ".join(f"{side} {mean(change(f, side)[-WINDOW:]):+.1f}" for side in ("chosen", "rejected"))

    return verdicts(
        HERE,
        {
            "pairs": lambda: "right: " + each(right, "base", "sft", "sft-more", *arms),
            "tax": lambda: each(tax, "sft", "sft-more", *arms, "dpo-fast"),
            "beta": lambda: each(near, *arms, "dpo-fast"),
            "fall": lambda: "nats an answer: " + each(fall, *arms, "dpo-sft", "dpo-fast"),
        },
    )


def draw_sides(found: dict[str, dict]) -> None:
    with picture(HERE / "sides.png", (11, 4.5), ncols=2) as axes:
        for at, (name, f) in enumerate(found.items()):
            for side, line in (("chosen", "-"), ("rejected", "--")):
                values, label = running(change(f, side)), f"{name}, {side}"
                axes[int(name == "dpo-fast")].plot(range(1, len(values) + 1), values, f"C{at}{line}", label=label)
        for panel in axes:
            panel.axhline(0, color="grey", linewidth=0.8)
            panel.set(xlabel=f"step; running mean of {WINDOW}", ylabel="log p since the start, nats an answer")
            panel.legend(fontsize=8)


def running(values: list[float]) -> list[float]:
    return [mean(values[max(0, at - WINDOW + 1) : at + 1]) for at in range(len(values))]


def draw_frontier(found: dict[str, dict]) -> None:
    with picture(HERE / "frontier.png", (9, 5)) as axes:
        for name, f in found.items():
            at = at_end(f)["retention_kl"], percent(f["answers"], is_right)
            axes.scatter(*at, color="C1" if name.startswith("sft") else "C0", zorder=3)
            side = dict(xytext=(7, -3)) if name.startswith("sft") else dict(xytext=(-7, -3), ha="right")
            axes.annotate(name, at, textcoords="offset points", fontsize=8, **side)
        axes.margins(x=0.12)
        axes.set(xlabel="forgotten: KL from the base on ordinary conversations, nats", ylim=(-4, 104))
        axes.set(ylabel="right by the rule, % of unseen questions")


experiment = Experiment(__file__, __doc__, show)
experiment.add("base", lambda scratch: {"answers": measure(scratch, None)})
experiment.add("sft", partial(imitate, tuple), leaves="adapter")
experiment.add("sft-more", partial(imitate, from_sft), "sft")
for beta in BETAS:
    experiment.add(f"dpo-{beta}", partial(prefer, ("--beta", beta)), "sft")
experiment.add("dpo-sft", partial(prefer, ("--beta", "0.1", "--sft-weight", "1")), "sft")
experiment.add("dpo-fast", partial(prefer, ("--beta", "0.1", "--lr", 2e-4)), "sft")

if __name__ == "__main__":
    sys.exit(experiment.main())
