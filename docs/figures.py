"""The pictures of README.md and the chapters, drawn from results that the repository holds.

python docs/figures.py             all of them, into docs/
python docs/figures.py --out DIR   elsewhere

The background is transparent and every colour is a middle tone, about as far from white as from GitHub's dark page:
one file serves both. The same results and the same matplotlib give the same bytes.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TEXT, BLUE, ORANGE, GREEN, RED, GREY = "#7a7f87", "#3d7fd6", "#cf6b1f", "#2b9348", "#d64550", "#858b94"
STYLE = {
    "svg.hashsalt": "lora",
    "font.size": 14,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": TEXT,
    "grid.alpha": 0.25,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
}


READ: dict[str, bytes] = {}  # what the picture in hand was drawn from


def text_of(path: str) -> str:
    READ[path] = (ROOT / path).read_bytes()
    return READ[path].decode()


def result(path: str) -> dict:
    return json.loads(text_of(path))


def source() -> str:
    """A hash of this program and of what the picture in hand was drawn from: a stale picture is found by it."""
    parts = [Path(__file__).read_bytes(), *(READ[path] for path in sorted(READ))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def canvas(width: float, height: float) -> tuple[pyplot.Figure, Axes]:
    """A sheet to draw on in its own units, without axes."""
    figure = pyplot.figure(figsize=(10, 10 * height / width))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", **style) -> None:
    """A filled box, with white text in its middle."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="none"))
    axes.text(x + width / 2, y + height / 2, text, color="white", ha="center", va="center", **style)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color=TEXT, linewidth=1.4))


# ---- the idea --------------------------------------------------------------------------------------------------------


def lora() -> pyplot.Figure:
    """W beside B A, with their shapes in q_proj of the default model."""
    figure, axes = canvas(100, 45)
    size, rank = 576, 16
    count = f"{2 * rank * size:,} trained numbers\nbeside {size * size:,} frozen ones"
    box(axes, 7, 11, 26, 26, BLUE, "W\n\nfrozen", fontsize=19)
    box(axes, 48, 11, 4.5, 26, ORANGE, "B", fontsize=19)
    box(axes, 60, 32.5, 26, 4.5, ORANGE, "A", fontsize=19)
    for x, text in ((20, f"{size} in"), (50.2, f"rank {rank}"), (73, f"{size} in")):
        axes.text(x, 38.5, text, ha="center", va="bottom")
    for x, y, text in ((6, 24, f"{size} out"), (47, 24, f"{size} out"), (59, 34.7, f"{rank}")):
        axes.text(x, y, text, ha="right", va="center", rotation=90 if "out" in text else 0)
    axes.text(38, 24, "+  s ·", ha="center", va="center", fontsize=23)
    axes.text(60, 24.5, f"{rank} × {size} + {size} × {rank}\n= {count}", va="center", linespacing=1.6, color=ORANGE)
    axes.text(60, 13.5, "B starts at zero, so at the\nstart nothing is changed", va="center", linespacing=1.6)
    formulas = "y  =  W x  +  s B A x          ΔW = s B A          merged:  W' = W + ΔW"
    axes.text(50, 4, formulas, ha="center", va="center", fontsize=17)
    return figure


# ---- from a line to a loss -------------------------------------------------------------------------------------------

WAY = (  # the file that does it, what is there then
    ("", "a line of train.jsonl, in any accepted shape"),
    ("lora/data/formats.py", "messages: one form from here on"),
    ("lora/text/chat.py", "token ids, and which of them are trained: built together"),
    ("lora/data/batch.py", "documents end to end, (T,): no padding"),
    ("lora/network/decoder.py", "hidden states (T, D); only trained rows go on to the head"),
    ("lora/train/step.py", "sum of the losses / trained tokens of the whole step"),
)


