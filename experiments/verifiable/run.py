"""Reinforcement by a reward that a program can verify."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parts import Experiment, command, train

HERE = Path(__file__).resolve().parent
ROWS = 1200


def start(scratch: Path) -> dict:
    data = experiment.scratch / "start.jsonl"
    if not data.exists():
        command("data_gen/multiply.py", "--digits", 2, "--rows", ROWS, "--style", "terse", "--out", data)
    return {"training": train(scratch / "adapter", "--config", HERE / "start.toml")}


experiment = Experiment(__file__, __doc__, lambda found: {})
experiment.add("start", start, leaves="adapter")

if __name__ == "__main__":
    sys.exit(experiment.main())
