"""Countdown rows: all can be solved, as their worked answers show; training and test share none; errors."""

import json

import pytest

from data_gen import countdown, tasks
from lora.data import formats
from tests.mutation import mutation


def write(tmp_path, *argv) -> list[dict]:
    assert countdown.main(["--out", str(tmp_path / "c.jsonl"), *map(str, argv)]) == 0
    return [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("numbers", [2, 3, 4, 6])
@mutation(
    "data_gen/countdown.py", '"*": (*sums, "/"), "/": (*sums, "*", "/")}[operator]', '"*": sums, "/": sums}[operator]'
)
@mutation("data_gen/countdown.py", "if operator not in sums and a.operator in sums", "if False")
@mutation("data_gen/countdown.py", '"-": sums, "*"', '"-": (), "*"')
def test_every_row_can_be_solved_as_its_worked_answer_shows(tmp_path, numbers):
    rows = write(tmp_path, "--rows", 60 if numbers == 2 else 300, "--numbers", numbers, "--answers")
    for row in rows:
        assert len(row["nums"]) == numbers and str(row["target"]) in row["prompt"]
        assert ", ".join(map(str, row["nums"])) in row["prompt"] and row["target"] not in row["nums"]
        assert tasks.countdown(row, [], row["completion"]) == 1.0, row
        *work, last = row["completion"].split("\n")
        assert last.endswith(f" = {row['target']}") and len(work) == (numbers - 1 if numbers > 2 else 0)
        for line in work:
            value, _ = tasks.evaluate(line.partition("=")[0])
            assert value == int(line.partition("=")[2]) and value >= 1


def test_rows_without_answers_are_prompts_with_columns(tmp_path):
    rows, answers = write(tmp_path, "--rows", 20), write(tmp_path, "--rows", 20, "--answers")
    assert [{k: v for k, v in row.items() if k != "completion"} for row in answers] == rows
    assert all([*row] == ["prompt", "nums", "target"] for row in rows)
    read = formats.read([tmp_path / "c.jsonl"])
    assert [row.messages[-1]["content"] for row in read] == [row["completion"] for row in answers]


@mutation("data_gen/countdown.py", 'f"{sorted(nums)}={target}"', 'f"{nums}={target}"')
@mutation("data_gen/countdown.py", "if game and key not in seen and", "if game and")
def test_held_out_games_are_in_no_training_file_and_no_game_is_there_twice(tmp_path):
    test = tmp_path / "t.jsonl"
    rows = write(tmp_path, "--rows", 1000, "--test-out", test, "--test-rows", 100)
    held_out = [json.loads(line) for line in test.read_text().splitlines()]
    games = [(*sorted(row["nums"]), row["target"]) for row in (*rows, *held_out)]
    assert len(held_out) == 100 and len({*games}) == 1100
    assert all(countdown.is_test(row["nums"][::-1], row["target"]) for row in held_out)
    other = write(tmp_path, "--rows", 1000, "--seed", 1)
    assert other != rows and not {(*sorted(row["nums"]), row["target"]) for row in other} & {*games[1000:]}


def test_the_same_arguments_give_the_same_rows_and_more_rows_begin_with_them(tmp_path):
    rows = write(tmp_path, "--rows", 30, "--highest", 50)
    assert rows == write(tmp_path, "--rows", 60, "--highest", 50)[:30]
    assert all(number <= 50 for row in rows for number in (*row["nums"], row["target"]))


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ("--numbers 1", "wrong --numbers in the command line: 1 is not in 2..6"),
        ("--rows 0", "wrong --rows"), ("--highest 3", "wrong --highest"), ("--test-rows 3", "need each other"),
        ("--rows 9999 --numbers 2 --highest 4", "no new one is found, and 9999 are asked for. Lower it"),
        ("--test-out c.jsonl --test-rows 1", "it is --out, too"), ("--test-out t.jsonl --test-rows 0", "--test-rows"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_with_one_line(tmp_path, monkeypatch, capsys, argv, why):
    monkeypatch.chdir(tmp_path)
    assert countdown.main(["--out", "c.jsonl", *argv.split()]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and why in line
    assert not any(tmp_path.iterdir())
