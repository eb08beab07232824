"""What a model is trained for. A method is a module that says three things; the loop, checkpoints, evaluation and ranks
do not know which one runs.

    KIND                        how rows become examples: one of `lora.data.encode.KINDS`
    loss(model, batch, args)    a batch's loss as (sum, count, figures); the sum is divided once, by the step's count
    FIGURES                     what is measured besides: name -> in words; `figures` are (sum, count) of each, by name

A method whose loss compares with the model of step 0 says so: `compares(args)`. One that needs to know all batches of
a step before the first gradient has `prepare(model, batches, args, total, carried)`, which returns those that are
trained; `carried` are numbers that a run hands from step to step. `count(batch, args)` is what a batch's sum is a mean
of, where that is not its trained tokens or linked examples. KIND "prompt" says that the model learns from its own
answers, which `lora.run.rollouts` samples; VALUE_HEAD, that a value head trains; NOTE is for readers of the report.

Its flags are SETTINGS; what they leave open, `defaults(args)` says. LABEL is what its loss is called, RATE the learning
rate as a part of that of sft, EPOCHS how many there are at least where nobody says.
"""

from collections.abc import Sequence
from types import ModuleType

from lora.methods import dpo, grpo, kto, ppo, reward, rloo, sft

METHODS = {"sft": sft, "dpo": dpo, "kto": kto, "reward": reward, "grpo": grpo, "rloo": rloo, "ppo": ppo}
SETTINGS = {name: [m for m in METHODS if name in METHODS[m].SETTINGS] for m in METHODS.values() for name in m.SETTINGS}
LOSSES = [name for m in METHODS.values() for name in getattr(m, "LOSSES", ())]


def samples(method: str) -> bool:
    """Does the model learn from its own answers?"""
    return METHODS[method].KIND == "prompt"


def has_value_head(method: str) -> bool:
    return getattr(METHODS[method], "VALUE_HEAD", False)


def compares(method: ModuleType, args) -> bool:
    """Does the loss compare with what the model of step 0 says?"""
    return hasattr(method, "compares") and method.compares(args)


def fill(args) -> None:
    """Write into `args` what the settings of its method left open."""
    method = METHODS[args.method]
    for name, value in method.defaults(args).items() if hasattr(method, "defaults") else ():
        if getattr(args, name) is None:
            setattr(args, name, value)


def used(settings: dict) -> dict:
    """The settings of a run that took part in it: not those that are off, nor those of another method."""
    return {name: value for name, value in without_others(settings).items() if value is not None and value is not False}


def without_others(settings: dict) -> dict:
    """The settings of a run but for those of other methods."""
    method = settings.get("method", "sft")
    return {name: value for name, value in settings.items() if method in SETTINGS.get(name, (method,))}


def figures(method: str, rows: Sequence[dict] = ()) -> dict[str, str]:
    """What a method measures, by name, in few words: those before the formula; and the rewards that rows have."""
    words = {name: words.partition(":")[0] for name, words in METHODS[method].FIGURES.items()}
    parts = dict.fromkeys(name for row in rows for name in row if name.startswith("reward_"))
    return words | {name: f"reward: {name.removeprefix('reward_')}" for name in parts if name not in words}


def describe(args) -> str:
    """The method and its settings that are not 0, in a line."""
    told = [(name.replace("_", " "), getattr(args, name)) for name in METHODS[args.method].SETTINGS]
    told = [(name, " + ".join(value) if isinstance(value, list) else value) for name, value in told]
    return ", ".join([args.method, *(f"{name} {value}" for name, value in told if value)])
