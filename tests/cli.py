"""A tiny model, data and adapter on disk, and the four commands run on them.

`call` runs a command's `main` in a child forked after torch is imported; `process` runs it as a person does. Both give
(code, out, err), in a folder of the test's own, without network, and stop after SECONDS with code 124.
"""

import atexit
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quantize
from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from lora import files
from lora.adapter.inject import inject
from lora.data import lint
from lora.errors import run
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from lora.run import results
from lora.train import memory
from lora.train.record import draw
from tests.helpers import tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60
ON_CPU = ("--device", "cpu", "--dtype", "float32")  # the same on every machine, and in a forked child
SCRIPTS = {
    "train": "train",
    "generate": "generate",
    "evaluate": "evaluate",
    "merge": "merge",
    "self_cognition": "data_gen.self_cognition",
}
RUN_FILES = sorted(
    [
        "adapter_model.safetensors",
        "adapter_config.json",
        "passport.json",
        "settings.json",
        "metrics.jsonl",
        "preview.json",
        "loss.png",
        "report.md",
        "README.md",
        "chat_template.jinja",
    ]
)
CHECKPOINT_FILES = sorted(
    [
        "adapter_model.safetensors",
        "adapter_config.json",
        "passport.json",
        "chat_template.jinja",
        "optimizer.safetensors",
        "state.json",
        "MANIFEST.json",
    ]
)


def run_tree(*steps: int, without: tuple[str, ...] = ()) -> list[str]:
    """All that a run's folder holds, with the checkpoints of these steps."""
    folders = [f"checkpoints/{step:06d}" for step in steps]
    inner = [f"{folder}/{name}" for folder in folders for name in CHECKPOINT_FILES]
    return sorted([*set(RUN_FILES) - set(without), "checkpoints", *folders, *inner])


# ---- a model, data and an adapter, made once -------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
CONVERSATIONS = [
    [("user", f"What is {a} and {b}?"), ("assistant", f"It is {a + b}, as {a} and {b} are {a + b}.")]
    for a in range(1, 4)
    for b in range(1, 4)
] + [[("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi!"), ("user", "Bye."), ("assistant", "Bye!")]]


@cache
def scratch() -> Path:
    """A folder that is there until pytest ends."""
    path = Path(tempfile.mkdtemp(prefix="lora-tests-"))
    owner = os.getpid()  # a forked child that ends by sys.exit must not remove it
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(path, ignore_errors=True))
    return path


def rows(conversations) -> str:
    """JSONL of conversations given as (role, content) pairs."""
    as_messages = ([{"role": role, "content": text} for role, text in turns] for turns in conversations)
    return "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in as_messages)


@cache
def data_file() -> Path:
    path = scratch() / "chats.jsonl"
    path.write_text(rows(CONVERSATIONS), encoding="utf-8")
    return path


def write_model(folder: Path, seed: int = 0, **sizes) -> Path:
    """A hub folder: a Llama of two layers with random bf16 weights, a byte-level BPE tokenizer, ChatML."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(torch.bfloat16, seed, **SIZES | sizes)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves 0600
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config | SIZES | sizes, indent=2))
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"], special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([data_file().read_text()] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return folder


def counted_reads(path: Path) -> Callable[[], None]:
    """For `before`: writes to `path`, as a model's tensors are read, how many were held at once and how many in all."""

    def watch() -> None:
        from lora import pretrained

        alive, most, total = set(), [0], [0]
        read = pretrained.ModelFolder.read

        def watched(self, name, dtype=None):
            tensor = read(self, name, dtype)
            total[0] += 1
            alive.add(total[0])
            weakref.finalize(tensor.untyped_storage(), alive.discard, total[0])
            most[0] = max(most[0], len(alive))
            path.write_text(f"{most[0]} {total[0]}")
            return tensor

        pretrained.ModelFolder.read = watched

    return watch


@cache
def model_folder() -> Path:
    return write_model(scratch() / "model")


