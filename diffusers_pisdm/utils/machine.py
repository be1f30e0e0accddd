"""The machine a run uses."""

from __future__ import annotations

import ctypes
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


def multiplies_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """
    Whether matrix products of a half-precision type take no longer than float32's. On a CPU without instructions for
    it, they take 7 to 30 times as long.
    """
    if device.type != "cpu":
        return True
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, supported)()


def slow_precision_warning(dtype: torch.dtype | None, device: torch.device) -> list[str]:
    """What to tell a user who asked for a precision that is slower than float32 here; nothing otherwise."""
    if dtype not in (torch.bfloat16, torch.float16) or multiplies_fast(dtype, device):
        return []
    name = str(dtype).removeprefix("torch.")
    return [f"Warning: this processor has no instructions for {name}: it takes several times as long as float32."]


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def keep_freed_memory() -> bool:
    """
    Makes this process keep the memory of tensors that it frees, for the next ones, instead of returning large ones to
    the system at once, as glibc does: on a CPU, each layer would have its memory mapped and zeroed anew, which takes
    long, in virtual machines above all. The process stays at its peak. It lasts until the process ends.

    Returns:
        `bool`: Whether it took effect; other C libraries than glibc, so other systems than Linux, have no such option.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return libc.mallopt(M_MMAP_MAX, 0) == 1 and libc.mallopt(M_TRIM_THRESHOLD, -1) == 1


def peak_memory_gib(device: torch.device) -> float:
    """This process's peak memory so far, in GiB: on the GPU if `device` is one, otherwise in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":  # Windows has no getrusage
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class DelayedReader:
    """
    Brings small tensors to the host. A GPU is not waited for: what it sends arrives when it sends the next.
    """

    def __init__(self):
        self.sent: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def send(self, tensor: torch.Tensor) -> list:
        """Sends a tensor; returns what has arrived, as lists of numbers."""
        if not tensor.is_cuda:
            return [tensor.tolist()]
        arrived = self.flush()
        copy, event = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record()
        self.sent = copy, event
        return arrived

    def flush(self) -> list:
        """Waits for what has not arrived yet."""
        if self.sent is None:
            return []
        (copy, event), self.sent = self.sent, None
        event.synchronize()
        return [copy.tolist()]
