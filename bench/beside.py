"""How fast is training beside a process that keeps a core busy?   python bench/beside.py [--rounds 3] [WAITING ...]

The main job's own data, 8 steps by `train.py` in a fresh process, alone and beside an endless loop, once as it is and
once for every setting of the OpenMP runtime that is named (`default` takes ours away; NAME=VALUE,NAME=VALUE sets
variables). The order rotates. Prints tokens/s, the share of the speed alone, and what each setting costs alone;
bench/results/beside.json keeps every figure, those of both kinds of CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "beside.json"
STEPS, WARM = 8, 2
sys.path.insert(0, str(ROOT))

from bench import machine  # noqa: E402
from lora import files  # noqa: E402

BUSY = "while True: pass"


def tokens_per_second(data: Path, variables: dict[str, str], busy: bool) -> float:
    """Median over the steps after the first ones of one process."""
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "train.py", "--data", data, "--max-steps", STEPS, "--out", f"{out}/run"]
            subprocess.run([*map(str, command)], cwd=ROOT, env=os.environ | variables, check=True, capture_output=True)
            rows = [json.loads(line) for line in (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()]
    finally:
        if other:
            other.kill()
            other.wait()
    return median(row["tokens_per_second"] for row in rows[WARM:] if "tokens_per_second" in row)


def variables(setting: str) -> dict[str, str]:
    if setting == "ours":
        return {}
    if setting == "default":
        return {"KMP_BLOCKTIME": "200"}  # so ours are not set; libomp's default, nothing to libgomp
    return dict(pair.split("=") for pair in setting.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=["default"], metavar="WAITING")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    settings = ["ours", *asked.settings]
    runs = {(setting, busy): [] for setting in settings for busy in (False, True)}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        words = ["data_gen/self_cognition.py", "--name", "Nimbus", "--author", "the Cloud Lab", "--out", data]
        subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, capture_output=True)
        for number in range(asked.rounds):
            order = list(runs)
            order = order[number % len(order) :] + order[: number % len(order)]
            for setting, busy in order:
                runs[setting, busy].append(tokens_per_second(data, variables(setting), busy))
                print(f"{setting} {'busy' if busy else 'alone'}: {runs[setting, busy][-1]:.0f}", file=sys.stderr)
    free = median(runs[settings[1], False])
    print(f"{'setting':36} alone  over {settings[1]}  beside  share")
    rows = []
    for setting in settings:
        alone, beside = median(runs[setting, False]), median(runs[setting, True])
        rows.append({"setting": setting, "alone": runs[setting, False], "beside": runs[setting, True]})
        print(
            f"{setting:36} {alone:5.0f}  {alone / free:{5 + len(settings[1])}.2f}  {beside:6.0f}  {beside / alone:5.2f}"
        )
    known = files.read_json(RESULT) if RESULT.exists() else {}
    share = median(rows[0]["beside"]) / median(rows[0]["alone"])
    found = {"machine": machine.described(), "tokens_per_second": rows, "reached": {"share": {"value": share}}}
    files.write_json(RESULT, known | {machine.keyed("beside"): found})


if __name__ == "__main__":
    main()
