"""The threads of OpenMP have cores of their own in a script, unless its user has decided otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora import threads
from tests import cli
from tests.mutation import mutation

ROOT = Path(__file__).resolve().parents[1]
CORES = len(threads.ALL)
linux = pytest.mark.skipif(sys.platform != "linux" or CORES < 2, reason="needs Linux and two cores")

BOUND = """
import json, os
from lora.errors import before_imports
before_imports("__main__")
import torch
from lora import threads
(torch.ones(1000, 1000) @ torch.ones(1000, 1000)).sum()
tasks = lambda: {int(task): sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}
of_products = [tasks()[os.getpid()], *(cores for task, cores in tasks().items() if task != os.getpid())]
"""


def run(code: str, **environment: str):
    """The JSON that a fresh Python prints, without the variables of this one."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=mine | environment, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


@linux
@mutation("lora/threads.py", '"OMP_PROC_BIND": "true"', '"OMP_PROC_BIND": "false"')
@mutation("lora/errors.py", "        threads.bind(waiting)\n", "")
def test_no_two_threads_of_a_product_share_a_core():
    found = run(BOUND + "print(json.dumps([torch.get_num_threads(), of_products]))")
    count, cores = found
    assert count == CORES, "the number of threads decides bits: it must be what it was"
    assert len(cores) == count
    assert sorted(core for bound in cores for core in bound) == sorted(threads.ALL)


@pytest.fixture
def unset(monkeypatch):
    """An environment in which nothing is set, put back afterwards."""
    for name in (*threads.THEIRS, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what the test leaves is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "ALL", {0, 1})


@pytest.mark.parametrize("name", [*threads.THEIRS, "OMP_NUM_THREADS"])
@mutation("lora/threads.py", "if few or any(", "if any(", case="OMP_NUM_THREADS")
@mutation("lora/threads.py", "any(name in os.environ for name in THEIRS)", "False", case="OMP_WAIT_POLICY")
def test_what_the_user_has_set_stays_as_it_is(unset, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    threads.bind()
    assert dict(os.environ) == before


@mutation("lora/threads.py", 'if sys.platform == "linux"', "if True")
def test_cores_are_named_only_where_the_runtime_can_bind_to_them(unset, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    threads.bind()
    assert "OMP_PROC_BIND" not in os.environ and os.environ["KMP_BLOCKTIME"] == "1"


SCRIPT = """
import json, os, runpy, sys
sys.argv, sys.stdout = ["{script}", "--help"], sys.stderr
try:
    runpy.run_path("{script}", run_name="__main__")
except SystemExit:
    print(json.dumps(os.environ["GOMP_SPINCOUNT"]), file=sys.__stdout__)
"""


@linux
@mutation(
    "generate.py", "before_imports(__name__, threads.ANSWERING)", "before_imports(__name__)", case="generate.py-300000"
)
@pytest.mark.parametrize(("script", "spins"), [("train.py", "30000"), ("generate.py", "300000")])
def test_threads_wait_longer_for_the_next_product_of_an_answer(script, spins):
    assert run(SCRIPT.format(script=script)) == spins


@linux
@mutation("lora/text/tokenizer.py", "        with threads.unbound():", "        if True:")
def test_the_threads_of_the_tokenizer_may_run_on_every_core():
    path = cli.model_folder() / "tokenizer.json"
    code = f"""{BOUND}
from lora.text.tokenizer import Tokenizer
tokenizer, before = Tokenizer(open({str(path)!r}, "rb").read()), tasks()
tokenizer.encode_all(["a text"] * 100)
print(json.dumps([before[os.getpid()] == tasks()[os.getpid()], [c for t, c in tasks().items() if t not in before]]))
"""
    main_stays, started = run(code, TOKENIZERS_PARALLELISM="true")
    assert main_stays and started and all(cores == sorted(threads.ALL) for cores in started)


@linux
@mutation("lora/device.py", "        threads.unbind()", "        pass")
def test_what_a_gpu_starts_may_run_on_every_core():
    start = "from lora import device; torch.cuda.is_available = lambda: True; device.choose_device('cuda')"
    assert run(f"{BOUND}\n{start}\nprint(json.dumps(sorted(os.sched_getaffinity(0))))") == sorted(threads.ALL)


COMPILES = """
from lora.run.compiling import compile_model
from tests.helpers import patched, tiny_model
seen = []
torch.compile = lambda half, **how: lambda *inputs: seen.append(sorted(os.sched_getaffinity(0))) or half(*inputs)
compile_model(patched(tiny_model()).train(), asked=True)
print(json.dumps([seen[0], sorted(os.sched_getaffinity(0))]))
"""


@linux
@mutation("lora/run/compiling.py", "with threads.unbound():", "if True:")
def test_what_a_compiler_starts_may_run_on_every_core_and_the_run_is_bound_again():
    inside, behind = run(f"{BOUND}\n{COMPILES}")
    assert inside == sorted(threads.ALL) and len(behind) == 1
