"""fp16, bf16 and small rates: what is rounded away, and what overflows.

python experiments/precision/run.py            from nothing to the figures, in parts; a second start goes on
python experiments/precision/run.py --figures  tables and picture again, from results/
"""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from half import HalfProducts
from parts import MODEL, Experiment, train
from show import picture, table, verdicts
from sums import rows_of

from lora import pretrained
from lora.adapter.inject import inject
from lora.data import formats
from lora.data.batch import micro_batches
from lora.data.encode import encode
from lora.errors import BadNumbers
from lora.methods import sft
from lora.train.step import train_step

HERE = Path(__file__).resolve().parent
ROWS = 320

# ---- the article's fp16 failure: the library trains in any float dtype, train.py refuses this one --------------------

STEPS, BATCH, RATE = 16, 2, 2e-3
HALF, WIDE = torch.float16, torch.float32


class How(NamedTuple):
    """dtype of base and activations, dtype of the adapter and AdamW's moments; `fused` steps in float32 inside."""

    dtype: torch.dtype
    adapter_dtype: torch.dtype
    fused: bool = True
    rate: float = RATE
    eps: float = 1e-8
    scale: int = 1  # of the loss, before backward


WAYS = {
    "bfloat16": How(torch.bfloat16, WIDE, fused=False),
    "bfloat16-slow": How(torch.bfloat16, WIDE, fused=False, rate=1e-4),
    "float16-all": How(HALF, HALF, fused=False),
    "float16-fused": How(HALF, HALF),
    "float16-slow": How(HALF, HALF, rate=1e-4),
    "float16-eps": How(HALF, HALF, eps=1e-3),
    "float16-base": How(HALF, WIDE, fused=False),
    "float16-scaled": How(HALF, WIDE, fused=False, scale=1024),
}


def loop(how: How, scratch: Path) -> dict:
    """A plain loop of the library's calls: AdamW at a constant rate, clipped at 1, no warm-up."""
    checkpoint = pretrained.find(MODEL)
    chat, model = pretrained.load_chat(checkpoint, system=False), pretrained.load_model(checkpoint, how.dtype)
    torch.manual_seed(0)
    inject(model, rank=16, alpha=32, dtype=how.adapter_dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, how.rate, eps=how.eps, weight_decay=0, fused=how.fused)
    examples = encode(formats.read([rows_of(experiment, ROWS)]), chat, 8192)
    losses, norms, lost, ended = [], [], [], "all steps are done"

    def objective(batch) -> torch.Tensor:
        return sft.loss(model, batch)[0]

    with HalfProducts() if how.dtype == HALF else nullcontext():
        for step in range(STEPS):
            batches = micro_batches([examples[step * BATCH + i] for i in range(BATCH)], 2048)
            trained = sum(len(batch.targets) for batch in batches)
            try:
                result = train_step(lambda b: how.scale * objective(b), batches, optimizer, how.rate, 1.0, trained)
            except BadNumbers as error:
                ended = f"step {step + 1}: {error}"
                break
            losses.append(round(result.loss / how.scale, 4))
            norms.append(result.grad_norm / how.scale)
            lost.append(round(squares_lost(optimizer), 4))
    finite = all(bool(p.isfinite().all()) for p in parameters)
    return {"losses": losses, "norms": norms, "squares_lost": lost, "ended": ended, "adapter_finite": finite}


def squares_lost(optimizer: torch.optim.Optimizer) -> float:
    """The share of numbers with a mean gradient whose mean square is 0."""
    moments = [(state["exp_avg"] != 0, state["exp_avg_sq"] == 0) for state in optimizer.state.values()]
    return sum(int((mean & none).sum()) for mean, none in moments) / sum(int(mean.sum()) for mean, _ in moments)


# ---- bf16 adapters against fp32 adapters, on from an adapter that has learned something ------------------------------

SMALL = (1e-5, 1e-3)
ADAPTERS = ("float32", "bfloat16")


def start(scratch: Path) -> dict:
    """What the later parts go on from: 20 steps at the default rate, in each dtype."""
    words = ("--data", rows_of(experiment, ROWS), "--no-system", "--batch-size", 4, "--max-steps", 20)
    return {name: train(scratch / name, *words, "--adapter-dtype", name) for name in ADAPTERS}


def go_on(dtype: str, rate: float, scratch: Path) -> dict:
    words = ("--init-adapter", experiment.scratch / "start" / ADAPTERS[0], "--config", HERE / "recipe.toml")
    words += ("--data", rows_of(experiment, ROWS), "--adapter-dtype", dtype, "--lr", rate)
    return {"dtype": dtype, "rate": rate, "training": train(scratch / "adapter", *words)}


