import ctypes
import platform

import psutil
import pytest

from diffusers_pisdm import keep_freed_memory
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
