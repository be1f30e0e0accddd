"""Depthwise causal convolution with SiLU on the CPU: Numba kernels as torch operators.

Sequences in other than `(B, L, D)` memory order are copied to it; results and gradients have that order. Kernels
compute in float32 whatever the inputs' dtypes. They read and write bfloat16 sequences as they are; float16 and mixed
ones are cast to float32, and results and gradients back.
"""

from __future__ import annotations

import functools

import torch

from ..common.backends import refuse_float64
from ..common.numba_launch import LANES, channels_last, launch, memory_dtype
from ..common.sequence_layout import ceil_div, empty_channels_last
from .autograd import register_conv_autograd


@functools.cache
def _kernel(name: str, dtype: torch.dtype):
    """The kernels' module, and the address of that for sequences of `dtype`. The first call imports and compiles."""
    from ..common.numba_compile import kernel_address
    from . import numba_kernels

    name += "_bfloat16" if dtype == torch.bfloat16 else ""
    return numba_kernels, kernel_address(getattr(numba_kernels, name))


def _input_parameters(kernels, dtype, x, weight, bias, activation):
    """The inputs in the kernels' form, by index in the parameter array."""
    return {
        kernels.TAPS: weight.shape[1],
        kernels.SILU: int(activation == "silu"),
        kernels.X: channels_last(x, dtype),
        kernels.WEIGHT: weight.float().t().contiguous(),  # (K, D)
        kernels.BIAS: None if bias is None else bias.float().contiguous(),
    }


@torch.library.custom_op("diffusers_pisdm::causal_conv_numba", mutates_args=(), device_types="cpu")
def _conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    dtype = memory_dtype(x)
    kernels, address = _kernel("forward_kernel", dtype)
    out = empty_channels_last(x, dtype)
    parameters = _input_parameters(kernels, dtype, x, weight, bias, activation) | {kernels.OUT: out}
    launch(kernels, address, kernels.forward_scratch_bytes, weight.shape[1], x.shape, parameters)
    return out.to(x.dtype)


@torch.library.custom_op("diffusers_pisdm::causal_conv_numba_backward", mutates_args=(), device_types="cpu")
def _conv_backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias; empty if there is no bias."""
    dtype = memory_dtype(grad_out, x)
    kernels, address = _kernel("backward_kernel", dtype)
    batch, channels, _ = x.shape
    taps = weight.shape[1]
    padded_channels = ceil_div(channels, LANES) * LANES
    grad_x = empty_channels_last(x, dtype)
    # Each unit of work writes its own partial sums; they are added below in a fixed order.
    grad_weight = torch.empty(batch, taps * padded_channels)
    grad_bias = torch.empty(batch, padded_channels)
    parameters = _input_parameters(kernels, dtype, x, weight, bias, activation) | {
        kernels.GRAD_OUT: channels_last(grad_out, dtype),
        kernels.GRAD_X: grad_x,
        kernels.GRAD_WEIGHT: grad_weight,
        kernels.GRAD_BIAS: grad_bias,
    }
    launch(kernels, address, kernels.backward_scratch_bytes, taps, x.shape, parameters)
    return (
        grad_x.to(x.dtype),
        grad_weight.sum(0).view(taps, -1)[:, :channels].t().to(weight.dtype, copy=True).contiguous(),
        grad_out.new_empty(0) if bias is None else grad_bias.sum(0)[:channels].to(bias.dtype, copy=True),
    )


register_conv_autograd(_conv, _conv_backward)


def causal_conv_numba(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = "silu"
) -> torch.Tensor:
    """
    Causal convolution with compiled CPU kernels, in float32; the result has `x`'s dtype and (B, L, D) memory order.
    The backward recomputes the activation's input.
    """
    refuse_float64("numba", (x, weight, bias))
    return _conv(x, weight, bias, activation)
