import ctypes
import platform

import psutil
import pytest
import torch

from diffusers_pisdm import keep_freed_memory
from diffusers_pisdm.utils.machine import multiplies_fast, slow_precision_warning
from tests.support.processes import Process


SIZE = 64 << 20  # bytes, more than glibc ever keeps by itself


def kept_share() -> float:
    """How much of a large block this process still holds after freeing it."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    block = libc.malloc(SIZE)
    ctypes.memset(block, 1, SIZE)
    full = psutil.Process().memory_info().rss
    libc.free(block)
    return 1 - (full - psutil.Process().memory_info().rss) / SIZE


def check_that_freed_memory_is_kept(arguments: list[str]) -> None:
    assert kept_share() < 0.1, "glibc did not return it before"
    assert keep_freed_memory()
    assert kept_share() > 0.9


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_from_then_on():
    process = Process(check_that_freed_memory_is_kept, [])  # a setting of the whole process, for good
    assert process.wait() == 0, process.said


def test_other_systems_are_told_that_it_has_no_effect(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF)
def test_a_cpu_is_slow_in_half_precision_where_onednn_has_no_kernels_for_it(monkeypatch, dtype):
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda supported=supported: supported)
        assert multiplies_fast(dtype, torch.device("cpu")) is supported
        told = slow_precision_warning(dtype, torch.device("cpu"))
        assert told == [] if supported else str(dtype).split(".")[1] in told[0] and "float32" in told[0]
    assert multiplies_fast(dtype, torch.device("cuda")) and not slow_precision_warning(dtype, torch.device("cuda"))
    monkeypatch.setattr(torch.ops.mkldnn, name, lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies_fast(dtype, torch.device("cpu"))


def test_other_precisions_are_never_warned_of():
    assert slow_precision_warning(torch.float32, torch.device("cpu")) == []
    for dtype in HALF:
        assert isinstance(multiplies_fast(dtype, torch.device("cpu")), bool)  # this PyTorch has the operators
