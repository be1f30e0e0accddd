"""Selective scan on the CPU: Numba kernels as torch operators, differentiable, traceable and exportable.

Sequences in other than `(B, L, D)` memory order are copied to it; results and gradients have that order. Kernels
compute in float32 whatever the inputs' dtypes. They read and write bfloat16 sequences as they are; float16 and mixed
ones are cast to float32, and results and gradients back.
"""

from __future__ import annotations

import functools

import torch

from ..common.backends import refuse_float64
from ..common.numba_launch import LANES, channels_last, launch, memory_dtype, split_channels
from ..common.sequence_layout import ceil_div, empty_channels_last
from .autograd import register_scan_autograd


STATES_AT_ONCE = 4  # the kernels read states in vectors of four


@functools.cache
def _kernel(name: str, dtype: torch.dtype):
    """The kernels' module, and the address of that for sequences of `dtype`. The first call imports and compiles."""
    from ..common.numba_compile import kernel_address
    from . import numba_kernels

    name += "_bfloat16" if dtype == torch.bfloat16 else ""
    return numba_kernels, kernel_address(getattr(numba_kernels, name))


def _num_kept(u: torch.Tensor, A: torch.Tensor, keep_states: bool) -> int:
    """
    The number of floats in the kept states. Their tensor is flat: an axis of chunks could have length 1, on which a
    compiled graph would guard.
    """
    from .numba_kernels import CHUNK

    batch, channels, length = u.shape
    chunks = ceil_div(length, CHUNK) if keep_states else 0
    return batch * chunks * A.shape[1] * ceil_div(channels, LANES) * LANES


def _input_parameters(kernels, dtype, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """The inputs in the kernels' form, by index in the parameter array."""
    return {
        kernels.STATES: A.shape[1],
        kernels.SOFTPLUS: int(delta_softplus),
        kernels.U: channels_last(u, dtype),
        kernels.DELTA: channels_last(delta, dtype),
        kernels.A: A.float().t().contiguous(),  # (N, D)
        kernels.B: B.to(dtype),
        kernels.C: C.to(dtype),
        kernels.D: None if D is None else D.float().contiguous(),
        kernels.Z: None if z is None else channels_last(z, dtype),
        kernels.BIAS: None if delta_bias is None else delta_bias.float().contiguous(),
    }


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
    """The scan's output, and the states kept for the backward."""
    dtype = memory_dtype(u, delta, B, C, z)
    kernels, address = _kernel("forward_kernel", dtype)
    out = empty_channels_last(u, dtype)
    kept = u.new_empty(_num_kept(u, A, keep_states), dtype=torch.float32)
    parameters = _input_parameters(kernels, dtype, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    parameters |= {kernels.OUT: out, kernels.KEPT: kept}
    launch(kernels, address, kernels.forward_scratch_bytes, A.shape[1], u.shape, parameters)
    return out.to(u.dtype), kept


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, keep_states):
    return empty_channels_last(u, u.dtype), u.new_empty(_num_kept(u, A, keep_states), dtype=torch.float32)


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
    """Gradients of u, delta, A, B, C, D, z and the bias; empty for absent ones."""
    dtype = memory_dtype(grad_out, u, delta, B, C, z)
    kernels, address = _kernel("backward_kernel", dtype)
    batch, channels, length = u.shape
    states = A.shape[1]
    blocks, _ = split_channels(batch, channels)
    padded_channels = ceil_div(channels, LANES) * LANES
    grad_u, grad_delta = empty_channels_last(u, dtype), empty_channels_last(u, dtype)
    grad_z = None if z is None else empty_channels_last(u, dtype)
    # Each unit of work writes its own partial sums; they are added below in a fixed order.
    grad_A = torch.empty(batch, states * padded_channels)
    grad_D, grad_bias = torch.empty(2, batch, padded_channels)
    grad_B, grad_C = torch.empty(2, blocks, batch * length * states)
    parameters = _input_parameters(kernels, dtype, u, delta, A, B, C, D, z, delta_bias, delta_softplus) | {
        kernels.KEPT: kept,
        kernels.GRAD_OUT: channels_last(grad_out, dtype),
        kernels.GRAD_U: grad_u,
        kernels.GRAD_DELTA: grad_delta,
        kernels.GRAD_Z: grad_z,
        kernels.GRAD_A: grad_A,
        kernels.GRAD_D: grad_D,
        kernels.GRAD_BIAS: grad_bias,
        kernels.GRAD_B: grad_B,
        kernels.GRAD_C: grad_C,
    }
    launch(kernels, address, kernels.backward_scratch_bytes, states, u.shape, parameters)
    return [
        grad_u.to(u.dtype),
        grad_delta.to(delta.dtype),
        grad_A.sum(0).view(states, -1)[:, :channels].t().to(A.dtype, copy=True).contiguous(),
        grad_B.sum(0).view(batch, length, states).mT.to(B.dtype),
        grad_C.sum(0).view(batch, length, states).mT.to(C.dtype),
        grad_out.new_empty(0) if D is None else grad_D.sum(0)[:channels].to(D.dtype, copy=True),
        grad_out.new_empty(0) if z is None else grad_z.to(z.dtype),
        grad_out.new_empty(0) if delta_bias is None else grad_bias.sum(0)[:channels].to(delta_bias.dtype, copy=True),
    ]


register_scan_autograd(_scan, _scan_backward)


def _fill_up_states(
    A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The same system with a multiple of four states: the last ones are repeated two or four times and their read-outs
    divided by as much, which is exact for powers of two. A state of zeros would turn an infinite input into NaN.
    """
    states = A.shape[1]
    repeats = [1] * (states // STATES_AT_ONCE * STATES_AT_ONCE) + {0: [], 1: [4], 2: [2, 2], 3: [1, 1, 2]}[
        states % STATES_AT_ONCE
    ]
    index = [state for state, count in enumerate(repeats) for _ in range(count)]
    share = C.new_tensor([1 / repeats[state] for state in index])
    return A[:, index], B[:, index], C[:, index] * share[:, None]


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
    """
    Selective scan with compiled CPU kernels, in float32; the result has `u`'s dtype and (B, L, D) memory order. The
    forward keeps every 24th state and the backward recomputes the others: memory is linear in the length.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    refuse_float64("numba", tensors)
    keep_states = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if A.shape[1] % STATES_AT_ONCE:
        A, B, C = _fill_up_states(A, B, C)
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, keep_states)[0]
