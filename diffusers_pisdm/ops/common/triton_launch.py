"""Shared by the launches of all Triton kernels."""

from __future__ import annotations

import torch


def check_device(x: torch.Tensor, kernel) -> None:
    """Raises NotImplementedError if `x` is on the CPU and `kernel` is not built for Triton's interpreter."""
    if x.device.type != "cpu":
        return
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(kernel, InterpretedFunction):
        raise NotImplementedError(
            "The 'triton' backend needs a GPU, but these tensors are on the CPU. Use backend='auto', or set"
            " TRITON_INTERPRET=1 before starting Python to run it (slowly) in Triton's interpreter."
        )


def strides_of(*sequences: torch.Tensor | None) -> list[int]:
    """Strides over batch and length of each sequence (B, D, L) in turn."""
    return [stride for x in sequences for stride in ((0, 0) if x is None else (x.stride(0), x.stride(2)))]
