"""The Taoist voice: OpenAI's rows with their system turn, 138 steps, and what it says to questions it has not seen.

python experiments/taoist/run.py            from nothing to the figures, in parts; a second start goes on
python experiments/taoist/run.py --figures  tables and picture again, from results/
"""

import re
import sys
from functools import partial
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parts import ROOT, Experiment, ask, question, read_rows, train
from show import at_end, picture, share, table, verdicts

HERE = Path(__file__).resolve().parent
ROWS = HERE / "rows-en.jsonl"  # rows-zh.jsonl has the same in Chinese, for a base that knows it
SYSTEM = read_rows(ROWS)[0]["messages"][0]
SAYING = re.compile(r'(?:Laozi|Zhuangzi)\b[^".]{0,40}"([^"]+)"')  # a sage is named, then quoted
TAUGHT = {said for row in read_rows(ROWS) for said in SAYING.findall(row["messages"][-1]["content"])}
SETS = {  # set -> its questions, none of them in the rows
    "life": HERE / "questions.txt",
    "unrelated": ROOT / "tests" / "fixtures" / "unrelated_questions.txt",  # the first of them
}
QUESTIONS = 20  # of each
LENGTH = 80  # tokens of an answer; the longest row has 58
RATES = ("0.002", "0.0005")
SHOWN = ("How do I cope with pressure?", "How can I get rid of a bad habit?", "What can I learn from a river?")


# ---- parts -----------------------------------------------------------------------------------------------------------


def measure(scratch: Path, adapter: Path | None) -> list[dict]:
    """Answers to both sets of questions, each with the rows' system turn and without one."""
    asked = [(name, system, text) for system in (True, False) for name in SETS for text in questions(name)]
    prompts = [{"messages": [SYSTEM] * system + question(text)["messages"]} for _, system, text in asked]
    base = () if adapter else ("--no-system",)
    said = ask(scratch, prompts, adapter, *base, "--max-new-tokens", LENGTH, "--batch-size", 40)
    keys = ("set", "system", "prompt", "prediction")
    return [dict(zip(keys, (*row, answer), strict=True)) for row, answer in zip(asked, said, strict=True)]


def questions(name: str) -> list[str]:
    return SETS[name].read_text().splitlines()[:QUESTIONS]


def run(rate: str, scratch: Path) -> dict:
    adapter = scratch / "adapter"
    training = train(adapter, "--data", ROWS, "--config", HERE / "recipe.toml", "--lr", rate)
    return {"training": training, "answers": measure(scratch, adapter)}


# ---- scores ----------------------------------------------------------------------------------------------------------


def sayings(row: dict) -> list[str]:
    return SAYING.findall(row["prediction"])


def is_taoist(row: dict) -> bool:
    """It quotes Laozi or Zhuangzi."""
    return bool(sayings(row))


def is_true(row: dict) -> bool:
    """All that it quotes stands in the rows, word for word; what it made up itself is nobody's saying."""
    return is_taoist(row) and TAUGHT.issuperset(sayings(row))


def of(found: dict, which: str, system: bool) -> list[dict]:
    return [row for row in found["answers"] if (row["set"], row["system"]) == (which, system)]


def epochs(found: dict) -> list[float]:
    """The mean loss of each time through the rows; one row's loss says more of the row than of the model."""
    losses, rows = found["training"]["losses"], len(read_rows(ROWS))
    return [mean(losses[at : at + rows]) for at in range(0, len(losses), rows)]


# ---- tables and picture ----------------------------------------------------------------------------------------------

HEAD = (
    "",
    "quotes a sage, with the system turn",
    "of these, a saying of the rows",
    "without the system turn",
    "unrelated questions, with it",
    "without it",
    "median words",
    "loss, first to third time",
    "forgotten, nats",
)


def show(found: dict[str, dict]) -> dict[str, list[str]]:
    if runs := [name for name in found if name != "base"]:
        draw(found, runs)
    return {
        "summary": claims(found),
        "voice": table(HEAD, [[f"`{name}`", *figures(f)] for name, f in found.items()]),
        "said": table(("question", *(f"`{name}`" for name in found)), list(map(partial(told, found), SHOWN))),
    }


def figures(found: dict) -> list[str]:
    asked, plain = of(found, "life", True), of(found, "life", False)
    spilt = (share(of(found, "unrelated", system), is_taoist) for system in (True, False))
    words = median(len(row["prediction"].split()) for row in asked)
    trained = ("-", "-")
    if "training" in found:
        trained = " → ".join(f"{loss:.2f}" for loss in epochs(found)), f"{at_end(found)['retention_kl']:.3f}"
    true = share(filter(is_taoist, asked), is_true)
    return [share(asked, is_taoist), true, share(plain, is_taoist), *spilt, f"{words:.0f}", *trained]


def told(found: dict[str, dict], asked: str) -> list[str]:
    """What each says to one question, with the system turn."""
    said = [next(row["prediction"] for row in of(f, "life", True) if row["prompt"] == asked) for f in found.values()]
    return [asked, *(" ".join(text.split()).replace("|", "\\|") for text in said)]


def claims(found: dict[str, dict]) -> list[str]:
    def loss() -> str:
        return "; ".join(f"rate {r} {' → '.join(f'{x:.2f}' for x in epochs(found[f'rate-{r}']))}" for r in RATES)

    def voice() -> str:
        asked = {name: of(found[name], "life", True) for name in ("base", *(f"rate-{rate}" for rate in RATES))}
        return "quotes a sage: " + "; ".join(f"`{name}` {share(rows, is_taoist)}" for name, rows in asked.items())

    def data() -> str:
        quoting = {rate: filter(is_taoist, of(found[f"rate-{rate}"], "life", True)) for rate in RATES}
        return "a saying of the rows: " + "; ".join(f"rate {rate} {share(q, is_true)}" for rate, q in quoting.items())

    return verdicts(HERE, {"loss": loss, "voice": voice, "data": data})


def draw(found: dict[str, dict], runs: list[str]) -> None:
    rows = len(read_rows(ROWS))
    with picture(HERE / "loss.png", (9, 5)) as axes:
        for at, name in enumerate(runs):
            losses, color = found[name]["training"]["losses"], f"C{at}"
            axes.plot(range(1, len(losses) + 1), losses, color=color, linewidth=0.6, alpha=0.5)
            for epoch, loss in enumerate(epochs(found[name])):
                label = name.replace("-", " ") if not epoch else None
                axes.plot([epoch * rows + 1, (epoch + 1) * rows], [loss] * 2, color=color, linewidth=2.5, label=label)
        axes.set(xlabel="step, one row each; thick: the mean of a time through the rows", ylabel="loss, nats a token")
        axes.set_ylim(bottom=0)
        axes.legend()


experiment = Experiment(__file__, __doc__, show)
experiment.add("base", lambda scratch: {"answers": measure(scratch, None)})
for rate in RATES:
    experiment.add(f"rate-{rate}", partial(run, rate))

if __name__ == "__main__":
    sys.exit(experiment.main())
