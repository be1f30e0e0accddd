"""Blocked selective scan in plain torch, for every device: forward and backward, memory linear in length.

The recurrence `h_t = exp(delta_t A) h_{t-1} + B_t x_t` with `x = delta u` runs in blocks of a few time steps and a few
batch rows. What does not depend on the previous step (decays, inputs, read-outs) is computed for a whole block at
once; what does is one fused multiply-add per step. A block is small enough to stay in a core's cache. States are laid
out as (time, batch, N, D) with channels innermost, so every operation runs over long contiguous rows.

The forward keeps the state that enters each block; the backward recomputes the block's states from it. Decays are only
ever multiplied: cumulative sums of logarithms and divisions by a decay would both overflow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F


STEPS = 8  # time steps per block, and between states kept for the backward
# Elements of one (time, batch, N, D) buffer. On a CPU, a block's three or four buffers should fit the L2 cache; on
# other devices small blocks gain nothing, and each costs launches.
CPU_BLOCK_ELEMENTS = 1 << 18
BLOCK_ELEMENTS = 1 << 26


class _Block:
    """The decays and states of one block of time steps, in buffers shared by all blocks."""

    def __init__(self, rows: int, A: torch.Tensor):
        self.decay = A.new_empty(STEPS, rows, *A.shape)  # (S, b, N, D)
        self.state = A.new_zeros(STEPS + 1, rows, *A.shape)  # (S + 1, b, N, D), the first enters the block
        self.decay_steps = self.decay.unbind(0)
        self.state_steps = self.state.unbind(0)

    def fill(self, x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
        """Computes decays and states from `state[0]`. x, delta (S, b, 1, D); A (N, D); B (S, b, N, 1)."""
        steps = x.shape[0]
        torch.mul(delta, A, out=self.decay[:steps]).exp_()
        torch.mul(x, B, out=self.state[1 : steps + 1])
        for step in range(steps):
            self.state_steps[step + 1].addcmul_(self.decay_steps[step], self.state_steps[step])  # (b, N, D)


def _walk(A: torch.Tensor, *tensors: torch.Tensor) -> Iterator[tuple[int, list[tuple[torch.Tensor, ...]]]]:
    """
    Cuts (B, L, ...) tensors into blocks: yields, for each group of batch rows, its first row and, in time order, the
    views (S, b, ...) of every tensor.
    """
    wanted = CPU_BLOCK_ELEMENTS if A.device.type == "cpu" else BLOCK_ELEMENTS
    rows = max(1, wanted // (STEPS * A.numel()))
    for group, views in enumerate(zip(*(tensor.split(rows) for tensor in tensors))):
        yield group * rows, list(zip(*(view.transpose(0, 1).split(STEPS) for view in views)))


@torch.library.custom_op("diffusers_pisdm::selective_scan_torch", mutates_args=())
def _scan(
    x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, keep_states: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The recurrence above with `y_t = C_t h_t`, without skip and gate, for x, delta (B, L, D), A (N, D) and B, C (B, L,
    N) of one dtype: y (B, L, D), and the states that enter each block (blocks, B, N, D) or an empty tensor.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kept = x.new_empty(-(-x.shape[1] // STEPS) if keep_states else 0, x.shape[0], *A.shape)
    with torch.autocast(x.device.type, enabled=False):
        for row, blocks in _walk(A, x[:, :, None], delta[:, :, None], B[..., None], C[:, :, None], y[:, :, None]):
            rows = blocks[0][0].shape[1]
            block = _Block(rows, A)
            for index, (x_, delta_, B_, C_, y_) in enumerate(blocks):
                if keep_states:
                    kept[index, row : row + rows] = block.state[0]
                block.fill(x_, delta_, A, B_)
                steps = x_.shape[0]
                y_.copy_(torch.matmul(C_, block.state[1 : steps + 1]))  # (S, b, 1, D)
                block.state[0].copy_(block.state[steps])
    return y, kept


@_scan.register_fake
def _(x, delta, A, B, C, keep_states):
    blocks = -(-x.shape[1] // STEPS) if keep_states else 0
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(blocks, x.shape[0], *A.shape)


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
    """Gradients of x, delta, A, B and C given the gradient (B, L, D) of y."""
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, delta, A, B, C)]
    grad_x, grad_delta, grad_A, grad_B, grad_C = grads
    grad_A.zero_()
    channel_rows = [tensor[:, :, None] for tensor in (x, delta, grad, grad_x, grad_delta)]
    state_columns = [tensor[..., None] for tensor in (B, C, grad_B, grad_C)]
    with torch.autocast(x.device.type, enabled=False):
        for row, blocks in _walk(A, *channel_rows, *state_columns):
            rows = blocks[0][0].shape[1]
            block = _Block(rows, A)
            grad_state = torch.empty_like(block.decay)
            grad_state_steps = grad_state.unbind(0)
            carried = torch.zeros_like(grad_state[0])  # the gradient of a block's last state from later blocks
            for index in reversed(range(len(blocks))):
                x_, delta_, grad_, grad_x_, grad_delta_, B_, C_, grad_B_, grad_C_ = blocks[index]
                block.state[0].copy_(kept[index, row : row + rows])
                block.fill(x_, delta_, A, B_)
                steps = x_.shape[0]
                decay, state, g = block.decay[:steps], block.state[: steps + 1], grad_state[:steps]  # (S, b, N, D)

                torch.mul(C_, grad_, out=g)
                grad_state_steps[steps - 1].add_(carried)
                for step in reversed(range(steps - 1)):
                    grad_state_steps[step].addcmul_(block.decay_steps[step + 1], grad_state_steps[step + 1])
                torch.mul(decay[0], g[0], out=carried)

                grad_C_.copy_(torch.matmul(state[1:], grad_.mT))  # (S, b, N, 1)
                grad_B_.copy_(torch.matmul(g, x_.mT))  # (S, b, N, 1)
                grad_x_.copy_(torch.matmul(B_.mT, g))  # (S, b, 1, D)
                grad_exponent = decay.mul_(state[:-1]).mul_(g)  # (S, b, N, D), of delta A
                grad_delta_.copy_(torch.mul(grad_exponent, A, out=g).sum(2, keepdim=True))  # (S, b, 1, D)
                grad_A += grad_exponent.mul_(delta_).sum((0, 1))  # (N, D)
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
    Selective scan in blocks of plain torch operations, on any device. States are float64 for float64 inputs, else
    float32.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    u_, delta_ = u.mT.to(dtype), delta.mT.to(dtype)  # (B, L, D)
    if delta_bias is not None:
        delta_ = delta_ + delta_bias.to(dtype)
    if delta_softplus:
        delta_ = F.softplus(delta_)
    operands = (delta_ * u_, delta_, A.mT.to(dtype), B.mT.to(dtype), C.mT.to(dtype))
    operands = tuple(tensor.contiguous() for tensor in operands)
    keep_states = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
    y, _ = _scan(*operands, keep_states)  # (B, L, D)
    if D is not None:
        y = y + u_ * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.mT.to(dtype))
    return y.mT.to(u.dtype)
