"""pytest for each of many files: python -m tests.every FILE ...

A file has a process of its own, forked after what most files import is imported: that alone takes some four seconds,
with transformers ten. As many run at once as there are cores, in the order given, those of SLOW before the others, so
that all cores end together. What a file printed is shown when it has ended, with its wall time and its CPU time. Exit 0
when every file passed.
"""

import gc
import importlib
import os
import sys
import tempfile
import time

import pytest
import torch

from tests import cli

SLOW = tuple(
    f"tests/{name}.py"
    for name in (
        "run/test_resume", "run/test_faults", "scripts/test_bad_input", "bench/test_experiments", "train/test_memory",
        "run/test_quant_runs", "train/test_torchrun", "train/test_ranks", "run/test_rollouts", "text/test_template",
        "run/test_layer_kinds", "scripts/test_methods", "data/test_encode", "scripts/test_commands",
        "data_gen/test_distill", "rewards/test_functions", "serve/test_engine", "parity/test_parity_llama",
        "parity/test_parity_adapter", "parity/test_parity_model", "parity/test_parity_default",
        "parity/test_parity_speed", "parity/test_parity_compile",
    )
)  # fmt: skip
REFEREES = ("transformers.models.llama.modeling_llama", "transformers.generation.utils", "peft")


def start(path: str, output) -> int:
    """The process's number; the child never returns."""
    child = os.fork()
    if child == 0:
        os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
        code = pytest.main([path, "-W", "ignore::pytest.PytestAssertRewriteWarning"])
        sys.exit(0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code)  # all of its tests are large
    return child


def main(paths: list[str]) -> int:
    torch.set_num_threads(1)  # in a forked child OpenMP waits for ever for the threads of its parent
    cli.warm()
    for module in ("hypothesis", *REFEREES * (os.environ.get("LORA_PARITY") == "1")):
        importlib.import_module(module)
    gc.collect(), gc.freeze()
    waiting = sorted(paths, key=lambda path: SLOW.index(path) if path in SLOW else len(SLOW))
    running, failed = {}, []
    while waiting or running:
        while waiting and len(running) < os.cpu_count():
            path, output = waiting.pop(0), tempfile.TemporaryFile()  # noqa: SIM115
            running[start(path, output)] = path, output, time.monotonic()
        child, status, used = os.wait4(-1, 0)
        path, output, began = running.pop(child)
        print(f"-- {path}: {time.monotonic() - began:.0f} s, of the CPU {used.ru_utime + used.ru_stime:.0f} s")
        output.seek(0)
        print(output.read().decode(errors="replace"), flush=True)
        failed += [path] * (status != 0)
    print(f"{len(paths) - len(failed)} of {len(paths)} files passed", *failed, sep="\nFAIL ")
    return min(len(failed), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
