"""Every flag of train.py: TrainSettings, inherited from a class for each group of flags."""

# ruff: noqa: RUF009

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from lora import rewards
from lora.adapter.passport import QUANT
from lora.errors import BadInput
from lora.methods import LOSSES, METHODS, SETTINGS, dpo, has_value_head, samples
from lora.run import track
from lora.settings import ABOVE_0_UP_TO_1, DATE, FROM_0_BELOW_1, Flag, Range, Settings, between, flag, one_of
from lora.text.template import is_argument
from lora.watch.asked import addresses

SPAN = re.compile(r"(\d+(?:\.\d+)?)(s|min|h)")
LAYERS = re.compile(r"\d{1,9}(-\d{0,9})?(,\d{1,9}(-\d{0,9})?)*", re.ASCII)


def seconds(value: str) -> float | None:
    """`30s`, `10min` or `2h` in seconds; None where it is a number of steps."""
    match = SPAN.fullmatch(value)
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]] if match else None


def pattern(values: list[str] | None, kind: Callable) -> dict:
    """`[q_proj=8, mlp=4]` as a dict, its values of this kind. Raises ValueError."""
    return {name: kind(value) for name, _, value in (text.rpartition("=") for text in values or ())}


def pattern_of(kind: Callable, low: float, high: float) -> Range:
    def holds(value: str) -> bool:
        name, _, number = value.rpartition("=")
        try:
            return _is_target(name) and low <= kind(number) <= high
        except ValueError:
            return False

    return Range(f"SUFFIX=VALUE, from {low:g} to {high:g}", holds)


LEARNS_FROM = {  # kind of rows -> what they are
    "pair": "pairs of a chosen and a rejected answer",
    "scored": "pairs of a chosen and a rejected answer",
    "judged": "answers judged good or bad",
    "prompt": "its own answers to prompts",
}
TEMPLATE_ARG = Range("NAME=VALUE; not messages, add_generation_prompt, tools, documents or a _token", is_argument)


def _is_span(value: str) -> bool:
    return (seconds(value) or 0) > 0 or (value.isascii() and value.isdecimal() and 0 < int(value) <= 10**9)


def _is_target(value: str) -> bool:
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error:
            return False
    return bool(value.removeprefix("re:"))


def _is_layers(value: str) -> bool:
    pairs = [part.split("-") for part in value.split(",")] if LAYERS.fullmatch(value) else [["1", "0"]]
    return all(int(first) <= int(last) for first, *rest in pairs for last in rest if last)


# fmt: off


@dataclass
class TrainModel(Settings, group="model"):
    """The base, and what of it trains."""

    model: str = flag(
        "smollm2-135m-instruct", "folder, hub id owner/name, .gguf file, or smollm2-135m-instruct", free=True)
    quant: str | None = flag(
        None, "pack the base's Linears on reading: nf4 takes 4.1 bits a weight, int8 8; keep leaves the blocks of a "
        "quantised file as they are; with --init-adapter as it was trained", one_of("none", *QUANT))
    full: bool = flag(False, "train every weight, in float32, instead of an adapter: the result is a whole model")


@dataclass
class TrainData(Settings, group="data"):
    """What is learned from, and how it is read."""

    data: list[str] | None = flag(
        None, "files of conversations, FILE, FILE:WEIGHT or hub:owner/name/FILE; without one, self-introductions are "
        "made", free=True)
    replay: list[str] | None = flag(
        None, "FILE:SHARE, ordinary conversations on top of every step against forgetting; 0.25 adds 2 to 8", free=True)
    prompt_key: str | None = flag(
        None, "key of the question in rows of another shape; with --response-key, but for pairs and prompts")
    response_key: str | None = flag(None, "key of the answer in rows of another shape")
    leading_answers: str = flag(
        "error", "an answer before the first question: drop it, or keep it as context that is not trained",
        one_of("error", "drop", "keep"))
    template: str | None = flag(None, "chat template in place of the model's own: chatml, alpaca, qa, plain or a file")
    system: str | None = flag(None, "system turn where the data has none; without it the chat template decides")
    no_system: bool = flag(False, "no system turn where the data has none, not even the template's own")
    template_arg: list[str] | None = flag(
        None, "switches of the chat template, as enable_thinking=false; values are JSON or text", TEMPLATE_ARG)
    date: str = flag("2025-01-01", "what today is, for templates that ask", DATE)
    control_tokens: bool = flag(False, "read the control tokens that documents (rows of text) spell as tokens")
    train_on: str = flag("assistant", "every answer, the last one, or every token", one_of("assistant", "last", "all"))
    max_len: int | None = flag(None, "longest example in tokens; the model's limit without it", between(2, 2**24))
    overlong: str = flag(
        "drop", "what to do with examples over --max-len; split cuts documents and drops the rest",
        one_of("drop", "truncate", "split", "error"))
    preview: int | None = flag(
        None, "show N examples token by token, then numbers of the data, and end", between(0, 10**6), saved=False)
    check: bool = flag(False, "look for mistakes in the data, and end", saved=False)


