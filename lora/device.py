"""Which device and dtype to compute with, and why."""

import sys
from pathlib import Path

import torch

from lora.errors import BadInput


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises BadInput for a device that is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in here.items() if there)
    if not here[name]:
        there = ", ".join(kind for kind, there in here.items() if there)
        raise BadInput(f"wrong --device in the command line: there is no {name} here. Give auto or one of: {there}")
    return torch.device(name)


def _cpu_has_bf16() -> bool:
    """Does the CPU multiply bf16 in hardware? Without that it is about three times slower than float32."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16"})


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


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of the GPU where one is used, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
