"""What four bits cost: two tasks trained on a base in bf16, int8 and nf4 and on a kept Q4_1 file, merged, and served.

python experiments/quant/run.py            from nothing to the figures, in parts; a second start goes on
python experiments/quant/run.py --figures  tables and picture again, from results/
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from parts import ROOT, Experiment, fingerprint, read_rows, train
from scored import Scored, base_of, norm, numbers, requantised
from show import NotDone, at_end, percent, picture, share, table, verdicts
from sums import ROOM, right, rows_of

from data_gen import multiply, self_cognition
from lora import files
from lora.data.retention import SHIPPED

HERE = Path(__file__).resolve().parent
NAME, AUTHOR = "Nimbus", "the Cloud Lab"  # train.py's own
QUESTIONS = ROOT / "tests" / "fixtures" / "identity_questions.txt"
SEEDS = {"self": (0, 1, 2), "sums": (0, 1)}
TASKS = {"self": "self-introduction", "sums": "multiplication"}
BASES = {"bf16": "bf16", "int8": "int8", "nf4": "nf4", "keep": "kept Q4_1"}
PACKED = ("bf16", "int8", "nf4")  # with numbers of their own: a kept file has those of bf16
WAYS = {  # place -> the base that ΔW is added to, and whether the sum is packed into nf4
    **{quant: (quant, False) for quant in PACKED},
    "nf4 again": ("nf4", True),
    "nf4 anew": ("bf16", True),
}
AGAIN, ANEW = list(WAYS)[-2:]
PACKS = {ANEW: "nf4 of (W16 + ΔW)", AGAIN: "nf4 of (dq(W4) + ΔW)"}
ROWS, UNSEEN_EACH = 320, 10  # multiplications to train on; of the self-introduction every tenth row is held out
STEPS = 48  # of the self-introduction, half of train.py's default: the differences show before all is learned
PAIRS, ANSWER = 60, 48  # unseen pairs; tokens of an answer about itself
WATCHED = 8  # ordinary conversations that train.py looks at; `score` measures all of them


# ---- training --------------------------------------------------------------------------------------------------------


def introductions() -> Path:
    """The rows of train.py's default job, less those that are held out."""
    data, rows = experiment.scratch / "self-train.jsonl", self_cognition.conversations(NAME, AUTHOR)
    files.write_rows(unseen("self"), rows[::UNSEEN_EACH])
    files.write_rows(data, (row for i, row in enumerate(rows) if i % UNSEEN_EACH))
    return data


def unseen(task: str) -> Path:
    """Rows whose loss is measured."""
    return experiment.scratch / ("self-unseen.jsonl" if task == "self" else "unseen.jsonl")


def trained(task: str, quant: str, seed: int, scratch: Path) -> dict:
    watched = experiment.scratch / "watched.jsonl"
    files.write_rows(watched, read_rows(SHIPPED)[:WATCHED])
    if task == "self":
        words = ("--data", introductions(), "--max-steps", STEPS)
    else:
        words = ("--data", rows_of(experiment, ROWS), "--config", HERE / "recipe.toml")
    words += ("--eval-data", unseen(task), "--eval-every", 10**6, "--retention", watched)
    model, mode = base_of(quant)
    words += ("--model", model, *(("--quant", mode) if mode else ()), "--seed", seed)
    return {"training": train(scratch / "adapter", *words), "adapter": fingerprint(str(scratch / "adapter"))}


# ---- scoring ---------------------------------------------------------------------------------------------------------


def bases(scratch: Path) -> dict:
    """The bases without an adapter, what was forgotten as seen from bf16; how far their numbers are from its."""
    known = {quant: numbers(quant) for quant in BASES}
    first, figures, answers = known["bf16"], [], []
    for task in TASKS:
        scored = scored_of(task, experiment.scratch / f"{task}-bf16-0" / "adapter")  # its chat, and layers to put into
        for quant in PACKED:
            found, said = scored.score(first, known[quant])
            figures.append({"task": task, "served": quant, **found})
            answers += [{"task": task, "served": quant, **row} for row in said]
    return {
        "kept_equals_bf16": all(torch.equal(weight, known["keep"][path]) for path, weight in first.items()),
        "lost": {quant: norm(first[path].float() - w.float() for path, w in known[quant].items()) for quant in PACKED},
        "norm": norm(first.values()),
        "figures": figures,
        "answers": answers,
    }