# ---- tables and pictures ---------------------------------------------------------------------------------------------


NAMES = {
    "bfloat16": "bf16 base, fp32 adapter: what train.py does",
    "bfloat16-slow": "bf16 base, fp32 adapter, rate 1e-4",
    "float16-all": "all in fp16, the adapter and AdamW too",
    "float16-fused": "all in fp16, AdamW as one kernel",
    "float16-slow": "all in fp16, AdamW as one kernel, rate 1e-4",
    "float16-eps": "all in fp16, AdamW as one kernel, its eps 1e-3",
    "float16-base": "fp16 base, fp32 adapter",
    "float16-scaled": "fp16 base, fp32 adapter, loss scaled by 1,024",
}


def show(found: dict[str, dict]) -> dict[str, list[str]]:
    loops = {name: found[name] for name in WAYS if name in found}
    runs = [found[name] for rate in SMALL for dtype in ADAPTERS if (name := f"{dtype}-{rate:g}") in found]
    shown = (1, 2, 4, 8, STEPS)
    courses = []
    for name, f in loops.items():
        losses = (f"{f['losses'][i - 1]:.2f}" if i <= len(f["losses"]) else "-" for i in shown)
        ended = f["ended"].partition(". ")[0]
        courses.append([NAMES[name], *losses, f"{f['norms'][-1]:.1f}", f"{f['squares_lost'][-1]:.1%}", ended])
    rates = []
    for f in runs:
        unchanged, losses = f["training"]["unchanged"], [row["eval_loss"] for row in f["training"]["evaluations"]]
        course = f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{losses[-1] - losses[0]:+.4f}"
        rates.append([f"{f['rate']:g}", f["dtype"], f"{mean(unchanged):.1%}", *course])
    if found:
        draw(loops, runs)
    head = (
        "rate",
        "adapter",
        "numbers that a step leaves unchanged, mean",
        "loss on unseen pairs, before",
        "after 60 steps",
        "change",
    )
    return {
        "summary": claims(found),
        "fp16": table(
            ("", *(f"loss, step {i}" for i in shown), "last gradient norm", "squares lost", "ended"), courses
        ),
        "rates": table(head, rates),
    }


def claims(found: dict[str, dict]) -> list[str]:
    def fp16() -> str:
        names = ("float16-slow", "bfloat16-slow", "float16-eps", "float16-base", "bfloat16")
        losses = ((NAMES[name], found[name]["losses"]) for name in names)
        return f"loss in {STEPS} steps: " + "; ".join(f"{label} {run[0]:.2f} → {run[-1]:.2f}" for label, run in losses)

    def rate(dtype: str) -> str:
        t = found[f"{dtype}-1e-05"]["training"]
        won = t["evaluations"][0]["eval_loss"] - t["evaluations"][-1]["eval_loss"]
        return f"{dtype}: {mean(t['unchanged']):.0%} left unchanged, loss lower by {won:.3f}"

    return verdicts(HERE, {"fp16": fp16, "rate": lambda: "; ".join(map(rate, ADAPTERS))})


def draw(loops: dict[str, dict], runs: list[dict]) -> None:
    below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8)
    with picture(HERE / "precision.png", (11, 4.5), ncols=2) as (left, right):
        for name, f in loops.items():
            left.plot(range(1, len(f["losses"]) + 1), f["losses"], "o-", markersize=3, label=NAMES[name])
        title = f"from the base, rate {RATE:g} unless said"
        left.set(xlabel="step", ylabel="training loss, nats a token", yscale="log", title=title)
        left.legend(**below)
        for f in runs:
            shares = [100 * share for share in f["training"]["unchanged"]]
            style = "--" if f["dtype"] == "float32" else "-"
            right.plot(range(1, len(shares) + 1), shares, style, label=f"{f['dtype']}, rate {f['rate']:g}")
        right.set(xlabel="step", ylabel="numbers left unchanged, %", title="on from an adapter")
        right.legend(**below)


experiment = Experiment(__file__, __doc__, show)
for name, how in WAYS.items():
    experiment.add(name, partial(loop, how))
experiment.add("start", start, leaves=ADAPTERS[0])
for rate in SMALL:
    for dtype in ADAPTERS:
        experiment.add(f"{dtype}-{rate:g}", partial(go_on, dtype, rate), "start")

if __name__ == "__main__":
    sys.exit(experiment.main())
