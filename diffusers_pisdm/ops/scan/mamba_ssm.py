"""Selective scan with mamba_ssm's CUDA kernel (`pip install mamba-ssm`, or from the Hub)."""

from __future__ import annotations

import torch

from ..common.backends import package_function
from .blocked import selective_scan_torch


def selective_scan_mamba_ssm(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> torch.Tensor:
    """
    Selective scan with mamba_ssm's `selective_scan_fn`. It needs one dtype for all sequences and float32 parameters,
    which mixed precision does not guarantee, so both are cast here.
    """
    if u.numel() == 0:  # the kernel rejects it
        return selective_scan_torch(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    delta, B, C = (tensor.to(u.dtype) for tensor in (delta, B, C))
    D, delta_bias = (None if tensor is None else tensor.float() for tensor in (D, delta_bias))
    z = None if z is None else z.to(u.dtype)
    return package_function("mamba_ssm")(u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus)
