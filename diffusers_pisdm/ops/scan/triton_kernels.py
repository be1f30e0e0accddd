"""The kernels of `selective_scan_triton`: forward and backward of one chunk, and joining the chunks.

A program handles one batch row, a block of `CHANNELS` channels and one chunk of the sequence. A state is a (states,
channels) tile in registers; the channels, adjacent in memory, are its inner axis.

A chunk runs in unrolled blocks of `STEPS`, and with `STAGES` above 1 the loads of the next blocks are in flight while
one is computed. Where a sequence has several chunks, the first pass over them can also write `deltas`, after bias and
softplus in float32, which the second pass then reads (`READY`). The backward starts from a state that the forward
kept, recomputes a block's states into registers, and walks back through them. Dead lanes (past the last channel, state
or step) load zeros but are still left out of sums: next to an infinity they would be NaN.
"""

import triton
import triton.language as tl

from ..common.triton_silu import LOG2E, silu_and_slope


LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """`max(x, 0) + log1p(exp(-|x|))`, with `log1p(y) = 2 atanh(y / (2 + y))`: Triton's log is inexact near 1."""
    y = tl.exp2(tl.abs(x) * -LOG2E)
    s = y / (2.0 + y)
    square = s * s
    # The polynomial of `numba_vectors`: minimax of atanh(s) / s in s * s on [0, 1/9], error 4e-9.
    series = 0.14000903069972992 + 0.1400599330663681 * square
    series = 0.3333320915699005 + square * (0.2001076340674354 + square * series)
    return tl.where(x < 0, 0.0, x) + 2.0 * s * (1.0 + square * series)  # not maximum, which may drop a NaN


@triton.jit
def _sum_states(values, state, STATES: tl.constexpr):
    """(states, channels) to (channels,)."""
    return tl.sum(tl.where(state[:, None] < STATES, values, 0.0), 0)


@triton.jit
def _sum_channels(values, is_channel):
    """(states, channels) to (states,)."""
    return tl.sum(tl.where(is_channel[None, :], values, 0.0), 1)


@triton.jit
def _existing(index, count, step, length):
    """Which of the channels or states `index` a sequence has at this step: none past its end."""
    return index < tl.where(step < length, count, 0)


