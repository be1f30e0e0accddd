"""Causal convolution with causal-conv1d's CUDA kernel (`pip install causal-conv1d`, or from the Hub)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..common.backends import package_function


KERNEL_SIZES = range(2, 5)  # that the kernel has


def causal_conv_causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = "silu"
) -> torch.Tensor:
    """
    Causal convolution with causal-conv1d's `causal_conv1d_fn`. It wants time or channels to be contiguous, and reads
    contiguous channels eight at a time; other sequences are copied. Filters of one tap become two.
    """
    if x.numel() == 0:  # the kernel rejects it
        return x * weight.sum().to(x.dtype)  # nothing, but differentiable
    if weight.shape[1] not in (1, *KERNEL_SIZES):
        raise NotImplementedError(
            f"The 'causal_conv1d' backend has kernel sizes from {KERNEL_SIZES[0]} to {KERNEL_SIZES[-1]}, not"
            f" {weight.shape[1]}: use backend='triton' or 'torch'."
        )
    if weight.shape[1] == 1:
        weight = F.pad(weight, (1, 0))  # (D, 2)
    batch, step, time = x.stride()
    reads_channels = step == 1 and x.shape[1] % 8 == 0 and batch % 8 == 0 and time % 8 == 0
    if time != 1 and not reads_channels:
        x = x.contiguous()
    weight = weight.to(x.dtype).contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    return package_function("causal_conv1d")(x, weight, bias, activation=activation)  # (B, D, L)
