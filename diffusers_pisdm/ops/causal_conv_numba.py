"""Depthwise causal convolution with SiLU on the CPU: Numba kernels as operators of torch.

The kernels want channels adjacent in memory (`(B, L, D)` order) and take any strides over batch and length; tensors in
another order are copied to it. Results are in `(B, L, D)` order.
"""

from __future__ import annotations

import functools

import torch

from .numba_parallel import run_kernel


@functools.cache
def _kernels():
    """The kernels' module and their addresses; Numba is imported and compiles here, at the first convolution."""
    from . import causal_conv_numba_kernels as kernels
    from .numba_compile import kernel_address

    return kernels, kernel_address(kernels.forward_kernel), kernel_address(kernels.backward_kernel)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """`x` (B, D, L) in float32 with adjacent channels: itself where it already is so."""
    x = x.float()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.mT.contiguous().mT


def _empty_channels_last(shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    batch, channels, length = shape
    return like.new_empty(batch, length, channels, dtype=torch.float32).mT


def _run(address, scratch_bytes, x, weight, bias, activation, sums, sequences):
    batch, channels, length = x.shape
    blocks = (channels + 255) // 256
    units = batch * blocks
    threads = max(1, min(torch.get_num_threads(), units))
    scratch = torch.empty(threads * scratch_bytes, dtype=torch.uint8)
    parameters = [
        0,
        0,
        units,
        blocks,
        scratch.data_ptr(),
        scratch_bytes,
        channels,
        length,
        weight.shape[0],
        int(activation == "silu"),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        *[0 if total is None else total.data_ptr() for total in sums],
        (channels + 15) // 16 * 16,
    ]
    for sequence in sequences:
        if sequence is None:
            parameters += [0, 0, 0]
        else:
            parameters += [sequence.data_ptr(), sequence.stride(0) * 4, sequence.stride(2) * 4]
    run_kernel(address, torch.tensor(parameters, dtype=torch.int64), threads)


def _filters(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    return weight.float().t().contiguous(), None if bias is None else bias.float().contiguous()  # (K, D), (D,)


@torch.library.custom_op("diffusers_pisdm::causal_conv_numba", mutates_args=(), device_types="cpu")
def _conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    kernels, forward, _ = _kernels()
    out = _empty_channels_last(x.shape, x)
    if x.numel():
        taps, offset = _filters(weight, bias)
        scratch_bytes = kernels.forward_scratch_bytes(taps.shape[0])
        sequences = (_channels_last(x), out, None, None)
        _run(forward, scratch_bytes, x, taps, offset, activation, (None, None), sequences)
    return out.to(x.dtype)


@_conv.register_fake
def _(x, weight, bias, activation):
    return _empty_channels_last(x.shape, x).to(x.dtype)


@torch.library.custom_op("diffusers_pisdm::causal_conv_numba_backward", mutates_args=(), device_types="cpu")
def _conv_backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, the weight and the bias."""
    kernels, _, backward = _kernels()
    batch, channels, _ = x.shape
    grad_x = _empty_channels_last(x.shape, x)
    padded = (channels + 15) // 16 * 16
    grad_weight = torch.empty(batch, weight.shape[1], padded)
    grad_bias = torch.empty(batch, padded)
    if x.numel():
        taps, offset = _filters(weight, bias)
        scratch_bytes = kernels.backward_scratch_bytes(taps.shape[0])
        sequences = (_channels_last(x), None, _channels_last(grad_out), grad_x)
        _run(backward, scratch_bytes, x, taps, offset, activation, (grad_weight, grad_bias), sequences)
    return (
        grad_x.to(x.dtype),
        grad_weight.sum(0)[:, :channels].t().to(weight.dtype).contiguous(),
        grad_bias.sum(0)[:channels].to(weight.dtype if bias is None else bias.dtype).contiguous(),
    )


@_conv_backward.register_fake
def _(grad_out, x, weight, bias, activation):
    like = weight if bias is None else bias
    return _empty_channels_last(x.shape, x).to(x.dtype), weight.new_empty(weight.shape), like.new_empty(weight.shape[0])


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad_out):
    x, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _conv_backward(grad_out, x, weight, bias, ctx.activation)
    return grad_x, grad_weight, None if bias is None else grad_bias, None


_conv.register_autograd(_backward, setup_context=_setup_context)


def causal_conv_numba(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = "silu"
) -> torch.Tensor:
    return _conv(x, weight, bias, activation)
