"""Break the product line by line and see the tests fail: `python tests/mutate.py [WORD ...]`.

Every row of mutations.toml names a claim, a line of the product, its broken form and the test that must fail for it. A
row is tried on a copy of the tree, in a process forked after torch is imported. With words, only rows containing one.
Exit 0 when every mutation was noticed.
"""

import compileall
import contextlib
import importlib
import io
import multiprocessing
import os
import py_compile
import shutil
import sys
import tempfile
import time
import tomllib
from itertools import chain, count, groupby
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120  # a mutation may make a test loop
# nothing explains a failure here, and nobody's garbage is looked for: a run of a test takes a third of the time
QUICK = ("--assert=plain", "-p", "no:cacheprovider", "-p", "no:anyio", "-p", "no:unraisableexception")
PRELOADED = (  # others' packages, imported once, before the forks
    "pytest", "hypothesis", "openai", "openai.resources.chat.completions", "gguf", "jinja2.sandbox", "jinja2.ext",
    "safetensors.torch", "tokenizers", "tqdm", "huggingface_hub",
)  # fmt: skip


def rows(words: list[str]) -> list[dict]:
    table = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())["mutation"]
    return [row for row in table if not words or any(word in str(row) for word in words)]


def copy_tree(target: Path) -> None:
    ignore = shutil.ignore_patterns(".git", "weights", "__pycache__", ".venv", "*.egg-info", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, target, ignore=ignore, dirs_exist_ok=True)


def run_test(tree: Path, test: str) -> int:
    """pytest's exit code for one test in `tree`, in a forked child: 0 passed, 1 failed; 124 after a time-out."""
    child = os.fork()
    if child == 0:
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(tree / ".hypothesis")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import pytest

            code = pytest.main([*QUICK, "-x", "-q", "--no-header", test])
        os._exit(int(code))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return 124


def judge_all(of_a_test: list[dict]) -> list[tuple[str, str | None]]:
    return [judge(row) for row in of_a_test]


def judge(row: dict) -> tuple[str, str | None]:
    """The row's claim, and what is wrong with it: None where the test passes as it is and fails for the mutation."""
    path, claim = TREE / row["file"], row["claim"]
    text = path.read_text()
    if text.count(row["line"]) != 1:
        return claim, f"its line is {text.count(row['line'])} times in {row['file']}"
    if row["test"] not in SOUND:
        SOUND[row["test"]] = run_test(TREE, row["test"])
    if SOUND[row["test"]] != 0:
        return claim, f"{row['test']} fails without it (exit {SOUND[row['test']]})"
    path.write_text(text.replace(row["line"], row["broken"]))
    code = run_test(TREE, row["test"])
    path.write_text(text)
    noticed = code in (1, 2, 124)  # failed, broken at import, or endless
    return claim, None if noticed else f"{row['test']} did not notice it (exit {code})"


TREE = Path()  # each worker's own copy of the tree
SOUND: dict[str, int] = {}  # a test's exit code without a mutation


def start_worker(scratch: str) -> None:
    global TREE
    TREE = Path(tempfile.mkdtemp(dir=scratch))
    copy_tree(TREE)
    # by the hash of their source, as a mutation may leave size and second of a file the same
    compileall.compile_dir(TREE, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def main() -> int:
    import torch

    for name in PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")]
    table, survived, number = rows(sys.argv[1:]), [], count(1)
    groups = [list(group) for _, group in groupby(sorted(table, key=itemgetter("test")), itemgetter("test"))]
    with tempfile.TemporaryDirectory() as scratch:
        workers = multiprocessing.get_context("fork").Pool(os.cpu_count(), start_worker, (scratch,))
        for claim, wrong in chain.from_iterable(workers.imap_unordered(judge_all, groups)):
            print(f"{next(number)}/{len(table)} {'SURVIVED' if wrong else 'noticed '}  {claim}", flush=True)
            survived += [f"{claim}: {wrong}"] if wrong else []
        workers.close()
        workers.join()
    for line in survived:
        print(f"FAIL {line}")
    print(f"{len(table) - len(survived)} of {len(table)} mutations noticed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
