"""Running a compiled kernel on PyTorch's threads.

A kernel is a C function of one pointer: the address of an int64 array whose first two entries are counters. Each
thread that enters the kernel draws a slot from the second and then units of work from the first until none is left,
so any number of threads gives the same result.

PyTorch's OpenMP workers spin for a while after each operation. Threads of our own would compete with them for the
cores, so the kernel is started on those same workers through `GOMP_parallel` of the libgomp that PyTorch has loaded.
Where there is none (macOS, Windows) a small Python pool serves; kernels run without the GIL.
"""

import ctypes
import functools
import os
from array import array
from concurrent.futures import ThreadPoolExecutor, wait

import torch


@functools.cache
def _gomp_parallel():
    """`GOMP_parallel` of an OpenMP runtime in this process, or None."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line and line.count("/")}
    except OSError:
        return None
    torch_folder = os.path.dirname(torch.__file__)
    names = [path for path in paths if "gomp" in os.path.basename(path) or "iomp" in os.path.basename(path)]
    # PyTorch's own first: only its workers are idle while an operator of PyTorch runs.
    for path in sorted(names, key=lambda path: (not path.startswith(torch_folder), path)):
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


@functools.cache
def _thread_pool(process_id, num_threads):
    # Keyed by process: the threads of a pool do not survive a fork.
    return ThreadPoolExecutor(num_threads, thread_name_prefix="diffusers_pisdm")


@functools.cache
def _callable(address):
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def run_kernel(address: int, parameters: array, num_threads: int) -> None:
    """
    Run a kernel on `num_threads` threads and wait for it.

    Args:
        address (`int`):
            Address of a C function `void kernel(int64_t *parameters)`.
        parameters (`array`):
            Of int64; the first two entries are 0.
        num_threads (`int`):
            At least 1; the calling thread is one of them.
    """
    pointer, _ = parameters.buffer_info()
    kernel = _callable(address)
    if num_threads == 1:
        kernel(pointer)
        return
    gomp_parallel = _gomp_parallel()
    if gomp_parallel is not None:
        gomp_parallel(address, pointer, num_threads, 0)
        return
    pool = _thread_pool(os.getpid(), num_threads - 1)
    others = [pool.submit(kernel, pointer) for _ in range(num_threads - 1)]
    kernel(pointer)
    wait(others)
