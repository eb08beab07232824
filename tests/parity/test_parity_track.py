"""What --track wrote is read back with the trackers' own readers.

LORA_PARITY=1 makes a missing tensorboard or trackio a failure; without it the file is skipped.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests import cli
from tests.mutation import mutation

HOW = ("--batch-size", 3, "--eval-fraction", 0.2, "--eval-every", 2, "--save-every", 2, "--schedule", "constant")


if os.environ.get("LORA_PARITY") != "1":
    pytest.importorskip("tensorboard")
    pytest.importorskip("trackio")


def expected(folder) -> dict[str, list[tuple[int, float]]]:
    """name -> (step, value) of every row."""
    found = {}
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        for name, value in row.items():
            if name not in ("step", "samples"):
                found.setdefault(name, []).append((row["step"], value))
    return found


def rounded(values) -> list:
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in values]  # tensorboard holds float32


@mutation("lora/run/results.py", "run_state.FOLDER, track.FOLDER,", "run_state.FOLDER,")
@mutation("lora/run/track.py", "purge_step=step + 1 if step else None", "purge_step=None")
def test_tensorboard_reads_every_row_of_a_run_and_of_the_run_that_went_on(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cli.train("run", *HOW, "--max-steps", 6, "--track", "tensorboard", cwd=tmp_path).code == 0
    first = expected(tmp_path / "run")
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        if checkpoint.name != "000004":
            shutil.rmtree(checkpoint)  # it goes on from step 4
    again = ("--resume", "--out", "run", "--track", "tensorboard")
    assert first and cli.call("train", *again, cwd=tmp_path).code == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    rows = expected(tmp_path / "run")
    assert set(events.Tags()["scalars"]) == set(rows) and {"loss", "eval_loss", "retention_kl"} <= set(rows)
    for name, values in rows.items():
        assert [(e.step, e.value) for e in events.Scalars(name)] == rounded(values), name
    assert cli.train("run", *HOW, "--overwrite", cwd=tmp_path).code == 0  # the folder is known as ours
    assert not (tmp_path / "run/tensorboard").exists()


def test_trackio_reads_every_row(tmp_path):
    kept = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    inputs = ("--model", cli.model_folder(), "--data", cli.data_file(), "--out", "run", *cli.ON_CPU)
    done = cli.process("train", *inputs, *HOW, "--max-steps", 4, "--track", "trackio", cwd=tmp_path, env=kept)
    assert done.code == 0 and "rackio" not in done.out, done.err
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "print(json.dumps([S.get_runs('lora'), S.get_logs('lora', 'run')]))"
    )
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **kept})
    names, logs = json.loads(read.stdout.splitlines()[-1])
    found = {}
    for log in logs:
        for name, value in log.items():
            if name not in ("step", "timestamp"):
                found.setdefault(name, []).append((log["step"], value))
    assert names == ["run"] and found == expected(tmp_path / "run")