def way() -> pyplot.Figure:
    """A conversation's way from a line of a file to a loss."""
    step = 12
    height = step * len(WAY) + 0.5
    figure, axes = canvas(100, height)
    for row, (file, what) in enumerate(WAY):
        y = height - 6.5 - step * row
        axes.text(31, y + 3.2, what, ha="left", va="center", fontsize=14)
        if file:
            axes.text(27, y + 6.2, file, ha="right", va="center", fontsize=13, family="monospace", color=BLUE)
            arrow(axes, (29, y + 9.2), (29, y + 3.4))
        _way_drawing(axes, row, y)
    return figure


def _way_drawing(axes: Axes, row: int, y: float) -> None:
    """What the value looks like after that many steps, left edge at 31, between y - 3 and y + 1."""
    turns = ((GREY, 13, "system"), (GREY, 13, "user"), (GREEN, 17, "assistant"))
    if row == 0:
        text = '{"question": "Name a tea.", "answer": "Sencha."}'
        axes.text(31, y - 0.7, text, ha="left", va="center", family="monospace", fontsize=13)
    elif row == 1:
        x = 31
        for colour, width, text in turns:
            box(axes, x, y - 2.6, width, 3.8, colour, text, fontsize=13)
            x += width + 1
    elif row == 2:
        tokens = (("<|im_start|>", 0, 12), ("ass", 0, 4.5), ("istant", 0, 7), ("⏎", 0, 3), ("Sen", 1, 5), ("cha", 1, 5),
                  (".", 1, 2.4), ("<|im_end|>", 1, 11), ("⏎", 0, 3))  # fmt: skip
        x = 31
        for text, trained, width in tokens:
            box(axes, x, y - 2.6, width, 3.8, GREEN if trained else GREY, text, fontsize=12)
            x += width + 0.5
    elif row == 3:
        x = 31
        for before, trained in ((8, 4), (5, 8), (11, 6), (6, 12)):
            for width, colour in ((before, GREY), (trained, GREEN)):
                axes.add_patch(Rectangle((x, y - 2.6), width, 3.8, facecolor=colour))
                x += width
            axes.plot((x, x), (y - 3.2, y + 1.8), color=TEXT, linewidth=2)
    elif row == 4:
        x = 31
        for before, trained in ((8, 4), (5, 8), (11, 6), (6, 12)):
            x += before
            axes.add_patch(Rectangle((x, y - 2.6), trained, 3.8, facecolor=GREEN))
            x += trained
    else:
        text = "loss  =  Σ  −log p(token)  /  N of all micro-batches, of all ranks"
        axes.text(31, y - 0.7, text, ha="left", va="center", fontsize=15)


# ---- documents end to end --------------------------------------------------------------------------------------------


def packing() -> pyplot.Figure:
    """Eight chats as a padded batch, and end to end. The lengths are an example; their sum and the padded size are of
    a step that bench/train_speed.py timed."""
    first = result("bench/results/train_speed.json")["short"]["runs"]["B0"][0]["rows"][0]
    tokens, computed = first["tokens"], first["computed"]
    longest = computed // 8
    shares = (0.29, 0.22, 0.17, 0.4, 0.12, 0.25, 0.5, 1)
    lengths = [longest * share for share in shares]
    rest = (tokens - longest) / sum(lengths[:-1])
    lengths = [round(length * rest) for length in lengths[:-1]] + [longest]
    figure, axes = canvas(100, 42)
    left, scale = 3, 94 / tokens
    padded = longest * scale
    for row, length in enumerate(lengths):
        y, width = 34 - 3 * row, length * scale
        axes.add_patch(Rectangle((left, y), width, 2.5, facecolor=BLUE if row % 2 else GREEN))
        axes.add_patch(
            Rectangle((left + width, y), padded - width, 2.5, fill=False, edgecolor=GREY, hatch="////", lw=0.6)
        )
    lost = f"{1 - tokens / computed:.0%} of the work is for nothing"
    text = f"padded on the right:\n\n{computed:,} positions for {tokens:,} tokens,\n{lost}"
    axes.text(left + padded + 5, 25, text, va="center", linespacing=1.5, fontsize=15)
    x = left
    for row, length in enumerate(lengths):
        axes.add_patch(Rectangle((x, 6.5), length * scale, 2.5, facecolor=BLUE if row % 2 else GREEN))
        x += length * scale
    text = f"end to end: {tokens:,} positions; attention stays within a document"
    axes.text(left, 3, text, va="center", fontsize=15)
    return figure


