"""Launches a compiled kernel: the layout of its tensors, its units of work, its parameter array and its threads.

Kernels need the channels of a sequence tensor (batch, channels, length) adjacent in memory, as in a transposed
(batch, length, channels) tensor, and accept any strides over batch and length. There is one kernel for float32
sequences and one for bfloat16; both compute in float32.

A kernel is a C function of one pointer: the address of an int64 array whose first two entries are counters. Each
thread that enters the kernel takes a slot from the second, then units of work from the first until none is left, so
any number of threads gives the same result.

PyTorch's OpenMP workers spin for a while after each operation. Threads of our own would compete with them for the
cores, so the kernel runs on those same workers, through `GOMP_parallel` of the libgomp that PyTorch has loaded.
Without libgomp (macOS, Windows), a small Python thread pool runs it; kernels do not hold the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from types import ModuleType

import torch

from .sequence_layout import adjacent_channels, ceil_div


LANES = 16
# Work is split by shape alone, never by the number of threads, which must not affect results. Sixteen units keep 16
# threads busy; a unit of 32 groups is the largest that suits the caches, one of 4 the smallest worth its overhead.
WANTED_UNITS = 16
MAX_GROUPS = 32
MIN_GROUPS = 4
# With fewer vector operations than this, another thread costs more than it saves.
WORK_PER_THREAD = 1 << 13


def memory_dtype(*sequences: torch.Tensor | None) -> torch.dtype:
    """The dtype in which kernels read and write a call's sequences: bfloat16 if all are, else float32."""
    is_bfloat16 = all(x is None or x.dtype == torch.bfloat16 for x in sequences)
    return torch.bfloat16 if is_bfloat16 else torch.float32


def channels_last(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` (B, D, L) in `dtype` with adjacent channels, copied only if necessary."""
    return adjacent_channels(x.to(dtype))


def split_channels(batch: int, channels: int) -> tuple[int, int]:
    """The number of blocks per batch row, and of groups of 16 channels per block."""
    groups = ceil_div(channels, LANES)
    blocks = max(
        ceil_div(groups, MAX_GROUPS), min(ceil_div(WANTED_UNITS, max(batch, 1)), ceil_div(groups, MIN_GROUPS))
    )
    groups_per_block = ceil_div(groups, blocks)
    return ceil_div(groups, groups_per_block), groups_per_block


def launch(
    kernels: ModuleType,
    address: int,
    scratch_bytes: Callable[[int, int], int],
    size: int,
    shape: tuple[int, int, int],
    parameters: dict[int, int | torch.Tensor | None],
) -> None:
    """
    Runs a kernel on sequences of `shape` (batch, channels, length).

    A step's work is proportional to `size`, the state size or number of taps; `scratch_bytes` gives the scratch a
    thread needs for `size` and the groups in a unit. Tensors among the other `parameters` become addresses; those with
    three axes are sequence tensors, in the kernel's dtype, and also pass their strides. All others are float32.
    """
    batch, channels, length = shape
    blocks, groups = split_channels(batch, channels)
    units = batch * blocks
    work = units * groups * length * size
    num_threads = max(1, min(torch.get_num_threads(), units, work // WORK_PER_THREAD))
    scratch = torch.empty(num_threads, scratch_bytes(size, groups), dtype=torch.uint8)
    values = array("q", bytes(8 * kernels.NUM_PARAMETERS))
    values[kernels.NUM_UNITS] = units
    values[kernels.BLOCKS] = blocks
    values[kernels.GROUPS] = groups
    values[kernels.SCRATCH] = scratch.data_ptr()
    values[kernels.SCRATCH_BYTES] = scratch.shape[1]
    values[kernels.CHANNELS] = channels
    values[kernels.PADDED_CHANNELS] = ceil_div(channels, LANES) * LANES
    values[kernels.LENGTH] = length
    for index, value in parameters.items():
        if isinstance(value, int):
            values[index] = value
        elif value is not None:
            values[index] = value.data_ptr()
            if value.ndim == 3:
                values[index + 1 : index + 4] = array(
                    "q", [value.element_size() * stride for stride in value.stride()]
                )
    run_kernel(address, values, num_threads)


@functools.cache
def _gomp_parallel():
    """`GOMP_parallel` from an OpenMP runtime in this process, or None."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line and line.count("/")}
    except OSError:
        return None
    torch_folder = os.path.dirname(torch.__file__)
    names = [path for path in paths if "gomp" in os.path.basename(path) or "iomp" in os.path.basename(path)]
    # PyTorch's own runtime first: only its workers are idle while a PyTorch operator runs.
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
    # Keyed by process: a pool's threads do not survive a fork.
    return ThreadPoolExecutor(num_threads, thread_name_prefix="diffusers_pisdm")


@functools.cache
def _callable(address):
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def run_kernel(address: int, parameters: array, num_threads: int) -> None:
    """Runs `void kernel(int64_t *parameters)` on `num_threads` threads, the calling one included, and waits."""
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
