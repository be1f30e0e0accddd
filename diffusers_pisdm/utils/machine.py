"""The machine a run uses."""

from __future__ import annotations

import os
import platform
import sys

import torch


def describe_machine(device: torch.device) -> str:
    """One line about the device, for logs and model cards: its name, and the number of threads for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory_gib(device: torch.device) -> float:
    """This process's peak memory so far, in GiB: on the GPU if `device` is one, otherwise in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":  # Windows has no getrusage
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