# ---- what is trained -------------------------------------------------------------------------------------------------


def preview() -> pyplot.Figure:
    """The preview that docs/data.md prints, as a terminal shows it, in colour."""
    shown = text_of("docs/data.md").split("\nexample 1 of 3", 1)[1].split("\n\n", 1)[0]
    READ["docs/data.md"] = shown.encode()  # the rest of the chapter may change
    lines = shown.split("\n")[1:]
    figure, axes = canvas(100, 5.2 * len(lines) + 5)
    character = 0.96
    for row, line in enumerate(lines):
        x, y = 1.0, 5.2 * (len(lines) - row) - 1
        for token in line[2:].split("│"):
            width = character * max(len(token), 1.4) + 0.5
            box(axes, x, y, width, 4, GREEN if line[0] == "+" else GREY, token, family="monospace", fontsize=11)
            x += width + 0.35
    axes.text(1, 1.6, "green: trained, the answer and its end of turn", ha="left", va="center", color=GREEN)
    axes.text(54, 1.6, "grey: context, read and not trained", ha="left", va="center", color=GREY)
    return figure


# ---- measured --------------------------------------------------------------------------------------------------------


def loss() -> pyplot.Figure:
    """Loss by step of an adapter and of every weight, the same rows in the same order."""
    figure, axes = pyplot.subplots(figsize=(10, 4.8), layout="constrained")
    for name, label, colour in (("lora-0.002", "LoRA, rank 16, rate 0.002", BLUE),
                                ("full-0.0002", "every weight, rate 0.0002", ORANGE)):  # fmt: skip
        run = result(f"experiments/full/results/{name}.json")["training"]
        axes.plot(range(1, run["steps"] + 1), run["losses"], color=colour, linewidth=2.2, label=label)
        held_out = [(row["step"], row["eval_loss"]) for row in run["evaluations"]]
        axes.plot(*zip(*held_out, strict=True), "o", color=colour, markersize=9, label="  … on rows held out")
    axes.set(yscale="log", xlabel="step of 8 rows", ylabel="loss, nats a trained token")
    axes.set_yticks([0.01, 0.03, 0.1, 0.3, 1, 3], ["0.01", "0.03", "0.1", "0.3", "1", "3"])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.legend()
    return figure


def frontier() -> pyplot.Figure:
    """What each run of experiments/persona learned against what it forgot."""
    persona = _module("experiments/persona/run.py")
    found = {
        path.stem: result(str(path.relative_to(ROOT)))
        for path in sorted((ROOT / "experiments/persona/results").glob("*.json"))
    }
    runs = [name for name, what in found.items() if "training" in what]
    for name in runs:
        found[name]["answers"] = [
            json.loads(line) for line in text_of(f"experiments/persona/results/{name}.jsonl").splitlines()
        ]
    forgotten = {name: persona.forgotten(found[name]) for name in runs}
    learned = {name: persona.percent(persona.of(found[name], "persona"), persona.is_persona) for name in runs}
    spilt = {name: persona.percent(persona.of(found[name], "unrelated"), persona.has_spilt) for name in runs}
    best = persona.frontier([(forgotten[name], learned[name], name) for name in runs])
    figure, axes = pyplot.subplots(figsize=(10, 5.6), layout="constrained")
    axes.plot([forgotten[n] for n in best], [learned[n] for n in best], ":", color=TEXT, linewidth=2)
    for colour, label, low, high in ((GREEN, "at most 5 % of unrelated questions get the persona", -1, 5),
                                     (ORANGE, "5 to 20 %", 5, 20), (RED, "over 20 %", 20, 101)):  # fmt: skip
        names = [name for name in runs if low < spilt[name] <= high]
        axes.scatter([forgotten[n] for n in names], [learned[n] for n in names], s=90, color=colour, label=label)
    names = {"v0": (-8, -22, "right"), "v1": (10, -4, "left"), "v2": (10, -4, "left"), "recipe": (-2, 9, "center"),
             "rank-1": (-8, 6, "right"), "chinese-1": (10, -4, "left"), "own-4": (10, -14, "left"),
             "stop-0.4": (10, -4, "left"), "written-1": (10, -14, "left")}  # fmt: skip
    for name, (x, y, side) in names.items():
        at = forgotten[name], learned[name]
        axes.annotate(name, at, (x, y), textcoords="offset points", ha=side, fontsize=13)
    axes.set(xlabel="forgotten: KL from the base on ordinary conversations, nats", ylim=(-5, 108))
    axes.set_ylabel("persona on unseen questions, %")
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    return figure