@triton.jit
def _load(row, step, stride, index, mask):
    """The elements `index` of one step of a sequence, zero where masked."""
    return tl.load(row + step * stride + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_vector(pointer, channel, is_channel):
    """The block's part of D or the bias; zero if absent."""
    if pointer is None:
        return tl.zeros_like(channel).to(tl.float32)
    else:
        return tl.load(pointer + channel, mask=is_channel, other=0.0).to(tl.float32)


@triton.jit
def _load_delta(row, step, stride, channel, mask, bias, SOFTPLUS: tl.constexpr, READY: tl.constexpr):
    """One step's delta after bias and softplus, zero in dead lanes, which thus keep their states."""
    delta = _load(row, step, stride, channel, mask)
    if READY:
        return delta
    delta += bias
    if SOFTPLUS:
        delta = _softplus(delta)
    return tl.where(mask, delta, 0.0)


@triton.jit
def _softplus_slope(delta):
    """The derivative of softplus, `1 - exp(-delta)`, by its value; by a series where the difference is inexact."""
    series = delta * (1.0 - delta * (1.0 / 2 - delta * (1.0 / 6 - delta * (1.0 / 24 - delta * (1.0 / 120)))))
    return tl.where(delta < 0.125, series, 1.0 - tl.exp2(delta * -LOG2E))


@triton.jit
def rates_kernel(
    A_log,
    rates,
    channels,
    A_log_channel,
    A_log_state,
    STATES: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """`-exp(A_log)` of a block of channels, with adjacent channels (states, channels)."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    state = tl.arange(0, STATE_ROWS)
    is_real = (state[:, None] < STATES) & (channel < channels)[None, :]
    place = channel[None, :] * A_log_channel + state[:, None] * A_log_state
    log = tl.load(A_log + place, mask=is_real, other=0.0).to(tl.float32)
    tl.store(rates + state[:, None] * channels + channel[None, :], -tl.exp(log), mask=is_real)


@triton.jit
def _place(
    blocks,
    channels,
    STATES: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANE_CHANNELS: tl.constexpr,
):
    """
    This program's batch row, block of channels, indices of channels and states, which of them exist, and the offsets
    of its tile in a tensor (..., states, channels).

    The compiler spreads a tile over a warp's lanes so that each loads as many adjacent elements at once as it can, up
    to 16 bytes, and all states follow that layout. The hints here tell it what is adjacent.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    state = tl.arange(0, STATE_ROWS)
    is_channel = channel < channels
    is_real = (state[:, None] < STATES) & is_channel[None, :]
    tile = tl.max_contiguous(state[:, None] * channels + channel[None, :], [1, LANE_CHANNELS])
    return row, block, channel, state, is_channel, is_real, tile


@triton.jit
def _advance(h, x, delta, rates, B):
    """The next state: decayed `h` plus `B x`."""
    return tl.exp2(delta[None, :] * rates) * h + B[:, None] * x[None, :]


@triton.jit
def chunk_state_kernel(
    u,
    delta,
    A,
    B,
    bias,
    deltas,
    ends,
    totals,
    channels,
    length,
    chunk_steps,
    blocks,
    u_row,
    u_step,
    delta_row,
    delta_step,
    B_row,
    B_step,
    SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANE_CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """
    The final state of a chunk that starts from zeros (`ends`), and the sum of its deltas (`totals`), which it also
    writes (`deltas`).
    """
    row, _, channel, state, is_channel, is_real, tile = _place(
        blocks, channels, STATES, STATE_ROWS, CHANNELS, LANE_CHANNELS
    )
    chunk = row * tl.num_programs(1) + tl.program_id(1)
    start = tl.program_id(1).to(tl.int64) * chunk_steps
    u += row * u_row
    delta += row * delta_row
    B += row * B_row
    if deltas is not None:
        deltas += row * length * channels
    rates = tl.load(A + tile, mask=is_real, other=0.0) * LOG2E
    bias_ = _load_vector(bias, channel, is_channel)

    h = tl.zeros([STATE_ROWS, CHANNELS], tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    for block in tl.range(tl.cdiv(tl.minimum(length - start, chunk_steps), STEPS), num_stages=STAGES):
        written = ()  # after the block's last load, as a store would stall the loads after it
        for index in tl.static_range(STEPS):
            step = start + block * STEPS + index
            is_valid = _existing(channel, channels, step, length)
            delta_ = _load_delta(delta, step, delta_step, channel, is_valid, bias_, SOFTPLUS, False)
            x = delta_ * _load(u, step, u_step, channel, is_valid)
            B_ = _load(B, step, B_step, state, _existing(state, STATES, step, length))
            h = _advance(h, x, delta_, rates, B_)
            total += delta_
            written = written + (delta_,)
        if deltas is not None:
            for index in tl.static_range(STEPS):
                step = start + block * STEPS + index
                is_valid = _existing(channel, channels, step, length)
                tl.store(deltas + step * channels + channel, written[index], mask=is_valid)
    tl.store(ends + chunk * STATES * channels + tile, h, mask=is_real)
    tl.store(totals + chunk * channels + channel, total, mask=is_channel)


@triton.jit
def chunk_gradient_kernel(
    grad,
    delta,
    A,
    C,
    z,
    bias,
    deltas,
    ends,
    totals,
    channels,
    length,
    chunk_steps,
    blocks,
    grad_row,
    grad_step,
    delta_row,
    delta_step,
    C_row,
    C_step,
    z_row,
    z_step,
    SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANE_CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """
    The gradient of the state before a chunk from the chunk's own outputs (`ends`), and the sum of its deltas, which it
    also writes (`deltas`).
    """
    row, _, channel, state, is_channel, is_real, tile = _place(
        blocks, channels, STATES, STATE_ROWS, CHANNELS, LANE_CHANNELS
    )
    chunk = row * tl.num_programs(1) + tl.program_id(1)
    start = tl.program_id(1).to(tl.int64) * chunk_steps
    grad += row * grad_row
    delta += row * delta_row
    C += row * C_row
    if z is not None:
        z += row * z_row
    if deltas is not None:
        deltas += row * length * channels
    rates = tl.load(A + tile, mask=is_real, other=0.0) * LOG2E
    bias_ = _load_vector(bias, channel, is_channel)

    carried = tl.zeros([STATE_ROWS, CHANNELS], tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    num_blocks = tl.cdiv(tl.minimum(length - start, chunk_steps), STEPS)
    for block in tl.range(num_blocks, num_stages=STAGES):
        written = ()
        for index in tl.static_range(STEPS):
            step = start + (num_blocks - block) * STEPS - 1 - index
            is_valid = _existing(channel, channels, step, length)
            delta_ = _load_delta(delta, step, delta_step, channel, is_valid, bias_, SOFTPLUS, False)
            grad_y = _load(grad, step, grad_step, channel, is_valid)
            if z is not None:
                gate, _slope = silu_and_slope(_load(z, step, z_step, channel, is_valid))
                grad_y *= gate
            C_ = _load(C, step, C_step, state, _existing(state, STATES, step, length))
            carried = tl.exp2(delta_[None, :] * rates) * (carried + C_[:, None] * grad_y[None, :])
            total += delta_
            written = written + (delta_,)
        if deltas is not None:
            for index in tl.static_range(STEPS):
                step = start + (num_blocks - block) * STEPS - 1 - index
                is_valid = _existing(channel, channels, step, length)
                tl.store(deltas + step * channels + channel, written[index], mask=is_valid)
    tl.store(ends + chunk * STATES * channels + tile, carried, mask=is_real)
    tl.store(totals + chunk * channels + channel, total, mask=is_channel)


@triton.jit
def join_kernel(
    A,
    ends,
    totals,
    entering,
    channels,
    chunks,
    elements,
    blocks,
    REVERSE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    JOINED: tl.constexpr,
):
    """
    The state that enters each chunk (`entering`), from the final states of chunks that start from zeros (`ends`), in
    time order or in reverse.

    A program handles one batch row and a block of a state's `elements`, which are independent. A chunk's decay is the
    exponential of the sum of its deltas, and nothing is divided by it. Chunks are processed `JOINED` at a time, all
    loaded before the first result is stored, as a store would stall the loads after it.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    element = (tl.program_id(0) % blocks) * ELEMENTS + tl.arange(0, ELEMENTS)
    rates = tl.load(A + element, mask=element < elements, other=0.0) * LOG2E
    state = tl.zeros([ELEMENTS], tl.float32)
    for group in range(tl.cdiv(chunks, JOINED)):
        loaded = ()
        for index in tl.static_range(JOINED):
            turn = group * JOINED + index
            chunk = row * chunks + turn
            if REVERSE:
                chunk = row * chunks + chunks - 1 - turn
            is_valid = _existing(element, elements, turn, chunks)
            total = tl.load(totals + chunk * channels + element % channels, mask=is_valid, other=0.0)
            end = tl.load(ends + chunk * elements + element, mask=is_valid, other=0.0)
            loaded = loaded + ((chunk * elements, is_valid, total, end),)
        for index in tl.static_range(JOINED):
            offset, is_valid, total, end = loaded[index]
            tl.store(entering + offset + element, state, mask=is_valid)
            state = tl.exp2(total * rates) * state + end


@triton.jit
def forward_kernel(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    entering,
    out,
    kept,
    channels,
    length,
    chunk_steps,
    blocks,
    u_row,
    u_step,
    delta_row,
    delta_step,
    B_row,
    B_step,
    C_row,
    C_step,
    z_row,
    z_step,
    SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANE_CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    KEPT_STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    READY: tl.constexpr,
):
    """The outputs of a chunk and, with `kept`, the states that enter its steps 0, `KEPT_STEPS`, 2 `KEPT_STEPS`, ..."""
    row, _, channel, state, is_channel, is_real, tile = _place(
        blocks, channels, STATES, STATE_ROWS, CHANNELS, LANE_CHANNELS
    )
    start = tl.program_id(1).to(tl.int64) * chunk_steps
    u += row * u_row
    delta += row * delta_row
    B += row * B_row
    C += row * C_row
    if z is not None:
        z += row * z_row
    out += row * length * channels
    rates = tl.load(A + tile, mask=is_real, other=0.0) * LOG2E
    D_ = _load_vector(D, channel, is_channel)
    bias_ = _load_vector(bias, channel, is_channel)

    h = tl.zeros([STATE_ROWS, CHANNELS], tl.float32)
    if entering is not None:
        chunk = row * tl.num_programs(1) + tl.program_id(1)
        h = tl.load(entering + chunk * STATES * channels + tile, mask=is_real, other=0.0)
    for block in tl.range(tl.cdiv(tl.minimum(length - start, chunk_steps), STEPS), num_stages=STAGES):
        if kept is not None:
            first = start + block * STEPS
            if first % KEPT_STEPS == 0:
                kept_at = row * tl.cdiv(length, KEPT_STEPS) + first // KEPT_STEPS
                tl.store(kept + kept_at * STATES * channels + tile, h, mask=is_real)
        outputs = ()  # stored after the block's last load, as a store would stall the loads after it
        for index in tl.static_range(STEPS):
            step = start + block * STEPS + index
            is_valid = _existing(channel, channels, step, length)
            is_state = _existing(state, STATES, step, length)
            delta_ = _load_delta(delta, step, delta_step, channel, is_valid, bias_, SOFTPLUS, READY)
            u_ = _load(u, step, u_step, channel, is_valid)
            h = _advance(h, delta_ * u_, delta_, rates, _load(B, step, B_step, state, is_state))
            C_ = _load(C, step, C_step, state, is_state)
            y = _sum_states(C_[:, None] * h, state, STATES)
            if D is not None:
                y += D_ * u_
            if z is not None:
                gate, _slope = silu_and_slope(_load(z, step, z_step, channel, is_valid))
                y *= gate
            outputs = outputs + (y,)
        for index in tl.static_range(STEPS):
            step = start + block * STEPS + index
            tl.store(out + step * channels + channel, outputs[index], mask=_existing(channel, channels, step, length))


@triton.jit
def backward_kernel(
    grad,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    kept,
    entering,
    grad_u,
    grad_delta,
    grad_A,
    grad_B,
    grad_C,
    grad_D,
    grad_z,
    grad_bias,
    channels,
    length,
    chunk_steps,
    blocks,
    grad_row,
    grad_step,
    u_row,
    u_step,
    delta_row,
    delta_step,
    B_row,
    B_step,
    C_row,
    C_step,
    z_row,
    z_step,
    SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANE_CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    KEPT_STEPS: tl.constexpr,
    READY: tl.constexpr,
):
    """
    The gradients of a chunk.

    Gradients of sequences over channels are written directly; this program's partial sums go to its block's (batch,
    length, states) for B and C, and to its chunk's (states, channels) and (channels,) for A, D and the bias.
    """
    row, block_of_channels, channel, state, is_channel, is_real, tile = _place(
        blocks, channels, STATES, STATE_ROWS, CHANNELS, LANE_CHANNELS
    )
    chunk = row * tl.num_programs(1) + tl.program_id(1)
    start = tl.program_id(1).to(tl.int64) * chunk_steps
    grad += row * grad_row
    u += row * u_row
    delta += row * delta_row
    B += row * B_row
    C += row * C_row
    grad_u += row * length * channels
    grad_delta += row * length * channels
    if z is not None:
        z += row * z_row
        grad_z += row * length * channels
    batch = tl.num_programs(0) // blocks
    grad_B += (block_of_channels * batch + row) * length * STATES
    grad_C += (block_of_channels * batch + row) * length * STATES
    kept += row * tl.cdiv(length, KEPT_STEPS) * STATES * channels
    rates = tl.load(A + tile, mask=is_real, other=0.0) * LOG2E
    D_ = _load_vector(D, channel, is_channel)
    bias_ = _load_vector(bias, channel, is_channel)

    carried = tl.zeros([STATE_ROWS, CHANNELS], tl.float32)  # the gradient of the last step's state from later steps
    if entering is not None:
        carried = tl.load(entering + chunk * STATES * channels + tile, mask=is_real, other=0.0)
    sum_A = tl.zeros([STATE_ROWS, CHANNELS], tl.float32)
    sum_D = tl.zeros([CHANNELS], tl.float32)
    sum_bias = tl.zeros([CHANNELS], tl.float32)
    num_blocks = tl.cdiv(tl.minimum(length - start, chunk_steps), STEPS)
    for block in range(num_blocks):
        first = start + (num_blocks - 1 - block) * STEPS
        kept_at = first // KEPT_STEPS
        h = tl.load(kept + kept_at * STATES * channels + tile, mask=is_real, other=0.0)
        # Advance from the kept state to this block; every step up to here lies before the sequence's end.
        for skipped in range((first - kept_at * KEPT_STEPS) // STEPS):
            for index in tl.static_range(STEPS):
                step = kept_at * KEPT_STEPS + skipped * STEPS + index
                delta_ = _load_delta(delta, step, delta_step, channel, is_channel, bias_, SOFTPLUS, READY)
                x = delta_ * _load(u, step, u_step, channel, is_channel)
                h = _advance(h, x, delta_, rates, _load(B, step, B_step, state, state < STATES))
        states = ()  # the state that enters each step
        for index in tl.static_range(STEPS):
            step = first + index
            is_valid = _existing(channel, channels, step, length)
            states = states + (h,)
            delta_ = _load_delta(delta, step, delta_step, channel, is_valid, bias_, SOFTPLUS, READY)
            x = delta_ * _load(u, step, u_step, channel, is_valid)
            h = _advance(h, x, delta_, rates, _load(B, step, B_step, state, _existing(state, STATES, step, length)))

        for index in tl.static_range(STEPS):
            step = first + STEPS - 1 - index
            is_valid = _existing(channel, channels, step, length)
            is_state = _existing(state, STATES, step, length)
            delta_ = _load_delta(delta, step, delta_step, channel, is_valid, bias_, SOFTPLUS, READY)
            u_ = _load(u, step, u_step, channel, is_valid)
            B_ = _load(B, step, B_step, state, is_state)
            C_ = _load(C, step, C_step, state, is_state)
            grad_y = _load(grad, step, grad_step, channel, is_valid)
            x = delta_ * u_
            decay = tl.exp2(delta_[None, :] * rates)
            h = decay * states[STEPS - 1 - index] + B_[:, None] * x[None, :]
            if z is not None:
                gate, slope = silu_and_slope(_load(z, step, z_step, channel, is_valid))
                y = _sum_states(C_[:, None] * h, state, STATES)
                if D is not None:
                    y += D_ * u_
                tl.store(grad_z + step * channels + channel, grad_y * y * slope, mask=is_valid)
                grad_y *= gate
            g = carried + C_[:, None] * grad_y[None, :]  # the gradient of h
            carried = decay * g
            grad_exponent = carried * states[STEPS - 1 - index]  # of delta A

            grad_x = _sum_states(B_[:, None] * g, state, STATES)
            grad_delta_ = u_ * grad_x + _sum_states(grad_exponent * rates, state, STATES) * LN2
            if SOFTPLUS:
                grad_delta_ *= _softplus_slope(delta_)
            grad_delta_ = tl.where(is_valid, grad_delta_, 0.0)
            grad_u_ = delta_ * grad_x
            if D is not None:
                grad_u_ += D_ * grad_y
            tl.store(grad_u + step * channels + channel, grad_u_, mask=is_valid)
            tl.store(grad_delta + step * channels + channel, grad_delta_, mask=is_valid)
            tl.store(grad_B + step * STATES + state, _sum_channels(g * x[None, :], is_channel), mask=is_state)
            tl.store(grad_C + step * STATES + state, _sum_channels(h * grad_y[None, :], is_channel), mask=is_state)
            sum_A += grad_exponent * delta_[None, :]
            sum_D += grad_y * u_
            sum_bias += grad_delta_
    tl.store(grad_A + chunk * STATES * channels + tile, sum_A, mask=is_real)
    if D is not None:
        tl.store(grad_D + chunk * channels + channel, sum_D, mask=is_channel)
    if bias is not None:
        tl.store(grad_bias + chunk * channels + channel, sum_bias, mask=is_channel)
