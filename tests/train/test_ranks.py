"""A step of several processes is one process's; only rank 0 speaks; whoever loses another ends with exit 3.

Processes are forked from this one, with the variables that torchrun would set; one test starts torchrun itself.
"""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported late by the product; it takes seconds in every child
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from lora import errors, files, pretrained
from lora.adapter.inject import disabled, inject, lora_layers
from lora.data import batch as batches
from lora.data.batch import dummy_batch, micro_batches
from lora.errors import BadEnvironment, BadInput, StopFlag, Stopped, say
from lora.inference.generate import generate
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from lora.pretrained import shard
from lora.train import distributed
from lora.train.step import clip
from tests.cli import ROOT, Result, gguf_file, scratch, set_environment
from tests.helpers import DELTAS, close, far, objective_of, patched, random_example, tiny_config, tiny_model
from tests.mutation import mutation
from tests.network.test_families import family_config, folder_of, model_of

CPU = torch.device("cpu")
SECONDS = 40  # after which a process that hangs is killed, code 137


# ---- several processes -----------------------------------------------------------------------------------------------


def run(size: int, work) -> list[Result]:
    """`work(rank)` in `size` forked processes, in the wrapper that every script has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children, streams = [], []
    for rank in range(size):
        pair = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        sys.stdout.flush(), sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads
            child = os.fork()
        if child == 0:
            _child(rank, size, port, work, pair)
        children.append(child)
        streams.append(pair)
    deadline, codes = time.monotonic() + SECONDS, {}
    while len(codes) < size:
        for child in set(children) - codes.keys():
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                codes[child] = code if code >= 0 else 128 - code
        time.sleep(0.005)
    results = []
    for child, pair in zip(children, streams, strict=True):
        for stream in pair:
            stream.seek(0)
        results.append(Result(codes[child], *(stream.read().decode(errors="replace") for stream in pair)))
    print(results)
    return results


def _child(rank: int, size: int, port: int, work, streams) -> None:
    code = 70
    try:
        for number, stream in enumerate(streams, 1):
            os.dup2(stream.fileno(), number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)  # the parent's threads do not live here
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        set_environment({"MASTER_ADDR": "127.0.0.1", "LORA_DEBUG": "1"} | {name: str(n) for name, n in names.items()})
        distributed.leave(errors.run(lambda argv: work(rank)))
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def all_well(results: list[Result]) -> bool:
    return [result.code for result in results] == [0] * len(results)


# ---- a step ----------------------------------------------------------------------------------------------------------


# lengths and trained tokens so unequal that a mean of the ranks' means is far off
EXAMPLES = [
    random_example(n - k, k, seed) for seed, (n, k) in enumerate([(50, 45), (12, 1), (9, 2), (31, 3), (7, 5), (22, 20)])
]
LENGTHS = [len(example.tokens) for example in EXAMPLES]


def step(
    model, processes: distributed.DistContext, indices, sharded: bool = False, micro_tokens: int = 40
) -> list[float]:
    """Gradients of a step over all ranks; returns its loss, its tokens, and how many ranks asked to stop."""
    trained = sum(sum(EXAMPLES[i].trained[1:]) for i in indices)
    cuts = [
        micro_batches([EXAMPLES[i] for i in share], micro_tokens)
        for share in distributed.shares(indices, LENGTHS, processes.size)
    ]
    batches = processes.padded(cuts, dummy_batch()) if sharded else cuts[processes.rank]
    assert not sharded or len(batches) == max(map(len, cuts))
    loss = 0.0
    for batch in batches:
        part = objective_of(model)(batch) / trained
        part.backward()
        loss += part.item()
    tokens = sum(len(batch.tokens) - batch.padding for batch in cuts[processes.rank])
    return processes.reduce(trainable(model), [loss, tokens, 1.0])


def trainable(model) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainable(model)])


@mutation(
    "lora/train/distributed.py",
    "        *gradients, numbers = self._sum(buffer).split(",
    "        *gradients, numbers = (self._sum(buffer) / self.size).split(",
)
@mutation(
    "lora/train/distributed.py",
    "dtype = functools.reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)",
    "dtype = torch.float32",
)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("size, indices", [(2, [0, 1, 2, 3, 4]), (3, [4, 0])], ids=["unequal", "one-rank-idle"])
def test_a_step_over_ranks_has_the_loss_tokens_and_gradients_of_one_process(tmp_path, size, indices, dtype, tol):
    alone = patched(tiny_model(dtype))
    loss, tokens, _ = step(alone, distributed.DistContext(0, 1, CPU), indices)

    def work(rank):
        model = patched(tiny_model(dtype))
        with distributed.dist_context(CPU) as processes:
            numbers = step(model, processes, indices)
            found = {"gradients": gradients(model), "numbers": torch.tensor(numbers, dtype=torch.float64)}
            save_file(found, tmp_path / str(rank))

    assert all_well(run(size, work))
    for rank in range(size):
        found = load_file(tmp_path / str(rank))
        assert found["gradients"].dtype == dtype
        assert close(found["gradients"], gradients(alone), tol)
        assert far(found["gradients"] * 0, gradients(alone), tol)
        assert abs(found["numbers"][0] - loss) <= tol * loss
        assert found["numbers"][1:].tolist() == [tokens, size]


def test_after_ten_steps_the_weights_are_one_process_s_and_the_same_bits_on_all_ranks(tmp_path):
    def trained(processes: distributed.DistContext) -> torch.Tensor:
        model = patched(tiny_model(torch.float32))
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        for number in range(10):
            step(model, processes, [(number + i) % len(EXAMPLES) for i in range(3)])
            clip(trainable(model), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in trainable(model)])

    def work(rank):
        with distributed.dist_context(CPU) as processes:
            save_file({"weights": trained(processes)}, tmp_path / str(rank))

    alone = trained(
        distributed.DistContext(0, 1, CPU)
    )  # first: an optimizer's first step imports much, and the children have it
    assert all_well(run(2, work))
    first, second = (load_file(tmp_path / str(rank))["weights"] for rank in range(2))
    assert torch.equal(first, second)
    start = torch.cat([p.detach().flatten() for p in trainable(patched(tiny_model(torch.float32)))])
    assert close(first, alone, 1e-3) and far(start, alone, 1e-3 / 10)


def test_a_step_is_one_all_reduce_in_the_widest_dtype_and_a_missing_gradient_counts_as_zeros():
    seen = []

    def work(rank):
        wide = torch.nn.Parameter(torch.zeros(3, 2))
        narrow = torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        dead = torch.nn.Parameter(torch.zeros(2))
        if rank == 0:
            wide.grad = torch.arange(6.0).view(2, 3).T
        narrow.grad = torch.full((5,), 0.5 + rank, dtype=torch.bfloat16)
        with distributed.dist_context(CPU) as processes:
            real = dist.all_reduce
            dist.all_reduce = lambda values: [seen.append((values.dtype, len(values))), real(values)]
            numbers = processes.reduce([wide, narrow, dead], [0.25, rank])
            assert seen == [(torch.float32, 15)]
            assert numbers == [0.5, 1.0]
            assert torch.equal(wide.grad, torch.arange(6.0).view(2, 3).T) and wide.grad.shape == wide.shape
            assert torch.equal(narrow.grad, torch.full((5,), 2.0, dtype=torch.bfloat16))
            assert torch.equal(dead.grad, torch.zeros(2))
            assert processes.all_reduce([1e-17, rank, 2**53 - 1]) == [2e-17, 1.0, 2.0**54 - 2]

    assert all_well(run(2, work))


@mutation("lora/train/distributed.py", "rank = tokens.index(min(tokens))", "rank = len(indices) % size")
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 500)), max_size=30), st.integers(1, 9))
def test_shares_are_every_example_once_and_even(examples, size):
    lengths = [length for _, length in examples]
    indices = [i for i, (times, _) in enumerate(examples) for _ in range(times % 3)]
    parts = distributed.shares(indices, lengths, size)
    assert len(parts) == size and sorted(i for part in parts for i in part) == sorted(indices)
    sums = [sum(lengths[i] for i in part) for part in parts]
    assert max(sums) - min(sums) <= max([lengths[i] for i in indices], default=0)


def test_main_first_is_done_before_the_others_begin(tmp_path):
    def work(rank):
        with distributed.dist_context(CPU) as processes, processes.main_first():
            if processes.main:
                time.sleep(0.2)
                (tmp_path / "model").touch()
            assert (tmp_path / "model").exists()

    assert all_well(run(3, work))


# ---- who speaks ------------------------------------------------------------------------------------------------------


@mutation("lora/train/distributed.py", "with nullcontext() if this.main else _silent():", "with nullcontext():")
@mutation("lora/train/distributed.py", "return time.monotonic() - begin < seconds", "return False")
def test_only_rank_0_prints_and_an_error_that_all_have_is_one_line():
    def work(rank):
        with distributed.dist_context(CPU) as processes:
            say(f"hello from {processes.rank}")
            print(f"answer of {processes.rank}", flush=True)
            list(tqdm(range(3), desc=f"bar of {processes.rank}", dynamic_ncols=True))
            time.sleep(0.3 * (not rank))  # rank 0 is the last to see it
            raise BadInput("wrong data in chats.jsonl:3: no messages. Repair it")

    first, second = run(2, work)
    assert "hello from 0\n" in first.err and "bar of 0: 100%" in first.err
    assert first.errors == ["error: wrong data in chats.jsonl:3: no messages. Repair it"]
    assert (first.code, first.out, second) == (2, "answer of 0\n", Result(2, "", ""))


def test_an_error_that_one_rank_alone_has_is_said_by_it():
    def work(rank):
        distributed.PATIENCE[errors.LoraError] = 0.2
        with distributed.dist_context(CPU) as processes:
            if rank == 1:
                raise BadInput("missing file in /data/chats.jsonl: there is no such file. Check the path")
            processes.all_reduce([1.0])

    first, second = run(2, work)
    assert (first.code, second.code) == (3, 2)
    assert len(first.errors) == 1 and first.errors[0].startswith("error: lost another rank in rank 0 of 2: ")
    assert len(second.errors) == 1 and "missing file" in second.errors[0]


# ---- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_lost_another_exits_3_within_10_seconds_with_one_line(tmp_path, victim):
    def work(rank):
        with distributed.dist_context(CPU) as processes:
            processes.all_reduce([1.0])
            if rank == victim:
                (tmp_path / "died").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            processes.reduce([torch.nn.Parameter(torch.zeros(3))], [1.0])
            (tmp_path / "saved").touch()

    results = run(2, work)
    assert time.time() - float((tmp_path / "died").read_text()) < 10
    survivor = results[1 - victim]
    assert (results[victim].code, survivor.code) == (137, 3)
    assert len(survivor.errors) == 1 and len(survivor.err.splitlines()) == 1
    assert survivor.errors[0].startswith(f"error: lost another rank in rank {1 - victim} of 2: ")
    assert not (tmp_path / "saved").exists()


@mutation("lora/train/distributed.py", "            this.all_reduce([0])", "            pass")
def test_the_block_ends_for_all_ranks_together(tmp_path):
    def work(rank):
        with distributed.dist_context(CPU) as processes:
            if processes.main:
                time.sleep(0.5)
                (tmp_path / "saved").touch()
        assert (tmp_path / "saved").exists()

    assert all_well(run(3, work))


@mutation("lora/train/distributed.py", "PATIENCE = {Stopped: 25.0,", "PATIENCE = {Stopped: 0.01,")
def test_a_stop_request_to_one_rank_stops_all_after_the_same_step_and_rank_0_saves(tmp_path):
    """And the others end after it: where one ends, torchrun would send rank 0 a signal of its own."""

    def work(rank):
        try:
            steps(rank)
        finally:
            (tmp_path / f"rank {rank} ends, saved: {(tmp_path / 'saved').exists()}").touch()

    def steps(rank):
        with distributed.dist_context(CPU) as processes:
            with StopFlag().listening() as stop:
                for number in range(1000):
                    if (rank, number) == (1, 7):
                        os.kill(os.getpid(), signal.SIGTERM)
                    [asked] = processes.reduce([], [stop.code is not None])
                    if asked:
                        break
                (tmp_path / f"rank {rank}").write_text(str(number))
                if processes.main:
                    time.sleep(0.5)  # saving; the other one waits
                    (tmp_path / "saved").touch()
            raise Stopped(143, f"stopped after step {number + 1} of 1000")

    first, second = run(2, work)
    assert (tmp_path / "rank 0").read_text() == (tmp_path / "rank 1").read_text() == "7"
    assert (tmp_path / "rank 1 ends, saved: True").exists()
    assert (first.code, first.err, second) == (143, "stopped after step 8 of 1000\n", Result(143, "", ""))


@pytest.mark.parametrize(
    "environment, why",
    [
        ({"RANK": "0"}, "missing WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "missing RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "wrong RANK"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "wrong RANK"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "wrong WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, "missing MASTER_ADDR"),
    ],
)
def test_half_of_torchrun_s_variables_are_refused(monkeypatch, environment, why):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(BadInput, match=f"^{why} in the environment: .*[.] Start with torchrun"),
        distributed.dist_context(CPU),
    ):
        pass


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}], ids=["plain", "torchrun"])
def test_one_process_is_alone(monkeypatch, environment):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with distributed.dist_context(CPU) as processes:
        assert (processes.main, processes.size, processes.device, dist.is_initialized()) == (True, 1, CPU, False)
        assert processes.share([3, 1, 2], [1, 2, 3, 4]) == [3, 1, 2]
        assert processes.reduce([], [1.5]) == processes.all_reduce([1.5]) == [1.5]


def test_an_address_that_nobody_can_have_is_one_line(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(BadEnvironment, match=r"^no way to the other ranks in 127.0.0.1:port: "),
        distributed.dist_context(CPU),
    ):
        pass


def test_several_processes_on_mps_are_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="mps serves one process"), distributed.dist_context(torch.device("mps")):
        pass


# ---- torchrun itself -------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time, torch
from pathlib import Path
from lora import errors
from lora.errors import StopFlag, Stopped
from lora.train import distributed

def main(argv):
    with distributed.dist_context(torch.device("cpu")) as processes:
        print(processes.size, *processes.all_reduce([processes.rank + 1, 0.5]))
        if sys.argv[1] == "lost":
            if processes.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        if sys.argv[1] == "stop":
            with StopFlag().listening() as stop:
                shared, step = distributed.SharedStop(processes, stop), 0
                while not shared.code:
                    shared.reduce([], [])
                    step += 1
                    Path(f"rank {processes.rank}").write_text(str(step))
            time.sleep(0.5 * processes.main)  # saving
            raise Stopped(shared.code, f"saved step {step}" if processes.main else "")

distributed.leave(errors.run(main))
"""


