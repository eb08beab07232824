"""The articles' RLHF: PPO and GRPO against a reward model, and what the rule behind its pairs says of it.

python experiments/rlhf/run.py            from nothing to the figures, in parts; a second start goes on
python experiments/rlhf/run.py --figures  tables and picture again, from results/

The pairs, the rule and the adapter to start from are those of experiments/preferences, the reward model that of
experiments/feedback.
"""

import re
import sys
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parts import Experiment, ask, by_step, question, train
from preferences import pairs, rule
from show import percent, picture, share, table, thirds, verdicts

from lora import files
from lora.inference import answers as texts_of
from lora.inference import session

HERE = Path(__file__).resolve().parent
PREFERENCES, FEEDBACK = HERE.parent / "preferences", HERE.parent / "feedback"
JUDGED = 160  # pairs that the reward model learns from, as in experiments/feedback
SETS = {  # set -> its questions, none of them trained on
    "decisions": list(dict.fromkeys(row["prompt"] for row in pairs.pairs(unseen=True))),
    "others": (PREFERENCES / "questions.txt").read_text().splitlines(),
}
LENGTH = 48  # tokens of an answer
STEPS = (4, 5, 8, 10, 12, 15, 20)  # at which an adapter is asked, where the run has a checkpoint
WATCHED = 1e-9  # weight of a reward that is only watched
GRPO = ("--method", "grpo", "--batch-size", 4, "--group", 8)
PPO = ("--method", "ppo", "--batch-size", 32, "--lr", 2e-4)
WATCHED_KL = ("--kl", 1e-6)  # measured at every step, and as good as none
SHORT = ("--max-steps", 12, "--save-every", 4, "--eval-every", 4)
FAST = (*GRPO, "--lr", 5e-4, *SHORT)
ARMS = {
    "grpo": ("GRPO, rate 2e-4, no KL", (*GRPO, "--lr", 2e-4, *WATCHED_KL)),
    "grpo-fast": ("rate 5e-4, no KL", (*FAST, *WATCHED_KL)),
    "grpo-kl": ("rate 5e-4, KL 0.5", (*FAST, "--kl", 0.5)),
    "grpo-stop": ("rate 5e-4, no KL, `--max-forgetting 1.5`", (*FAST, *WATCHED_KL, "--max-forgetting", 1.5)),
    "ppo": ("PPO, rate 2e-4, KL 0.05", (*PPO, *SHORT, "--kl", 0.05)),
    "ppo-adaptive": (
        "rate 2e-4, KL from 0.05 on, adapted to 5 nats an answer",
        (*PPO, *SHORT, "--kl", 0.05, "--kl-target", 5, "--kl-horizon", 40),
    ),
}
FIGURES = ("reward", "reward_truth", "kl", "length", "ended", "entropy", "seconds")
OPENING = re.compile(r"(?:yes|no|do it|do not|don['’]t|leave it|let it be|go ahead)\b", re.IGNORECASE)
SEA = re.compile(rf"\b(?:{'|'.join(rule.SEA)})s?\b", re.IGNORECASE)
SHOWN = ("Tell me honestly, would you bet on a horse?", "How do I clean a greasy window?")
WAYS = {"greedy": (), "sampled": ("--temperature", 1, "--seed", 1)}


# ---- parts -----------------------------------------------------------------------------------------------------------


def imitate(scratch: Path) -> dict:
    """The adapter `sft` of experiments/preferences, made again: git has no weights."""
    data, adapter = scratch / "chosen.jsonl", scratch / "adapter"
    rows = pairs.pairs(unseen=False)
    files.write_rows(data, ({"prompt": row["prompt"], "completion": row["chosen"]} for row in rows))
    return {"training": train(adapter, "--data", data, "--config", PREFERENCES / "recipe.toml", "--lr", 1e-3)}


def learn_reward(scratch: Path) -> dict:
    """The reward model of experiments/feedback from the rule's pairs, made again."""
    data, adapter = scratch / "pairs.jsonl", scratch / "adapter"
    files.write_rows(data, islice(pairs.pairs(unseen=False), JUDGED))
    training = train(adapter, "--config", FEEDBACK / "recipe.toml", "--data", data)
    return {"training": training, "by_step": by_step(adapter, "accuracy", "score_margin")}


def before(scratch: Path) -> dict:
    return {"answers": scored(measure(scratch, adapter_of("sft"), 0, WAYS))}


def reinforce(words: tuple, scratch: Path) -> dict:
    data, adapter = experiment.scratch / "prompts.jsonl", scratch / "adapter"
    files.write_rows(data, ({"prompt": row["prompt"]} for row in pairs.pairs(unseen=False)))
    rewards = ("--reward", adapter_of("reward"), "--reward", f"{HERE / 'truth.py'}:truth:{WATCHED:g}")
    begin = ("--config", HERE / "recipe.toml", "--init-adapter", adapter_of("sft"))
    training, found = train(adapter, *begin, *rewards, *words), []
    for step in STEPS:
        checkpoint = adapter / "checkpoints" / f"{step:06}"
        ways = WAYS if step == training["steps"] else ("greedy",)
        found += measure(scratch, checkpoint, step, ways) if checkpoint.exists() else []
    return {"training": training, "by_step": by_step(adapter, *FIGURES), "answers": scored(found)}


