"""Functions of the user's own: what they are given, what they may give, and how each of their faults ends the run."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora.errors import BadInput
from lora.rewards import Asked, functions, parse
from lora.rewards.functions import Format, Function
from tests.mutation import mutation

LINE = r"^wrong --reward in \S.*: .+\. [A-Z].*"
ROWS = [
    {"prompt": "What is 1 and 2?", "answer": "3", "hard": False},
    {"prompt": "What is 2 and 2?", "answer": "4", "hard": True},
]


def turns(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def asked(rows=ROWS, texts=("It is 3.", "It is 5.")) -> list[Asked]:
    return [Asked(row, turns("asked"), text, len(text.split())) for row, text in zip(rows, texts, strict=True)]


def rows_of(rows) -> list:
    return [SimpleNamespace(row=row, where=f"d.jsonl:{i}", messages=turns("asked")) for i, row in enumerate(rows, 1)]


@pytest.fixture
def rule(tmp_path):
    """A function of a file that holds `source`, started and checked; its process ends with the test."""
    parts = []

    def make(source: str, name: str = "f", timeout: float = 30, rows=ROWS, file: str = "rules.py") -> Function:
        (tmp_path / file).write_text(textwrap.dedent(source))
        parts.append(Function(parse(f"{tmp_path}/{file}:{name}"), timeout))
        parts[-1].start()
        problems = [*parts[-1].problems(rows_of(rows))]
        if problems:
            raise BadInput(*problems)
        return parts[-1]

    yield make
    for part in parts:
        part.close()
        assert part.worker.process.returncode is not None


def problem_of(make, *args, **how) -> str:
    """The one line of what `make` raises."""
    with pytest.raises(BadInput) as caught:
        make(*args, **how)
    [problem] = caught.value.problems
    assert caught.value.code == 2 and "\n" not in problem
    return problem


# ---- what it is given ------------------------------------------------------------------------------------------------


def test_a_function_is_given_prompts_completions_and_columns_by_keyword(rule):
    source = """
        def f(completions, prompts, answer):
            assert prompts == ["What is 1 and 2?", "What is 2 and 2?"], prompts
            return [float(a in text) for a, text in zip(answer, completions)]
    """
    assert rule(source).score(asked()) == [1.0, 0.0]


@mutation("lora/rewards/functions.py", 'isinstance(one.row.get("prompt"), str) for one', "True for one")
def test_completions_are_messages_where_the_rows_prompt_is_no_text(rule):
    source = """
        def f(prompts, completions):
            assert prompts == [[{"role": "user", "content": "asked"}]] * 2, prompts
            assert [sorted(one) for [one] in completions] == [["content", "role"]] * 2, completions
            return [len(one["content"]) if one["role"] == "assistant" else None for [one] in completions]
    """
    rows = [{"messages": turns("asked"), "prompt": turns("asked")}, {"conversations": []}]
    assert rule(source, rows=rows).score(asked(rows, ("four", "seven 7"))) == [4.0, 7.0]


@mutation("lora/rewards/worker.py", 'if takes["any"] or name in takes["takes"]}', 'if name in takes["takes"]}')
@mutation("lora/rewards/functions.py", '(takes["any"] or name in', "(name in")
def test_a_function_with_any_keyword_is_given_every_column_but_the_prompt(rule):
    source = """
        def f(prompts, completions, **columns):
            assert columns == {"answer": ["3", None], "hard": [False, True], "odd name": [None, 1]}, columns
            return [1, 1]
    """
    rows = [ROWS[0], {"prompt": "b", "hard": True, "odd name": 1}]
    assert rule(source, rows=rows).score(asked(rows)) == [1.0, 1.0]


def test_a_parameter_with_a_default_keeps_it_where_no_row_has_the_column(rule):
    part = rule("def f(completions, scale=7): return [scale] * len(completions)")
    assert part.score(asked()) == [7.0, 7.0]


@mutation("lora/rewards/functions.py", "if name not in row.row:", "if name not in columns:")
def test_a_column_that_a_function_needs_and_a_row_lacks_is_named_with_its_place(rule):
    part = Function(parse(f"{Path(__file__).with_name('none.py')}:f"), 1)
    assert part.worker.process is None and [*part.problems([])] == []
    source = "def f(completions, answer, **more): return [1] * len(completions)"
    found = problem_of(rule, source, rows=[*ROWS, {"prompt": "b"}])
    assert found.startswith("no column 'answer' in d.jsonl:3: f of ") and found.endswith("give the parameter a default")


def test_a_column_that_is_called_as_what_the_run_gives_is_refused(rule):
    found = problem_of(rule, "def f(completions): return [1]", rows=[{"prompt": "a", "completions": 3}])
    assert found.startswith("wrong column 'completions' in d.jsonl:1: ")


@mutation("lora/rewards/worker.py", "    sys.modules[spec.name] = module\n", "")
@mutation("lora/rewards/worker.py", "sys.path[:] = [folder, *(", "sys.path[:] = [*(")
def test_a_file_imports_from_its_own_folder_and_keeps_its_state_between_calls(rule, tmp_path):
    (tmp_path / "helper.py").write_text("START = 10")
    source = """
        from __future__ import annotations
        from dataclasses import dataclass, KW_ONLY
        import helper, sys

        @dataclass
        class Counter:
            _: KW_ONLY
            calls: int = helper.START

        counter = Counter()

        def f(completions):
            counter.calls += 1
            assert not any(path.endswith("rewards") and "lora" in path for path in sys.path), sys.path
            return [counter.calls] * len(completions)
    """
    part = rule(source)
    assert [part.score(asked())[0] for _ in range(3)] == [11.0, 12.0, 13.0]


# ---- what it may give ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("[1, 0.5]", [1.0, 0.5]), ("(True, False)", [1.0, 0.0]), ("[None, -2]", [None, -2.0]),
        ("np.array([1, 2], dtype=np.int16)", [1.0, 2.0]), ("[np.float32(0.5), np.bool_(True)]", [0.5, 1.0]),
        ("torch.tensor([1.5, 2], dtype=torch.bfloat16)", [1.5, 2.0]),
        ("[torch.tensor(3), torch.tensor(0.25)]", [3, 0.25]),
        ("torch.ones(2, requires_grad=True)", [1.0, 1.0]), ("np.array([None, 1.0], dtype=object)", [None, 1.0]),
        ("[Fraction(1, 4), 10 ** 300]", [0.25, 1e300]),
    ],
)  # fmt: skip
@mutation(
    "lora/rewards/worker.py",
    "        value = value.item()\n",
    "        pass\n",
    case="[torch.tensor(3), torch.tensor(0.25)]-expected6",
)
@mutation(
    "lora/rewards/worker.py",
    "        values = values.tolist()\n",
    "        pass\n",
    case="np.array([1, 2], dtype=np.int16)-expected3",
)
def test_numbers_of_every_kind_are_taken(rule, given, expected):
    needs = [line for word, line in (("np.", "import numpy as np\n"), ("torch", "import torch\n")) if word in given]
    source = "".join(needs) + f"from fractions import Fraction\ndef f(completions): return {given}"
    assert rule(source).score(asked()) == expected


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("[1.0]", "it gave 1 values for 2 completions"), ("[1, 2, 3]", "it gave 3 values for 2"),
        ("None", "it gave nothing, not a list"), ("1.0", "it gave a float, not a list"), ("'ab'", "it gave a str"),
        ("{'a': 1, 'b': 2}", "it gave a dict"), ("(x for x in [1, 2])", "it gave a generator"),
        ("[1, float('nan')]", "its value 1 is nan, which is not finite"), ("[float('inf'), 1]", "value 0 is inf"),
        ("[1, 10 ** 400]", "value 1 is inf"), ("[1, '1.0']", "its value 1 is '1.0', no number"),
        ("[[1], [2]]", "its value 0 is [1], no number"), ("[1j, 2]", "its value 0 is 1j, no number"),
    ],
)  # fmt: skip
@mutation(
    "lora/rewards/worker.py",
    "if len(values) != count:",
    "if len(values) < count:",
    case="[1, 2, 3]-it gave 3 values for 2",
)
@mutation(
    "lora/rewards/worker.py",
    "if not math.isfinite(value):",
    "if value != value:",
    case="[float('inf'), 1]-value 0 is inf",
)
@mutation(
    "lora/rewards/worker.py",
    "if not isinstance(value, Real):",
    "if False:",
    case="[1, '1.0']-its value 1 is '1.0', no number",
)
def test_wrong_values_end_the_run_with_one_line(rule, given, why):
    part = rule(f"def f(completions): return {given}")
    found = problem_of(part.score, asked())
    assert why in found and "rules.py: f: it" in found.replace("its", "it") and "--resume" in found


# ---- what is wrong before a row is seen ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def f(:", "rules.py:1: f: it raises SyntaxError"),
        ("\nimport no_such_module", "rules.py:2: f: it raises ModuleNotFoundError: No module named 'no_such_module'"),
        ("g = 1", "there is no such function in the file. Check the spelling"),
        ("f = 3", "it is a int, no function"),
        ("class f: pass", "it is a class, no function"),
        ("async def f(completions): return [1, 1]", "it is an async function"),
        ("class F:\n  async def __call__(self, completions): return [1, 1]\nf = F()", "it is an async function"),
        ("def f(completions, /): return [1, 1]", "it takes completions by position only"),
        ("import sys\nsys.exit(3)", "rules.py:2: f: it ends the program (sys.exit)"),
        ("import os\nos._exit(0)", "its process ended with exit code 0"),
        ("raise KeyboardInterrupt", "it raises KeyboardInterrupt"),
        ("raise ValueError('a.\\nb')", "rules.py:1: f: it raises ValueError: a. Repair it"),
    ],
)  # fmt: skip
@mutation(
    "lora/rewards/worker.py", "except BaseException as error:  # SystemExit, too", "except Exception as error:",
    case="import sys\\nsys.exit(3)-rules.py:2: f: it ends the program (sys.exit)",
)  # fmt: skip
def test_a_file_or_function_that_cannot_be_used_is_named_at_the_start(rule, source, why):
    found = problem_of(rule, source)
    assert why in found and found.startswith("wrong --reward in ")


def test_a_file_that_is_not_there_is_named(tmp_path):
    part = Function(parse(f"{tmp_path}/none.py:f"), 1)
    assert "there is no such Python file" in problem_of(part.start)
    part.close()


@mutation(
    "lora/rewards/functions.py",
    "takes = self.worker.reply(max(LEAST_TO_START, self.worker.timeout))",
    "takes = self.worker.reply(99)",
)
def test_a_file_that_never_ends_its_imports_is_ended(rule, monkeypatch):
    monkeypatch.setattr(functions, "LEAST_TO_START", 0.5)
    assert "it took more than 0.5 s" in problem_of(rule, "while True: pass", timeout=0.1)


# ---- what goes wrong while it runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return {}['a']", "rules.py:3: f: it raises KeyError: 'a'. Repair it; --resume goes on from the last"),
        ("return helper()", "rules.py:6: f: it raises ValueError: deep"),
        ("return json.loads('{')", "rules.py:3: f: it raises JSONDecodeError"),
        ("sys.exit('bye')", "rules.py:3: f: it ends the program (sys.exit)"),
        ("os._exit(7)", "its process ended with exit code 7"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its process was ended by SIGSEGV"),
        ("return f(completions)", "it raises RecursionError"),
        ("raise Mute()", "rules.py:3: f: it raises Mute. Repair it"),
    ],
)  # fmt: skip
@mutation(
    "lora/rewards/worker.py",
    "if place[0] == file]",
    "]",
    case="return json.loads('{')-rules.py:3: f: it raises JSONDecodeError",
)
def test_a_function_that_breaks_ends_the_run_with_one_line(rule, body, why):
    source = f"""import json, os, signal, sys
