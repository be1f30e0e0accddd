"""Depthwise causal convolution with SiLU on GPUs: Triton kernels as torch operators.

Sequences in other than `(B, L, D)` memory order are copied to it; results and gradients have that order. Kernels
compute in float32 whatever the inputs' dtypes; partial sums are added in a fixed order.
"""

from __future__ import annotations

import functools

import torch

from ..common.backends import refuse_float64
from ..common.sequence_layout import adjacent_channels, ceil_div, empty_channels_last
from ..common.triton_launch import check_device, strides_of
from .autograd import register_conv_autograd


CHANNELS = 64  # per program and tile
STEPS = 16  # per tile
BACKWARD_STEPS = 16  # per tile in the backward, which holds 2 * taps - 1 tiles
MAX_CHUNKS = 65_535  # CUDA's limit on the second axis of a launch
# A backward program adds several tiles to one partial sum as long as this many programs remain.
WANTED_PROGRAMS = 2048


@functools.cache
def _kernels():
    """The kernels' module. The first call imports Triton; each kernel compiles at its first launch."""
    from . import triton_kernels

    return triton_kernels


def split_steps(batch: int, blocks: int, length: int, tile: int, programs: int) -> tuple[int, int]:
    """
    The number of chunks per sequence, with about as many `programs` at most, and the steps per chunk, a multiple of
    `tile`.
    """
    tiles = ceil_div(length, tile)
    steps = tile * max(1, tiles * batch * blocks // programs, ceil_div(tiles, MAX_CHUNKS))
    return ceil_div(length, steps), steps


def _start(
    kernel, chunks: int, chunk_steps: int, x: torch.Tensor, tensors, strides, weight: torch.Tensor, **constants
) -> None:
    """One program per batch row, block of channels and chunk."""
    batch, channels, length = x.shape
    blocks = ceil_div(channels, CHANNELS)
    sizes = (channels, length, chunk_steps, blocks, *weight.stride(), *strides)
    with torch.cuda.device_of(x):
        kernel[batch * blocks, chunks](*tensors, *sizes, TAPS=weight.shape[1], CHANNELS=CHANNELS, **constants)


@torch.library.custom_op("diffusers_pisdm::causal_conv_triton", mutates_args=())
def _conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    out = empty_channels_last(x, x.dtype)
    if out.numel() == 0:  # an empty grid cannot be launched
        return out
    check_device(x, _kernels().conv_forward_kernel)
    x = adjacent_channels(x)
    tensors = (x, weight, None if bias is None else bias.contiguous(), out)
    split = split_steps(1, 1, x.shape[2], STEPS, programs=x.shape[2])  # a tile each, unless there are too many
    constants = {"SILU": activation == "silu", "STEPS": STEPS}
    _start(_kernels().conv_forward_kernel, *split, x, tensors, strides_of(x), weight, **constants)
    return out


@torch.library.custom_op("diffusers_pisdm::causal_conv_triton_backward", mutates_args=())
def _conv_backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias; empty if there is no bias."""
    grad_x = empty_channels_last(x, x.dtype)
    if grad_x.numel() == 0:
        absent = grad_out.new_empty(0) if bias is None else torch.zeros_like(bias)
        return grad_x, weight.new_zeros(weight.shape), absent
    check_device(x, _kernels().conv_backward_kernel)
    grad_out, x = adjacent_channels(grad_out), adjacent_channels(x)
    batch, channels, length = x.shape
    taps = weight.shape[1]
    blocks = ceil_div(channels, CHANNELS)
    chunks, chunk_steps = split_steps(batch, blocks, length, BACKWARD_STEPS, WANTED_PROGRAMS)
    grad_weight = torch.empty(batch * chunks, taps, channels, device=x.device)
    grad_bias = torch.empty(batch * chunks, channels, device=x.device)
    tensors = (grad_out, x, weight, None if bias is None else bias.contiguous())
    _start(
        _kernels().conv_backward_kernel,
        *(chunks, chunk_steps, x, (*tensors, grad_x, grad_weight, grad_bias), strides_of(grad_out, x), weight),
        SILU=activation == "silu",
        STEPS=BACKWARD_STEPS,
    )
    return (
        grad_x,
        grad_weight.sum(0).t().to(weight.dtype).contiguous(),
        grad_out.new_empty(0) if bias is None else grad_bias.sum(0).to(bias.dtype),
    )


register_conv_autograd(_conv, _conv_backward)


def causal_conv_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = "silu"
) -> torch.Tensor:
    """
    Causal convolution with Triton kernels, in float32; the result has `x`'s dtype and (B, L, D) memory order. The
    backward recomputes the activation's input.
    """
    refuse_float64("triton", (x, weight, bias))
    return _conv(x, weight, bias, activation)