@dataclass
class TrainMethod(Settings, group="method"):
    """What it is trained for."""

    method: str = flag(
        "sft", "sft learns answers; dpo from pairs, chosen and rejected; kto from answers judged good or bad; reward "
        "makes a model that scores answers, from pairs; grpo, rloo and ppo learn from rewards of answers that the "
        "model gives itself", one_of(*METHODS))
    loss: str | None = flag(
        None, "of dpo (sigmoid without it) and of grpo: dapo, the default, grpo, bnpo or dr_grpo", one_of(*LOSSES))
    beta: float | None = flag(
        None, "of dpo and kto: how closely to keep to the reference; 0.1 without it, 2 for simpo", between(1e-6, 1e3))
    label_smoothing: float | None = flag(
        None, "of cdpo and robust: the share of pairs that are swapped; 0.1 without it",
        Range("from 0 to below 0.5", lambda value: 0 <= value < 0.5))
    sft_weight: float = flag(
        0.0, "of dpo: so many times the chosen answer's mean loss a token is added", between(0, 1e3))
    margin: float | None = flag(
        None, "how far apart both sides shall be: of reward, and of sigmoid, cdpo, robust, sigmoid_norm and simpo; 0 "
        "without it, 1 for simpo", between(0, 1e3))
    good_weight: float = flag(1.0, "of kto: how much a good answer counts", between(0, 1e3))
    bad_weight: float = flag(1.0, "of kto: how much a bad answer counts", between(0, 1e3))
    center: float = flag(0.0, "of reward: keeps scores around 0; 0.01 in its paper", between(0, 1e3))


@dataclass
class TrainRewards(Settings, group="reinforcement"):
    """How grpo, rloo and ppo sample answers, and what they make of their rewards."""

    reward: list[str] | None = flag(
        None, "NAME or NAME:WEIGHT, may be repeated: multiply, countdown, format:REGEX, length:N, FILE.py:FUNCTION, or "
        "the folder of a reward model")
    reward_timeout: float = flag(
        60.0, "seconds that a function of your own may take for a step", between(0.01, 1e6), free=True)
    group: int | None = flag(None, "answers to each prompt: 8, of ppo 1", between(1, 4096))
    temperature: float = flag(1.0, "of sampling, and of the log-probabilities that are trained", between(0.01, 100))
    max_new_tokens: int = flag(128, "longest sampled answer in tokens", between(1, 2**20))
    kl: float | None = flag(
        None, "how much the distance from the model of step 0 costs, a nat: 0 for grpo, 0.05 for rloo and ppo",
        between(0, 1e3))
    epsilon: float = flag(0.2, "a likelihood ratio counts up to 1 + epsilon, down to 1 - epsilon", between(1e-6, 1e3))
    epsilon_high: float | None = flag(None, "another epsilon upwards, 0.28 in DAPO", between(1e-6, 1e3))
    scale: str = flag("group", "of grpo: divide advantages by the group's deviation, or not", one_of("group", "none"))
    updates: int | None = flag(None, "updates from the same answers: 1, of ppo 4", between(1, 1000))
    gamma: float = flag(1.0, "of ppo: what a reward a token later is worth", between(0, 1))
    lam: float = flag(0.95, "of ppo: λ of the advantages, from values alone (0) to rewards alone (1)", between(0, 1))
    value_weight: float = flag(0.1, "of ppo: how much the loss of the values counts", between(0, 1e3))
    value_clip: float = flag(0.2, "of ppo: how far a value may move in a step", between(1e-6, 1e6))
    whiten_rewards: bool = flag(False, "of ppo: rewards of a step have a deviation of 1")
    kl_target: float | None = flag(
        None, "of ppo: adapt --kl so that an answer is so many nats from the model of step 0", between(1e-6, 1e6))
    kl_horizon: float = flag(10000.0, "of ppo: answers after which --kl may have doubled", between(1, 1e12))
    no_end_penalty: float = flag(0.0, "of ppo: what is taken off where an answer does not end", between(0, 1e6))


