"""The threads of OpenMP: each on a core of its own.

A step has thousands of products, and their threads wait for each other after each, spinning. When another process keeps
a core busy, Linux may leave two of them on one core, where the one that spins keeps the other from running: training
was up to 26 times slower. Bound to cores they share theirs with the other process at worst, which costs half.
"""

import os
import sys
from contextlib import contextmanager, suppress

# OpenMP 5.2, 21 "Environment Variables"; those of libgomp and of LLVM's libomp in their manuals
PLACES = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
WAITING = {"GOMP_SPINCOUNT": "30000", "KMP_BLOCKTIME": "1"}  # spins; ms. Without it they wait for tens of ms
ANSWERING = WAITING | {"GOMP_SPINCOUNT": "300000"}  # some ten small operations lie between two products of a token
THEIRS = (*PLACES, "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_WAIT_POLICY", *WAITING)


def _cores() -> set[int]:
    """Where this thread may run; empty where the system does not say (macOS, Windows)."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


ALL = _cores()


def bind(waiting: dict[str, str] = WAITING) -> None:
    """To be called before torch is imported. The environment of a user who has set any of this stays as it is, and so
    does that of a process that shall leave cores to others (OMP_NUM_THREADS, as torchrun sets it)."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    few = threads.isdecimal() and int(threads) < len(ALL)
    if few or any(name in os.environ for name in THEIRS):
        return
    os.environ |= waiting | (PLACES if sys.platform == "linux" else {})


def unbind() -> None:
    """From here on this thread may run anywhere, and so may those that it starts."""
    with suppress(OSError):  # the cores that the process may use have changed
        if ALL:
            os.sched_setaffinity(0, ALL)


@contextmanager
def unbound():
    """Threads that are started inside, as those of the tokenizer, may run on every core."""
    before = _cores()
    unbind()
    try:
        yield
    finally:
        with suppress(OSError):
            if before:
                os.sched_setaffinity(0, before)
