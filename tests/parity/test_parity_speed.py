"""bench/train_speed.py measures sides that compute the same, and no others. Run with LORA_PARITY=1."""

import json
import os
import re

import pytest

if os.environ.get("LORA_PARITY") != "1":
    pytest.skip("a referee's test: LORA_PARITY=1 runs it", allow_module_level=True)

from bench import train_speed

pytestmark = pytest.mark.large


def test_the_benchmark_runs_and_says_what_was_reached(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_speed.machine, "with_amx", lambda: False)
    out = tmp_path / "speed.json"
    train_speed.main(["--smoke", "--rounds", "1", "--out", str(out)])
    printed = capsys.readouterr().out
    for side in ("ours", "B0", "B1"):
        assert re.search(rf"^{side} +[\d.]+ +[\d.]+ ", printed, re.MULTILINE)
    for what in ("tokens/s over B0 +>= 3", "tokens/s over B1 +>= 2.2", "matmul-only time +<= 1.5", "GB +<= 6"):
        assert re.search(rf"{what} +\d+\.\d\d", printed)
    results = json.loads(out.read_text())
    assert set(results) == {"short", "document"}
    for result in results.values():
        assert {"machine", "date", "command", "parity", "float32"} <= result.keys()
    seen = {
        side: [(row["tokens"], row["trained"]) for row in run["rows"]]
        for side, [run] in results["short"]["runs"].items()
    }
    assert seen["ours"] == seen["B0"] == seen["B1"] and len(seen["ours"]) == 3


def test_a_side_that_computes_something_else_voids_the_speed(tmp_path, capsys, monkeypatch):
    job = train_speed.Bench.job

    def wrong(self, of, **more):
        return job(self, of, **more) | ({"alpha": 33.0} if of == "B1" else {})

    monkeypatch.setattr(train_speed.Bench, "job", wrong)
    with pytest.raises(SystemExit, match=r"void: small in float32, ours and B1: (loss|norm|worst tensor) "):
        train_speed.main(["--smoke", "--out", str(tmp_path / "speed.json")])
    assert "tokens/s" not in capsys.readouterr().out and not list(tmp_path.iterdir())
