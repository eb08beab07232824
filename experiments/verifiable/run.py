"""A reward that a program can verify: GRPO on right products alone, from an adapter that has some of them right.

python experiments/verifiable/run.py            from nothing to the figures, in parts; a second start goes on
python experiments/verifiable/run.py --figures  tables and picture again, from results/
"""

import sys
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parts import Experiment, ask, by_step, command, question, train
from show import percent, picture, share, table, thirds, verdicts
from sums import ROOM, right

from data_gen import multiply
from lora import files

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
FAST_SEEDS, FAST_STEPS, FAST = (0, 1), 16, ("--lr", 2e-4, "--patience", 7)
ROWS = 1200  # that the start is trained on; a checkpoint of it is where reinforcement starts
CHECKPOINTS = (40, 50, 60, 70, 80, 100)  # of the start, tried on TRIED pairs
START = 70
TRIED, UNSEEN = 60, 100  # unseen pairs
STEPS, PROMPTS = 12, 4  # of reinforcement
WINDOW = 5  # steps, of the curves' running mean
WAYS = {"greedy": "the likeliest answer", "sampled": "sampled at temperature 1"}
FIGURES = ("reward", "no_signal", "entropy", "length", "ended", "seconds")


# ---- data ------------------------------------------------------------------------------------------------------------


def start_rows() -> Path:
    path = experiment.scratch / "start.jsonl"
    if not path.exists():
        command("data_gen/multiply.py", "--digits", 2, "--rows", ROWS, "--style", "terse", "--out", path)
    return path


def later_pairs(steps: int = STEPS) -> list[tuple[int, int]]:
    """Pairs that the start has not seen, nor any step before."""
    return multiply.pairs(2, ROWS + steps * PROMPTS)[ROWS:]


def prompts(steps: int) -> Path:
    path = experiment.scratch / ("prompts.jsonl" if steps == STEPS else f"prompts-{steps}.jsonl")
    files.write_rows(path, ({"prompt": multiply.question(a, b, "en")} for a, b in later_pairs(steps)))
    return path


def solved() -> Path:
    path = experiment.scratch / "solved.jsonl"
    asked = ((multiply.question(a, b, "en"), multiply.solve(a, b, "terse", "en")) for a, b in later_pairs())
    files.write_rows(path, ({"prompt": q, "completion": answer} for q, answer in asked))
    return path


# ---- parts -----------------------------------------------------------------------------------------------------------


def start(scratch: Path) -> dict:
    start_rows()
    return {"training": train(scratch / "adapter", "--config", HERE / "start.toml")}


def tried(scratch: Path) -> dict:
    """Which checkpoint of it has how many right."""
    found = []
    for step in CHECKPOINTS:
        answers = answered(scratch, first().with_name(f"{step:06}"), "greedy", TRIED)
        found += [{"step": step} | row for row in answers]
    return {"answers": found}


def first() -> Path:
    return experiment.scratch / "start" / "adapter" / "checkpoints" / f"{START:06}"


def before(scratch: Path) -> dict:
    return {"answers": measure(scratch, first(), *SEEDS)}


def reinforce(seed: int, steps: int, words: tuple, scratch: Path) -> dict:
    adapter, data = scratch / "adapter", prompts(steps)
    begin = ("--config", HERE / "recipe.toml", "--init-adapter", first(), "--seed", seed)
    words = (*words, "--data", data) if words else ()
    return {
        "training": train(adapter, *begin, *words),
        "by_step": by_step(adapter, *FIGURES),
        "answers": measure(scratch, adapter, seed),
    }


def imitate(scratch: Path) -> dict:
    """What it costs and brings to show the worked answers to the same questions instead."""
    adapter = scratch / "adapter"
    words = ("--data", solved(), "--config", HERE / "imitate.toml", "--init-adapter", first())
    return {
        "training": train(adapter, *words),
        "by_step": by_step(adapter, "seconds"),
        "answers": measure(scratch, adapter, 0),
    }


def measure(scratch: Path, adapter: Path, *seeds: int) -> list[dict]:
    """Answers to unseen pairs: the likeliest, and one drawn with each seed."""
    found = answered(scratch, adapter, "greedy", UNSEEN)
    for seed in seeds:
        found += answered(scratch, adapter, "sampled", UNSEEN, "--temperature", 1, "--seed", 1000 * seed)
    return found


def answered(scratch: Path, adapter: Path, way: str, count: int, *words: object) -> list[dict]:
    pairs = multiply.pairs(2, count, held_out=True)
    asked = [question(multiply.question(a, b, "en")) for a, b in pairs]
    texts = ask(scratch, asked, adapter, "--max-new-tokens", ROOM, "--batch-size", TRIED, *words)
    return [{"way": way, "a": a, "b": b, "prediction": text} for (a, b), text in zip(pairs, texts, strict=True)]


