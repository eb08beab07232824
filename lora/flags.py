"""Every flag of the four commands, in tables: name, type, default, range, help."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One flag `--name`. `check` says whether a value is in range, `range` says it in words."""

    name: str
    kind: Callable  # str, int, float, or bool for a switch
    default: Any
    help: str
    range: str = ""
    check: Callable[[Any], bool] = lambda value: True
    many: bool = False  # several values
    adds: bool = False  # given again, it adds to them; else the last one counts
    saved: bool = True  # part of settings.json: what was done, not where it was put
    free: bool = False  # may change when a run is resumed: nothing learned depends on it, or its content is compared
    bare: bool = False  # the flag may stand without a value, which is ""
    alias: str = ""  # another spelling of the flag

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def one_of(*choices: str) -> dict:
    return {"range": "one of " + ", ".join(choices), "check": lambda value: value in choices}


def between(low: float, high: float) -> dict:
    return {"range": f"from {low:g} to {high:g}", "check": lambda value: low <= value <= high}


SPAN = re.compile(r"(\d+(?:\.\d+)?)(s|min|h)")


def seconds(value: str) -> float | None:
    """`30s`, `10min` or `2h` in seconds; None where it is a number of steps."""
    match = SPAN.fullmatch(value)
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]] if match else None


def _is_span(value: str) -> bool:
    return (seconds(value) or 0) > 0 or (value.isascii() and value.isdecimal() and 0 < int(value) <= 10**9)


def _is_target(value: str) -> bool:
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error:
            return False
    return bool(value.removeprefix("re:"))


LAYERS = re.compile(r"\d{1,9}(-\d{0,9})?(,\d{1,9}(-\d{0,9})?)*", re.ASCII)


def _is_layers(value: str) -> bool:
    pairs = [part.split("-") for part in value.split(",")] if LAYERS.fullmatch(value) else [["1", "0"]]
    return all(int(first) <= int(last) for first, *rest in pairs for last in rest if last)


def pattern(values: list[str] | None, kind: Callable) -> dict:
    """`[q_proj=8, mlp=4]` as a dict, its values of this kind. Raises ValueError."""
    return {name: kind(value) for name, _, value in (text.rpartition("=") for text in values or ())}


def pattern_of(kind: Callable, low: float, high: float) -> dict:
    def check(value: str) -> bool:
        name, _, number = value.rpartition("=")
        try:
            return _is_target(name) and low <= kind(number) <= high
        except ValueError:
            return False

    return {"range": f"SUFFIX=VALUE, from {low:g} to {high:g}", "check": check}


def _is_date(value: str) -> bool:
    try:
        return str(date.fromisoformat(value)) == value
    except ValueError:
        return False


