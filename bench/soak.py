"""Does the server stay as it was, whatever clients do?   python bench/soak.py

A tiny random model and two adapters behind `generate.py --serve` get 2,000 requests, 16 at a time: right ones, streamed
or not, whose answers must be those of a quiet hour; streams that are broken off, clients that go before an answer,
bodies that are no JSON or not what the API takes, prompts of 1 MB, bodies that are too large, paths that are not there.

Prints how often each came and how it ended, and the server's memory after 200 requests, in the middle and at the end.
Exit 1 where an answer was wrong, the server failed, wrote a trace, kept a row, or grew by more than 32 MB from the
first of these to the last. A few minutes on 2 cores; bench/results/soak.json gets the figures.
"""

import argparse
import asyncio
import json
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine  # noqa: E402
from lora import files  # noqa: E402

RESULT = ROOT / "bench" / "results" / "soak.json"
AT_ONCE, WARM, GROWTH = 16, 200, 32 * 2**20
CHAT = "/v1/chat/completions"
KINDS = {  # and how many of 100
    "whole": 28, "stream": 16, "broken stream": 14, "gone": 10, "garbage": 10, "not the API": 8, "1 MB prompt": 6,
    "too large": 2, "elsewhere": 6,
}  # fmt: skip
GARBAGE = (b"", b"{", b"\xff\xfe\x00", b"[" * 10_000, b'{"model": "base"', b"null", b"[]", b"\x00" * 1000)
NOT_THE_API = (
    {"model": "nobody"}, {"messages": []}, {"messages": [3]}, {"n": 10**9}, {"temperature": "hot"}, {"stop": [""]},
    {"logprobs": True}, {"max_tokens": -1}, {"unknown": 1}, {"messages": [{"role": ["user"], "content": {}}]},
)  # fmt: skip


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) * 1024


class Soak:
    def __init__(self, url: str, pid: int, models: list[str], seed: int = 0):
        self.url, self.pid, self.draw, self.models = url, pid, random.Random(seed), models
        self.expected, self.seen, self.wrong, self.memory = {}, Counter(), [], []

    def right(self) -> dict:
        number = self.draw.randrange(24)
        message = {"role": "user", "content": f"What is {number} and {number % 7}?"}
        sampled = {"temperature": 1.0, "seed": number} if number % 2 else {}
        model = self.models[number % len(self.models)]
        return {"model": model, "messages": [message], "max_tokens": 4 + number, "n": 1 + number % 3, **sampled}

    async def run(self, count: int) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as self.client:
            for _ in range(120):  # nobody else is there
                body = self.right()
                if (key := json.dumps(body)) not in self.expected:
                    self.expected[key] = await self.whole(body)
            kinds = self.draw.choices([*KINDS], [*KINDS.values()], k=count)
            marks, done, waiting = {min(WARM, count // 4), count // 2, count}, 0, iter(kinds)

            async def worker() -> None:
                nonlocal done
                for kind in waiting:
                    self.seen[kind, str(await self.one(kind))] += 1
                    done += 1
                    if done in marks:
                        self.memory.append(resident(self.pid))

            await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
            for _ in range(500):
                metrics = (await self.client.get("/metrics")).text
                if "lora_requests_open 0" in metrics:
                    break
                await asyncio.sleep(0.02)
            else:
                self.wrong.append("rows that nobody waits for were kept")

    async def whole(self, body: dict) -> list[str]:
        response = await self.client.post(CHAT, json=body)
        if response.status_code == 503:
            return []
        return [choice["message"]["content"] for choice in response.json()["choices"]]

    async def streamed(self, body: dict, most: float = float("inf")) -> list[str]:
        texts, count = [""] * body["n"], 0
        async with self.client.stream("POST", CHAT, json=body | {"stream": True}) as response:
            async for line in response.aiter_lines():
                if response.status_code != 200 or count >= most:
                    return []
                if line.startswith("data: {"):
                    count += 1
                    for choice in json.loads(line[6:])["choices"]:
                        texts[choice["index"]] += choice["delta"].get("content", "")
        return texts

    async def one(self, kind: str) -> object:
        """What came of a request of this kind: a status, or a word."""
        body, draw = self.right(), self.draw
        if kind in ("whole", "stream"):
            got = await (self.whole if kind == "whole" else self.streamed)(body)
            if got and got != self.expected.setdefault(json.dumps(body), got):
                self.wrong.append(f"{body}: {got}")
            return "answered" if got else 503
        if kind == "broken stream":
            await self.streamed(body, draw.randrange(6))
            return "broken off"
        if kind == "gone":
            with suppress(TimeoutError, httpx.HTTPError):
                await asyncio.wait_for(self.client.post(CHAT, json=body), draw.random() * 0.05)
            return "gone"
        if kind == "elsewhere":
            method, path = draw.choice((("GET", "/"), ("PUT", CHAT), ("GET", "/../etc/passwd"), ("OPTIONS", CHAT)))
            response = await self.client.request(method, path)
        elif kind == "garbage":
            response = await self.client.post(CHAT, content=draw.choice(GARBAGE))
        else:
            if kind == "not the API":
                body |= draw.choice(NOT_THE_API)
            else:
                size = 10**6 if kind == "1 MB prompt" else 5 * 10**6
                body["messages"] = [{"role": "user", "content": draw.choice(("long ", "x", "é")) * (size // 5)}]
            response = await self.client.post(CHAT, json=body)
        if response.status_code >= 500 and response.status_code != 503:
            self.wrong.append(f"{kind}: {response.status_code} {response.text[:200]}")
        return response.status_code

    def report(self) -> None:
        for (kind, ended), count in sorted(self.seen.items()):
            print(f"{kind:16}{ended:12}{count:6}")
        print("memory MB:", *(f"{bytes / 1e6:.0f}" for bytes in self.memory))
        for line in self.wrong[:10]:
            print("WRONG", line)

    @property
    def grown(self) -> int:
        return self.memory[-1] - self.memory[0]


def main(argv=None) -> int:
    from tests import cli
    from tests.adapters import write_adapter

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        adapters = [write_adapter(folder / name, seed) for seed, name in enumerate(("heron", "crane"), 1)]
        log, start = folder / "log", time.monotonic()
        with open(log, "w") as err:
            flags = ("--serve", 0, "--model", cli.model_folder(), "--adapter", *adapters, *cli.ON_CPU)
            server = cli.start("generate", *flags, cwd=folder, stderr=err)
        try:
            while "Ctrl-C ends it" not in log.read_text():
                if server.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.05)
            url = next(word for word in log.read_text().split() if word.startswith("http://")).rstrip("/")
            soak = Soak(url, server.pid, ["base", "heron", "crane"], chosen.seed)
            asyncio.run(soak.run(chosen.requests))
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=30)
        finally:
            server.kill()
        soak.report()
        errors = log.read_text()
    traces, lines = errors.count("Traceback"), errors.count("error:")
    print(f"tracebacks {traces}, errors {lines}, exit {server.returncode}, {time.monotonic() - start:.0f} s")
    row = {
        "machine": machine.described(), "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "command": shlex.join(["python", "bench/soak.py", *(sys.argv[1:] if argv is None else argv)]),
        "requests": {f"{kind}, {ended}": count for (kind, ended), count in sorted(soak.seen.items())},
        "memory": soak.memory, "tracebacks": traces, "wrong": soak.wrong, "exit": server.returncode,
    }  # fmt: skip
    files.write_json(chosen.out, row)
    return int(bool(soak.wrong) or traces > 0 or lines > 0 or soak.grown > GROWTH or server.returncode != 130)


if __name__ == "__main__":
    sys.exit(main())