@dataclass
class TrainAdapter(Settings, group="adapter"):
    """The adapter; nothing of this is for --full."""

    init_adapter: str | None = flag(
        None, "start from an adapter: rank, alpha and targets are its own", alias="--previous_lora_weights")
    no_verify: bool = flag(False, "start from an adapter that was made on another base")
    rank: int = flag(16, "rank of the adapter", between(1, 65536))
    alpha: float = flag(32.0, "the adapter counts alpha / rank times", between(1e-6, 1e6))
    dropout: float = flag(0.0, "dropout before the adapter", FROM_0_BELOW_1)
    target: list[str] = flag(
        ["all"], "all, attention, mlp, a name's end, or re:PATTERN for whole names",
        Range("a name, or re: and a regular expression", _is_target))
    layers: str | None = flag(
        None, "layers to adapt, as 0-7,20-; all without it", Range("numbers and spans, as 0-7,20-", _is_layers))
    rank_pattern: list[str] | None = flag(
        None, "another rank where a target's name ends so, as q_proj=8; the first that fits", pattern_of(int, 1, 65536))
    alpha_pattern: list[str] | None = flag(None, "another alpha there, as q_proj=64", pattern_of(float, 1e-6, 1e6))
    init: str = flag(
        "kaiming", "how A starts; pissa starts from the principal part of each weight",
        one_of("kaiming", "gaussian", "pissa"))
    rslora: bool = flag(False, "the adapter counts alpha / sqrt(rank) times")
    dora: bool = flag(False, "train the length of each weight's rows apart from their direction")
    lr_ratio_b: float = flag(1.0, "lora_B learns so many times as fast as the rest (LoRA+)", between(1e-3, 1e4))
    adapter_dtype: str = flag("float32", "dtype of lora_A and lora_B", one_of("float32", "bfloat16"))


@dataclass
class TrainOptimisation(Settings, group="optimisation"):
    """How it is learned."""

    lr: float | None = flag(
        None, "peak learning rate; 1.15 / hidden_size without it, 0.002 for the default model; a tenth of that with "
        "--full, a quarter for reward, a fortieth for all other methods", ABOVE_0_UP_TO_1)
    epochs: int | None = flag(
        None, "times through the data; 3, of other methods 1, or as many as give 50 steps", between(1, 10**6),
        free=True)
    max_steps: int | None = flag(None, "optimisation steps, instead of --epochs", between(1, 10**9), free=True)
    batch_size: int = flag(8, "examples a step", between(1, 10**6))
    warmup: float = flag(0.1, "steps with a rising rate, or a share of all steps if below 1", between(0, 10**9))
    schedule: str = flag("cosine", "course of the rate after warm-up", one_of("constant", "linear", "cosine"))
    weight_decay: float = flag(0.0, "AdamW's weight decay", between(0, 10))
    clip: float = flag(1.0, "limit of the gradient norm; 0 is none", between(0, 1e9))
    skip_nonfinite: int = flag(
        0, "leave out up to N steps whose loss or gradient is not finite", between(0, 10**9), free=True)
    seed: int = flag(0, "seed of adapter, order and dropout", between(0, 2**63 - 1))


@dataclass
class TrainEvaluation(Settings, group="evaluation"):
    """What is measured meanwhile, and when that ends the run."""

    eval_data: list[str] | None = flag(
        None, "files that are not trained on, for evaluations; --check compares them", free=True)
    eval_fraction: float | None = flag(
        None, "share of the data that is held out for evaluations, by question",
        Range("above 0, below 1", lambda value: 0 < value < 1))
    eval_every: int | None = flag(
        None, "steps from one evaluation to the next; a tenth of the run", between(1, 10**9), free=True)
    patience: int | None = flag(
        None, "end after N evaluations in a row that are no better than the best one; of grpo and rloo, after N steps "
        "in whose groups all rewards are equal", between(1, 10**6), free=True)
    retention: str | None = flag(
        None, "file of ordinary conversations that show what is forgotten; ours without it", free=True)
    max_forgetting: float | None = flag(
        None, "end where the mean KL from the base on them is over N nats", between(0, 1e3), free=True)