# ---- scores ----------------------------------------------------------------------------------------------------------


def of(found: dict, way: str) -> list[dict]:
    return [row for row in found["answers"] if row["way"] == way]


def fault(row: dict) -> multiply.Fault | None:
    """The first wrong line of the work."""
    return multiply.check(row["a"], row["b"], row["prediction"].strip(), "terse", "en")


def states(row: dict) -> bool:
    """Its last line is of the form of a result, right or wrong."""
    return multiply.final(row["prediction"]) is not None


def in_form(row: dict) -> bool:
    """It states a result, and no line before the first wrong one is out of form."""
    return states(row) and (fault(row) or NO_FAULT).kind != "format"


def proved(row: dict) -> bool:
    """Right in every line."""
    return fault(row) is None


NO_FAULT = multiply.Fault(0, "", "")


def seconds_a_step(found: dict) -> float:
    seconds = [0.0, *found["by_step"]["seconds"]]
    return median(b - a for a, b in pairwise(seconds))


# ---- tables and picture ----------------------------------------------------------------------------------------------


ARMS_HEAD = (
    "",
    *(f"{what}, {way}" for what in ("right", "every line right", "states a result") for way in WAYS),
    "forgotten, nats",
    "loss on ordinary conversations",
)
THIRDS = ("first", "second", "last")
COURSE_HEAD = (
    "",
    *(f"right, {third} third" for third in THIRDS),
    *(f"groups with a signal, {third} third" for third in THIRDS),
    "entropy, nats a token, first → last third",
    "tokens an answer",
    "answers that end",
    "seconds a step",
)


def show(found: dict[str, dict]) -> dict[str, list[str]]:
    seeds = {name: found[name] for seed in SEEDS if (name := f"grpo-{seed}") in found}
    fast = {name: found[name] for seed in FAST_SEEDS if (name := f"fast-{seed}") in found}
    if seeds:
        draw(found, seeds, fast)
    return {
        "summary": claims(found),
        "start": table(START_HEAD, start_lines(found["tried"]) if "tried" in found else []),
        "arms": table(ARMS_HEAD, arms(found, seeds, fast)),
        "course": table(COURSE_HEAD, [[f"`{name}`", *course(f["by_step"])] for name, f in {**seeds, **fast}.items()]),
        "faults": table(FAULTS_HEAD, faults(found, {**seeds, **fast})),
    }


START_HEAD = ("rows seen", "right", "every line right", "states a result")


def start_lines(found: dict) -> list[list]:
    lines = []
    for step in CHECKPOINTS:
        rows = [row for row in found["answers"] if row["step"] == step]
        name = f"**{8 * step}**" if step == START else f"{8 * step}"
        lines.append([name, *(share(rows, good) for good in (right, proved, states))])
    return lines


def arms(found: dict[str, dict], seeds: dict[str, dict], fast: dict[str, dict]) -> list[list]:
    lines = []
    if "before" in found:
        known = next(iter(seeds.values()), None)
        cost = tuple(known["training"]["evaluations"][0].get(key) for key in COST) if known else (None, None)
        lines.append(["before", *answers_of(found["before"]), *costs(*cost)])
    for name, f in seeds.items():
        lines.append([f"`{name}`: {f['training']['steps']} steps of GRPO", *answers_of(f), *costs(*at_end(f))])
    if len(seeds) > 1:
        every = {"answers": [row for f in seeds.values() for row in f["answers"]]}
        cost = [mean(values) for values in zip(*map(at_end, seeds.values()), strict=True)]
        lines.append([f"all {len(seeds)} seeds", *answers_of(every), *costs(*cost)])
    for name, f in fast.items():
        steps = f["training"]["steps"]
        lines.append([f"`{name}`: {steps} steps at four times the rate", *answers_of(f), *costs(*at_end(f))])
    if "imitate" in found:
        f = found["imitate"]
        steps = f["training"]["steps"]
        lines.append([f"`imitate`: {steps} steps of imitation instead", *answers_of(f), *costs(*at_end(f))])
    return lines


COST = ("retention_kl", "retention_loss")


def at_end(found: dict) -> tuple[float | None, float | None]:
    """What was forgotten by the last step; None where a run was stopped before it was measured."""
    training = found["training"]
    last = training["evaluations"][-1]
    return tuple(last[key] if last["step"] == training["steps"] else None for key in COST)


def costs(forgotten: float | None, loss: float | None) -> tuple[str, str]:
    return (f"{forgotten:.3f}", f"{loss:.2f}") if forgotten is not None else ("-", "-")


def answers_of(found: dict) -> list[str]:
    return [share(of(found, way), good) for good in (right, proved, states) for way in WAYS]


