"""LoRA against full fine-tuning on the same rows: speed, memory, size, accuracy, forgetting.

python experiments/full/run.py            from nothing to the figures, in parts; a second start goes on
python experiments/full/run.py --figures  table and picture again, from results/
"""

import sys
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parts import Experiment, train
from show import at_end, percent, picture, share, table, verdicts
from sums import answered, right, rows_of

HERE = Path(__file__).resolve().parent
ROWS, UNSEEN = 320, 50
RATES = {"lora": (5e-4, 2e-3, 8e-3), "full": (5e-5, 2e-4, 5e-4)}
WAYS = {"lora": "LoRA, rank 16", "full": "every weight"}


def run(way: str, rate: float, scratch: Path) -> dict:
    out = scratch / "result"
    data = rows_of(experiment, ROWS)
    full = ("--full",) if way == "full" else ()
    training = train(out, "--config", HERE / "recipe.toml", "--data", data, *full, "--lr", rate)
    whole = ("--no-system",), {"model": out}  # it does not remember how it was trained
    words, who = whole if full else ((), {})
    found = answered(scratch, None if full else out, UNSEEN, *words, **who)
    return {"way": way, "rate": rate, "training": training, "answers": found}


def show(found: dict[str, dict]) -> dict[str, list[str]]:
    lines = []
    for f in found.values():
        t, end = f["training"], at_end(f)
        lines.append([
            WAYS[f["way"]], f"{f['rate']:g}", share(f["answers"], right), f"{end['eval_loss']:.4f}",
            f"{end['retention_kl']:.2f}", f"{t['tokens_per_second']:.0f}", f"{t['peak_bytes'] / 1e9:.1f} GB",
            f"{t['result_bytes'] / 1e6:.0f} MB",
        ])  # fmt: skip
    head = ("trained", "rate", f"right, of {UNSEEN} unseen pairs", "loss on unseen pairs", "forgotten, nats",
            "tokens/s", "peak memory", "result")  # fmt: skip
    if found:
        draw(list(found.values()))
    return {"summary": claims(found), "ways": table(head, lines)}


def claims(found: dict[str, dict]) -> list[str]:
    def of(way: str) -> list[dict]:
        return [found[f"{way}-{rate:g}"] for rate in RATES[way]]

    def cost() -> str:
        def over(key: str) -> float:
            full, lora = (median(f["training"][key] for f in of(way)) for way in ("full", "lora"))
            return full / lora

        speed, memory, size = map(over, ("tokens_per_second", "peak_bytes", "result_bytes"))
        shares = f"{speed:.1f} of the speed, {memory:.1f} times the memory, {size:.0f} times the file"
        return f"every weight over rank 16, medians of their runs: {shares}"

    def quality() -> str:
        best = (min(of(way), key=lambda f: at_end(f)["eval_loss"]) for way in RATES)
        return "; ".join(
            f"{WAYS[f['way']]}, rate {f['rate']:g}: {share(f['answers'], right)}, "
            f"forgotten {at_end(f)['retention_kl']:.2f}"
            for f in best
        )

    return verdicts(HERE, {"cost": cost, "quality": quality})


def draw(runs: list[dict]) -> None:
    with picture(HERE / "full.png", (7, 4.5)) as axes:
        for way, label in WAYS.items():
            its = [f for f in runs if f["way"] == way]
            points = [(at_end(f)["retention_kl"], percent(f["answers"], right), f["rate"]) for f in its]
            axes.plot([x for x, *_ in points], [y for _, y, _ in points], "o", markersize=9, label=f"{label}, by rate")
            for x, y, rate in points:
                at = (7, 5) if way == "full" else (7, -12)
                axes.annotate(f"{rate:g}", (x, y), xytext=at, textcoords="offset points")
        axes.set(xlabel="forgotten: KL from the base on ordinary conversations, nats", ylim=(-3, 105))
        axes.set(ylabel="right on unseen pairs, %")
        axes.margins(x=0.12)
        axes.legend()


experiment = Experiment(__file__, __doc__, show)
for way, rates in RATES.items():
    for rate in rates:
        experiment.add(f"{way}-{rate:g}", partial(run, way, rate))

if __name__ == "__main__":
    sys.exit(experiment.main())
