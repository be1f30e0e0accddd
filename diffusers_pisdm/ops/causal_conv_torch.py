"""Depthwise causal convolution by torch's own operations, for every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_conv_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = "silu"
) -> torch.Tensor:
    """
    Depthwise causal convolution by `torch.nn.functional.conv1d`.

    Arguments and return value are those of [`~diffusers_pisdm.ops.causal_conv`].
    """
    weight = weight.to(x.dtype)[:, None]  # (D, 1, K)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv1d(F.pad(x, (weight.shape[2] - 1, 0)), weight, bias, groups=x.shape[1])  # (B, D, L)
    y = y if activation is None else F.silu(y)
    return y.to(x.dtype)  # autocast computes float32 convolutions in half precision
