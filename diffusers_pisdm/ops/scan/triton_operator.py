"""Selective scan on GPUs: Triton kernels as torch operators, differentiable, traceable and exportable.

A scan is a loop over time, and one loop per batch row and block of channels leaves most of a GPU idle when the batch
is small. So sequences are cut into chunks that run in parallel, in three passes: each chunk's final state when started
from zeros; a short loop over these that gives the state entering each chunk; the chunks again, each from its own
state. This computes the decays twice, but inside a chunk it is the plain loop, with one state in registers; a parallel
scan within a chunk would move tiles of (steps, states, channels) between threads. If batch and channels fill a GPU,
there is one chunk and only the last pass. The backward does the same in reverse and recomputes states from those that
the forward kept.

The sizes below were the fastest tried on an H200 (`benchmarks/scan.py`).

Sequences in other than `(B, L, D)` memory order are copied to it; results and gradients have that order. Kernels
compute in float32 whatever the inputs' dtypes. Chunks depend only on the shape and partial sums are added in a fixed
order, so equal inputs give equal results.
"""

from __future__ import annotations

import functools

import torch

from ..common.backends import refuse_float64
from ..common.sequence_layout import adjacent_channels, ceil_div, empty_channels_last
from ..common.triton_launch import check_device, strides_of
from .autograd import register_scan_autograd


# In a program that only walks a chunk forward, each lane of the warp has four channels with all their states, so sums
# over states stay within the lane. The backward also sums over channels and holds more: there, a lane has four
# channels with a quarter of the states.
CHANNELS, LANE_CHANNELS = 128, 4
BACKWARD_CHANNELS, BACKWARD_LANE_CHANNELS = 32, 4
STEPS = 4  # unrolled in both directions; the backward holds as many states in registers, and 8 would spill
KEPT_STEPS = 2 * STEPS  # between states kept for the backward
STATES_PER_WARP = 16  # more would also spill
# A short sequence is walked in one chunk, so by one kernel instead of three, whose programs have fewer channels, with
# their states spread over lanes. Beyond this length, its instructions outweigh the two other kernels.
SHORT_LENGTH = 96
SHORT_CHANNELS, SHORT_LANE_CHANNELS = 16, 2
# Blocks of steps whose loads are in flight at once. Compiled for an H100, one more would spill registers; so would
# more than one where the forward keeps states.
FORWARD_STAGES, CHUNK_STAGES = 3, 2
# In chunks, softplus takes a fifth of the first pass's instructions, and the conversion of B and C to float32, which
# all programs of a batch row read, a twelfth of the second's: both passes share one float32 result. Converting B and C
# takes two kernels, which pay from this many tokens on: on an H200, they gained 3% of a pass at 4,096, and cost 4% at
# 256.
SHARED_DELTAS, SHARED_FLOATS_TOKENS = True, 2048
JOINED = 8  # chunks whose states are loaded at once for joining
JOIN_ELEMENTS = 128  # of a state, per joining program
# There are enough chunks to fill a large GPU, which runs this many programs at once, as long as a chunk's steps
# outweigh reading and writing its state. Chunks cost one pass more than a single walk over the sequence.
PROGRAMS_AT_ONCE = 1056
MIN_CHUNK_STEPS = 2 * KEPT_STEPS
COST_OF_CHUNKS = 1.75
MAX_ROUNDS = 4
WORTH = 0.9  # more chunks must take at most this share of the time: they have to be joined


@functools.cache
def _kernels():
    """The kernels' module. The first call imports Triton; each kernel compiles at its first launch."""
    from . import triton_kernels

    return triton_kernels