def torchrun(folder: Path, how: str) -> subprocess.Popen:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py", how]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )


def test_torchrun_itself_starts_the_ranks(tmp_path):
    running = torchrun(tmp_path, "well")
    out, err = running.communicate(timeout=120)
    assert (running.returncode, out) == (0, "2 3.0 1.0\n"), err


def test_torchrun_ends_a_busy_rank_and_names_the_one_that_was_killed(tmp_path):
    """A rank in no collective does not see the loss. torchrun's own exit code is 1, whatever those of the ranks are."""
    running = torchrun(tmp_path, "lost")
    _, err = running.communicate(timeout=120)
    assert running.returncode == 1 and "error: internal" not in err
    first = err[err.index("Root Cause") :]
    assert re.search(r"rank +: 1 ", first) and "SIGKILL" in first
    assert re.search(r"rank +: 0 .*\n.*exitcode +: 143 ", err), err  # by torchrun's SIGTERM


def test_a_signal_to_torchrun_stops_all_ranks_after_the_same_step_and_rank_0_saves(tmp_path):
    running = torchrun(tmp_path, "stop")
    deadline = time.monotonic() + 120
    while not (tmp_path / "rank 0").exists():
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=120)
    step = (tmp_path / "rank 0").read_text()
    assert step == (tmp_path / "rank 1").read_text() and f"saved step {step}\n" in err and "error:" not in err


