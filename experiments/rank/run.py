"""Rank, "as large as possible"? Ranks 1 to 256, each at its best rate: loss and accuracy, parameters, time.

python experiments/rank/run.py            from nothing to the figures, in parts; a second start goes on
python experiments/rank/run.py --figures  table and picture again, from results/
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parts import Experiment, train
from show import at_end, percent, picture, share, table, verdicts
from sums import answered, right, rows_of

HERE = Path(__file__).resolve().parent
RATES = {  # rank -> rates, until neither the first nor the last was the best
    1: (5e-4, 2e-3, 8e-3, 3.2e-2),
    4: (2e-3, 8e-3, 3.2e-2),
    16: (5e-4, 2e-3, 8e-3),
    64: (5e-4, 2e-3, 8e-3),
    256: (1.25e-4, 5e-4, 2e-3),
}
ROWS, UNSEEN = 320, 50


def run(rank: int, rate: float, scratch: Path) -> dict:
    """Alpha is twice the rank throughout, so that the branch counts twice."""
    adapter = scratch / "adapter"
    words = ("--config", HERE / "recipe.toml", "--data", rows_of(experiment, ROWS), "--rank", rank, "--alpha", 2 * rank)
    training = train(adapter, *words, "--lr", rate)
    return {"rank": rank, "rate": rate, "training": training, "answers": answered(scratch, adapter, UNSEEN)}


def show(found: dict[str, dict]) -> dict[str, list[str]]:
    runs = sorted(found.values(), key=lambda f: (f["rank"], f["rate"]))
    best = [min((f for f in runs if f["rank"] == rank), key=unseen_loss) for rank in sorted({f["rank"] for f in runs})]
    lines = []
    for f in best:
        losses = ", ".join(f"{g['rate']:g}: {unseen_loss(g):.3f}" for g in runs if g["rank"] == f["rank"])
        t, forgotten = f["training"], at_end(f)["retention_kl"]
        cost = (
            f"{t['result_bytes'] / 4e6:.1f} M",
            f"{t['training_seconds'] / 60:.1f}",
            f"{t['peak_bytes'] / 1e9:.1f} GB",
        )
        lines.append([f["rank"], losses, share(f["answers"], right), *cost, f"{forgotten:.2f}"])
    if runs:
        draw(runs, best)
    head = (
        "rank",
        "loss on unseen pairs, at each rate",
        f"right, of {UNSEEN} unseen pairs",
        "parameters",
        "minutes",
        "peak memory",
        "forgotten, nats",
    )
    return {"summary": claims(found, best), "ranks": table(head, lines)}


def unseen_loss(found: dict) -> float:
    return at_end(found)["eval_loss"]


def claims(found: dict[str, dict], best: list[dict]) -> list[str]:
    def large() -> str:
        for name in experiment.parts:
            found[name]  # or it is not done yet
        return "; ".join(f"{f['rank']}: loss {unseen_loss(f):.3f}, {share(f['answers'], right)}" for f in best)

    return verdicts(HERE, {"large": large})


def draw(runs: list[dict], best: list[dict]) -> None:
    ranks = [f["rank"] for f in best]
    minutes = [f["training"]["training_seconds"] / 60 for f in best]
    with picture(HERE / "rank.png", (10, 4), ncols=2) as (left, right_):
        for rate in sorted({f["rate"] for f in runs}):
            of_rate = [f for f in runs if f["rate"] == rate]
            left.plot([f["rank"] for f in of_rate], [unseen_loss(f) for f in of_rate], "o-", label=f"rate {rate:g}")
        left.set(yscale="log", xlabel="rank", ylabel="loss on unseen pairs, nats a token")
        left.legend()
        right_.plot(ranks, [percent(f["answers"], right) for f in best], "o-", label="right, %")
        right_.plot(ranks, [100 * m / max(minutes) for m in minutes], "s--", label="time, % of the longest")
        right_.set(xlabel="rank, each at its best rate", ylim=(-3, 103))
        right_.legend()
        for axes in (left, right_):
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(RATES), list(RATES))


experiment = Experiment(__file__, __doc__, show)
for rank, rates in RATES.items():
    for rate in rates:
        experiment.add(f"rank-{rank}-rate-{rate:g}", partial(run, rank, rate))

if __name__ == "__main__":
    sys.exit(experiment.main())