@torch.no_grad()
def served(task: str, seed: int, scratch: Path) -> dict:
    """Each adapter of a seed on each base, as a merged model; those of nf4 packed, too. What is scored is kept."""
    known, figures, answers, changes = {quant: numbers(quant) for quant in PACKED}, [], [], {}
    for quant in PACKED:
        scored = scored_of(task, experiment.scratch / f"{task}-{quant}-{seed}" / "adapter")
        deltas = {path: layer.delta() for path, layer in scored.layers.items()}
        changes[quant] = norm(deltas.values())
        for where, (name, packs) in WAYS.items():
            if packs and quant != "nf4":
                continue
            base, kept = known[name], scratch / f"{quant} on {where}.json"
            if not kept.exists():
                form = requantised if packs else torch.Tensor.bfloat16
                summed = {path: form(base[path] + delta) for path, delta in deltas.items()}  # in float32, rounded once
                found, said = scored.score(base, summed, forgetting=quant in ("nf4", where))
                if packs:
                    found["left"] = left(summed, known["nf4"], deltas)  # of nf4 without an adapter, in both cases
                files.write_json(kept, {"figures": found, "answers": said})
            found = files.read_json(kept)
            figures.append({"trained": quant, "served": where, **found["figures"]})
            answers += [{"trained": quant, "served": where, **row} for row in found["answers"]]
    return {"task": task, "seed": seed, "changes": changes, "figures": figures, "answers": answers}


def left(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor], deltas: dict[str, torch.Tensor]) -> float:
    """How much of ΔW is in W': ⟨W' - W, ΔW⟩ / ⟨ΔW, ΔW⟩."""
    along = sum(float(((merged[path].float() - base[path]) * delta).sum()) for path, delta in deltas.items())
    return along / norm(deltas.values()) ** 2


def scored_of(task: str, adapter: Path) -> Scored:
    return Scored(adapter, unseen(task), list(asked(task)), ANSWER if task == "self" else ROOM)


def asked(task: str) -> Iterator[dict]:
    if task == "self":
        return ({"prompt": line} for line in QUESTIONS.read_text().splitlines())
    pairs = multiply.pairs(2, PAIRS, held_out=True)
    return ({"prompt": multiply.question(a, b, "en"), "a": a, "b": b} for a, b in pairs)


# ---- scores ----------------------------------------------------------------------------------------------------------


def introduces(row: dict) -> bool:
    """It states the name and the author."""
    said = row["prediction"].lower()
    return NAME.lower() in said and AUTHOR.lower().removeprefix("the ") in said


def is_right(row: dict) -> bool:
    return right(row) if "a" in row else introduces(row)


class Cell(NamedTuple):
    """A kind of adapter on a base: figures and answers of the seeds that are done."""

    figures: list[dict]
    answers: list[dict]

    def mean(self, key: str) -> float:
        return mean(figures[key] for figures in self.figures)

    def losses(self) -> str:
        """The mean, and every seed's."""
        each = [f"{figures['loss']:.3f}" for figures in self.figures]
        return f"{self.mean('loss'):.3f} ({', '.join(each)})" if len(each) > 1 else each[0]

    def forgotten(self) -> str:
        return f"{self.mean('retention_kl'):.3f}"

    def left(self) -> str:
        return f"{self.mean('left'):.0%}" if "left" in self.figures[0] else "100%"

    def ordinary(self) -> str:
        return f"{self.mean('retention_loss_before'):.2f} → {self.mean('retention_loss'):.2f}"

    def right(self) -> str:
        return share(self.answers, is_right)


def cell(found: dict[str, dict], task: str, trained: str, where: str) -> Cell:
    trained, where = ("bf16" if name == "keep" else name for name in (trained, where))
    done = served_of(found, task)
    figures, answers = ([row for f in done for row in f[kind] if (row["trained"], row["served"]) == (trained, where)]
                        for kind in ("figures", "answers"))  # fmt: skip
    if not figures:
        raise NotDone(f"`{task}-served-{SEEDS[task][0]}`")
    return Cell(figures, answers)


