"""Does a broken file ever cost more than a line?   python bench/mutated_inputs.py [--count 50000] [--seed N] [--kind K]

Files of every kind that the commands read are mutated at random, by their bytes or by their structure, and given to the
command that reads them: rows of data, pairs, prompts, chat templates, configs and tokenizers, adapter configs,
safetensors and GGUF headers, value heads, journals, checkpoints, files of settings. An input must be used or refused
with its lines. Counted as failures are tracebacks (exit code 1, a crash), hangs over 10 s and memory over 1 GB; their
files are kept, and exit is 1.

Input i of a seed is the same on every machine. Prints a table; bench/results/mutated_inputs.json gets it.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from bench import machine, mutators  # noqa: E402
from bench.kills import commit, start_worker  # noqa: E402
from data_gen.journal import Journal, Question, Reply  # noqa: E402
from lora import files  # noqa: E402
from lora.adapter import value_head  # noqa: E402
from lora.errors import run  # noqa: E402
from lora.pretrained.gguf import GGUFFile  # noqa: E402
from tests import cli  # noqa: E402

RESULT = ROOT / "bench" / "results" / "mutated_inputs.json"
SECONDS, BYTES, PART, WORKERS = 10, 10**9, 50, 2  # PART inputs run in one process
USED, REFUSED, TRACEBACK, HANG, MEMORY = OUTCOMES = ("used", "refused", "traceback", "hang", "memory")
ASK = ("--prompt", "a", "--max-new-tokens", 1, *cli.ON_CPU)
ABOUT = {"teacher": "t", "seed": 0}


# ---- what is mutated: a kind makes a file or folder in `place`, mutates it, and returns what reads it ----------------


def command(script: str, *argv) -> Callable[[], int]:
    return lambda: run(sys.modules[cli.SCRIPTS[script]].main, [str(word) for word in argv])


def mutate_one(folder: Path, names: tuple[str, ...], chosen: random.Random) -> None:
    """One file of a folder, by what it holds; now and then it is gone, empty, a folder or a link to nowhere."""
    path = folder / chosen.choice([name for name in names if (folder / name).exists()])
    data = path.read_bytes()
    if chosen.random() < 0.03:
        path.unlink()
        chosen.choice([lambda: None, path.touch, path.mkdir, lambda: path.symlink_to("nowhere")])()
    elif path.suffix == ".safetensors":
        path.write_bytes(mutators.safetensors(data, chosen))
    elif path.suffix == ".json":
        path.write_bytes(mutators.json_text(data, chosen))
    else:
        path.write_bytes(mutators.text(data, chosen))


def rows(place: Path, chosen: random.Random):
    lines = mutators.ROWS + [line.encode() for line in cli.data_file().read_text().splitlines()]
    lines = [chosen.choice(lines) for _ in range(chosen.randint(1, 6))]
    number = chosen.randrange(len(lines))
    lines[number] = mutators.json_text(lines[number], chosen)
    path = place / chosen.choice(["data.jsonl", "data.json", "data"])
    path.write_bytes(b"\n".join(lines))
    what = chosen.choice(
        [["--preview", 1], ["--preview", 1, "--overlong", "truncate", "--train-on", "all"], ["--check"]]
    )
    return command("train", "--model", cli.model_folder(), "--data", path, *cli.ON_CPU, *what)


def pairs(place: Path, chosen: random.Random):
    method = chosen.choice(["dpo", "dpo", "reward", "kto"])
    judged = [row for row in mutators.PAIRS if b"label" in row or b"kto_tag" in row]
    lines = judged if method == "kto" else [row for row in mutators.PAIRS if row not in judged]
    lines = [chosen.choice(lines) for _ in range(chosen.randint(1, 6))]
    number = chosen.randrange(len(lines))
    lines[number] = mutators.json_text(lines[number], chosen)
    path = place / "pairs.jsonl"
    path.write_bytes(b"\n".join(lines))
    what = chosen.choice([["--preview", 1], ["--preview", 1, "--overlong", "truncate", "--max-len", 40], ["--check"]])
    return command("train", "--method", method, "--model", cli.model_folder(), "--data", path, *cli.ON_CPU, *what)


def prompts(place: Path, chosen: random.Random):
    lines = [
        chosen.choice([*mutators.PROMPTS, *mutators.PROMPTS, *mutators.PAIRS]) for _ in range(chosen.randint(1, 6))
    ]
    number = chosen.randrange(len(lines))
    lines[number] = mutators.json_text(lines[number], chosen)
    path = place / "prompts.jsonl"
    path.write_bytes(b"\n".join(lines))
    what = chosen.choice([["--preview", 2], ["--preview", 2, "--overlong", "error", "--max-len", 60], ["--check"],
                          ["--preview", 1, "--eval-fraction", 0.5],
                          ["--preview", 1, "--prompt-key", "question"]])  # fmt: skip
    method = chosen.choice(["grpo", "rloo", "ppo"])
    return command("train", "--method", method, "--model", cli.model_folder(), "--data", path, "--max-new-tokens", 16,
                   *cli.ON_CPU, *what)  # fmt: skip


def heads(place: Path, chosen: random.Random):
    folder = copy_of_adapter(place)
    width = json.loads((cli.model_folder() / "config.json").read_text())["hidden_size"]
    tensors = {"v_head.summary.weight": torch.ones(1, width), "v_head.summary.bias": torch.ones(1)}
    files.write_tensors(folder / value_head.FILE, tensors)
    mutate_one(folder, (value_head.FILE,), chosen)
    path = place / "pairs.jsonl"
    path.write_bytes(mutators.PAIRS[0])
    return command("evaluate", "--adapter", folder, "--model", cli.model_folder(), "--data", path, *cli.ON_CPU,
                   "--method", "reward", "--no-retention")  # fmt: skip


def templates(place: Path, chosen: random.Random):
    path = place / "template.jinja"
    path.write_bytes(mutators.template(chosen))
    what = ("--data", cli.data_file(), "--template", path, "--preview", 1)
    return command("train", "--model", cli.model_folder(), *what, *cli.ON_CPU)


def configs(place: Path, chosen: random.Random):
    folder = shutil.copytree(cli.model_folder(), place / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2], "temperature": 0.7}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    names = ("config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "special_tokens_map.json")  # fmt: skip
    mutate_one(folder, names, chosen)
    return command("generate", "--model", folder, *ASK)


def copy_of_adapter(place: Path) -> Path:
    return shutil.copytree(
        cli.adapter_folder(), place / "adapter", ignore=shutil.ignore_patterns("checkpoints", "*.png")
    )


def adapters(place: Path, chosen: random.Random):
    folder = copy_of_adapter(place)
    if chosen.random() < 0.5:
        (folder / "passport.json").unlink()  # as PEFT writes it
    config = ("adapter_config.json",) * 4
    mutate_one(folder, (*config, "passport.json", "chat_template.jinja", "settings.json", "metrics.jsonl"), chosen)
    if chosen.random() < 0.3:
        return command("merge", "--adapter", folder, "--model", cli.model_folder(), "--out", "merged", "--no-receipt")
    return command("generate", "--model", cli.model_folder(), "--adapter", folder, *ASK)


def safetensors(place: Path, chosen: random.Random):
    if chosen.random() < 0.5:
        folder = shutil.copytree(cli.model_folder(), place / "model")
        mutate_one(folder, ("model.safetensors",), chosen)
        return command("generate", "--model", folder, *ASK)
    folder = copy_of_adapter(place)
    mutate_one(folder, ("adapter_model.safetensors",), chosen)
    return command("generate", "--model", cli.model_folder(), "--adapter", folder, *ASK)


def gguf(place: Path, chosen: random.Random):
    path = place / "model.gguf"
    path.write_bytes(mutators.data(cli.gguf_file().read_bytes(), chosen, gguf_size()))
    return command("generate", "--model", path, *ASK)


@cache
def gguf_size() -> int:
    """Bytes before the first tensor's data."""
    size = cli.gguf_file().stat().st_size
    return size - sum(torch.Size(shape).numel() * 4 for _, shape in GGUFFile(cli.gguf_file()).header.values())