# ---- a sharded base --------------------------------------------------------------------------------------------------


@cache
def base(tied: bool, deltas: bool) -> pretrained.ModelFolder:
    """A model on disk whose tensors do not divide by 2 or 3: some ranks have fewer rows, of biases perhaps none."""
    folder = scratch() / f"uneven-{tied}-{deltas}"
    folder.mkdir()
    how = {"tie_word_embeddings": tied, "attention_bias": True, **(DELTAS if deltas else {})}
    save_file(tiny_model(torch.float32, **how).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tiny_config(**how)))
    return pretrained.ModelFolder(folder)


def adapted(model, dtype: torch.dtype):
    """Random adapters, the same whether the base is whole or sharded."""
    torch.manual_seed(3)
    inject(model, 5, 8, 0.0, ("all",), dtype)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(0, 0.3)
    return model.train()


def answers_and_gradients(model, processes: distributed.DistContext, sharded: bool) -> dict[str, torch.Tensor]:
    """What train.py does with a model: answers, two steps with an evaluation between, answers of the base alone."""
    prompts = [[5, 9, 11, 40], [17, 3]]
    answers = generate(model, prompts, {2}, 8)
    numbers = step(model, processes, [0, 1, 2, 3, 4], sharded)
    found = {"first": gradients(model)}
    with torch.no_grad():
        for p in trainable(model):
            p -= 0.1 * p.grad
            p.grad = None
        hidden = model.trunk(torch.tensor(EXAMPLES[0].tokens))
        found["logits"] = model.head(hidden)
        with disabled(model):
            found["base"] = model.trunk(torch.tensor(EXAMPLES[0].tokens)) @ model.head_weight.T
    numbers += step(model, processes, [5], sharded)
    with disabled(model):
        answers += generate(model, prompts, {2}, 8)
    found["second"], found["loss"] = gradients(model), torch.tensor([numbers[0], numbers[3]], dtype=torch.float64)
    found["answers"] = torch.tensor([token for answer in answers for token in answer])
    return found