@dataclass
class TrainSaving(Settings, group="saving"):
    """Where the run is put, how often it is saved."""

    out: str | None = flag(None, "new folder of the run; weights/<data name> without it", saved=False)
    overwrite: bool = flag(False, "replace the folder of an earlier run", saved=False)
    save_every: str = flag(
        "10min", "a checkpoint every so many steps, or every 30s, 10min, 2h",
        Range("steps, or a time as 10min", _is_span), free=True)
    keep: int = flag(2, "newest checkpoints to keep; the best one stays, too", between(1, 10**6), free=True)
    resume: str | None = flag(
        None, "go on with the run in --out from its newest good checkpoint, or from this one", saved=False, bare=True)
    config: str | None = flag(None, "TOML or JSON file of settings; flags override it", saved=False)


@dataclass
class TrainWatching(Settings, group="watching"):
    """Who looks on. Nothing of it changes what is learned."""

    watch: list[str] | None = flag(
        None, "the run as a page, at [HOST:]PORT of this machine, 8001 without one; or folders of runs, which open "
        "without training", saved=False, bare=True)
    track: list[str] | None = flag(
        None, "give the rows of metrics.jsonl to another program, too; nothing leaves this machine unless its own "
        "settings say so", one_of(*track.TRACKERS), saved=False)


@dataclass
class TrainHardware(Settings, group="hardware"):
    """Where it is computed, within which memory."""

    device: str = flag("auto", "where to compute", one_of("auto", "cpu", "cuda", "mps"), free=True)
    dtype: str = flag(
        "auto", "dtype of the base and the activations",
        Range("one of auto, bfloat16, float32; float16 overflows in training",
              ("auto", "bfloat16", "float32").__contains__))
    micro_tokens: int = flag(2048, "tokens in memory at once; changes only speed and memory", between(1, 2**24))
    checkpoint_activations: bool = flag(
        False, "compute each layer again in the backward pass: slower, less memory", free=True)
    compile: bool = flag(
        False, "compile decoder blocks first: faster after a minute on a CPU, a minute or two on a GPU; long runs "
        "on a CPU are compiled without it", saved=False)
    no_compile: bool = flag(False, "compile nothing, however long the run", saved=False)
    plain: bool = flag(
        False, "train with every formula as its paper writes it: slower, for reading and checking", saved=False)
    fsdp: bool = flag(False, "shard the base over the processes of torchrun", saved=False)


# fmt: on


