"""What the launches of Triton kernels have in common."""

from __future__ import annotations

import torch


def check_device(x: torch.Tensor, kernel) -> None:
    """Raises NotImplementedError if `x` is on the CPU and `kernel` was not made for Triton's interpreter."""
    if x.device.type != "cpu":
        return
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(kernel, InterpretedFunction):
        raise NotImplementedError(
            "The 'triton' backend computes on a GPU, and these tensors are on the CPU: use backend='auto', or set"
            " TRITON_INTERPRET=1 before Python starts to run it, slowly, in Triton's interpreter."
        )


def strides_of(*sequences: torch.Tensor | None) -> list[int]:
    """Strides over batch and length, one sequence (B, D, L) after the other."""
    return [stride for x in sequences for stride in ((0, 0) if x is None else (x.stride(0), x.stride(2)))]