def speed() -> pyplot.Figure:
    """Tokens a second and peak memory beside PEFT and transformers."""
    measured = result("bench/results/train_speed.json")
    shown = {"short": "chats of 50–300\ntokens", "long": "answers of\n600–1,500", "full": "a document\nof 2,048"}
    sides = {"ours": ("this project", BLUE), "B1": ("PEFT, tuned", ORANGE), "B0": ("PEFT as people run it", GREY)}
    figure, both = pyplot.subplots(1, 2, figsize=(10, 5), layout="constrained")
    for axes, (key, label) in zip(both, (("tokens/s", "tokens a second"), ("peak GB", "peak memory, GB")), strict=True):
        for place, (side, (name, colour)) in enumerate(sides.items()):
            x = [at + 0.28 * (place - 1) for at in range(len(shown))]
            values = [measured[workload]["sides"][side][key] for workload in shown]
            bars = axes.bar(x, values, 0.26, color=colour, label=name)
            axes.bar_label(
                bars, [f"{v:.0f}" if v > 20 else f"{v:.1f}" for v in values], color=TEXT, fontsize=12, padding=2
            )
        axes.set_xticks(range(len(shown)), shown.values(), fontsize=12)
        axes.set_title(label, color=TEXT, fontsize=15)
        axes.margins(y=0.12)
        axes.grid(axis="y")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def where() -> pyplot.Figure:
    """Where a step's time and memory go, a bar a part, for each kind of CPU that was measured."""
    measured = result("bench/results/where.json")
    figure, panels = pyplot.subplots(
        len(measured), 2, figsize=(12, 4.6 * len(measured)), layout="constrained", squeeze=False
    )
    for row, (kind, found) in zip(panels, measured.items(), strict=True):
        for axes, key, colour, title in zip(
            row, ("time", "memory"), (BLUE, ORANGE), ("time", "memory at the peak"), strict=True
        ):
            parts = {name: value for name, value in found[key].items() if value >= 0.005 * sum(found[key].values())}
            shares = [100 * value / sum(found[key].values()) for value in parts.values()]
            bars = axes.barh(range(len(parts)), shares, color=colour)
            axes.bar_label(bars, [f"{share:.0f} %" for share in shares], color=TEXT, fontsize=12, padding=3)
            axes.set_yticks(range(len(parts)), parts, fontsize=12)
            axes.invert_yaxis()
            axes.set_title(f"{title}, {kind}", color=TEXT, fontsize=15)
            axes.set_xticks([])
            axes.margins(x=0.12)
    return figure


def _module(path: str):
    """A script of the repository as a module."""
    sys.path.insert(0, str((ROOT / path).parent.parent))
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PICTURES: dict[str, Callable[[], pyplot.Figure]] = {
    f"{draw.__name__}.svg": draw for draw in (lora, way, packing, preview, loss, frontier, speed, where)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the pictures [docs]")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in PICTURES.items():
            READ.clear()
            figure = draw()
            metadata = {"Date": None, "Creator": None, "Source": source()}
            figure.savefig(out / name, transparent=True, metadata=metadata)
            pyplot.close(figure)
            print(out / name)


if __name__ == "__main__":
    main()