@mutation("lora/train/distributed.py", "[empty] * (max(map(len, cuts)) - len(cuts[self.rank]))", "[]")
@mutation(
    "lora/pretrained/shard.py",
    """        model.trunk(torch.zeros(1, dtype=torch.long, device=device))
""",
    """        pass
""",
)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "size, tied, deltas",
    [(2, False, False), (3, True, False), (2, True, True)],
    ids=["two-ranks", "three-ranks-tied", "deltas"],
)
def test_a_sharded_base_gives_the_gradients_and_answers_of_a_whole_one(tmp_path, size, tied, deltas, dtype, tol):
    checkpoint = base(tied, deltas)
    whole = adapted(pretrained.load_model(checkpoint, dtype), dtype)
    expected = answers_and_gradients(whole, distributed.DistContext(0, 1, CPU), False)

    def work(rank):
        with distributed.dist_context(CPU) as processes:
            model = adapted(shard.load_sharded(checkpoint, dtype), dtype)
            assert all(type(p) is torch.nn.Parameter for p in trainable(model))
            model.reshard()
            own = {name: p.to_local() for name, p in model.named_parameters() if not p.requires_grad}
            save_file(answers_and_gradients(model, processes, True), tmp_path / str(rank))
            save_file({name: rows.contiguous() for name, rows in own.items()}, tmp_path / f"own {rank}")

    assert all_well(run(size, work))
    for rank in range(size):
        found = load_file(tmp_path / str(rank))
        for name, tensor in expected.items():
            assert close(found[name], tensor, tol), name
    assert far(expected["base"], expected["logits"], tol) and far(expected["first"] * 0, expected["first"], tol)
    pieces = [load_file(tmp_path / f"own {rank}") for rank in range(size)]
    for name, p in whole.named_parameters():
        if not p.requires_grad:
            rows = [piece[name] for piece in pieces]
            assert torch.equal(torch.cat(rows), p) and max(map(len, rows)) == math.ceil(len(p) / size)


