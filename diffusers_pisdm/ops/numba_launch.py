"""What a kernel of this package is started with: the layout of its tensors, its units of work, its parameter array.

Kernels want the channels of a sequence tensor (batch, channels, length) adjacent in memory, as in a transposed
(batch, length, channels) tensor, and take any strides over batch and length.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import ModuleType

import torch

from .numba_parallel import run_kernel
from .sequence_layout import adjacent_channels, ceil_div


LANES = 16
# Work is cut by the shape alone, never by the number of threads: results must not depend on that. Sixteen units keep
# as many threads busy; a unit of 32 groups is as large as caches like it, one of 4 as small as its own costs allow.
WANTED_UNITS = 16
MAX_GROUPS = 32
MIN_GROUPS = 4
# Vector operations below which another thread costs more than it does.
WORK_PER_THREAD = 1 << 13


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """`x` (B, D, L) in float32 with adjacent channels: itself where it is so already."""
    return adjacent_channels(x.float())


def split_channels(batch: int, channels: int) -> tuple[int, int]:
    """The number of blocks that a batch row is cut into, and the groups of 16 channels in a block."""
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
    Run a kernel.

    Args:
        kernels (`module`): The kernel's module, which names the entries of the parameter array.
        address (`int`): The compiled kernel.
        scratch_bytes (`callable`): Bytes a thread needs, from `size` and the groups in a unit.
        size (`int`): State size or number of taps: a step costs vector operations in proportion to it.
        shape (`tuple`): (batch, channels, length).
        parameters (`dict`):
            The other entries, by index. Tensors are float32 and become addresses; those with three axes are sequence
            tensors and bring their strides.
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
                values[index + 1 : index + 4] = array("q", [4 * stride for stride in value.stride()])
    run_kernel(address, values, num_threads)