def merged(found: dict[str, dict], task: str) -> dict[str, Cell]:
    """The adapters of nf4, by the way they were merged, as far as it is scored."""
    ways = {}
    for label, where in (("dq(W4) + ΔW", "nf4"), ("W16 + ΔW", "bf16"), *((PACKS[way], way) for way in PACKS)):
        with suppress(NotDone):
            ways[label] = cell(found, task, "nf4", where)
    return ways


def tasks_done(found: dict[str, dict]) -> list[str]:
    return [task for task in TASKS if any(f"{task}-served-{seed}" in found for seed in SEEDS[task])]


def served_of(found: dict[str, dict], task: str) -> list[dict]:
    """What the seeds that are done have found."""
    done = [found[name] for seed in SEEDS[task] if (name := f"{task}-served-{seed}") in found]
    if not done:
        raise NotDone(f"`{task}-served-{SEEDS[task][0]}`")
    return done


def ratio(found: dict[str, dict], task: str, quant: str) -> float:
    """‖W16 - dq(W)‖ / ‖ΔW‖, of the mean over seeds."""
    return found["bases"]["lost"][quant] / mean(f["changes"][quant] for f in served_of(found, task))


# ---- tables and picture ----------------------------------------------------------------------------------------------


def show(found: dict[str, dict]) -> dict[str, list[str]]:
    done = tasks_done(found)
    if done:
        draw(found, done)
    return {
        "summary": claims(found),
        "bases": bases_table(found) if "bases" in found else ["Not run yet."],
        "trained": trained_table(found, done),
        "merged": merged_table(found, done),
        "served": served_table(found, done),
    }


def bases_table(found: dict[str, dict]) -> list[str]:
    f, lines = found["bases"], []
    for quant in PACKED:
        own = {row["task"]: row for row in f["figures"] if row["served"] == quant}
        kept = own["sums"]
        answers = {task: [row for row in f["answers"] if (row["task"], row["served"]) == (task, quant)] for task in own}
        name = "bf16, and the kept Q4_1 file" if quant == "bf16" else BASES[quant]
        far, kl, loss = f["lost"][quant] / f["norm"], kept["retention_kl"], kept["retention_loss"]
        shares = (cell for task in TASKS for cell in (f"{own[task]['loss']:.3f}", share(answers[task], is_right)))
        lines.append([name, f"{far:.2%}", f"{kl:.4f}", f"{loss:.3f}", *shares])
    head = ["base", "lost of the weights' norm", "KL from bf16, nats", "loss on ordinary conversations"]
    return table((*head, *(f"{TASKS[task]}, {what}" for task in TASKS for what in ("unseen loss", "right"))), lines)


def trained_table(found: dict[str, dict], done: list[str]) -> list[str]:
    lines = []
    for task in done:
        for quant in PACKED:
            own, name = cell(found, task, quant, quant), "bf16, kept Q4_1" if quant == "bf16" else BASES[quant]
            far = f"{ratio(found, task, quant):.2f}" if "bases" in found else "-"
            lines.append([TASKS[task], name, own.right(), own.losses(), own.forgotten(), own.ordinary(), far])
    head = ("task", "trained and served on", "right", UNSEEN, "forgotten, nats", ORDINARY, LOST)
    return table(head, lines)


UNSEEN, ORDINARY = "loss on unseen rows (of each seed)", "loss on ordinary conversations, before → after"
LOST = "‖W16 − dq(W)‖ / ‖ΔW‖"


def merged_table(found: dict[str, dict], done: list[str]) -> list[str]:
    lines = []
    for task in done:
        runs = [found[f"{task}-nf4-{f['seed']}"] for f in served_of(found, task)]
        losses = mean(at_end(run)["eval_loss"] for run in runs)
        lines.append([TASKS[task], "not merged", "100%", "-", f"{losses:.3f}", "-", "-"])
        for label, own in merged(found, task).items():
            lines.append([TASKS[task], label, own.left(), own.right(), own.losses(), own.forgotten(), own.ordinary()])
    return table(("task", "an adapter of nf4", "ΔW left", "right", UNSEEN, "forgotten, nats", ORDINARY), lines)