@mutation("lora/pretrained/shard.py", "buffer.copy_(base.read(name))", "buffer.fill_(1)", case="gemma4_text")
@pytest.mark.parametrize("kind", ["lfm2", "granitemoehybrid", "gemma4_text"])
def test_a_sharded_base_of_other_kinds_of_layers_gives_the_gradients_and_answers_of_a_whole_one(tmp_path, kind):
    """Convolutions, rows of fused tensors, keys of an earlier layer and inputs to each."""
    raw = family_config(kind) | dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 131)
    checkpoint = pretrained.ModelFolder(folder_of(model_of(raw, dtype=torch.float32), raw, tmp_path / "model"))
    whole = adapted(pretrained.load_model(checkpoint, torch.float64), torch.float64)
    expected = answers_and_gradients(whole, distributed.DistContext(0, 1, CPU), False)

    def work(rank):
        with distributed.dist_context(CPU) as processes:
            model = adapted(shard.load_sharded(checkpoint, torch.float64), torch.float64)
            save_file(answers_and_gradients(model, processes, True), tmp_path / str(rank))

    assert all_well(run(2, work))
    for rank in range(2):
        found = load_file(tmp_path / str(rank))
        for name, tensor in expected.items():
            assert close(found[name], tensor, 1e-10), name


def test_a_gguf_file_can_be_sharded_too():
    checkpoint = pretrained.find(str(gguf_file()))
    whole = pretrained.load_model(checkpoint)

    def work(rank):
        with distributed.dist_context(CPU) as processes:
            for name, p in shard.load_sharded(checkpoint).named_parameters():
                assert torch.equal(p.to_local(), whole.get_parameter(name).chunk(processes.size)[rank])

    assert all_well(run(2, work))