@cache
def gguf_file(kind: str = "F32") -> Path:
    """The model of `model_folder` as a GGUF file; the values are the same where its matrices are in F32."""
    folder, path, kind = model_folder(), scratch() / f"model-{kind}.gguf", GGMLQuantizationType[kind]
    state = tiny_model(torch.bfloat16, 0, **SIZES).state_dict()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    for name, tensor in state.items():
        short = name.replace("model.layers.", "blk.").replace("self_attn.", "attn_").replace("mlp.", "ffn_")
        short = short.replace("_proj.", ".").replace("attn_o.", "attn_output.").replace("input_layernorm", "attn_norm")
        short = short.replace("post_attention_layernorm", "ffn_norm").replace("model.embed_tokens", "token_embd")
        short = short.replace("model.norm", "output_norm").replace("lm_head", "output")
        if ".q_proj." in name or ".k_proj." in name:  # llama.cpp's RoPE turns neighbours: its converter moves rows
            tensor = tensor.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)
        blocks = short.startswith("blk") and tensor.dim() == 2 and tensor.shape[1] % GGML_QUANT_SIZES[kind][0] == 0
        its = kind if blocks else GGMLQuantizationType.F32  # bf16 values in F32: nothing is rounded
        writer.add_tensor(short, quantize(tensor.float().contiguous().numpy(), its), raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@cache
def adapter_folder() -> Path:
    """An adapter of `model_folder`, two steps old; the folder is all that train.py writes."""
    out = scratch() / "adapter"
    done = train(out, cwd=scratch())
    assert done.code == 0, done.err
    return out


def train(out, *argv, cwd: Path, model: Path | None = None, data: Path | None = None, **how) -> "Result":
    """A short run; later flags win, and with --data among them they alone are its data."""
    short = ("--max-steps", 2, "--rank", 4, "--lr", 0.05, *ON_CPU)
    given = () if "--data" in argv else ("--data", data or data_file())
    inputs = ("--model", model or model_folder(), *given, "--out", out)
    return call("train", *inputs, *short, *argv, cwd=cwd, **how)


def ask(*argv, cwd: Path, **how) -> "Result":
    """Short answers in float32; later flags win."""
    return call("generate", "--max-new-tokens", 12, *ON_CPU, *argv, cwd=cwd, **how)


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: path -> sha256 of its bytes, or what else it is."""

    def what(path: Path) -> str:
        if path.is_symlink():
            return f"link to {os.readlink(path)}"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder" if path.is_dir() else "?"

    return {str(path.relative_to(folder)): what(path) for path in sorted(folder.rglob("*"))}


# ---- running a command -----------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """Exit code (128 + signal number where a signal ended it), stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that begin with `error:`."""
        return [line for line in self.err.replace("\r", "\n").split("\n") if line.startswith("error:")]


ENVIRONMENT = {  # None removes a variable
    "HF_HUB_OFFLINE": "1",
    "HF_ENDPOINT": None,
    "HF_TOKEN": None,
    "LORA_DEBUG": None,
    "OMP_NUM_THREADS": "1",
    "PYTHONIOENCODING": None,
}


def set_environment(env: dict[str, str | None]) -> None:
    for key, value in ({"HF_HOME": str(scratch() / "hub")} | ENVIRONMENT | env).items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value


@cache
def warm() -> None:
    """Do once what every child would: import what the product imports late, and take slow first steps."""
    "".encode("utf-8-sig"), lint.normal("")  # a codec is imported, and a table made, when first used
    for module in ("torch._dynamo", *SCRIPTS.values()):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:  # finds fonts
        draw([{"step": 1, "loss": 1.0, "lr": 0.1}], Path(folder, "loss.png"), "a run")
    with torch.device("meta"):  # whose first operations take longest
        inject(model := Model(ModelConfig.from_json(tiny_config())), 4)
    memory.saved_by_blocks(model.train(), (5, 3))


def draw_once(rows: list[dict], path: Path, title: str, best: int | None, loss: str) -> None:
    """Instead of `draw`, half of the time of a short run: the first picture of rows with such names serves them all."""
    kind = sorted({tuple((name, row[name] is None) for name in row) for row in rows}), len(rows[:2]), best is None, loss
    picture = scratch() / f"{hashlib.sha256(repr(kind).encode()).hexdigest()}.png"
    if not picture.exists():
        draw(rows, picture, title, best, loss)
    files.write_bytes(path, picture.read_bytes())


class Fork:
    """`run(main, argv)` of a script in a forked child; `before` runs there first, so it may change anything."""

    def __init__(
        self,
        script: str,
        *argv,
        cwd: Path,
        env: dict | None = None,
        stdin: str | bytes = "",
        before: Callable | None = None,
    ):
        warm()
        given, *self.texts = self.streams = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        given.write(stdin.encode() if isinstance(stdin, str) else stdin)
        given.seek(0)
        sys.stdout.flush(), sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads; the child uses none of them
            self.pid = os.fork()
        if self.pid == 0:
            results.draw = draw_once
            _child(script, [str(word) for word in argv], cwd, env or {}, self.streams, before)

    def result(self) -> Result:
        """Waits for its end."""
        code, texts = _wait(self.pid), []
        for file in self.texts:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        for file in self.streams:
            file.close()
        return Result(code, *texts)


def call(script: str, *argv, **how) -> Result:
    """What came of a `Fork`."""
    return Fork(script, *argv, **how).result()


def use_streams(*streams) -> None:
    """Three files become stdin, stdout and stderr of this process."""
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115


def _child(script: str, argv: list[str], cwd: Path, env: dict, streams: tuple, before) -> None:
    code = 70
    try:
        use_streams(*streams)
        for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
            del sys.modules[name]  # its settings are read from the environment when it is imported
        torch.set_num_threads(1)  # the parent's threads do not live here
        os.chdir(cwd)
        set_environment(env)
        sys.argv = [f"{script}.py", *argv]
        if before:
            before()
        code = run(sys.modules[SCRIPTS[script]].main, argv)
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> tuple[int, bool]:
    """The exit code of a child (minus a signal's number), which is killed after so many seconds; did it end by then?"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), False


def _wait(child: int) -> int:
    code, in_time = wait(child, SECONDS)
    return 124 if not in_time else code if code >= 0 else 128 - code


def start(script: str, *argv, cwd: Path, env: dict | None = None, **how) -> subprocess.Popen:
    """A script as a real process, its streams as text in pipes."""
    environment = {"HF_HOME": str(scratch() / "hub")} | dict(os.environ) | ENVIRONMENT | (env or {})
    command = [sys.executable, ROOT / f"{SCRIPTS[script].replace('.', '/')}.py", *argv]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | how
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env={key: value for key, value in environment.items() if value is not None},
        text=True,
        encoding="utf-8",
        errors="replace",
        **pipes,
    )


def finish(running: subprocess.Popen, stdin: str = "") -> Result:
    try:
        out, err = running.communicate(stdin, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        running.kill()
        out, err = running.communicate()
        return Result(124, out or "", err or "")
    return Result(running.returncode if running.returncode >= 0 else 128 - running.returncode, out or "", err or "")


def process(script: str, *argv, cwd: Path, env: dict | None = None, stdin: str = "") -> Result:
    """`python SCRIPT.py argv...` as a real process."""
    return finish(start(script, *argv, cwd=cwd, env=env), stdin)
