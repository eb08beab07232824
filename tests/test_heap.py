"""What glibc keeps of the heap and gives back; the script that trains begins again to leave no holes in it."""

import json
import platform
import subprocess
import sys
from os import environ

import pytest

from lora import heap
from tests import cli
from tests.mutation import mutation

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
SCRIPT = """
import json, os, sys
from lora import heap
before = os.environ.get("SEEN", "")
os.environ["SEEN"] = before + "x"
heap.restart(__name__)
tunables = os.environ.get("GLIBC_TUNABLES")
print(json.dumps([os.environ["SEEN"], tunables, sys.argv[1:], sys.flags.utf8_mode, os.getpid()]))
print(sys.stdin.read(), end="")
"""


def started(words, tmp_path, **more) -> tuple[list, str, int]:
    """What SCRIPT in a fresh Python prints, the rest of its output, and its process."""
    (tmp_path / "script.py").write_text(SCRIPT)
    mine = {name: value for name, value in environ.items() if name not in heap.TUNABLES} | {"PYTHONPATH": str(cli.ROOT)}
    with subprocess.Popen(
        [sys.executable, *words],
        env=mine | more,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        first, _, rest = process.communicate("what is piped in", timeout=60)[0].partition("\n")
    return json.loads(first), rest, process.pid


@glibc
@mutation("lora/heap.py", "[sys.executable, *sys.orig_argv[1:]]", "[sys.executable, *sys.argv]")
@mutation("lora/heap.py", "        os.environ |= TUNABLES\n", "")
def test_a_script_begins_again_once_in_its_place_with_its_words_and_its_input(tmp_path):
    found, rest, pid = started(["-X", "utf8", "script.py", "--a", "b c"], tmp_path)
    assert found == ["xx", heap.TUNABLES["GLIBC_TUNABLES"], ["--a", "b c"], 1, pid]
    assert rest == "what is piped in"


NOTEBOOK = "import runpy, sys; sys.argv = ['script.py']; runpy.run_path('script.py', run_name='__main__')"
TRACED = NOTEBOOK.replace("import runpy, sys", "import runpy, sys; sys.settrace(lambda *_: None)")


@mutation("lora/heap.py", "sys.argv[0] in sys.orig_argv and ", "", case="notebook")
@mutation("lora/heap.py", "sys.gettrace() or ", "", case="debugger")
@mutation("lora/heap.py", " or TUNABLES.keys() & os.environ.keys()", "", case="tunables of its user")
@pytest.mark.parametrize(
    "words, variables",
    [
        pytest.param(["-c", NOTEBOOK], {}, id="notebook"),
        pytest.param(["-c", TRACED, "script.py"], {}, id="debugger"),
        pytest.param(["script.py"], {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, id="tunables of its user"),
    ],
)
def test_what_is_not_a_plain_start_of_the_script_goes_on_as_it_is(tmp_path, words, variables):
    [seen, tunables, *_], _, _ = started(words, tmp_path, **variables)
    assert seen == "x" and tunables == variables.get("GLIBC_TUNABLES")


INTERRUPTED = """
import os, signal
from lora.errors import before_imports
before_imports(__name__)
from lora import heap
begin = os.execv
def interrupted(*words):
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    begin(*words)
os.execv = interrupted
heap.restart(__name__)
print("it went on")
"""


@glibc
@mutation("lora/heap.py", "        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_CODES)", "        pass")
@mutation("lora/heap.py", "        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_CODES)", "        pass")
def test_a_signal_that_comes_while_it_begins_again_ends_it(tmp_path):
    (tmp_path / "script.py").write_text(INTERRUPTED)
    mine = {name: value for name, value in environ.items() if name not in heap.TUNABLES} | {"PYTHONPATH": str(cli.ROOT)}
    words = [sys.executable, "script.py"]
    done = subprocess.run(words, env=mine, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "True\n", "stopped")


STEP = """
import torch
from lora import ops
from lora.adapter.inject import inject
from lora.heap import keep_memory, resident_memory
from tests.helpers import tiny_model
keep_memory(torch.device("cpu"))
sizes = {"num_hidden_layers": 24, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 256}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
model = tiny_model(torch.float32, **sizes)
inject(model, 8, 16)
model.train()
def loss(size):
    tokens = torch.zeros(8 * size, dtype=torch.long)
    return ops.cross_entropy(model.trunk(tokens, [size] * 8), model.head_weight, tokens)
loss(8).backward()
before = resident_memory()
last = loss(300)
grown, kept = resident_memory() - before, {}
del last
with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
    last = loss(300)
weights = {p.data_ptr() for p in model.parameters()}
print(grown / sum(tensor.nbytes for place, tensor in kept.items() if place not in weights))
"""


@glibc
@mutation("lora/heap.py", "glibc.malloc.tcache_count=0", "glibc.malloc.tcache_count=7")
def test_a_forward_pass_takes_a_third_more_than_what_it_keeps():
    done = subprocess.run(
        [sys.executable, "-c", STEP], env=environ | heap.TUNABLES | {"OMP_NUM_THREADS": "1"}, cwd=cli.ROOT,
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert 1 < float(done.stdout) < 1.45


def holes() -> int:
    """Bytes that stay after blocks of 25 MB were freed between small ones that are kept."""
    bytearray(25 * 2**20)  # by itself glibc keeps blocks of this size from now on
    before, kept = heap.resident_memory(), []
    large = []
    for _ in range(4):
        large.append(bytearray(25 * 2**20))
        kept.append(bytearray(100_000))
    large.clear()
    return heap.resident_memory() - before


@mutation("lora/heap.py", "mallopt(-3, size)", "mallopt(-3, 2 * size)")
@glibc
def test_large_blocks_are_returned_though_small_ones_lie_between_them():
    """In a fresh process: other tests have left holes, in which small blocks would lie elsewhere."""
    call = "from lora import heap; import tests.test_heap as t; heap.give_back(2**24); print(t.holes())"
    done = subprocess.run([sys.executable, "-c", call], cwd=cli.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and int(done.stdout) < 10 * 2**20, done.stdout + done.stderr


HOLES = """
import torch
from lora.heap import keep_memory, resident_memory
tidy = keep_memory(torch.device("cpu"), {enough})
given = []
for _ in range(2):
    blocks = [torch.ones(2**20) for _ in range(100)]  # 4 MB each
    del blocks[::2]
    before = resident_memory()
    tidy()
    given.append(before - resident_memory())
print(*(size // 10**6 for size in given))
"""


@mutation("lora/heap.py", "due = time.monotonic() + TIDY_SECONDS", "pass")
@mutation("lora/heap.py", "if time.monotonic() >= due and resident_memory() > enough:", "if time.monotonic() >= due:")
@mutation("lora/heap.py", "libc.malloc_trim(0)", "pass")
@glibc
@pytest.mark.parametrize("enough, least, most", [(2e8, 150, 250), (8e9, -20, 20)])
def test_above_what_is_enough_holes_between_blocks_are_given_back_but_not_at_every_call(enough, least, most):
    """Every other block of 400 MB is free: 200 MB between blocks in use."""
    words = [sys.executable, "-c", HOLES.format(enough=enough)]
    found = subprocess.run(words, capture_output=True, text=True, check=True, cwd=cli.ROOT)
    first, again = map(int, found.stdout.split())
    assert least < first < most
    assert -20 < again < 20


SPARING = """
import torch
from lora.heap import keep_memory, resident_memory
keep_memory(torch.device("cpu"), sparing={sparing})
before, kept = resident_memory(), []
for _ in range(3):
    large = [torch.ones(2**25, dtype=torch.int32) for _ in range(2)]  # 134 MB each
    kept += [torch.ones(2**18)]
    del large
print((resident_memory() - before) // 10**6)
"""


@mutation("lora/heap.py", "LARGE if sparing else 2**30", "2**30", case="True-0-30")
@glibc
@pytest.mark.parametrize("sparing, least, most", [(True, 0, 30), (False, 200, 900)])
def test_where_memory_is_spared_large_blocks_are_not_kept(sparing, least, most):
    words = [sys.executable, "-c", SPARING.format(sparing=sparing)]
    found = subprocess.run(words, capture_output=True, text=True, check=True, cwd=cli.ROOT)
    assert least <= int(found.stdout) < most


@mutation("lora/errors.py", "        gc.disable()\n", "")
@mutation("lora/errors.py", "    gc.enable()\n", "")
@mutation("lora/errors.py", "    gc.freeze()  # what", "    # what")
def test_garbage_is_looked_for_from_where_a_command_begins_and_not_in_what_was_imported():
    code = (
        "import gc, json; from lora import errors; errors.before_imports('__main__'); before = gc.isenabled();"
        "import torch; errors.run(lambda argv: print(json.dumps([before, gc.isenabled(), len(gc.get_objects())])))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=cli.ROOT, capture_output=True, text=True, check=True)
    before, now, looked_at = json.loads(done.stdout)
    assert (before, now) == (False, True) and looked_at < 1000
