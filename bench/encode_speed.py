"""How long 100,000 rows take from file to examples, and how much memory: `python bench/encode_speed.py [ROWS]`.

Runs `train.py --preview 0` on a made file and on a hundredth of it, each in a process of its own.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write(path: Path, rows: int) -> None:
    """Chats of 15 to 150 words from the licence."""
    draw = random.Random(1)
    words = [word for word in (ROOT / "LICENSE").read_text(encoding="utf-8").split() if word.isascii()]
    with open(path, "w") as file:
        for _ in range(rows):
            turns = [" ".join(draw.choices(words, k=draw.randint(low, high))) for low, high in ((5, 30), (10, 120))]
            file.write(json.dumps(dict(zip(("question", "answer"), turns, strict=True))) + "\n")


def main(rows: int = 100_000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for count in (rows // 100, rows):
            path, start = Path(folder) / f"{count}.jsonl", time.monotonic()
            write(path, count)
            start = time.monotonic()
            command = [sys.executable, ROOT / "train.py", "--data", path, "--preview", "0"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            out = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            seconds, tokens = time.monotonic() - start, int(out.split("tokens: ")[1].split()[0])
            assert status == 0
            print(f"{count:,} rows, {tokens:,} tokens: {seconds:.1f} s, {usage.ru_maxrss / 1024:.0f} MB at the peak")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
