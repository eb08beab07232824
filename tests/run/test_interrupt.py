"""Ctrl-C and SIGTERM, sent at several moments: the exit code, no traceback, and a run that is whole or not there.

What is still importing is a real process, one in training and a chat, too; others are forked when all is imported.
"""

import fcntl
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from itertools import count

import pytest

from tests import cli

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
ENDLESS = ("--max-steps", 10**6, "--rank", 4, *cli.ON_CPU)


class Watched(cli.Fork):
    """A fork whose stderr is read until something has happened."""

    @property
    def seen(self):
        return os.pread(self.texts[1].fileno(), 2**20, 0).decode(errors="replace")

    def until(self, happened):
        deadline = time.monotonic() + cli.SECONDS
        while not happened(self):
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            assert ended is None and time.monotonic() < deadline, f"it never happened:\n{self.seen}"
            time.sleep(0.01)
        return self

    def send(self, number):
        os.kill(self.pid, number)
        return self


class Real(Watched):
    """The same of a real process."""

    def __init__(self, script, *argv, cwd):
        self.texts = self.streams = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.running = cli.start(script, *argv, cwd=cwd, stdout=self.texts[0], stderr=self.texts[1])
        self.pid = self.running.pid


def importing(watched):
    with open(f"/proc/{watched.pid}/maps") as maps:
        return "libtorch" in maps.read()


def said(text):
    return lambda watched: text in watched.seen


def steps(count):
    """So many steps are in the metrics."""

    def happened(watched):
        metrics = watched.cwd / "out/metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("\n") >= count

    return happened


def endless(module, name, call):
    """For `before`: the call of this number of a module's function says so and does not end: a signal is in time."""

    def before():
        whole, calls = getattr(sys.modules[module], name), count(1)

        def counted(*args, **how):
            if next(calls) == call:
                os.write(2, b"endless\n")
                time.sleep(2 * cli.SECONDS)
            return whole(*args, **how)

        setattr(sys.modules[module], name, counted)

    return before


def train(folder, *argv, how=Watched, **more):
    inputs = ("--model", cli.model_folder(), "--data", cli.data_file(), "--out", "out")
    watched = how("train", *inputs, *ENDLESS, *argv, cwd=folder, **more)
    watched.cwd = folder
    return watched


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param(importing, signal.SIGINT, id="imports-SIGINT"),
        pytest.param(importing, signal.SIGTERM, id="imports-SIGTERM"),
        pytest.param(said("run      out"), signal.SIGINT, id="start-SIGINT"),
        pytest.param(said("plan  "), signal.SIGTERM, id="loading-SIGTERM"),
    ],
)
def test_before_training_it_stops_at_once_and_an_earlier_run_is_untouched(tmp_path, moment, number):
    (tmp_path / "out").mkdir()
    for name in cli.RUN_FILES:
        (tmp_path / "out" / name).write_text("of the earlier run")
    before = cli.tree(tmp_path)
    how = {"how": Real} if moment is importing else {"before": endless("lora.pretrained", "load_model", 1)}
    code, out, err = train(tmp_path, "--overwrite", **how).until(moment).send(number).result()
    assert (code, out) == (CODES[number], "")
    assert "Traceback" not in err and "error:" not in err and err.endswith("stopped\n")
    assert cli.tree(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGINT, Real), (signal.SIGTERM, Watched)], ids=["SIGINT", "SIGTERM"]
)
def test_in_training_it_ends_the_step_and_saves_a_whole_adapter(tmp_path, number, how):
    done = train(tmp_path, how=how).until(steps(3)).send(number).result()
    assert done.code == CODES[number] and "Traceback" not in done.err and done.errors == []
    rows = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert f"stopped after step {len(rows)} of 1000000; the adapter so far is saved" in done.err
    assert sorted(cli.tree(tmp_path / "out")) == cli.run_tree(len(rows), without=("report.md",))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert cli.ask("--adapter", "out", "--prompt", "hi", cwd=tmp_path).code == 0


def test_a_second_signal_ends_it_at_once_and_nothing_half_written_is_left(tmp_path):
    watched = train(tmp_path, before=endless("train", "train_step", 4)).until(said("endless"))
    watched.send(signal.SIGTERM).until(said("again to stop at once")).send(signal.SIGINT)
    code, _, err = watched.result()
    assert code == 130 and "Traceback" not in err and "saved" not in err
    assert sorted(cli.tree(tmp_path)) == [
        ".out.lock",
        "out",
        "out/metrics.jsonl",
        "out/preview.json",
        "out/settings.json",
    ]
    done = cli.train("out", "--overwrite", cwd=tmp_path)  # the lock was the process's and ended with it
    assert done.code == 0 and sorted(cli.tree(tmp_path / "out")) == cli.run_tree(2)


def test_ctrl_c_in_a_chat(tmp_path):
    watched = Real("generate", "--model", cli.model_folder(), *cli.ON_CPU, cwd=tmp_path)
    code, out, err = watched.until(said("/quit ends")).send(signal.SIGINT).result()
    assert (code, out) == (130, "") and err.endswith("\nstopped\n") and "Traceback" not in err


def test_sigterm_while_answering_leaves_no_file_of_answers(tmp_path):
    (tmp_path / "p.txt").write_text("Tell me everything.\n" * 20_000)
    argv = ("--prompts", "p.txt", "--out", "answers.jsonl", *cli.ON_CPU)
    watched = Watched("generate", "--model", cli.model_folder(), *argv, cwd=tmp_path)
    code, out, err = watched.until(said("model ")).send(signal.SIGTERM).result()
    assert (code, out) == (143, "") and "Traceback" not in err
    assert sorted(cli.tree(tmp_path)) == ["p.txt"]


@needs_proc
@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("merge", ("--adapter", "a", "--out", "out")),
        ("self_cognition", ("--name", "A", "--author", "B", "--out", "rows")),
    ],
)
def test_ctrl_c_while_a_script_is_importing(tmp_path, script, argv):
    code, out, err = Real(script, *argv, cwd=tmp_path).until(importing).send(signal.SIGINT).result()
    assert (code, out) == (130, "") and err == "\nstopped\n"
    assert cli.tree(tmp_path) == {}


def test_a_signal_while_a_line_is_being_printed_still_ends_the_step(tmp_path):
    """Nobody reads stderr, so a write to it blocks; Python forbids to print from a signal handler inside a print."""
    inputs = ("--model", cli.model_folder(), "--data", cli.data_file(), "--out", "out")
    running = cli.start("train", *inputs, *ENDLESS, cwd=tmp_path, env={"PYTHONUNBUFFERED": None})
    with suppress(AttributeError):  # of Linux: a few lines fill it
        fcntl.fcntl(running.stderr, fcntl.F_SETPIPE_SZ, 4096)
    metrics, deadline, seen = tmp_path / "out/metrics.jsonl", time.monotonic() + cli.SECONDS, -1
    while time.monotonic() < deadline:  # until no step is made any more: it waits for its reader
        time.sleep(0.7)
        rows = metrics.read_text().count("\n") if metrics.exists() else 0
        if rows == seen > 0:
            break
        seen = rows
    running.send_signal(signal.SIGTERM)
    done = cli.finish(running)
    assert done.code == 143 and done.errors == [] and (tmp_path / "out/adapter_model.safetensors").exists(), done.err
