"""The heap of a process, where its tensors on a CPU are: what glibc keeps of it, and when it gives back.

All of it is glibc's, https://man7.org/linux/man-pages/man3/mallopt.3.html; with another C library nothing is done.
"""

import ctypes
import mmap
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from lora.errors import STOP_CODES

if TYPE_CHECKING:  # the scripts are here before torch is imported
    import torch

TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
LARGE = 2**26  # bytes, and above it the numbers of a weight of a 7B; not the logits of a small model
TIDY_SECONDS = 10  # between two times that memory is given back: the pages have to be filled with zeros again


def restart(name: str) -> None:
    """Called early by a script that trains, with its `__name__`: its process begins again, in place and once, with
    TUNABLES, which glibc reads when a process starts. An environment that has tunables stays as it is.

    PyTorch's tensors are aligned to 64 bytes. glibc cuts such a block out of a larger one and frees the slivers at its
    ends. With a cache of small blocks these are soon something else, so that the hole that a tensor leaves is too small
    for the next of its size: holes were a fifth of the memory at the peak (glibc 2.36).
    """
    if name != "__main__" or not _is_glibc():
        return
    if os.environ.get("GLIBC_TUNABLES") == TUNABLES["GLIBC_TUNABLES"]:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_CODES)
    elif sys.argv[0] in sys.orig_argv and not (sys.gettrace() or TUNABLES.keys() & os.environ.keys()):
        # a notebook that runs the script is not to begin again, nor is a debugger
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_CODES)  # Ctrl-C meanwhile waits, or it would be lost
        os.environ |= TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def keep_memory(device: "torch.device", enough: float = inf, sparing: bool = False) -> Callable[[], None]:
    """Let glibc keep what is freed, up to `enough` bytes of the process, for training on a CPU; elsewhere nothing. Call
    what it returns after each step.

    By itself glibc returns large blocks to the system, which hands the next ones out page by page, each filled with
    zeros (mallopt(3): M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD). But steps differ in size, and what is kept of
    one has holes that the next does not fill: 500 steps of 2,000 tokens grew from 2.3 to 6.2 GB. So where a step leaves
    more than enough, all that is free is given back (malloc_trim(3)). To be `sparing` is not to keep blocks of LARGE
    bytes or more at all: the numbers of packed weights come and go, and left 1.3 GB of holes in a step of a 7B.
    """
    if device.type != "cpu" or not _is_glibc():
        return lambda: None
    libc, due = ctypes.CDLL(None), 0.0
    for option, size in ((-1, 2**31 - 1), (-2, 64 * 2**20), (-3, LARGE if sparing else 2**30)):
        libc.mallopt(option, size)

    def tidy() -> None:
        nonlocal due
        if time.monotonic() >= due and resident_memory() > enough:
            libc.malloc_trim(0)
            due = time.monotonic() + TIDY_SECONDS

    return tidy


def give_back(size: int) -> None:
    """Let glibc return every block of `size` bytes or more to the system when it is freed; elsewhere nothing.

    By itself it raises its threshold to the largest block freed so far (mallopt(3), M_MMAP_THRESHOLD), and blocks that
    come and go leave holes in the heap. Training as a whole is 20 % slower with it: only for a base in shards.
    """
    if _is_glibc():
        ctypes.CDLL(None).mallopt(-3, size)


def huge_pages(tensor: "torch.Tensor") -> None:
    """Ask Linux to bring a large new tensor of the CPU into memory by 2 MB, not by 4 kB, in half the time (madvise(2)).

    The numbers of packed weights are such tensors: 26 GB of them in a step of a 7B.
    """
    if tensor.nbytes >= LARGE and tensor.device.type == "cpu" and sys.platform == "linux":
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)


def resident_memory() -> int:
    """Bytes of this process in memory, as Linux counts them (proc_pid_statm(5))."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