def journals(place: Path, chosen: random.Random):
    path = place / "out.jsonl.journal"
    path.write_bytes(mutators.data(whole_journal(), chosen))

    def read(argv) -> int:
        journal = Journal(path, ABOUT)
        try:
            for i in range(12):
                if str(i) not in journal:
                    journal.add(question(i), Reply(str(i), "an answer", "stop", 3), 1, 5)
                journal.fits(question(i)), journal[str(i)]
        finally:
            journal.close()
        return 0

    return lambda: run(read, [])


def question(i: int) -> Question:
    return Question(str(i), [{"role": "user", "content": f"question {i}"}])


@cache
def whole_journal() -> bytes:
    path = cli.scratch() / "whole.journal"
    journal = Journal(path, ABOUT)
    for i in range(8):
        journal.add(question(i), Reply(str(i), f"the answer {i} " * 20, "stop", 3), 1, 5)
    journal.close()
    return path.read_bytes()


def checkpoints(place: Path, chosen: random.Random):
    out = shutil.copytree(half_run(), place / "out")
    step = next((out / "checkpoints").iterdir())
    names = [str(path.relative_to(out)) for path in (*step.iterdir(), out / "settings.json", out / "metrics.jsonl")]
    mutate_one(out, tuple(sorted(names)), chosen)
    return command("train", "--resume", "--out", out)


@cache
def half_run() -> Path:
    """A run of four steps as it lies there after two."""
    whole = cli.scratch() / "whole run"
    done = cli.train(whole, "--max-steps", 4, "--save-every", 2, "--keep", 9, cwd=cli.scratch())
    assert done.code == 0, done.err
    shutil.rmtree(whole / "checkpoints" / "000004")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "report.md"):
        (whole / name).unlink()
    return whole