TRAIN = (
    Setting("model", str, "smollm2-135m-instruct", "folder, hub id owner/name, .gguf file, or smollm2-135m-instruct",
            free=True),
    Setting(
        "data", str, None, "files of conversations, FILE, FILE:WEIGHT or hub:owner/name/FILE; without one, "
        "self-introductions are made", many=True, free=True,
    ),
    Setting(
        "replay", str, None, "FILE:SHARE, ordinary conversations on top of every step against forgetting; 0.25 adds 2 "
        "to 8", many=True, free=True,
    ),
    Setting("eval_data", str, None, "files that are not trained on, for evaluations; --check compares them",
            many=True, free=True),
    Setting("eval_fraction", float, None, "share of the data that is held out for evaluations, by question",
            "above 0, below 1", lambda value: 0 < value < 1),
    Setting("eval_every", int, None, "steps from one evaluation to the next; a tenth of the run", free=True,
            **between(1, 10**9)),
    Setting("patience", int, None, "end after N evaluations in a row that are no better than the best one", free=True,
            **between(1, 10**6)),
    Setting("retention", str, None, "file of ordinary conversations that show what is forgotten; ours without it",
            free=True),
    Setting("max_forgetting", float, None, "end where the mean KL from the base on them is over N nats", free=True,
            **between(0, 1e3)),
    Setting("prompt_key", str, None, "key of the question in rows of another shape; with --response-key"),
    Setting("response_key", str, None, "key of the answer in rows of another shape"),
    Setting("template", str, None, "chat template in place of the model's own: chatml, alpaca, qa, plain or a file"),
    Setting("system", str, None, "system turn where the data has none; without it the chat template decides"),
    Setting("no_system", bool, False, "no system turn where the data has none, not even the template's own"),
    Setting("date", str, "2025-01-01", "what today is, for templates that ask", "as 2025-01-01", _is_date),
    Setting("train_on", str, "assistant", "every answer, the last one, or every token",
            **one_of("assistant", "last", "all")),
    Setting("overlong", str, "drop", "what to do with examples over --max-len", **one_of("drop", "truncate", "error")),
    Setting("preview", int, None, "show N examples token by token, then numbers of the data, and end",
            **between(0, 10**6), saved=False),
    Setting("check", bool, False, "look for mistakes in the data, and end", saved=False),
    Setting("out", str, None, "new folder of the run; weights/<data name> without it", saved=False),
    Setting("overwrite", bool, False, "replace the folder of an earlier run", saved=False),
    Setting("save_every", str, "10min", "a checkpoint every so many steps, or every 30s, 10min, 2h",
            "steps, or a time as 10min", _is_span, free=True),
    Setting("keep", int, 2, "newest checkpoints to keep; the best one stays, too", free=True, **between(1, 10**6)),
    Setting("resume", str, None, "go on with the run in --out from its newest good checkpoint, or from this one",
            saved=False, bare=True),
    Setting("init_adapter", str, None, "start from an adapter: rank, alpha and targets are its own",
            alias="--previous_lora_weights"),
    Setting("no_verify", bool, False, "start from an adapter that was made on another base"),
    Setting("full", bool, False, "train every weight, in float32, instead of an adapter: the result is a whole model"),
    Setting("rank", int, 16, "rank of the adapter", **between(1, 65536)),
    Setting("alpha", float, 32.0, "the adapter counts alpha / rank times", **between(1e-6, 1e6)),
    Setting("dropout", float, 0.0, "dropout before the adapter", "from 0 to below 1", lambda value: 0 <= value < 1),
    Setting(
        "target", str, ["all"], "all, attention, mlp, a name's end, or re:PATTERN for whole names",
        "a name, or re: and a regular expression", _is_target, many=True,
    ),
    Setting("layers", str, None, "layers to adapt, as 0-7,20-; all without it", "numbers and spans, as 0-7,20-",
            _is_layers),
    Setting("rank_pattern", str, None, "another rank where a target's name ends so, as q_proj=8; the first that fits",
            many=True, **pattern_of(int, 1, 65536)),
    Setting("alpha_pattern", str, None, "another alpha there, as q_proj=64", many=True, **pattern_of(float, 1e-6, 1e6)),
    Setting("init", str, "kaiming", "how A starts; pissa starts from the principal part of each weight",
            **one_of("kaiming", "gaussian", "pissa")),
    Setting("rslora", bool, False, "the adapter counts alpha / sqrt(rank) times"),
    Setting("dora", bool, False, "train the length of each weight's rows apart from their direction"),
    Setting("lr_ratio_b", float, 1.0, "lora_B learns so many times as fast as the rest (LoRA+)", **between(1e-3, 1e4)),
    Setting(
        "lr", float, None, "peak learning rate; 1.15 / hidden_size without it, 0.002 for the default model; a tenth of "
        "that with --full",
        "above 0, up to 1", lambda value: 0 < value <= 1,
    ),
    Setting("epochs", int, None, "times through the data; 3, or as many as give 50 steps", free=True,
            **between(1, 10**6)),
    Setting("max_steps", int, None, "optimisation steps, instead of --epochs", free=True, **between(1, 10**9)),
    Setting("batch_size", int, 8, "examples a step", **between(1, 10**6)),
    Setting("micro_tokens", int, 2048, "tokens in memory at once; changes only speed and memory", **between(1, 2**24)),
    Setting("checkpoint_activations", bool, False, "compute each layer again in the backward pass: slower, less memory",
            free=True),
    Setting("compile", bool, False, "compile decoder blocks in the first step: faster on a GPU after a minute or two",
            saved=False),
    Setting("fsdp", bool, False, "shard the base over the processes of torchrun", saved=False),
    Setting("max_len", int, None, "longest example in tokens; the model's limit without it", **between(2, 2**24)),
    Setting("warmup", float, 0.1, "steps with a rising rate, or a share of all steps if below 1", **between(0, 10**9)),
    Setting("schedule", str, "cosine", "course of the rate after warm-up", **one_of("constant", "linear", "cosine")),
    Setting("weight_decay", float, 0.0, "AdamW's weight decay", **between(0, 10)),
    Setting("clip", float, 1.0, "limit of the gradient norm; 0 is none", **between(0, 1e9)),
    Setting("skip_nonfinite", int, 0, "leave out up to N steps whose loss or gradient is not finite", free=True,
            **between(0, 10**9)),
    Setting("seed", int, 0, "seed of adapter, order and dropout", **between(0, 2**63 - 1)),
    Setting("device", str, "auto", "where to compute", free=True, **one_of("auto", "cpu", "cuda", "mps")),
    Setting(
        "dtype", str, "auto", "dtype of the base and the activations",
        "one of auto, bfloat16, float32; float16 overflows in training", lambda v: v in ("auto", "bfloat16", "float32"),
    ),
    Setting("adapter_dtype", str, "float32", "dtype of lora_A and lora_B", **one_of("float32", "bfloat16")),
    Setting("config", str, None, "TOML or JSON file of settings; flags override it", saved=False),
)  # fmt: skip

