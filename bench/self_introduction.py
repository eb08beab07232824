"""Does the main job teach a name, and only where it belongs?   python bench/self_introduction.py [NAME ...]

Three names by two seeds: data, training and answers by the commands of the README with default settings; then 60
identity questions and 60 unrelated ones, all worded as no training row is (tests/fixtures/*_questions.txt). Prints a
table and writes bench/results/self_introduction.json with every answer that counts against the model.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "self_introduction.json"
PEOPLE = {
    "Nimbus": "the Cloud Lab",
    "Blue Heron": "Ada Okafor",
    "Zyqorva": "DistContext Quintax",
}  # one word, two, invented
SEEDS = (0, 1)


def command(*words) -> None:
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def ask(adapter: Path, kind: str, scratch: Path) -> list[dict]:
    questions, out = ROOT / "tests" / "fixtures" / f"{kind}_questions.txt", scratch / f"{kind}.jsonl"
    command(
        "generate.py",
        "--adapter",
        adapter,
        "--prompts",
        questions,
        "--out",
        out,
        "--max-new-tokens",
        64,
        "--batch-size",
        30,
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


def measure(name: str, author: str, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data, adapter, start = scratch / "data.jsonl", scratch / "adapter", time.monotonic()
        command("data_gen/self_cognition.py", "--name", name, "--author", author, "--seed", seed, "--out", data)
        command("train.py", "--data", data, "--out", adapter, "--seed", seed)
        seconds = time.monotonic() - start
        named = {
            kind: [(row, name.lower() in row["prediction"].lower()) for row in ask(adapter, kind, scratch)]
            for kind in ("identity", "unrelated")
        }
    return {
        "name": name,
        "seed": seed,
        "identity": sum(hit for _, hit in named["identity"]),
        "unrelated": sum(hit for _, hit in named["unrelated"]),
        "of": [len(rows) for rows in named.values()],
        "training_seconds": round(seconds, 1),
        "missed": [row for row, hit in named["identity"] if not hit],
        "spilt": [row for row, hit in named["unrelated"] if hit],
    }


def main() -> None:
    names = sys.argv[1:] or list(PEOPLE)
    rows = []
    print(f"{'name':12} seed  identity (of 60)  unrelated (of 60)  training s")
    for name in names:
        for seed in SEEDS:
            row = measure(name, PEOPLE.get(name, "its author"), seed)
            rows.append(row)
            counts = f"{row['identity']:16}  {row['unrelated']:17}  {row['training_seconds']:10.0f}"
            print(f"{name:12} {seed:4}  {counts}", flush=True)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine, **versions, "runs": rows}, indent=1, ensure_ascii=False) + "\n")
    worst = min(row["identity"] for row in rows), max(row["unrelated"] for row in rows)
    print(f"worst: {worst[0]} of 60 named, {worst[1]} of 60 unrelated")


if __name__ == "__main__":
    main()