@mutation(
    "lora/pretrained/folder.py",
    "tensor = self._file_of[whole].read_rows(whole, first + start, first + stop)",
    "tensor = self._file_of[whole].read(whole)[first + start : first + stop]",
)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
def test_no_rank_ever_holds_or_reads_the_whole_base(tmp_path):
    """In a fresh process: memory that tests before this one have freed would be taken again, and not be counted."""
    call = "import sys; from tests.train import test_ranks as t; sys.exit(not t.holds_and_reads_its_share(sys.argv[1]))"
    command = [sys.executable, "-c", call, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def holds_and_reads_its_share(folder: str) -> bool:
    """Measured by the system: bytes read while loading, and the process's largest growth in loading and a step."""
    folder = Path(folder)
    sizes = {"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 40, "vocab_size": 3000}
    sizes |= {"num_attention_heads": 5, "num_key_value_heads": 5}
    with torch.device("meta"):
        empty = Model(ModelConfig.from_json(tiny_config(**sizes)))
    header = {name: ("BF16", tuple(p.shape)) for name, p in empty.named_parameters()}
    write = lambda name: torch.full(header[name][1], 0.01, dtype=torch.bfloat16)  # noqa: E731
    files.write_safetensors(folder / "model.safetensors", header, write)
    (folder / "config.json").write_text(json.dumps(tiny_config(**sizes)))
    whole = sum(p.nbytes for p in empty.parameters())
    block = sum(p.nbytes for p in empty.model.layers[0].parameters())
    limit = whole / 2 + empty.head_weight.nbytes + 4 * block + 35e6  # a block and its copies on the way; all the rest
    assert limit < 0.8 * whole
    small = base(False, False)

    def work(rank):
        batches.ROUND = 1  # a few tokens, so that it is weights that are measured
        with distributed.dist_context(CPU) as processes:
            step(
                adapted(shard.load_sharded(small), torch.float32), processes, [0], True
            )  # the code that this needs is read
            checkpoint = pretrained.ModelFolder(folder)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before, read_before = memory("VmRSS"), bytes_read()
            model = shard.load_sharded(checkpoint)
            read = bytes_read() - read_before
            inject(model, 2)
            step(model, processes, [2, 4], True)
            grown = memory("VmHWM") - before
            assert whole / 2 < grown < limit and whole / 4 <= read < whole / 4 + 1e6, f"{grown} {limit} {read}"

    results = run(2, work)
    (folder / "model.safetensors").unlink()
    return all_well(results)


def memory(what: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_weights_that_are_not_finite_are_named_once_whoever_has_their_rows(tmp_path):
    state = tiny_model(torch.float32).state_dict()
    state["lm_head.weight"][-1, 3] = math.nan
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))

    def work(rank):
        with distributed.dist_context(CPU):
            shard.load_sharded(pretrained.ModelFolder(tmp_path))

    first, second = run(2, work)
    assert (first.code, second) == (2, Result(2, "", ""))
    assert len(first.errors) == 1 and ":lm_head.weight: values that are not finite" in first.errors[0]


@mutation("lora/train/distributed.py", 'if "gloo" in str(error) or', "if")
def test_a_rank_lost_while_a_block_is_gathered_is_no_bug(tmp_path):
    def work(rank):
        with distributed.dist_context(CPU) as processes:
            model = adapted(shard.load_sharded(base(False, False)), torch.float32)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            step(model, processes, [0, 1], True)

    base(False, False)
    first, _ = run(2, work)
    assert first.code == 3 and len(first.errors) == 1 and "lost another rank in rank 0 of 2" in first.errors[0]


def test_one_process_has_nobody_to_share_a_base_with():
    with pytest.raises(BadInput, match=r"^wrong --fsdp in the command line"):
        shard.load_sharded(base(False, False))