def course(by_step: dict[str, list[float]]) -> list[str]:
    entropy = thirds(by_step["entropy"])
    return [
        *(f"{value:.0%}" for value in thirds(by_step["reward"])),
        *(f"{1 - value:.0%}" for value in thirds(by_step["no_signal"])),
        f"{entropy[0]:.3f} → {entropy[-1]:.3f}",
        f"{mean(by_step['length']):.0f}",
        f"{mean(by_step['ended']):.1%}",
        f"{seconds_a_step({'by_step': by_step}):.0f}",
    ]


KINDS = ("format", "split", "product", "addition", "carry", "result", "final")
FAULTS_HEAD = ("answers whose first wrong line is one of", *KINDS, "none is wrong")


def faults(found: dict[str, dict], seeds: dict[str, dict]) -> list[list]:
    arms = {"before": found["before"]} if "before" in found else {}
    lines = []
    for name, f in {**arms, **seeds}.items():
        for way in WAYS:
            rows = of(f, way)
            kinds = Counter(first.kind if (first := fault(row)) else None for row in rows)
            counts = (f"{100 * kinds[kind] / len(rows):.0f} %" for kind in (*KINDS, None))
            lines.append([f"{name}, {way}", *counts])
    return lines


def claims(found: dict[str, dict]) -> list[str]:
    names = [f"grpo-{seed}" for seed in SEEDS]

    def both(tell) -> str:
        return "; ".join(f"{way} {tell(way)}" for way in WAYS)

    def rate(f: dict, way: str, good=right) -> float:
        return percent(of(f, way), good)

    def gain(good=right):
        def tell(way: str) -> str:
            after = ", ".join(f"{rate(found[name], way, good):.0f}" for name in names)
            return f"{rate(found['before'], way, good):.0f} % → {after} %"

        return both(tell)

    def signal() -> str:
        shares = (1 - mean(found[name]["by_step"]["no_signal"]) for name in names)
        return "groups with a signal: " + ", ".join(f"{share:.0%}" for share in shares)

    def cost() -> str:
        start = found[names[0]]["training"]["evaluations"][0]["retention_kl"]
        after = ", ".join(f"{at_end(found[name])[0]:.3f}" for name in names)
        return (
            f"forgotten {start:.3f} → {after} nats; by imitation of as many questions {at_end(found['imitate'])[0]:.3f}"
        )

    return verdicts(
        HERE,
        {
            "right": lambda: f"right on unseen pairs, {gain()}",
            "format": lambda: f"states a result, {gain(states)}; every line right, {gain(proved)}",
            "signal": signal,
            "forgets": cost,
        },
    )


def running(values: list[float]) -> list[float]:
    return [mean(values[max(0, at - WINDOW + 1) : at + 1]) for at in range(len(values))]


def draw(found: dict[str, dict], seeds: dict[str, dict], fast: dict[str, dict]) -> None:
    with picture(HERE / "course.png", (11, 4.2), ncols=3, layout="constrained") as (rewards, signals, after):
        for name, f in {**seeds, **fast}.items():
            line = "--" if name in fast else "-"
            steps = range(1, len(f["by_step"]["reward"]) + 1)
            rewards.plot(steps, [100 * value for value in running(f["by_step"]["reward"])], line, label=name)
            signals.plot(steps, [100 * (1 - value) for value in running(f["by_step"]["no_signal"])], line, label=name)
        rewards.set(xlabel="step", ylabel="right answers of a step, %", ylim=(0, 100))
        signals.set(xlabel=f"step; running mean of {WINDOW}", ylabel="groups with a signal, %", ylim=(0, 104))
        rewards.legend(fontsize=8)
        bars = {name: f for name, f in found.items() if name in ("before", *seeds, *fast, "imitate")}
        for shift, way in ((-0.2, "greedy"), (0.2, "sampled")):
            heights = [percent(of(f, way), right) for f in bars.values()]
            drawn = after.bar([at + shift for at in range(len(bars))], heights, 0.38, label=WAYS[way])
            after.bar_label(drawn, fmt="%.0f", fontsize=7)
        after.set_xticks(range(len(bars)), bars, rotation=30, fontsize=8)
        after.set(ylabel="right on unseen pairs, %", ylim=(0, 100))
        after.legend(fontsize=8)


experiment = Experiment(__file__, __doc__, show)
experiment.add("start", start, leaves="adapter")
experiment.add("tried", tried, "start")
experiment.add("before", before, "start")
for seed in SEEDS:
    experiment.add(f"grpo-{seed}", partial(reinforce, seed, STEPS, ()), "start")
for seed in FAST_SEEDS:
    experiment.add(f"fast-{seed}", partial(reinforce, seed, FAST_STEPS, FAST), "start")
experiment.add("imitate", imitate, "start")

if __name__ == "__main__":
    sys.exit(experiment.main())
