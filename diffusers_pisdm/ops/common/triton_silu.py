"""SiLU in Triton, for the kernels that have it in common."""

import triton
import triton.language as tl


if not hasattr(tl, "tuple"):
    raise ImportError(f"Triton 3.3 or later is needed, this is {triton.__version__}")

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def silu_and_slope(x):
    """silu and its derivative."""
    sigmoid = 1.0 / (1.0 + tl.exp2(x * -LOG2E))
    return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))
