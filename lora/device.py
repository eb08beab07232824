"""Which device and dtype to compute with, and why."""

import os
import re
import shutil
import sys
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from lora import threads
from lora.errors import BadEnvironment, BadInput

ROUND = 32  # on a CPU a product is compiled for every number of rows anew, and kept: better few numbers


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises BadInput for a device that is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in here.items() if there)
    if not here[name]:
        there = ", ".join(kind for kind, there in here.items() if there)
        raise BadInput(f"wrong --device in the command line: there is no {name} here. Give auto or one of: {there}")
    if name != "cpu":
        threads.unbind()  # a GPU's own threads are started from here
    return torch.device(name)


@cache
def _cpu_words() -> set[str]:
    """What Linux says of the CPU, its instruction sets among it; nothing elsewhere."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def _cpu_has_bf16() -> bool:
    """Does the CPU multiply bf16 in hardware? Without that it is about three times slower than float32."""
    return bool(_cpu_words() & {"avx512_bf16", "amx_bf16"})


def cpu_has_amx() -> bool:
    """Does the CPU multiply tiles of bf16 matrices?"""
    return "amx_bf16" in _cpu_words()


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype and the reason for it."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
        return (torch.bfloat16, "the GPU is fast in it") if fast else (torch.float32, "the GPU has no bfloat16")
    if device.type == "cpu" and _cpu_has_bf16():
        return torch.bfloat16, "the CPU multiplies it in hardware"
    return torch.float32, f"bfloat16 is slow on this {'CPU' if device.type == 'cpu' else device.type}"


def check_compiler(device: torch.device) -> None:
    """Raises BadEnvironment where torch.compile would not find what it calls: a C++ compiler for a CPU, C for a GPU."""
    if device.type == "cuda":
        language, names = "C", [os.environ.get("CC") or "gcc", "clang"]
    else:
        default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        language, names = "C++", [os.environ.get("CXX") or default]
    if not any(map(shutil.which, names)):
        fix = "Install it, or leave out --compile"
        raise BadEnvironment(f"no {language} compiler in this environment: --compile calls {names[0]}. {fix}")


def upload(values, device: torch.device | str, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """A list or a CPU tensor on `device`. A GPU is not waited for: a copy from pinned memory queues like a kernel."""
    tensor, device = torch.as_tensor(values, dtype=dtype), torch.device(device)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextmanager
def few_rows(count: int, device: torch.device):
    """For products of `count` rows with large weights: one or two are faster without oneDNN on a CPU without AMX.

    It lays every bfloat16 weight out anew for each product, which costs as much again as reading it; PyTorch's own
    kernel reads it once, but computes row by row. With AMX `ops.fast_decoding` has a better way.
    """
    before = torch.backends.mkldnn.enabled
    try:
        torch.backends.mkldnn.enabled = before and not (count <= 2 and device.type == "cpu" and not cpu_has_amx())
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def widest(device: torch.device | str) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of the GPU where one is used, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that can still be had: of the GPU, or of this machine within the limits of the control groups that the
    process is in; None where the system does not say. `root` is where `proc` and `sys` are."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = re.search(r"^MemAvailable: +(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    return min([int(available[1]) * 1024, *_free_in_groups(root, groups)]) if available else None


def _free_in_groups(root: Path, groups: list[str]):
    """What each control group with a limit has left, counting as free the file pages it would drop. Version 2 has one
    hierarchy, version 1 one for memory: https://docs.kernel.org/admin-guide/cgroup-v2.html, cgroup-v1/memory.html."""
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit, used, pages = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            pages = "total_inactive_file"
        else:
            continue
        group = root / base / path.lstrip("/")
        for folder in (group, *group.parents):  # in a container the path may be the host's: then only the top is here
            with suppress(OSError, ValueError):  # no file: not a group, or no limit; "max" is none either
                dropped = re.search(rf"^{pages} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                yield max(0, left) + int(dropped[1] if dropped else 0)
            if folder == root / base:
                break
