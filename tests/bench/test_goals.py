"""The table of goals: what it reads, what it counts as met, and that the chapter on speed quotes it."""

import json
from pathlib import Path

import pytest

from bench import goals
from tests.mutation import mutation

ROOT = Path(__file__).resolve().parents[2]


@mutation("bench/goals.py", '"short", "B1", ">=", 2.2, 3.0)', '"short", "B1", ">=", 2.0, 3.0)')
def test_the_chapter_on_speed_quotes_the_table_as_it_is():
    assert "\n".join(goals.table()) in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


@mutation("bench/goals.py", 'goal.part + " with AMX" * amx', "goal.part")
@mutation("bench/goals.py", "return self.with_amx if amx else self.without", "return self.without")
@mutation("bench/goals.py", 'value >= number if self.sign == ">=" else', "value <= number if self.sign else")
@pytest.mark.parametrize("sign, met", [(">=", (True, False)), ("<=", (False, True))])
def test_each_kind_of_cpu_has_its_result_and_its_goal(tmp_path, monkeypatch, sign, met):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    results = {"part": {"reached": {"x": {"value": 2.5}}}, "part with AMX": {"reached": {"x": {"value": 3.5}}}}
    (tmp_path / "bench" / "results" / "run.json").write_text(json.dumps(results))
    monkeypatch.setattr(goals, "ROOT", tmp_path)
    goal = goals.Goal("what", "run", "part", "x", sign, 2.0, 4.0)
    shown = [goals.cell(goal, amx) for amx in (False, True)]
    assert [cell.strip("*") for cell in shown] == ["2.50", "3.50"]
    assert tuple(cell.startswith("**") for cell in shown) == met


def test_what_was_not_measured_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(goals, "ROOT", tmp_path)
    goal = goals.Goal("what", "run", "part", "x", ">=", 2.0, None)
    assert [goals.cell(goal, amx) for amx in (False, True)] == ["", ""]


@mutation("bench/goals.py", "(goal.run, goal.part, goal.name) == (run, part, name)", "goal.name == name")
def test_a_benchmark_takes_its_goals_from_the_same_list():
    assert goals.judged("train_speed", "long", "B0", 3.5, True) == {"value": 3.5, "goal": ">= 3", "met": True}
    assert goals.judged("train_speed", "short", "B0", 3.5, True) == {"value": 3.5, "goal": ">= 4.5", "met": False}
    assert goals.judged("train_speed", "short", "compiled", 1.1, True) == {"value": 1.1}