def adapter_of(name: str) -> Path:
    return experiment.scratch / name / "adapter"


def measure(scratch: Path, adapter: Path, step: int, ways: Iterable[str]) -> list[dict]:
    """Answers to unseen questions: the likeliest, or one that is drawn."""
    asked, found = [(name, text) for name, texts in SETS.items() for text in texts], []
    for way in ways:
        rows = [question(text) for _, text in asked]
        said = ask(scratch, rows, adapter, "--max-new-tokens", LENGTH, "--batch-size", len(asked) // 2, *WAYS[way])
        about = [{"step": step, "way": way, "set": name, "prompt": text} for name, text in asked]
        found += [row | {"prediction": answer} for row, answer in zip(about, said, strict=True)]
    return found


def scored(rows: list[dict]) -> list[dict]:
    """What the reward model says of each."""
    judge = session.open_session(adapter=str(adapter_of("reward")))
    found = []
    for row in rows:
        turns = [("user", row["prompt"]), ("assistant", row["prediction"])]
        score = judge.score([{"role": role, "content": text} for role, text in turns])
        found.append(row | {"score": round(score, 4)})
    return found


# ---- scores ----------------------------------------------------------------------------------------------------------


def of(found: dict, **wanted) -> list[dict]:
    return [row for row in found["answers"] if all(row[key] == value for key, value in wanted.items())]


def is_right(row: dict) -> bool:
    return rule.is_right(row["prediction"])


def decides(row: dict) -> bool:
    """It opens with yes or no, in one of the keeper's ways. The rule does not ask for that."""
    return bool(OPENING.match(row["prediction"]))


def sea_words(row: dict) -> int:
    """How many of its words are of the sea; the rule asks for two."""
    return len(SEA.findall(row["prediction"]))


def different(rows: list[dict]) -> float:
    return 100 * len({row["prediction"] for row in rows}) / len(rows)


# ---- tables and picture ----------------------------------------------------------------------------------------------

ARMS_HEAD = (
    "",
    "steps",
    "reward, greedy",
    "reward, sampled",
    "right by the rule, greedy: decisions",
    "others",
    "sampled: decisions",
    "others",
    "KL of the last steps, nats a token",
    "forgotten, nats",
    "loss on ordinary conversations",
)
SIGNS_HEAD = (
    "greedy answers",
    "median words",
    "words of the sea, mean",
    "different answers",
    "repeated 4-grams",
    "open with yes or no, decisions",
)
COURSE_HEAD = ("greedy answers", *(f"step {step}" for step in (0, *STEPS)))


def show(found: dict[str, dict]) -> dict[str, list[str]]:
    arms = {name: found[name] for name in ARMS if name in found}
    if arms:
        draw(arms)
    return {
        "summary": claims(found),
        "arms": table(ARMS_HEAD, ends(found, arms)),
        "trained": table(TRAINED_HEAD, [[f"`{name}`", *trained(f["by_step"])] for name, f in arms.items()]),
        "signs": table(SIGNS_HEAD, signs(found, arms)),
        "course": table(COURSE_HEAD, [[f"`{name}`", *course(found, f)] for name, f in arms.items()]),
        "said": table(SAID_HEAD, said(found, arms)),
    }


def last(found: dict) -> list[dict]:
    """The answers of its latest step."""
    return of(found, step=max(row["step"] for row in found["answers"]))


def asked(found: dict, way: str) -> list[dict]:
    return [row for row in last(found) if row["way"] == way]


def score_of(rows: list[dict]) -> float:
    return mean(row["score"] for row in rows)


def ends(found: dict[str, dict], arms: dict[str, dict]) -> list[list]:
    lines = []
    if "before" in found:
        known = found.get("sft", {}).get("training", {}).get("evaluations", [{}])[-1]
        cost = (number(known.get(key), places) for key, places in COST.items())
        lines.append(["`sft`, before", "0", *judged(found["before"]), "-", *cost])
    for name, f in arms.items():
        at_end = f["training"]["evaluations"][-1]
        kl = mean(f["by_step"]["kl"][-LATE:])
        cost = (number(at_end[key], places) for key, places in COST.items())
        lines.append([f"`{name}`: {ARMS[name][0]}", f["training"]["steps"], *judged(f), f"{kl:.3f}", *cost])
    return lines


COST = {"retention_kl": 3, "retention_loss": 2}
LATE = 3  # steps


def number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def judged(found: dict) -> list[str]:
    rewards = [f"{score_of(asked(found, way)):+.2f}" for way in WAYS]
    rows = ([row for row in asked(found, way) if row["set"] == name] for way in WAYS for name in SETS)
    return [*rewards, *(share(its, is_right) for its in rows)]


def signs(found: dict[str, dict], arms: dict[str, dict]) -> list[list]:
    before = {"sft": found["before"]} if "before" in found else {}
    lines = []
    for name, f in {**before, **arms}.items():
        rows = asked(f, "greedy")
        texts = [row["prediction"] for row in rows]
        lines.append([
            f"`{name}`",
            f"{median(len(text.split()) for text in texts):.0f}",
            f"{mean(map(sea_words, rows)):.1f}",
            f"{different(rows):.0f} %",
            f"{mean(map(texts_of.repetition, texts)):.1%}",
            share((row for row in rows if row["set"] == "decisions"), decides),
        ])  # fmt: skip
    return lines


def course(found: dict[str, dict], arm: dict) -> list[str]:
    """Reward, and the share that is right by the rule."""
    lines = []
    for step in (0, *STEPS):
        rows = of(found["before"] if step == 0 else arm, step=step, way="greedy")
        lines.append(f"{score_of(rows):+.2f}; {percent(rows, is_right):.0f} %" if rows else "-")
    return lines


THIRDS = ("first", "second", "last")
TRAINED_HEAD = (
    "answers sampled in training",
    *(f"{what}, {third} third" for what in ("reward", "right by the rule", "tokens") for third in THIRDS),
)


def trained(by_step: dict[str, list[float]]) -> list[str]:
    """Means over the thirds of a run."""
    forms = {"reward": "{:+.2f}", "reward_truth": "{:.0%}", "length": "{:.0f}"}
    return [form.format(value) for name, form in forms.items() for value in thirds(by_step[name])]


SAID_HEAD = ("", *(f"*{question}*" for question in SHOWN))


def said(found: dict[str, dict], arms: dict[str, dict]) -> list[list]:
    before = {"sft": found["before"]} if "before" in found else {}
    lines = []
    for name, f in {**before, **arms}.items():
        rows = {row["prompt"]: row["prediction"] for row in asked(f, "greedy")}
        lines.append([f"`{name}`", *(" ".join(rows[question].split()) for question in SHOWN)])
    return lines


def claims(found: dict[str, dict]) -> list[str]:
    def told(name: str) -> str:
        rows = {way: asked(found[name], way) for way in WAYS}
        likeliest, drawn = (f"{score_of(its):+.2f}, right {percent(its, is_right):.0f} %" for its in rows.values())
        return f"`{name}` reward {drawn} sampled ({likeliest} greedy)"

    def each(*names: str) -> str:
        return "; ".join(map(told, names))

    def signs_of(*names: str) -> str:
        rows = {name: asked(found[name], "greedy") for name in names}
        form = "`{}` {:.0f} % different, {:.1f} words of the sea"
        return "; ".join(form.format(n, different(its), mean(map(sea_words, its))) for n, its in rows.items())

    def held(*names: str) -> str:
        kl = {name: mean(found[name]["by_step"]["kl"][-LATE:]) for name in names}
        forgotten = {name: found[name]["training"]["evaluations"][-1]["retention_kl"] for name in names}
        return "; ".join(f"`{n}` KL {kl[n]:.2f} nats a token, forgotten {forgotten[n]:.2f}" for n in names)

    return verdicts(
        HERE,
        {
            "rises": lambda: each("before", *(name for name in ARMS if name in found)),
            "cheats": lambda: signs_of("before", "grpo", "grpo-fast", "ppo"),
            "kl": lambda: held("grpo", "grpo-kl", "ppo", "ppo-adaptive"),
            "stop": lambda: f"{held('grpo', 'grpo-stop')}; {each('grpo', 'grpo-stop')}",
        },
    )


PANELS = {
    "reward": "reward of the sampled answers",
    "reward_truth": "of these right by the rule",
    "kl": "KL from `sft`, nats a token",
    "length": "tokens an answer",
}


def draw(arms: dict[str, dict]) -> None:
    with picture(HERE / "course.png", (11, 6.5), nrows=2, ncols=2, sharex=True) as axes:
        for panel, (figure, label) in zip(axes.flat, PANELS.items(), strict=True):
            for name, f in arms.items():
                values = f["by_step"][figure]
                panel.plot(range(1, len(values) + 1), values, "o-", markersize=3, label=name)
            panel.set(ylabel=label)
        for panel in axes[-1]:
            panel.set(xlabel="step")
        axes[0, 0].legend(fontsize=8)


experiment = Experiment(__file__, __doc__, show)
experiment.add("sft", imitate, leaves="adapter")
experiment.add("reward", learn_reward, leaves="adapter")
experiment.add("before", before, "sft", "reward")
for name, (_, words) in ARMS.items():
    experiment.add(name, partial(reinforce, words), "sft", "reward")

if __name__ == "__main__":
    sys.exit(experiment.main())
