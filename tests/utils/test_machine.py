import ctypes
import os
import platform

import psutil
import pytest

from diffusers_pisdm import keep_freed_memory
from diffusers_pisdm.utils.machine import M_MMAP_MAX, M_TRIM_THRESHOLD


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_from_then_on():
    child = os.fork()  # a setting of the whole process, for good
    if child == 0:
        code = 1
        try:
            for option, default in ((M_MMAP_MAX, 65_536), (M_TRIM_THRESHOLD, 128 << 10)):
                assert ctypes.CDLL(None).mallopt(option, default) == 1  # another test may have changed them
            returned = kept_share() < 0.1
            code = 0 if returned and keep_freed_memory() and kept_share() > 0.9 else 1
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_other_systems_are_told_that_it_has_no_effect(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
