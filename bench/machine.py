"""The machine that a benchmark runs on: its name, what it can do at most, and what a process takes of it."""

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora import device  # noqa: E402

PACKAGES = ("torch", "transformers", "peft")


def described() -> dict:
    """CPU, cores, memory and versions, for the head of a file of results."""
    model = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    memory = re.search(r"MemTotal: +(\d+) kB", _read("/proc/meminfo"))
    versions = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory GB": round(int(memory[1]) * 1024 / 1e9, 1) if memory else None,
        "system": platform.platform(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "amx": "amx_bf16" in _read("/proc/cpuinfo"),
        "python": platform.python_version(),
        **versions,
    }


def with_amx() -> bool:
    """Has the CPU AMX?"""
    return bool(described()["amx"])


def keyed(name: str) -> str:
    """A result's name in a file that holds those of both kinds of CPU."""
    return f"{name} with AMX" if with_amx() else name


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # not Linux
        return ""


# ---- probes ----------------------------------------------------------------------------------------------------------


def matmul_rate(dtype: torch.dtype = torch.bfloat16, seconds: float = 0.5) -> float:
    """FLOP/s of `F.linear` on 2,048 rows and a weight (1536, 576), over at least so many seconds."""
    x, weight = torch.randn(2048, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    return 2 * x.shape[0] * weight.numel() * _rate(lambda: F.linear(x, weight), seconds)


def read_rate(seconds: float = 0.5) -> float:
    """Bytes/s at which the sum over 512 MB is formed, over at least so many seconds."""
    numbers = torch.ones(2**27)  # float32
    return numbers.nbytes * _rate(numbers.sum, seconds)


def _rate(call: Callable, seconds: float) -> float:
    """Calls per second, after a first one."""
    call()
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        call()
        count += 1
    return count / spent


# ---- this process ----------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not say."""
    return of_status("VmRSS")


def peak() -> int:
    """Most bytes of this process so far. Where Linux counts them, not `ru_maxrss`: a child begins with its parent's."""
    return of_status("VmHWM") or device.peak_memory(torch.device("cpu"))


def of_status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _read("/proc/self/status"))
    return int(found[1]) * 1024 if found else 0