def f(completions):
    {body}

def helper():
    raise ValueError("deep")

class Mute(Exception):
    def __str__(self): raise KeyError
"""
    found = problem_of(rule(source).score, asked())
    assert why in found and "--resume" in found


@pytest.mark.parametrize(
    "body",
    [
        "while True:\n        try: time.sleep(9)\n        except BaseException: pass",
        "time.sleep(60)",
        "re.fullmatch('(a+)+b', 'a' * 60)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); time.sleep(60)",
    ],
)
@mutation("lora/rewards/functions.py", "        timer.start()\n", "", case="time.sleep(60)")
def test_a_function_that_takes_too_long_is_ended(rule, body):
    part = rule(f"import re, signal, time\ndef f(completions):\n    {body}", timeout=0.4)
    begun = time.monotonic()
    found = problem_of(part.score, asked())
    assert "f: it took more than 0.4 s. Make it faster, or raise --reward-timeout; --resume" in found
    assert time.monotonic() - begun < 20 and part.worker.process.wait(10) == -signal.SIGKILL


def test_a_regular_expression_that_backtracks_for_ever_is_ended():
    part = Format(parse("format:^(a+)+$"), 0.4)
    part.start()
    assert [*part.problems([])] == []
    assert part.score(asked(texts=("aaa", "b"))) == [1.0, 0.0]
    found = problem_of(part.score, asked(texts=("a" * 60 + "b", "b")))
    assert found.startswith("wrong --reward in the command line: format:^(a+)+$: it took more than 0.4 s")
    part.close()


@mutation("lora/rewards/worker.py", "    os.dup2(2, 1)\n", "")
def test_what_a_function_prints_goes_to_stderr(rule, capfd):
    source = """
        import os, subprocess, sys
        print("imported")
        def f(completions):
            print('{"values": [9, 9]}')
            print("\\udc80", file=sys.stdout)
            os.write(1, b"written\\n")
            subprocess.run(["echo", "echoed"])
            assert sys.stdin.read() == ""
            return [1, 0]
    """
    assert rule(source).score(asked()) == [1.0, 0.0]
    out, err = capfd.readouterr()
    assert out == ""
    assert [word in err for word in ("imported", '"values"', "written", "echoed")] == [True] * 4


# ---- how its process ends --------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid: int) -> bool:
    return any(not alive(pid) or time.sleep(0.05) for _ in range(200))


@mutation("lora/rewards/functions.py", "self.process.wait(LEAVE if not self.late else 0)", "self.process.wait(0)")
def test_a_function_may_finish_its_own_files_at_the_end_of_a_run(rule, tmp_path):
    source = f"""
        log = open({str(tmp_path / "log")!r}, "w")
        def f(completions):
            log.write("scored")
            return [1, 1]
    """
    part = rule(source)
    part.score(asked())
    part.close()
    assert (tmp_path / "log").read_text() == "scored" and part.worker.process.returncode == 0


@mutation("lora/rewards/functions.py", "start_new_session=True,  #", "start_new_session=False,  #")
def test_what_a_function_started_is_ended_with_it(rule, tmp_path):
    source = f"""
        import os, subprocess, sys
        child = subprocess.Popen(["sleep", "600"])
        open({str(tmp_path / "pid")!r}, "w").write(f"{{child.pid}} {{os.getsid(0) == os.getpid()}}")
        def f(completions):
            while True: pass
    """
    part = rule(source, timeout=0.3)
    child, alone = (tmp_path / "pid").read_text().split()
    assert alone == "True"  # so Ctrl-C in the terminal does not reach it
    problem_of(part.score, asked())
    part.close()
    assert ends(int(child))


RUN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is behind & with it ignored
from types import SimpleNamespace
from lora.rewards import Asked, parse
from lora.rewards.functions import Function
part = Function(parse(sys.argv[1] + ":f"), 600)
part.start()
list(part.problems([]))
print(part.worker.process.pid, flush=True)
part.score([Asked({}, [], "", 0)])
"""


@pytest.mark.parametrize("busy", ["time.sleep(600)", "while True: pass", "re.fullmatch('(a+)+b', 'a' * 60)"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@mutation(
    "lora/rewards/worker.py", "        ctypes.CDLL(None).prctl(1, signal.SIGKILL)", "        pass",
    case="9-re.fullmatch('(a+)+b', 'a' * 60)",
)  # fmt: skip
def test_a_worker_dies_with_its_run_and_prints_nothing(tmp_path, number, busy):
    (tmp_path / "rules.py").write_text(f"import re, time\ndef f(completions):\n    {busy}")
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path / "rules.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    worker = int(run.stdout.readline())
    assert alive(worker)
    time.sleep(0.2)
    run.send_signal(number)
    run.wait(30)
    ended = ends(worker)
    if not ended:
        os.kill(worker, signal.SIGKILL)
    assert ended
    assert "worker.py" not in run.stderr.read()
    run.stdout.close(), run.stderr.close()
