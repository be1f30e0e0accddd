"""Selective scan on the CPU: Numba kernels as operators of torch, differentiable, traceable and exportable.

The kernels want channels adjacent in memory (`(B, L, D)` order) and take any strides over batch and length; tensors in
another order are copied to it. Results are in `(B, L, D)` order.
"""

from __future__ import annotations

import functools

import torch

from .numba_parallel import run_kernel


@functools.cache
def _kernels():
    """The kernels' module and their addresses; Numba is imported and compiles here, at the first scan."""
    from . import selective_scan_numba_kernels as kernels
    from .numba_compile import kernel_address

    return kernels, kernel_address(kernels.forward_kernel), kernel_address(kernels.backward_kernel)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """`x` (B, D, L) in float32 with adjacent channels: itself where it already is so."""
    x = x.float()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.mT.contiguous().mT


def _empty_channels_last(shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    batch, channels, length = shape
    return like.new_empty(batch, length, channels, dtype=torch.float32).mT


def _sequence(x: torch.Tensor | None) -> tuple[int, int, int, int]:
    """The four parameters of a sequence tensor."""
    if x is None:
        return (0, 0, 0, 0)
    batch, middle, length = x.stride()
    return (x.data_ptr(), batch * 4, middle * 4, length * 4)


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _ceil16(channels: int) -> int:
    return (channels + 15) // 16 * 16


CHUNK = 32


def _num_chunks(length: int) -> int:
    return (length + CHUNK - 1) // CHUNK


def _kept_shape(u: torch.Tensor, A: torch.Tensor, keep: bool) -> tuple[int, int, int, int]:
    """Shape of the states kept for the backward: those before each chunk but the first, which are zero."""
    kept = _num_chunks(u.shape[2]) - 1 if keep else 0
    return (u.shape[0], kept, (A.shape[1] + 3) // 4 * 4, _ceil16(u.shape[1]))


def _prepare(u, delta, A, B, C, D, z, delta_bias):
    return (
        _channels_last(u),
        _channels_last(delta),
        A.float().t().contiguous(),  # (N, D)
        B.float(),
        C.float(),
        None if D is None else D.float().contiguous(),
        None if z is None else _channels_last(z),
        None if delta_bias is None else delta_bias.float().contiguous(),
    )


def _run(address, scratch_bytes, u, A, softplus, kept, D, delta_bias, sequences):
    batch, channels, length = u.shape
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
        A.shape[0],
        int(softplus),
        kept.data_ptr() if kept is not None else 0,
        A.data_ptr(),
        _address(D),
        _address(delta_bias),
        0,
        _ceil16(channels),
    ]
    for sequence in sequences:
        parameters.extend(_sequence(sequence) if sequence is None or sequence.ndim == 3 else (sequence.data_ptr(), 0, 0, 0))
    run_kernel(address, torch.tensor(parameters, dtype=torch.int64), threads)


@torch.library.custom_op("diffusers_pisdm::selective_scan_numba", mutates_args=(), device_types="cpu")
def _scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    keep_states: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    kernels, forward, _ = _kernels()
    kept = u.new_empty(_kept_shape(u, A, keep_states), dtype=torch.float32)
    out = _empty_channels_last(u.shape, u)
    dtype = u.dtype
    u, delta, A, B, C, D, z, delta_bias = _prepare(u, delta, A, B, C, D, z, delta_bias)
    if u.numel():
        _run(
            forward,
            kernels.forward_scratch_bytes(A.shape[0]),
            u,
            A,
            delta_softplus,
            kept if keep_states else None,
            D,
            delta_bias,
            (u, delta, z, out, B, C),
        )
    return out.to(dtype), kept


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, keep_states):
    out = _empty_channels_last(u.shape, u).to(u.dtype)
    return out, u.new_empty(_kept_shape(u, A, keep_states), dtype=torch.float32)


@torch.library.custom_op("diffusers_pisdm::selective_scan_numba_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    grad_out: torch.Tensor,
    kept: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
) -> list[torch.Tensor]:
    """Gradients of u, delta, A, B, C, D, z and the bias; empty tensors for what is absent."""
    kernels, _, backward = _kernels()
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    batch, channels, length = u.shape
    states, padded = A.shape[1], _ceil16(channels)
    grad_u = _empty_channels_last(u.shape, u)
    grad_delta = _empty_channels_last(u.shape, u)
    grad_z = None if z is None else _empty_channels_last(u.shape, u)
    # Partial sums: one row a batch element, for B and C one a block of channels.
    grad_A = torch.empty(batch, states, padded)
    grad_D = torch.empty(batch, padded)
    grad_bias = torch.empty(batch, padded)
    grad_B = torch.empty((channels + 255) // 256, batch, length, states)
    grad_C = torch.empty_like(grad_B)
    u, delta, A, B, C, D, z, delta_bias = _prepare(*inputs)
    if u.numel():
        _run(
            backward,
            kernels.backward_scratch_bytes(states),
            u,
            A,
            delta_softplus,
            kept,
            D,
            delta_bias,
            (u, delta, z, None, B, C, _channels_last(grad_out), grad_u, grad_delta, grad_z)
            + (grad_A[None, ...], grad_D, grad_bias, grad_B, grad_C),
        )
    gradients = (
        grad_u,
        grad_delta,
        grad_A.sum(0)[:, :channels].t(),
        grad_B.sum(0).mT,
        grad_C.sum(0).mT,
        grad_D.sum(0)[:channels],
        grad_z,
        grad_bias.sum(0)[:channels],
    )
    return [
        grad_out.new_empty(0) if tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, inputs)
    ]


@_scan_backward.register_fake
def _(grad_out, kept, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    def channels_last(x):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).mT

    def vector(x):
        return grad_out.new_empty(0) if x is None else x.new_empty(x.shape)

    return [
        channels_last(u),
        channels_last(delta),
        A.new_empty(A.shape[1], A.shape[0]).t(),
        channels_last(B),
        channels_last(C),
        vector(D),
        grad_out.new_empty(0) if z is None else channels_last(z),
        vector(delta_bias),
    ]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_kept):
    if grad_out is None:
        return (None,) * 10
    kept, *tensors = ctx.saved_tensors
    gradients = _scan_backward(grad_out, kept, *tensors, ctx.delta_softplus)
    return (*[None if x is None else gradient for gradient, x in zip(gradients, tensors)], None, None)


_scan.register_autograd(_backward, setup_context=_setup_context)


def selective_scan_numba(
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
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, keep)[0]