@dataclass
class TrainSettings(
    TrainModel,
    TrainData,
    TrainMethod,
    TrainRewards,
    TrainAdapter,
    TrainOptimisation,
    TrainEvaluation,
    TrainSaving,
    TrainWatching,
    TrainHardware,
):
    """train.py"""

    one_of_two: ClassVar = (("epochs", "max_steps"), ("system", "no_system"))

    def contradictions(self) -> list[str]:
        """The flags that exclude each other, without a look at the base; a line each."""
        line = "contradiction in the command line:"
        packs = self.quant not in (None, "none")
        pairs = [
            ("--resume", "--overwrite", self.resume is not None and self.overwrite, "Give one of them"),
            ("--preview", "--watch", self.preview is not None and self.watch is not None, ""),
            ("--compile", "--no-compile", self.compile and self.no_compile, ""),
            ("--compile", "--fsdp", self.compile and self.fsdp, ""),
            ("--quant", "--full, which trains what would be packed", packs and self.full, ""),
            ("--quant", "--fsdp, which shards numbers", packs and self.fsdp, ""),
            ("--quant", "--compile", packs and self.compile, ""),
            ("--full", "--fsdp, which is for a base that is only read", self.full and self.fsdp, ""),
        ]
        if self.fsdp and (self.dora or self.init == "pissa"):
            pairs.append(("--fsdp", f"--{'dora' if self.dora else 'init pissa'}, which reads whole weights", True, ""))
        for name in ("dora", "rslora", "init_adapter"):
            pairs.append(("--init pissa", self.flags()[name].flag, self.init == "pissa" and getattr(self, name), ""))
        found = [f"{line} {a} and {b}. {fix or 'Leave out one of them'}" for a, b, wrong, fix in pairs if wrong]
        for name in ("rank_pattern", "alpha_pattern"):
            if len(pattern(getattr(self, name), str)) < len(getattr(self, name) or ()):
                found.append(f"{line} {self.flags()[name].flag} names a target twice. Leave out one of them")
        if self.full and (given := [one.flag for one in self.of_adapters() if one.name in self.given]):
            found.append(f"{line} --full makes no adapter to have {', '.join(given)}. Leave them out")
        by_group = samples(self.method) and not has_value_head(self.method)
        if self.patience and not (self.eval_data or self.eval_fraction or by_group):
            found.append("wrong --patience in the command line: no loss is evaluated. Add --eval-data FILE")
        if self.watch is not None and len(addresses(self.watch)) > 1:
            found.append(f"{line} {' and '.join(self.watch)} of --watch. Give one address")
        return found + track.missing(self.track) + self._foreign_to_method()

    def _foreign_to_method(self) -> list[str]:
        """A line for each flag that changes nothing with this method or loss."""
        line, found = "contradiction in the command line:", []
        of_losses = {"label_smoothing": dpo.WITH_SMOOTHING, "margin": dpo.WITH_MARGIN}
        for name, methods in SETTINGS.items():
            flag = self.flags()[name].flag
            if getattr(self, name) == self.flags()[name].default:
                continue
            if self.method not in methods:
                found.append(
                    f"{line} --method {self.method} and {flag}, which is for {', '.join(methods)}. Leave it out"
                )
            elif name == "loss" and self.loss not in METHODS[self.method].LOSSES:
                losses = ", ".join(METHODS[self.method].LOSSES)
                found.append(f"{line} --method {self.method} and --loss {self.loss}. Give one of {losses}")
            elif self.method == "dpo" and (loss := self.loss or "sigmoid") not in of_losses.get(name, dpo.LOSSES):
                losses = ", ".join(of_losses[name])
                found.append(f"{line} --loss {loss} and {flag}, which is for {losses}. Leave it out")
        if self.method != "sft":
            if not self.data and not self.check:
                what = LEARNS_FROM[METHODS[self.method].KIND]
                found.append(f"missing --data in the command line: --method {self.method} learns from {what}. Add FILE")
            if self.train_on != "assistant":
                found.append(f"{line} --method {self.method} and --train-on, which is for sft. Leave it out")
            if self.overlong == "split":
                found.append(
                    f"{line} --method {self.method} and --overlong split, which is for documents. Leave it out"
                )
        if has_value_head(self.method) and self.full:
            why = "a value head stands beside an adapter"
            found.append(f"{line} --method {self.method} and --full: {why}. Leave out --full")
        return found + (self._foreign_to_sampling() if samples(self.method) else [])

    def _foreign_to_sampling(self) -> list[str]:
        """A line for each flag that has no meaning, or another one, where the model learns from its own answers."""
        line = f"contradiction in the command line: --method {self.method} and"
        wrong = (
            ("--replay, which has no rewards", self.replay, "Leave it out"),
            ("--dropout, which would sample from one model and train another", self.dropout, "Leave it out"),
            ("--compile", self.compile, "Leave it out"),
            ("--fsdp", self.fsdp, "Leave it out"),
            ("--overlong truncate, which would cut questions", self.overlong == "truncate", "Give drop or error"),
            ("--group 1: an answer is compared with others of its group", self.group == 1 and self.method != "ppo",
             "Give 2 or more"),
            ("--kl-target without a --kl to adapt", self.kl_target and self.kl == 0, "Leave out --kl 0"),
            ("--full with --kl: the model of step 0 would be a second one", self.full and self.kl, "Leave out --kl"),
            ("--full without --kl 0: the model of step 0 would be a second one",
             self.full and self.method == "rloo" and self.kl is None, "Add --kl 0"),
        )  # fmt: skip
        found = [f"{line} {what}. {fix}" for what, is_wrong, fix in wrong if is_wrong]
        if not self.reward and not self.check and self.preview is None:
            fix = "Add --reward multiply, FILE.py:function or another"
            found.append(f"missing --reward in the command line: --method {self.method} learns from rewards. {fix}")
        return [*found, *rewards.wrong(self.reward or ())]

    @classmethod
    def _read_config(cls, where: str, problems: list[str]) -> dict:
        """Runs of other methods once saved dpo's loss, too, which was the default."""
        found = super()._read_config(where, problems)
        if found.get("loss") == "sigmoid" and found.get("method", "sft") in ("sft", "kto", "reward"):
            del found["loss"]
        return found

    def refuse_contradictions(self) -> None:
        """Raises BadInput with all of them. With --full, what belongs to adapters is None from here on."""
        if problems := self.contradictions():
            raise BadInput(*problems)
        if self.full:
            vars(self).update({one.name: None for one in self.of_adapters()})

    @classmethod
    def of_adapters(cls) -> list[Flag]:
        return [one for one in cls.flags().values() if one.group == "adapter"]
