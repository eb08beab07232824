"""Break the product line by line and see the tests fail.

python tests/mutate.py                      all of them: about half an hour on 2 cores
python tests/mutate.py WORD ...             those whose file, line or test contains a word
python tests/mutate.py --since 1.day        those whose file or test was changed by the commits since then

Each `@mutation(file, line, broken)` in tests/ stands on the test that must fail with that line of that file broken so.
A mutation is tried on a copy of the tree, in a process forked after torch is imported. With `--minutes N` no new one is
begun after N minutes; the order is by a hash of the commit, so another commit begins with others. One whose test is
skipped here, as pages are where there is no browser, counts as not tried. Exit 0 when every one tried was noticed.
"""

import argparse
import ast
import compileall
import contextlib
import importlib
import io
import math
import multiprocessing
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import time
from hashlib import blake2b
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120  # a mutation may make a test loop
SKIPPED = 70  # beside pytest's exit codes: none of the tests ran
# nothing explains a failure here, and nobody's garbage is looked for: a run of a test takes a third of the time
QUICK = ("-m", "", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:anyio", "-p", "no:unraisableexception")
PRELOADED = (  # others' packages, imported once, before the forks
    "pytest", "hypothesis", "openai", "openai.resources.chat.completions", "gguf", "jinja2.sandbox", "jinja2.ext",
    "safetensors.torch", "tokenizers", "tqdm", "huggingface_hub", "matplotlib.pyplot", "torch._dynamo",
)  # fmt: skip


def rows() -> list[dict]:
    """Every decorator in tests/, read from the source: nothing is imported."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path.parent.name == "parity" and os.environ.get("LORA_PARITY") != "1":
            continue  # where the referees are not installed, these are skipped, and nothing would be noticed
        for node in ast.parse(path.read_text()).body:
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "mutation":
                    file, line, broken = map(ast.literal_eval, call.args)
                    case = "".join(f"[{ast.literal_eval(keyword.value)}]" for keyword in call.keywords)
                    test = f"{path.relative_to(ROOT)}::{node.name}{case}"
                    found.append({"file": file, "line": line, "broken": broken, "test": test})
    return found


def changed_since(when: str) -> set[str]:
    """Files that the commits since `when` (as git reads a date) have touched."""
    log = ["git", "log", f"--since={when}", "--name-only", "--pretty=format:"]
    return set(subprocess.run(log, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")) - {""}


def chosen(asked) -> list[dict]:
    table = [row for row in rows() if not asked.words or any(word in str(row) for word in asked.words)]
    if asked.since:
        files = changed_since(asked.since)
        table = [row for row in table if {row["file"], row["test"].partition("::")[0]} & files]
    return table


def in_groups(table: list[dict]) -> list[list[dict]]:
    """The mutations of each test together, in an order that differs from commit to commit."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    groups = [list(group) for _, group in groupby(sorted(table, key=itemgetter("test")), itemgetter("test"))]
    return sorted(groups, key=lambda group: blake2b(f"{head} {group[0]['test']}".encode()).digest())


def copy_tree(target: Path) -> None:
    ignore = shutil.ignore_patterns(".git", "weights", "__pycache__", ".venv", "*.egg-info", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, target, ignore=ignore, dirs_exist_ok=True)


class Passed:
    """A plugin of pytest's, which ends with 0 also where every test was skipped."""

    count = 0

    def pytest_runtest_logreport(self, report):
        self.count += report.when == "call" and report.passed


def run_test(tree: Path, test: str) -> int:
    """pytest's exit code for one test in `tree`, in a forked child: 0 passed, 1 failed; 124 timed out; SKIPPED."""
    child = os.fork()
    if child == 0:
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)  # of the processes that a test starts
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(tree / ".hypothesis")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import pytest

            passed = Passed()
            code = pytest.main([*QUICK, "-x", "-q", "--no-header", test], plugins=[passed])
        os._exit(int(code) if code or passed.count else SKIPPED)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return 124


def judge_all(of_a_test: list[dict]) -> list[tuple[str, str, str]]:
    return [judge(row) for row in of_a_test if time.time() < DEADLINE]


def judge(row: dict) -> tuple[str, str, str]:
    """The verdict, the mutation in words, and what is wrong with it. "noticed": its test passes, and fails for it."""
    path, claim = TREE / row["file"], f"{row['file']}: {row['line'].strip().splitlines()[0]}"
    text = path.read_text()
    if text.count(row["line"]) != 1:
        return "SURVIVED", claim, f"its line is {text.count(row['line'])} times in {row['file']}"
    if row["test"] not in SOUND:
        SOUND[row["test"]] = run_test(TREE, row["test"])
    if SOUND[row["test"]] == SKIPPED:
        return "skipped", claim, ""
    if SOUND[row["test"]] != 0:
        return "SURVIVED", claim, f"{row['test']} fails without it (exit {SOUND[row['test']]})"
    path.write_text(text.replace(row["line"], row["broken"]))
    code = run_test(TREE, row["test"])
    path.write_text(text)
    if code in (1, 2, 124):  # failed, broken at import, or endless
        return "noticed", claim, ""
    return "SURVIVED", claim, f"{row['test']} did not notice it (exit {code})"


TREE = Path()  # each worker's own copy of the tree
SOUND: dict[str, int] = {}  # a test's exit code without a mutation
DEADLINE = math.inf


def start_worker(scratch: str, deadline: float) -> None:
    global TREE, DEADLINE
    DEADLINE = deadline
    TREE = Path(tempfile.mkdtemp(dir=scratch))
    copy_tree(TREE)
    # by the hash of their source, as a mutation may leave size and second of a file the same
    compileall.compile_dir(TREE, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--since")
    parser.add_argument("--minutes", type=float, default=math.inf)
    asked = parser.parse_args()
    table, verdicts, survived = chosen(asked), [], []
    if not table and not asked.since:
        parser.error(f"no mutation has any of {asked.words} in its file, line or test")
    import torch

    for name in PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")]
    with tempfile.TemporaryDirectory() as scratch:
        start = scratch, time.time() + 60 * asked.minutes
        workers = multiprocessing.get_context("fork").Pool(os.cpu_count(), start_worker, start)
        for verdict, claim, wrong in chain.from_iterable(workers.imap_unordered(judge_all, in_groups(table))):
            verdicts.append(verdict)
            print(f"{len(verdicts)}/{len(table)} {verdict:8}  {claim}", flush=True)
            survived += [f"{claim}: {wrong}"] if wrong else []
        workers.close()
        workers.join()
    for line in survived:
        print(f"FAIL {line}")
    tried = len(verdicts) - verdicts.count("skipped")
    print(
        f"{verdicts.count('noticed')} of {tried} mutations noticed"
        + f", {len(table) - tried} not tried" * (tried < len(table))
    )
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