CHAT = (  # of a trained model, with adapters or without
    Setting("template", str, None, "chat template: chatml, alpaca, qa, plain or a file; an adapter brings its own"),
    Setting("system", str, None, "system turn; without it as in training, or as the chat template decides"),
    Setting("no_system", bool, False, "no system turn, not even the template's own"),
    Setting("date", str, None, "what today is, for templates that ask; as in training", "as 2025-01-01", _is_date),
)
WHERE = (
    Setting("device", str, "auto", "where to compute", **one_of("auto", "cpu", "cuda", "mps")),
    Setting("dtype", str, "auto", "dtype of the model", **one_of("auto", "bfloat16", "float32")),
)

GENERATE = (
    Setting("model", str, None, "folder, hub id, .gguf file or smollm2-135m-instruct; an adapter remembers its own"),
    Setting("adapter", str, None, "folder of an adapter; of several, for a chat that switches or for --compare",
            many=True, adds=True),
    Setting("compare", bool, False, "answers of the base and of every adapter side by side"),
    Setting("prompt", str, None, "one prompt, or - for stdin; without --prompt and --prompts, a chat"),
    Setting("prompts", str, None, "file with a prompt a line, or conversation rows; answered in batches"),
    Setting("out", str, None, "JSONL file for the answers to --prompts or of --compare; stdout without it"),
    *CHAT,
    Setting("max_new_tokens", int, 256, "longest answer", **between(1, 10**6)),
    Setting("temperature", float, 0.0, "0 takes the likeliest token", **between(0, 100)),
    Setting("top_k", int, 0, "draw from the k likeliest; 0 is all", **between(0, 2**24)),
    Setting("top_p", float, 1.0, "draw from the likeliest that sum to p", "above 0, up to 1", lambda v: 0 < v <= 1),
    Setting("min_p", float, 0.0, "drop tokens below this share of the best", "from 0 to below 1", lambda v: 0 <= v < 1),
    Setting("repetition_penalty", float, 1.0, "above 1 makes repetition unlikely", **between(0.01, 100)),
    Setting("seed", int, 0, "seed of the drawing", **between(0, 2**62)),
    Setting("batch_size", int, 16, "prompts answered at once", **between(1, 4096)),
    *WHERE,
    Setting("no_verify", bool, False, "use an adapter on another base than it was trained on"),
)  # fmt: skip