def split_length(batch: int, blocks: int, length: int) -> tuple[int, int]:
    """
    The number of chunks per sequence and steps per chunk, a multiple of `KEPT_STEPS`, with which a GPU finishes first
    if its programs run in rounds.
    """
    programs = batch * blocks
    chunks, least = 1, ceil_div(programs, PROGRAMS_AT_ONCE)
    for rounds in range(1, MAX_ROUNDS + 1):
        candidate = min(rounds * PROGRAMS_AT_ONCE // programs, length // MIN_CHUNK_STEPS)
        if candidate > 1 and COST_OF_CHUNKS * rounds / candidate < WORTH * least:
            chunks, least = candidate, COST_OF_CHUNKS * rounds / candidate
    steps = ceil_div(ceil_div(length, chunks), KEPT_STEPS) * KEPT_STEPS
    return ceil_div(length, steps), steps


class _Launch:
    """The sizes that all kernels of one scan share, and their launches."""

    def __init__(self, u: torch.Tensor, states: int, delta_softplus: bool, may_be_short: bool = False):
        self.batch, self.channels, self.length = u.shape
        self.states = states
        self.layout = CHANNELS, LANE_CHANNELS
        self.chunks, self.chunk_steps = split_length(self.batch, ceil_div(self.channels, CHANNELS), self.length)
        if may_be_short and self.chunks > 1 and self.length <= SHORT_LENGTH:
            self.layout = SHORT_CHANNELS, SHORT_LANE_CHANNELS
            self.chunks, self.chunk_steps = 1, ceil_div(self.length, KEPT_STEPS) * KEPT_STEPS
        self.device = u.device
        rows = 1 << (self.states - 1).bit_length()  # tile sizes are powers of two
        self.walk = {"STATES": self.states, "STATE_ROWS": rows, "SOFTPLUS": delta_softplus, "STEPS": STEPS}
        self.walk |= {"num_warps": min(8, max(1, rows // STATES_PER_WARP)), "enable_fp_fusion": True}

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=self.device)

    def chunk_sums(self, *shape: int) -> torch.Tensor:
        """Space for one tensor (*shape, channels) per chunk."""
        return self.empty(self.batch, self.chunks, *shape, self.channels)

    def start(self, kernel, *tensors, strides: list[int], layout: tuple[int, int] | None = None, **constants) -> None:
        """One program per batch row, block and chunk; `layout`: the channels per block and per lane."""
        block, lane = layout or self.layout
        blocks = ceil_div(self.channels, block)
        sizes = (self.channels, self.length, self.chunk_steps, blocks, *strides)
        constants |= {"CHANNELS": block, "LANE_CHANNELS": lane, **self.walk}
        with torch.cuda.device_of(tensors[0]):
            kernel[self.batch * blocks, self.chunks](*tensors, *sizes, **constants)

    def maybe_floats(self, B: torch.Tensor, C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """B and C in float32, where that is faster for the kernels that read them."""
        is_worth = self.chunks > 1 and self.batch * self.length >= SHARED_FLOATS_TOKENS
        return (B.float(), C.float()) if is_worth else (B, C)

    def enter(
        self, kernel, *tensors, A: torch.Tensor, strides: list[int], reverse: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        The state that enters each chunk (B, chunks, N, D), and deltas after bias and softplus, as `u`: the first two
        passes, given the first's kernel.
        """
        if self.chunks == 1:
            return None, None
        ends, totals, entering = self.chunk_sums(self.states), self.chunk_sums(), self.chunk_sums(self.states)
        deltas = self.empty(self.batch, self.length, self.channels).mT if SHARED_DELTAS else None
        self.start(kernel, *tensors, deltas, ends, totals, strides=strides, STAGES=CHUNK_STAGES)
        elements = self.states * self.channels
        blocks = ceil_div(elements, JOIN_ELEMENTS)
        sizes = (self.channels, self.chunks, elements, blocks)
        constants = {"REVERSE": reverse, "ELEMENTS": JOIN_ELEMENTS, "JOINED": JOINED, "num_warps": 1}
        with torch.cuda.device_of(A):
            _kernels().join_kernel[self.batch * blocks,](A, ends, totals, entering, *sizes, **constants)
        return entering, deltas


def _prepare(u, delta, A, B, C, D, z, delta_bias):
    """The inputs in the kernels' form."""
    check_device(u, _kernels().forward_kernel)
    u, delta, B, C = (adjacent_channels(x) for x in (u, delta, B, C))
    D, delta_bias = (None if x is None else x.contiguous() for x in (D, delta_bias))
    return u, delta, A.float().t().contiguous(), B, C, D, None if z is None else adjacent_channels(z), delta_bias


def _num_kept(u: torch.Tensor, A: torch.Tensor, keep_states: bool) -> int:
    """
    The number of floats in the kept states. Their tensor is flat: an axis of chunks could have length 1, on which a
    compiled graph would guard.
    """
    batch, channels, length = u.shape
    return batch * ceil_div(length, KEPT_STEPS) * A.shape[1] * channels if keep_states else 0


@torch.library.custom_op("diffusers_pisdm::selective_scan_triton", mutates_args=())
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
    out = empty_channels_last(u, u.dtype)
    kept = u.new_empty(_num_kept(u, A, keep_states), dtype=torch.float32)
    if out.numel() == 0:  # an empty grid cannot be launched
        return out, kept
    u, delta, A, B, C, D, z, delta_bias = _prepare(u, delta, A, B, C, D, z, delta_bias)
    launch = _Launch(u, A.shape[0], delta_softplus, may_be_short=True)
    B, C = launch.maybe_floats(B, C)
    entering, deltas = launch.enter(
        _kernels().chunk_state_kernel, u, delta, A, B, delta_bias, A=A, strides=strides_of(u, delta, B), reverse=False
    )
    delta = delta if deltas is None else deltas
    launch.start(
        _kernels().forward_kernel,
        *(u, delta, A, B, C, D, z, delta_bias, entering, out, kept if keep_states else None),
        strides=strides_of(u, delta, B, C, z),
        KEPT_STEPS=KEPT_STEPS,
        STAGES=1 if keep_states else FORWARD_STAGES,
        READY=deltas is not None,
    )
    return out, kept


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, keep_states):
    return empty_channels_last(u, u.dtype), u.new_empty(_num_kept(u, A, keep_states), dtype=torch.float32)


@torch.library.custom_op("diffusers_pisdm::selective_scan_triton_backward", mutates_args=())
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
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    grad_u, grad_delta = empty_channels_last(u, u.dtype), empty_channels_last(delta, delta.dtype)
    grad_z = None if z is None else empty_channels_last(z, z.dtype)
    if grad_out.numel() == 0:
        return [grad_out.new_empty(0) if x is None else torch.zeros_like(x) for x in inputs]
    grad_out = adjacent_channels(grad_out)
    u, delta, A, B, C, D, z, delta_bias = _prepare(*inputs)
    launch = _Launch(u, A.shape[0], delta_softplus)
    # Each program writes its own partial sums; they are added below in a fixed order.
    grad_A, grad_D, grad_bias = launch.chunk_sums(launch.states), launch.chunk_sums(), launch.chunk_sums()
    blocks = ceil_div(launch.channels, BACKWARD_CHANNELS)
    grad_B, grad_C = launch.empty(2, blocks, launch.batch, launch.length, launch.states)
    B, C = launch.maybe_floats(B, C)
    entering, deltas = launch.enter(
        _kernels().chunk_gradient_kernel,
        *(grad_out, delta, A, C, z, delta_bias),
        A=A,
        strides=strides_of(grad_out, delta, C, z),
        reverse=True,
    )
    delta = delta if deltas is None else deltas
    launch.start(
        _kernels().backward_kernel,
        *(grad_out, u, delta, A, B, C, D, z, delta_bias, kept, entering),
        *(grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias),
        strides=strides_of(grad_out, u, delta, B, C, z),
        layout=(BACKWARD_CHANNELS, BACKWARD_LANE_CHANNELS),
        KEPT_STEPS=KEPT_STEPS,
        READY=deltas is not None,
    )
    _, _, A, B, C, D, z, delta_bias = inputs
    return [
        grad_u,
        grad_delta,
        grad_A.sum((0, 1)).t().to(A.dtype).contiguous(),
        grad_B.sum(0).mT.to(B.dtype),
        grad_C.sum(0).mT.to(C.dtype),
        grad_out.new_empty(0) if D is None else grad_D.sum((0, 1)).to(D.dtype),
        grad_out.new_empty(0) if z is None else grad_z,
        grad_out.new_empty(0) if delta_bias is None else grad_bias.sum((0, 1)).to(delta_bias.dtype),
    ]


register_scan_autograd(_scan, _scan_backward)


@torch.library.custom_op("diffusers_pisdm::scan_rates_triton", mutates_args=())
def _rates(A_log: torch.Tensor) -> torch.Tensor:
    """`-exp(A_log)`, transposed to (states, channels), as the kernels read it."""
    rates = _fake_rates(A_log)
    check_device(A_log, _kernels().rates_kernel)
    states, channels = rates.shape
    constants = {"STATES": states, "STATE_ROWS": 1 << (states - 1).bit_length(), "CHANNELS": CHANNELS}
    with torch.cuda.device_of(A_log):
        _kernels().rates_kernel[ceil_div(channels, CHANNELS),](A_log, rates, channels, *A_log.stride(), **constants)
    return rates


def _fake_rates(A_log):
    return A_log.new_empty(A_log.shape[::-1], dtype=torch.float32)


def _rates_context(ctx, inputs, output):
    ctx.save_for_backward(output)
    ctx.dtype = inputs[0].dtype


_rates.register_fake(_fake_rates)
_rates.register_autograd(
    lambda ctx, grad: (grad * ctx.saved_tensors[0]).t().to(ctx.dtype), setup_context=_rates_context
)


def rates_triton(A_log: torch.Tensor) -> torch.Tensor:
    """`-exp(A_log)` (channels, states) in one kernel, laid out as the scan's kernels read it, differentiable."""
    refuse_float64("triton", (A_log,))
    return _rates(A_log).t()


def selective_scan_triton(
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
    Selective scan with Triton kernels, in float32; the result has `u`'s dtype and (B, L, D) memory order. The backward
    keeps one state in 16 steps and recomputes the others: memory is linear in the length.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    refuse_float64("triton", tensors)
    keep_states = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, keep_states)[0]