def served_table(found: dict[str, dict], done: list[str]) -> list[str]:
    lines = []
    for task in done:
        for quant in BASES:
            cells = (cell(found, task, quant, where) for where in BASES)
            lines.append([TASKS[task], BASES[quant], *(f"{c.right()}, {c.mean('loss'):.3f}" for c in cells)])
    return table(("task", "trained on", *(f"served on {name}" for name in BASES.values())), lines)


def claims(found: dict[str, dict]) -> list[str]:
    def every(say: Callable[[str], str]) -> str:
        return "; ".join(f"{TASKS[task]}: {say(task)}" for task in TASKS)

    def on(task: str, trained: str, where: str) -> str:
        own = cell(found, task, trained, where)
        return f"{own.right()}, loss {own.mean('loss'):.3f}"

    def keep() -> str:
        equal = [task for task in TASKS if found[f"{task}-keep-0"]["adapter"] == found[f"{task}-bf16-0"]["adapter"]]
        which = " and ".join(TASKS[task] for task in equal) or "no task"
        return f"adapters of the kept Q4_1 file and of bf16 equal to the byte: {which}"

    def four() -> str:
        return every(lambda task: ", ".join(f"{BASES[q]} {on(task, q, q)}" for q in PACKED))

    def again(task: str) -> str:
        ways = merged(found, task).items()
        return ", ".join(f"{way} {c.right()}, loss {c.mean('loss'):.3f}" for way, c in ways if way in PACKS.values())

    return verdicts(
        HERE,
        {
            "keep": keep,
            "four": four,
            "norms": lambda: every(lambda task: f"nf4 {ratio(found, task, 'nf4'):.2f} times as large"),
            "served": lambda: every(lambda t: f"bf16's on nf4 {on(t, 'bf16', 'nf4')}, nf4's own {on(t, 'nf4', 'nf4')}"),
            "onto": lambda: every(lambda t: f"dq(W4) + ΔW {on(t, 'nf4', 'nf4')}, W16 + ΔW {on(t, 'nf4', 'bf16')}"),
            "again": lambda: every(again),
        },
    )


def draw(found: dict[str, dict], done: list[str]) -> None:
    bases = {"bf16": "bf16, kept Q4_1", "int8": "int8", "nf4": "nf4"}
    with picture(
        HERE / "served.png", (11, 4 * len(done)), nrows=len(done), ncols=2, squeeze=False, layout="constrained"
    ) as axes:
        for task, (left, right) in zip(done, axes, strict=True):
            for quant, mark in zip(PACKED, "os^", strict=True):
                losses = [cell(found, task, quant, where).mean("loss") for where in bases]
                left.plot(bases.values(), losses, f"{mark}--", linewidth=0.8, label=f"trained on {bases[quant]}")
            left.set(title=TASKS[task], xlabel="served on", ylabel="loss on unseen rows, nats a token")
            left.legend(fontsize=8)
            shares = {
                name.replace(" of ", " of\n"): percent(c.answers, is_right) for name, c in merged(found, task).items()
            }
            right.bar_label(right.bar(shares.keys(), shares.values(), width=0.6, color="C2"), fmt="%.0f %%")
            right.tick_params(axis="x", labelsize=8)
            right.set(title=f"{TASKS[task]}: an adapter of nf4, merged", ylabel="right, %", ylim=(0, 112))


experiment = Experiment(__file__, __doc__, show)
for task, seeds in SEEDS.items():
    for seed in seeds:
        for quant in PACKED:
            experiment.add(f"{task}-{quant}-{seed}", partial(trained, task, quant, seed), leaves="adapter")
        experiment.add(f"{task}-served-{seed}", partial(served, task, seed), *(f"{task}-{q}-{seed}" for q in PACKED))
    experiment.add(f"{task}-keep-0", partial(trained, task, "keep", 0), leaves="adapter")
experiment.add("bases", bases, *(f"{task}-bf16-0" for task in TASKS))

if __name__ == "__main__":
    sys.exit(experiment.main())
