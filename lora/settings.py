"""One table of settings: flag, type, default, range, help. It becomes argparse, `--config` and `settings.json`.

`resolve` reads a config file (TOML or JSON), lets flags override it, and checks every range; all problems at once.
"""

import math
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora import files
from lora.errors import BadInput, Parser


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
    Setting("rank", int, 16, "rank of the adapter", **between(1, 65536)),
    Setting("alpha", float, 32.0, "the adapter counts alpha / rank times", **between(1e-6, 1e6)),
    Setting("dropout", float, 0.0, "dropout before the adapter", "from 0 to below 1", lambda value: 0 <= value < 1),
    Setting(
        "target", str, ["all"], "all, attention, mlp, a name's end, or re:PATTERN for whole names",
        "a name, or re: and a regular expression", _is_target, many=True,
    ),
    Setting(
        "lr", float, None, "peak learning rate; 1.15 / hidden_size without it, 0.002 for the default model",
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
    Setting("adapter", str, None, "folder of an adapter"),
    Setting("prompt", str, None, "one prompt, or - for stdin; without --prompt and --prompts, a chat"),
    Setting("prompts", str, None, "file with a prompt a line, or conversation rows; answered in batches"),
    Setting("out", str, None, "JSONL file for the answers to --prompts; stdout without it"),
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
    Setting("adapter", str, None, "folder of an adapter"),
    Setting("out", str, None, "new folder of the merged model"),
    Setting("model", str, None, "the base, where it is not where the adapter remembers it"),
    Setting("overwrite", bool, False, "replace an earlier merged model"),
    Setting("dtype", str, "auto", "dtype to write; the base's own by default",
            **one_of("auto", "bfloat16", "float16", "float32")),
    Setting("no_verify", bool, False, "merge into another base than the adapter was trained on"),
)  # fmt: skip

EVALUATE = (
    Setting("model", str, None, "folder, hub id, .gguf file or smollm2-135m-instruct; an adapter remembers its own"),
    Setting("adapter", str, None, "folders of adapters, each a column beside the base", many=True),
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


ONE_OF_TWO = (("epochs", "max_steps"), ("system", "no_system"))


def parser(table: Sequence[Setting], description: str) -> Parser:
    build = Parser(description=description)
    for s in table:
        text = s.help + (f" ({s.range})" if s.range else "")
        if s.kind is bool:
            build.add_argument(s.flag, dest=s.name, action="store_true", default=None, help=text)
        else:
            metavar = "TEXT" if s.kind is str else s.kind.__name__.upper()
            default = "" if s.default is None else f" [{' '.join(s.default) if s.many else s.default}]"
            build.add_argument(
                *filter(None, (s.flag, s.alias)),
                dest=s.name,
                nargs="+" if s.many else "?" if s.bare else None,
                const="" if s.bare else None,
                metavar=metavar,
                help=(text + default).replace("%", "%%"),
            )
    return build


def _read(path: Path) -> dict:
    if path.suffix.lower() != ".toml":
        return files.read_json(path)
    try:
        return tomllib.loads(files.read_bytes(path).decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"broken TOML in {path}: {error}. Repair it") from None


def _value(s: Setting, value: Any, where: str, problems: list[str]) -> Any:
    """One value of the setting's kind and range; from a flag it is a string, from a file it has a type."""
    from_flag = isinstance(value, str)
    try:
        if s.kind is str and (not from_flag or b"\0" in os.fsencode(value)):  # which also refuses half a surrogate pair
            raise ValueError
        if s.kind is bool:
            if type(value) is not bool:
                raise ValueError
            return value
        if s.kind in (int, float) and isinstance(value, bool):
            raise ValueError
        result = s.kind(value)
        if s.kind is int and not from_flag and result != value:
            raise ValueError
        if s.kind is float and not math.isfinite(result):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        problems.append(f"wrong {s.flag} in {where}: {value!r} is not {kinds[s.kind]}. Give {s.range or kinds[s.kind]}")
        return s.default
    if not s.check(result):
        problems.append(f"wrong {s.flag} in {where}: {value!r} is out of range. Give {s.range}")
    return result


def resolve(
    table: Sequence[Setting], argv: Sequence[str] | None, description: str, saved: dict | None = None
) -> SimpleNamespace:
    """Flags over config file over what a run `saved` over defaults; `given` has the names of the first two.

    Raises BadInput with everything that is wrong.
    """
    flags = vars(parser(table, description).parse_args(argv))
    problems: list[str] = []
    known = {s.name: s for s in table}
    config, where = {}, flags.get("config")
    if where is not None:
        config = {key.replace("-", "_"): value for key, value in _read(Path(where)).items()}
        config.pop(ENDED, None)
        for key in config.keys() - (known.keys() - {"config"}):
            problems.append(f"unknown key in {where}:{key}: no such setting. Known are {', '.join(known)}")
    values = {}
    for s in table:
        if flags.get(s.name) is not None:
            value, source = flags[s.name], "the command line"
        elif config.get(s.name) is not None:
            value, source = config[s.name], str(where)
        elif (saved or {}).get(s.name) is not None:
            value, source = saved[s.name], "the checkpoint"
        else:
            values[s.name] = s.default
            continue
        if s.many:
            items = value if isinstance(value, list) else [value]
            if not items:
                problems.append(f"wrong {s.flag} in {source}: an empty list. Give at least one, or leave it out")
            values[s.name] = [_value(s, item, source, problems) for item in items]
        else:
            values[s.name] = _value(s, value, source, problems)
    if problems:
        raise BadInput(*problems)
    for pair in ONE_OF_TWO:  # a flag of one kind replaces a config file's value of the other
        if pair[0] in known and all(values[name] for name in pair):
            given = [name for name in pair if flags.get(name) is not None]
            if len(given) == 2:
                both = " and ".join(known[name].flag for name in pair)
                raise BadInput(f"contradiction in the command line: {both}. Give one of them")
            given = given or [name for name in pair if config.get(name) is not None]
            if len(given) != 1:
                raise BadInput(f"contradiction in {where}: {' and '.join(pair)}. Give one of them")
            [lost] = set(pair) - set(given)
            values[lost] = known[lost].default
    given = {s.name for s in table if flags.get(s.name) is not None or config.get(s.name) is not None}
    return SimpleNamespace(**values, given=given)


ENDED = "ended"  # in settings.json: why the run ended


def to_save(table: Sequence[Setting], values: SimpleNamespace) -> dict:
    """What `settings.json` holds: it can be given back as `--config` as it is."""
    return {s.name: getattr(values, s.name) for s in table if s.saved}


def changed(table: Sequence[Setting], before: dict, now: SimpleNamespace) -> list[str]:
    """The names of settings that decide what is learned and are not what they were."""
    return [s.name for s in table if s.saved and not s.free and before.get(s.name) != getattr(now, s.name)]
