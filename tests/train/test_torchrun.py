"""train.py in several processes, with the variables that torchrun sets: the run of one process, ended together."""

import json
import os
import signal
import socket
import time

import pytest

from lora import files
from lora.train import run_state
from tests import cli
from tests.helpers import close
from tests.methods.linked import data_of, rewarded
from tests.mutation import mutation
from tests.run.test_resume import ordinary

STEADY = (
    "--schedule",
    "constant",
    "--warmup",
    0,
    "--batch-size",
    3,
    "--micro-tokens",
    60,
    "--rank",
    4,
    "--lr",
    0.01,
    *cli.ON_CPU,
)


def start(count, *argv, cwd, how=cli.Fork):
    """`count` ranks of one run on this machine, forked or, with `how` `cli.start`, as real processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    given = () if "--data" in argv else ("--data", cli.data_file())
    inputs = ("--model", cli.model_folder(), *given, "--out", "out", *STEADY)
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
    return [how("train", *inputs, *argv, cwd=cwd, env=place | rank) for rank in ranks]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def until_step(folder, step):
    deadline = time.monotonic() + cli.SECONDS
    while not (folder / "out/metrics.jsonl").exists() or len(metrics(folder / "out")) < step:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    held_out = ("--eval-data", cli.data_file(), "--eval-every", 4, "--retention", ordinary())
    done = cli.train("out", *STEADY, *held_out, "--max-steps", 10, cwd=folder)
    assert done.code == 0, done.err
    return folder / "out"


@mutation("train.py", "lr, args.clip, count, shared_stop.reduce)", "lr, args.clip, None, shared_stop.reduce)")
@pytest.mark.parametrize(
    ("how", "flags", "finish"),
    [(cli.start, (), cli.finish), (cli.Fork, ("--fsdp", "--checkpoint-activations"), cli.Fork.result)],
    ids=["shares", "a sharded base"],
)
def test_two_processes_make_the_run_of_one_and_only_the_first_writes_and_prints(tmp_path, alone, how, flags, finish):
    held_out = ("--eval-data", cli.data_file(), "--eval-every", 4, "--retention", ordinary())
    first, second = map(finish, start(2, *held_out, "--max-steps", 6, *flags, cwd=tmp_path, how=how))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "Try it" in first.err and (second.out, second.err) == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    done = cli.call("train", "--resume", "--out", "out", "--max-steps", 10, cwd=tmp_path)  # by one process
    assert done.code == 0 and "note     processes: 1, was 2" in done.err
    rows = [row for row in metrics(tmp_path / "out") if row.get("step") != 6 or "loss" in row]  # its last step then
    assert len(rows) == len(metrics(alone))
    for ours, theirs in zip(rows, metrics(alone), strict=True):
        assert ours["step"] == theirs["step"] and ours.get("tokens") == theirs.get("tokens")
        for key in ("loss", "grad_norm", "eval_loss", "retention_kl"):
            assert ours.get(key) == (pytest.approx(theirs[key], rel=1e-3, abs=1e-6) if key in theirs else None), key
    ours, theirs = (files.Safetensors(run / "adapter_model.safetensors") for run in (tmp_path / "out", alone))
    assert all(close(ours.read(name), theirs.read(name), 1e-3) for name in theirs.header)


@mutation(
    "lora/run/reference.py", "processes.all_reduce(found.flatten().tolist())", "found.flatten().tolist()", case="dpo"
)
@mutation(
    "train.py",
    "batches = objective.prepare(batches, processes.all_reduce)",
    "batches = objective.prepare(batches)",
    case="kto",
)
@mutation(
    "train.py",
    "figures = objective.figures(processes.all_reduce)",
    "figures = objective.figures()",
    case="reward",
)
@mutation("lora/run/rollouts.py", "places = range(processes.rank, len(indices), processes.size)",
          "places = range(len(indices))", case="rloo")  # fmt: skip
@pytest.mark.parametrize(
    ("method", "how", "flags"),
    [pytest.param("dpo", (), (), marks=pytest.mark.large), ("kto", ("--fsdp",), ()),
     pytest.param("reward", ("--fsdp",), (), marks=pytest.mark.large),
     pytest.param("grpo", (), ("--kl", 0.1), marks=pytest.mark.large),
     ("rloo", (), ("--batch-size", 4)), ("ppo", (), ("--whiten-rewards", "--kl-target", 0.5))],
    ids=["dpo", "kto", "reward", "grpo", "rloo", "ppo"],
)  # fmt: skip
def test_two_processes_make_the_run_of_one_with_every_method(tmp_path, method, how, flags):
    """Of rloo, the last of the steps has one prompt, so that one process has none."""
    learned = ("--method", method, "--data", data_of(method), "--eval-data", data_of(method), "--eval-every", 2,
               "--retention", ordinary(), "--max-steps", 3, "--batch-size", 5, "--micro-tokens", 90, *flags,
               *rewarded(method))  # fmt: skip
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    done = cli.train("out", *STEADY, *learned, cwd=tmp_path / "one")
    assert done.code == 0, done.err
    first, second = (rank.result() for rank in start(2, *learned, *how, cwd=tmp_path / "two"))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    one, two = tmp_path / "one/out", tmp_path / "two/out"
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in two.iterdir()}
    assert ("reference.safetensors" in names) == (method in ("dpo", "kto"))
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"tokens_per_second", "seconds", "samples", "unchanged"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), key
    for name in names & {"adapter_model.safetensors", "value_head.safetensors", "reference.safetensors"}:
        ours, theirs = files.Safetensors(two / name), files.Safetensors(one / name)
        assert all(close(ours.read(part), theirs.read(part), 1e-3) for part in theirs.header), name


@mutation(
    "lora/train/distributed.py",
    "float(self.stop.code == code) for code in codes",
    "float(self.stop.code == code and self.context.main) for code in codes",
)
def test_a_request_to_stop_that_reaches_one_process_stops_all_after_the_same_step(tmp_path):
    first, second = start(2, "--max-steps", 10**6, cwd=tmp_path)
    until_step(tmp_path, 3)
    os.kill(second.pid, signal.SIGTERM)
    first, second = first.result(), second.result()
    assert (first.code, second.code) == (143, 143), first.err + second.err
    steps = len(metrics(tmp_path / "out"))
    assert f"stopped after step {steps} of 1000000" in first.err
    assert run_state.newest(tmp_path / "out") == (run_state.at(tmp_path / "out", steps), [])


def test_where_one_process_is_lost_the_other_ends_with_3_without_saving(tmp_path):
    first, second = start(2, "--max-steps", 10**6, "--save-every", 2, cwd=tmp_path)
    until_step(tmp_path, 5)
    os.kill(second.pid, signal.SIGKILL)
    lost = time.monotonic()
    first = first.result()
    second.result()
    assert first.code == 3 and time.monotonic() - lost < 10
    assert "error: lost another rank in rank 0 of 2" in first.err and "Traceback" not in first.err
    good, passed_over = run_state.newest(tmp_path / "out")
    assert passed_over == [] and int(good.name) % 2 == 0  # saved on time, not at the end
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
