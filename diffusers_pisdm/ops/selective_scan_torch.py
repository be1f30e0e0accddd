"""Blocked selective scan in plain torch, for every device: forward and backward, memory linear in length.

The recurrence `h_t = exp(delta_t A) h_{t-1} + B_t x_t` with `x = delta u` is walked in blocks of a few time steps and a
few batch rows. What does not depend on the previous step (decays, inputs, read-outs) is computed for a whole block at
once; what does is one fused multiply-add a step. A block is small enough to stay in a core's cache. States are laid out
(time, batch, N, D) with the channels innermost, so every operation runs over long contiguous rows.

The forward keeps the state that enters each block; the backward recomputes the states inside a block from it. Decays are
only ever multiplied: no cumulative sums of logarithms and no division by a decay, both of which overflow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F


STEPS = 8  # time steps a block; also the distance of the states kept for the backward
# Elements of one (time, batch, N, D) buffer. On a CPU the three or four buffers of a block should fit the L2 cache; on
# other devices there is nothing to win from small blocks, and each costs launches.
CPU_BLOCK_ELEMENTS = 1 << 18
BLOCK_ELEMENTS = 1 << 26


def _batch_groups(batch: int, A: torch.Tensor) -> Iterator[slice]:
    """Slices of the batch such that a block of `STEPS` steps has about the wanted number of elements."""
    wanted = CPU_BLOCK_ELEMENTS if A.device.type == "cpu" else BLOCK_ELEMENTS
    rows = max(1, wanted // (STEPS * max(1, A.numel())))
    for start in range(0, batch, rows):
        yield slice(start, min(start + rows, batch))


def _recompute_block(decay, state, x, delta, A, B) -> None:
    """Fills `decay` (S, b, N, D) and `state[1:]` (S, b, N, D) of a block from `state[0]` (b, N, D), in place."""
    torch.mul(delta, A, out=decay).exp_()  # (S, b, N, D)
    torch.mul(x, B, out=state[1:])  # (S, b, N, D)
    states = state.unbind(0)
    for step, decay_step in enumerate(decay.unbind(0)):
        states[step + 1].addcmul_(decay_step, states[step])  # (b, N, D)


@torch.library.custom_op("diffusers_pisdm::selective_scan_torch", mutates_args=())
def _scan(
    x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, keep_states: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `y_t = C_t h_t` of the recurrence above, time-first and without skip or gate.

    x, delta (L, B, D); A (N, D); B, C (L, B, N); all of one dtype. Returns y (L, B, D) and the states that enter each
    block (blocks, B, N, D), or an empty tensor in place of these.
    """
    length, batch, channels = x.shape
    blocks = -(-length // STEPS)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kept = x.new_empty(blocks if keep_states else 0, batch, *A.shape)
    with torch.autocast(x.device.type, enabled=False):
        for rows in _batch_groups(batch, A):
            decay = x.new_empty(STEPS, rows.stop - rows.start, *A.shape)
            state = x.new_zeros(STEPS + 1, *decay.shape[1:])
            for block in range(blocks):
                times = slice(block * STEPS, min((block + 1) * STEPS, length))
                steps = times.stop - times.start
                if keep_states:
                    kept[block, rows] = state[0]
                x_block, delta_block = x[times, rows, None], delta[times, rows, None]  # (S, b, 1, D)
                _recompute_block(decay[:steps], state[: steps + 1], x_block, delta_block, A, B[times, rows, :, None])
                y[times, rows] = torch.matmul(C[times, rows, None], state[1 : steps + 1]).squeeze(2)  # (S, b, D)
                state[0].copy_(state[steps])
    return y, kept


@_scan.register_fake
def _(x, delta, A, B, C, keep_states):
    blocks = -(-x.shape[0] // STEPS) if keep_states else 0
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(blocks, x.shape[1], *A.shape)


@torch.library.custom_op("diffusers_pisdm::selective_scan_torch_backward", mutates_args=())
def _scan_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, delta, A, B and C for the gradient (L, B, D) of y."""
    length, batch, channels = x.shape
    blocks = kept.shape[0]
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, delta, A, B, C)]
    grad_x, grad_delta, grad_A, grad_B, grad_C = grads
    grad_A.zero_()
    with torch.autocast(x.device.type, enabled=False):
        for rows in _batch_groups(batch, A):
            decay = x.new_empty(STEPS, rows.stop - rows.start, *A.shape)
            state = x.new_empty(STEPS + 1, *decay.shape[1:])
            grad_state = torch.empty_like(decay)
            carried = torch.zeros_like(decay[0])  # the gradient of a block's last state from the blocks after it
            for block in reversed(range(blocks)):
                times = slice(block * STEPS, min((block + 1) * STEPS, length))
                steps = times.stop - times.start
                a, h, g = decay[:steps], state[: steps + 1], grad_state[:steps]
                x_block, delta_block = x[times, rows, None], delta[times, rows, None]  # (S, b, 1, D)
                B_block, C_block = B[times, rows, :, None], C[times, rows, :, None]  # (S, b, N, 1)
                grad_block = grad[times, rows, None]  # (S, b, 1, D)
                h[0].copy_(kept[block, rows])
                _recompute_block(a, h, x_block, delta_block, A, B_block)

                torch.mul(C_block, grad_block, out=g)  # (S, b, N, D)
                g[-1].add_(carried)
                decays, state_grads = a.unbind(0), g.unbind(0)
                for step in reversed(range(steps - 1)):
                    state_grads[step].addcmul_(decays[step + 1], state_grads[step + 1])  # (b, N, D)
                torch.mul(decays[0], state_grads[0], out=carried)

                grad_C[times, rows] = torch.matmul(h[1:], grad_block.mT).squeeze(3)  # (S, b, N)
                grad_B[times, rows] = torch.matmul(g, x_block.mT).squeeze(3)  # (S, b, N)
                grad_x[times, rows] = torch.matmul(B_block.mT, g).squeeze(2)  # (S, b, D)
                grad_exponent = a.mul_(h[:-1]).mul_(g)  # (S, b, N, D), of delta A
                grad_delta[times, rows] = torch.mul(grad_exponent, A, out=g).sum(2)  # (S, b, D)
                grad_A += grad_exponent.mul_(delta_block).sum((0, 1))  # (N, D)
    return grad_x, grad_delta, grad_A, grad_B, grad_C


@_scan_backward.register_fake
def _(grad, x, delta, A, B, C, kept):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, delta, A, B, C))


def _save_inputs(ctx, inputs, output) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _propagate(ctx, grad, grad_kept):
    return (*_scan_backward(grad, *ctx.saved_tensors), None)


_scan.register_autograd(_propagate, setup_context=_save_inputs)


def selective_scan_torch(
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
    Selective scan in blocks of plain torch operations, on any device.

    Arguments and return value are those of [`~diffusers_pisdm.ops.selective_scan`]. The state is kept in float64 for
    float64 inputs and in float32 for all others.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    u_, delta_ = u.permute(2, 0, 1).to(dtype), delta.permute(2, 0, 1).to(dtype)  # (L, B, D)
    if delta_bias is not None:
        delta_ = delta_ + delta_bias.to(dtype)
    if delta_softplus:
        delta_ = F.softplus(delta_)
    operands = (delta_ * u_, delta_, A.mT.to(dtype), B.permute(2, 0, 1).to(dtype), C.permute(2, 0, 1).to(dtype))
    operands = tuple(tensor.contiguous() for tensor in operands)
    keep_states = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
    y, _ = _scan(*operands, keep_states)  # (L, B, D)
    if D is not None:
        y = y + u_ * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.permute(2, 0, 1).to(dtype))
    return y.permute(1, 2, 0).to(u.dtype)
