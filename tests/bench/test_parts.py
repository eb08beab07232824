"""Processes of a benchmark that work by turns."""

import sys

import pytest

from bench.parts import ROOT, Processes
from tests.mutation import mutation

SIDE = """
import json, sys, time
from bench.parts import take_turn

job = json.load(open(sys.argv[1]))
for number in range(3):
    if number:
        take_turn()
    with open(job["log"], "a") as log:
        log.write(f"{job['side']} begins, ")
        log.flush()
        time.sleep(0.05)
        log.write(f"{job['side']} ends\\n")
    if job["side"] == job["fails"] and number == 1:
        sys.exit("no more")
json.dump({"side": job["side"]}, open(sys.argv[2], "w"))
"""


class Sides(Processes):
    def command(self, side):
        return [sys.executable, "-c", SIDE]

    def probe(self):
        return 1.0


@pytest.fixture
def turns(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def run(fails=None):
        log = tmp_path / "log"
        jobs = {side: {"log": str(log), "fails": fails} for side in "abc"}
        return Sides(tmp_path, 1, True).by_turns(jobs, 3), log.read_text().splitlines()

    return run


@mutation("bench/parts.py", "begins = (first + number) % len(sides)", "begins = 0")
@mutation("bench/parts.py", "                wait_for_turn(process)\n", "                pass\n")
def test_one_works_at_a_time_and_who_begins_rotates(turns):
    found, lines = turns()
    assert lines == [f"{side} begins, {side} ends" for side in "abcbcacab"]
    assert found == {side: {"side": side} for side in "abc"}


@mutation("bench/parts.py", "        if process.returncode:\n", "        if process.returncode is None:\n")
def test_a_side_that_fails_ends_the_benchmark_with_what_it_said(turns):
    with pytest.raises(SystemExit, match="b ended with 1\nno more"):
        turns("b")
