"""SiLU in Triton, shared by the kernels."""

import triton
import triton.language as tl


if not hasattr(tl, "tuple"):
    raise ImportError(f"Triton 3.3 or later is required, found {triton.__version__}")

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def silu_and_slope(x):
    """SiLU and its derivative."""
    sigmoid = 1.0 / (1.0 + tl.exp2(x * -LOG2E))
    return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))
