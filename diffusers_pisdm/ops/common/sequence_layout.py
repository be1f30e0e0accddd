"""The kernels' memory layout of sequence tensors (batch, channels, length): adjacent channels."""

from __future__ import annotations

import torch


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return (a + b - 1) // b


def adjacent_channels(x: torch.Tensor) -> torch.Tensor:
    """`x` (B, D, L) with adjacent channels, copied only if necessary."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.mT.contiguous().mT


def empty_channels_last(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An empty tensor shaped like `x` (B, D, L), with adjacent channels and no gaps."""
    batch, channels, length = x.shape
    return x.new_empty(batch, length, channels, dtype=dtype).mT
