"""`tests/mutate.py` itself: what it calls noticed was noticed, and what it chooses is what was changed."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import mutate
from tests.mutation import mutation

PRODUCT = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = """
import pytest
from product import double, half
from tests.mutation import mutation

@mutation("product.py", "2 * x", "3 * x")
def test_noticed():
    assert double(2) == 4

@mutation("product.py", "2 * x", "x + x")
def test_too_weak():
    assert double(2) == 4

@mutation("product.py", "x)", "y)")
def test_of_a_line_that_is_there_twice():
    pass

@mutation("product.py", "x / 2", "x")
def test_that_fails_anyway():
    assert half(2) == 2

@mutation("product.py", "x / 2", "x / 3", case="4")
@pytest.mark.parametrize("x", [0, 4])
def test_of_one_case(x):
    assert half(x) == x / 2

@mutation("product.py", "x / 2", "x / 5")
@pytest.mark.skipif(True, reason="no browser here")
def test_of_what_is_not_here():
    assert half(2) == 1
"""


@pytest.fixture
def project(tmp_path):
    """A small project with two commits: the first of the year 2020, the second of today."""
    (tmp_path / "tests").mkdir()
    for name in ("mutate.py", "mutation.py"):
        shutil.copy(Path(mutate.__file__).with_name(name), tmp_path / "tests")
    (tmp_path / "product.py").write_text(PRODUCT)
    (tmp_path / "tests/test_product.py").write_text(TESTS)
    commit(tmp_path, "2020-01-01T00:00:00Z")
    (tmp_path / "other.py").write_text("ONE = 1\n")
    (tmp_path / "tests/test_other.py").write_text(
        "from tests.mutation import mutation\nfrom other import ONE\n\n\n"
        '@mutation("other.py", "1", "2")\ndef test_one():\n    assert ONE == 1\n'
    )
    commit(tmp_path, f"{int(time.time())} +0000")
    return tmp_path


def commit(root: Path, date: str) -> None:
    env = os.environ | {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
    by = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), ("add", "-A"), (*by, "commit", "-qm", "x")):
        subprocess.run(["git", *command], cwd=root, env=env, check=True)


def run(root: Path, *arguments: str) -> tuple[int, list[str]]:
    command = [sys.executable, "tests/mutate.py", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    return done.returncode, (done.stdout + done.stderr).splitlines()


@mutation("tests/mutate.py", "    if code in (1, 2, 124):", "    if True:")
@mutation("tests/mutate.py", "    return 1 if survived else 0", "    return 0")
@mutation("tests/mutate.py", '    if SOUND[row["test"]] != 0:', "    if False:")
@mutation("tests/mutate.py", '    if text.count(row["line"]) != 1:', "    if False:")
def test_a_mutation_is_noticed_if_its_test_passes_as_it_is_and_fails_with_it(project):
    code, lines = run(project)
    assert code == 1 and lines[-1] == "3 of 6 mutations noticed, 1 not tried"
    assert sorted(line for line in lines if line.startswith("FAIL")) == [
        "FAIL product.py: 2 * x: tests/test_product.py::test_too_weak did not notice it (exit 0)",
        "FAIL product.py: x / 2: tests/test_product.py::test_that_fails_anyway fails without it (exit 1)",
        "FAIL product.py: x): its line is 2 times in product.py",
    ]
    assert (project / "product.py").read_text() == PRODUCT


@mutation("tests/mutate.py", "if code or passed.count else SKIPPED", "if True else SKIPPED")
@mutation("tests/mutate.py", '- verdicts.count("skipped")', "")
def test_one_whose_test_is_skipped_here_counts_as_not_tried(project):
    code, lines = run(project, "not_here")
    assert (code, lines) == (0, ["1/1 skipped   product.py: x / 2", "0 of 0 mutations noticed, 1 not tried"])


@mutation("tests/mutate.py", 'f"--since={when}"', '"--all"')
@mutation("tests/mutate.py", '{row["file"], row["test"].partition("::")[0]}', '{row["file"]}')
def test_since_chooses_those_whose_file_or_test_was_committed_since_then(project, monkeypatch):
    monkeypatch.setattr(mutate, "ROOT", project)

    def chosen(*words: str) -> list[str]:
        rows = mutate.chosen(argparse.Namespace(words=words, since="1.day"))
        return [row["test"].partition("::")[2] for row in rows]

    assert chosen() == ["test_one"] and chosen("product.py") == []
    (project / "tests/test_product.py").write_text(TESTS + "\n")  # the test alone
    commit(project, f"{int(time.time())} +0000")
    assert len(chosen()) == 7 and chosen("noticed", "x / 3") == ["test_noticed", "test_of_one_case[4]"]


@mutation("tests/mutate.py", "for row in of_a_test if time.time() < DEADLINE]", "for row in of_a_test]")
def test_after_the_minutes_no_other_is_begun_and_how_many_were_not_is_said(project):
    assert run(project, "--minutes", "0") == (0, ["0 of 0 mutations noticed, 7 not tried"])


@mutation("tests/mutate.py", "    if not table and not asked.since:", "    if False:")
def test_a_word_that_no_mutation_has_is_an_error(project):
    code, lines = run(project, "nowhere")
    assert code == 2 and lines[-1].endswith("error: no mutation has any of ['nowhere'] in its file, line or test")