MERGE = (
    Setting("adapter", str, None, "folder of an adapter to merge into its base"),
    Setting("combine", str, None, "or adapters to make one of, FOLDER or FOLDER:WEIGHT; weights may be negative",
            many=True, adds=True),
    Setting("extract", str, None, "or a base and a model fine-tuned from it, to make an adapter of the difference",
            many=True),
    Setting("rank", int, None, "largest rank in the adapter that --combine or --extract makes", **between(1, 65536)),
    Setting("energy", float, None, "or the share of every ΔW's squared singular values to keep", "above 0, up to 1",
            lambda v: 0 < v <= 1),
    Setting("out", str, None, "new folder of the merged model or of the adapter, or FILE.gguf"),
    Setting("format", str, "folder", "a model folder, or one GGUF file for llama.cpp", **one_of("folder", "gguf")),
    Setting("gguf_type", str, None, "how matrices are stored; f16 without it, f32 in an adapter alone",
            **one_of("f32", "f16", "bf16", "q8_0")),
    Setting("adapter_only", bool, False, "the adapter alone as GGUF, for the GGUF file of its base"),
    Setting("model", str, None, "the base, where it is not where the adapter remembers it"),
    Setting("overwrite", bool, False, "replace an earlier result"),
    Setting("dtype", str, "auto", "dtype to write; the base's own by default",
            **one_of("auto", "bfloat16", "float16", "float32")),
    Setting("no_verify", bool, False, "use another base than the adapter was trained on"),
    Setting("tolerance", float, 0.01, "the merged model may be off by such a share of what the adapter changed, in "
            "mean KL", **between(0, 1e9)),
    Setting("prompts", str, None, "what is compared: a prompt a line, or conversation rows; ours without it"),
    Setting("no_receipt", bool, False, "do not compare; for models that do not fit into memory in float32"),
    Setting("device", str, "auto", "where to compare", **one_of("auto", "cpu", "cuda", "mps")),
    Setting("push", str, None, "upload to owner/name on the hub, made as a private one: the merged model, or without "
            "--out the adapter"),
)  # fmt: skip

EVALUATE = (
    Setting("model", str, None, "folder, hub id, .gguf file or smollm2-135m-instruct; an adapter remembers its own"),
    Setting("adapter", str, None, "folders of adapters, each a column beside the base", many=True, adds=True),
    Setting("data", str, None, "files of conversations, FILE or hub:owner/name/FILE; or --task", many=True),
    Setting("task", str, None, "a task that makes its own held-out rows and grades answers", **one_of("multiply")),
    Setting("rows", int, None, "so many rows; all of --data, 60 of --task", **between(1, 10**6)),
    Setting("digits", int, 2, "of multiply: numbers have up to so many digits", **between(1, 9)),
    Setting("style", str, "terse", "of multiply: how it is worked out", **one_of("article", "terse")),
    Setting("lang", str, "en", "of multiply: language of questions and article lines", **one_of("en", "zh")),
    Setting("seed", int, 0, "of multiply: which pairs", **between(0, 2**62)),
    Setting("out", str, None, "JSON file for all figures, settings and faults"),
    Setting("predictions", str, None, "folder for a JSONL file a column; FILE.predictions beside --out FILE.json"),
    Setting("no_generate", bool, False, "losses and retention only"),
    Setting("max_new_tokens", int, None, "longest answer; 1.5 longest targets, 48 at least", **between(1, 10**6)),
    Setting("retention", str, None, "conversations for the meter of forgetting; those of the project without it"),
    Setting("no_retention", bool, False, "do not measure forgetting"),
    *CHAT,
    Setting("batch_size", int, 16, "rows answered at once", **between(1, 4096)),
    Setting("micro_tokens", int, 2048, "tokens in memory at once, for losses", **between(1, 2**24)),
    *WHERE,
    Setting("no_verify", bool, False, "use adapters on another base than they were trained on"),
)  # fmt: skip

OF_ADAPTERS = (  # nothing to --full
    "init_adapter", "no_verify", "rank", "alpha", "dropout", "target", "layers", "rank_pattern", "alpha_pattern",
    "init", "rslora", "dora", "lr_ratio_b", "adapter_dtype",
)  # fmt: skip
ONE_OF_TWO = (("epochs", "max_steps"), ("system", "no_system"))
