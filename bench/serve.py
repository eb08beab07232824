"""How fast is the server for one, eight and 32 clients at once, and is it fair?   python bench/serve.py

The default model in bfloat16 behind `generate.py --serve`, with the base and two adapters of rank 16 on all linears,
two threads. Each client streams 128 tokens, greedy, for a prompt of 64; clients of a round begin together. Beside it,
in a process of its own, what `generate.py` needs for one such answer. Rounds rotate; medians are given.

Tokens/s are those of all clients, from the first request to the last token. A fair share of 32 equal answers is that
all end together: latest over fair is the last answer's time over the mean of all. Prints a table; bench/results/
serve.json gets every raw row. About six minutes on 2 quiet cores.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import mean, median

import httpx
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine  # noqa: E402
from lora import files, pretrained  # noqa: E402
from lora.adapter import passport, store  # noqa: E402
from lora.adapter.inject import inject, lora_layers  # noqa: E402
from lora.pretrained import default_model  # noqa: E402

RESULT = ROOT / "bench" / "results" / "serve.json"
PROMPT, CLIENTS = 64, (1, 8, 32)
ALONE = """
import json, sys, time, torch
from lora import pretrained
from lora.inference.generate import stream_tokens
ids, new, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
model = pretrained.load_model(pretrained.find(sys.argv[2]), torch.bfloat16)
for _ in range(2):  # the second counts
    start = time.perf_counter()
    count = len(list(stream_tokens(model, [ids], {-1}, new)))
print(count / (time.perf_counter() - start))
"""


def write_adapter(base: Path, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    checkpoint = pretrained.find(str(base))
    model = pretrained.load_model(checkpoint, torch.bfloat16)
    inject(model, 16, 32)
    for layer in lora_layers(model).values():  # large enough to change answers, small enough for text
        torch.nn.init.normal_(layer.lora_B, std=0.003)
    store.save(model, folder, str(base), passport.make(checkpoint, lora_layers(model)), task="CAUSAL_LM")
    return folder


def alone(base: Path, ids: list[int], new: int, threads: int) -> float:
    """Tokens/s of `generate.py`'s way."""
    told = json.dumps([ids, new, threads])
    done = subprocess.run([sys.executable, "-c", ALONE, told, str(base)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout)


async def at_once(url: str, prompts: list[list[int]], models: list[str], new: int) -> dict:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        start = time.perf_counter()

        async def one(number: int) -> dict:
            body = {"model": models[number % len(models)], "prompt": prompts[number], "max_tokens": new, "stream": True}
            first, usage = None, {"include_usage": True}
            async with client.stream("POST", "/v1/completions", json=body | {"stream_options": usage}) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter() - start
                        tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", 0)
            return {"first s": first, "s": time.perf_counter() - start, "tokens": tokens}

        answers = await asyncio.gather(*map(one, range(len(prompts))))
        wall = time.perf_counter() - start
    times = [answer["s"] for answer in answers]
    return {
        "clients": len(prompts), "tokens/s": sum(answer["tokens"] for answer in answers) / wall,
        "latest over fair": max(times) / mean(times), "first s": median(answer["first s"] for answer in answers),
        "answers": answers,
    }  # fmt: skip


class Server:
    def __init__(self, folder: Path, base: Path, adapters: list[Path], threads: int):
        self.log = folder / "log"
        command = [sys.executable, "generate.py", "--serve", "0", "--model", base, "--adapter", *adapters]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*map(str, command), "--dtype", "bfloat16", "--device", "cpu"], cwd=ROOT, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip

    def __enter__(self) -> str:
        while "Ctrl-C ends it" not in self.log.read_text():
            if self.process.poll() is not None:
                raise SystemExit(self.log.read_text())
            time.sleep(0.1)
        return next(word for word in self.log.read_text().split() if word.startswith("http://")).rstrip("/")

    def __exit__(self, *error) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args(argv)
    base, rounds, single = default_model.folder(), [], []
    text = pretrained.load_chat(pretrained.find(str(base))).tokenizer.encode((ROOT / "LICENSE").read_text())
    prompts = [text[20 * i : 20 * i + PROMPT] for i in range(max(CLIENTS))]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        adapters = [write_adapter(base, folder / name, seed) for seed, name in enumerate(("heron", "crane"))]
        models = ["base", "heron", "crane"]
        for number in range(chosen.rounds):
            single.append(alone(base, prompts[0], chosen.new, chosen.threads))
            with Server(folder, base, adapters, chosen.threads) as url:
                asyncio.run(at_once(url, prompts[:8], models, 8))  # warm
                for clients in CLIENTS if number % 2 == 0 else CLIENTS[::-1]:
                    rounds.append(asyncio.run(at_once(url, prompts[:clients], models, chosen.new)))
    rates = {n: median(one["tokens/s"] for one in rounds if one["clients"] == n) for n in CLIENTS}
    fair = {n: median(one["latest over fair"] for one in rounds if one["clients"] == n) for n in CLIENTS}
    print(f"{'clients':>16}{'tokens/s':>10}{'over one':>10}{'to first s':>12}{'latest over fair':>18}")
    print(f"{'generate.py':>16}{median(single):10.1f}{median(single) / rates[1]:10.2f}")
    for n in CLIENTS:
        first = median(one["first s"] for one in rounds if one["clients"] == n)
        print(f"{n:16}{rates[n]:10.1f}{rates[n] / rates[1]:10.2f}{first:12.2f}{fair[n]:18.2f}")
    goals = [
        {"what": "tokens/s of eight at once over one", "value": rates[8] / rates[1], "met": rates[8] >= 3 * rates[1]},
        {"what": "latest of 32 over its fair share", "value": fair[32], "met": fair[32] <= 1.2},
    ]
    for goal in goals:
        print(f"{goal['what']:40}{goal['value']:8.2f}  {'met' if goal['met'] else 'missed'}")
    command = shlex.join(["python", "bench/serve.py", *(sys.argv[1:] if argv is None else argv)])
    head = {"machine": machine.described(), "date": f"{datetime.now():%Y-%m-%d %H:%M}", "command": command}
    head |= {"threads": chosen.threads, "reached": goals, "generate.py tokens/s": single, "rounds": rounds}
    files.write_json(chosen.out, head)


if __name__ == "__main__":
    main()