def settings(place: Path, chosen: random.Random):
    path = place / chosen.choice(["settings.toml", "settings.json"])
    data = {"rank": 4, "lr": 0.01, "epochs": 2, "target": ["q_proj"], "data": [str(cli.data_file())], "dora": True}
    if path.suffix == ".json":
        path.write_bytes(mutators.json_text(json.dumps(data).encode(), chosen))
    else:
        lines = [f"{key} = {json.dumps(value)}" for key, value in data.items()]
        path.write_bytes(mutators.text("\n".join(lines).encode(), chosen))
    return command("train", "--model", cli.model_folder(), "--config", path, "--preview", 0, *cli.ON_CPU)


KINDS = {  # and their share of all inputs
    rows: 10, templates: 6, configs: 10, adapters: 8, safetensors: 6, gguf: 6, journals: 2, checkpoints: 1, settings: 1,
    pairs: 8, heads: 2, prompts: 6,
}  # fmt: skip


# ---- a part of the inputs, in a process of its own -------------------------------------------------------------------


def kind_of(number: int) -> Callable:
    order = [kind for kind, share in KINDS.items() for _ in range(share)]
    return order[number % len(order)]


def serve(numbers: list[int], seed: int, place: Path, tell) -> None:
    """In a child: each input in turn. Tells its number before, and what came of it after."""
    torch.set_num_threads(1)
    cli.set_environment({})
    with open(os.devnull, "rb") as nothing, open(place / "log", "ab") as log:
        cli.use_streams(nothing, log, log)
    for number in numbers:
        folder = place / str(number)
        folder.mkdir()
        read = kind_of(number)(folder, random.Random(f"{seed}/{number}"))
        os.ftruncate(1, 0)
        os.chdir(folder)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = machine.of_status("VmRSS")
        tell.send(("begins", number))
        code = read()
        grown = machine.of_status("VmHWM") - before
        outcome = TRACEBACK if code == 1 else MEMORY if grown > BYTES else REFUSED if code else USED
        tell.send((outcome, number))
        if outcome in (USED, REFUSED):
            os.chdir(place)
            shutil.rmtree(folder)
    os._exit(0)


def prepare() -> None:
    """What all inputs have in common, made once, before the processes are forked."""
    cli.warm(), cli.model_folder(), cli.adapter_folder(), gguf_size(), whole_journal(), half_run()


def part(numbers: list[int], seed: int) -> list[tuple[int, str, str]]:
    """What came of some inputs: number, outcome, the folder where a failure is kept."""
    found, place = [], Path(tempfile.mkdtemp(prefix="mutated-"))
    while numbers:
        here, there = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            try:
                serve(numbers, seed, place, there)
            except BaseException as error:  # of ours, or one that went past `run`
                (place / "error").write_text(repr(error))
            os._exit(70)
        there.close()
        running = None
        try:
            while here.poll(SECONDS):
                word, number = here.recv()
                running = number if word == "begins" else None
                if word != "begins":
                    found.append((number, word, str(place / str(number))))
            ended = HANG
        except EOFError:
            ended = TRACEBACK
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done = {number for number, *_ in found}
        if running is not None:
            found.append((running, ended, str(place / str(running))))
            done.add(running)
        elif ended == HANG or (place / "error").exists():
            raise RuntimeError(f"the program itself failed, see {place}")
        numbers = [number for number in numbers if number not in done]
    if all(outcome in (USED, REFUSED) for _, outcome, _ in found):
        shutil.rmtree(place)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=[kind.__name__ for kind in KINDS], help="only this one; writes no result")
    args = parser.parse_args(argv)
    prepare()
    numbers = [n for n in range(args.first, args.first + args.count) if args.kind in (None, kind_of(n).__name__)]
    parts = [numbers[i : i + PART] for i in range(0, len(numbers), PART)]
    counts = {kind.__name__: Counter() for kind in KINDS}
    with (
        multiprocessing.get_context("fork").Pool(WORKERS, start_worker) as workers,
        tqdm(total=len(numbers), unit="input", desc="reading") as bar,
    ):
        tasks = [workers.apply_async(part, (numbers, args.seed)) for numbers in parts]
        for task in tasks:
            for number, outcome, folder in task.get():
                counts[kind_of(number).__name__][outcome] += 1
                bar.update()
                if outcome not in (USED, REFUSED):
                    bar.write(f"{outcome}: input {number} of seed {args.seed}, {kind_of(number).__name__}, {folder}")
    print(f"{'kind':12}" + "".join(f"{name:>11}" for name in OUTCOMES))
    for kind, count in counts.items():
        if count:
            print(f"{kind:12}" + "".join(f"{count[name]:11,}" for name in OUTCOMES))
    total = sum(counts.values(), Counter())
    print(f"{'all':12}" + "".join(f"{total[name]:11,}" for name in OUTCOMES))
    if not args.kind:
        head = {"seed": args.seed, "first": args.first, "code": commit(), **machine.described()}
        files.write_json(RESULT, head | {"kinds": {kind: dict(count) for kind, count in counts.items()}})
    return 1 if total[TRACEBACK] + total[HANG] + total[MEMORY] else 0


if __name__ == "__main__":
    sys.exit(main())
