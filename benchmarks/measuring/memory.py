"""The peak memory of a call beyond what was in use before it."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def measure_peak_growth(call: Callable[[], object], device: torch.device) -> int | None:
    """
    The bytes by which the memory in use grows during a call; `None` on a CPU without Linux and glibc.

    On a GPU, this is what torch's allocator handed out. On the CPU, it is the process's resident memory, by the
    kernel's high-water mark, after the C library has returned all free memory; it includes libraries' workspaces.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _reset_high_water_mark():
        call()
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)  # the kernel counts pages in batches


def _reset_high_water_mark() -> bool:
    if sys.platform != "linux":
        return False
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):  # not glibc, or not permitted
        return False
    return True


def _status_bytes(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
