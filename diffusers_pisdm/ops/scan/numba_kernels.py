"""The compiled loops of `selective_scan_numba`: forward and backward over raw addresses.

A tour. The work lies in a box of channels by steps by states, once per image (a batch row):

                         steps ->
               | chunk 0 | chunk 1 | chunk 2 | ...    a chunk: 24 steps
    -----------+---------+---------+---------+
    block 0    | group 0 |                       \
               | group 1 |   a unit: one image,   |   a group: 16 channels, the lanes of one vector,
               |   ...   |   one block of groups  |   with its states four at a time
    -----------+---------+                       /
    block 1    |   ...

    for chunk in a unit:                      one thread runs a whole unit; its states stay in a scratch buffer
        for group in the block:               load the group's u, delta, z, B, C of this chunk into vectors
            for four states of the group:     16 lanes x 4 states live in registers ...
                for step in the chunk:        ... while the recurrence h = exp(delta A) h + delta B u runs

The order matters: walking the whole sequence for one group would touch a new page at every step. Everything a group
reuses within a chunk is in a scratch buffer that fits the caches.

The backward walks the chunks from last to first and recomputes a chunk's states from the state at its start, which the
forward kept. Gradients of B and C are sums over channels: lanes and groups are added within a unit, and each unit
writes its own partial sum, so the result does not depend on which thread did what.

Each kernel is compiled twice: for sequences that are float32 in memory, and for bfloat16. In registers and scratch
buffers all is float32.
"""

from numba import njit

from ..common.numba_vectors import (
    absolute,
    any_above,
    exp2,
    exp2_bounded,
    load,
    load_bfloat16,
    load_first,
    load_float,
    load_int,
    load_sequence,
    load_splat,
    maximum,
    multiply_add,
    prefetch,
    prefetch_write,
    sigmoid,
    softplus,
    splat,
    store,
    store_float,
    store_lane_sums,
    store_sequence,
    take_ticket,
)


CHUNK = 24  # steps between states kept for the backward
VECTOR = 64  # bytes of a vector
ROWS = CHUNK * VECTOR  # bytes of one vector per step
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

# Entries of the parameter array; the first two are the counters of `run_kernel`. A unit has up to `GROUPS` groups of
# channels, a batch row has `BLOCKS` units. `STATES` is a multiple of four, `PADDED_CHANNELS` of 16. A tensor is its
# address, 0 if absent; a sequence tensor takes four entries: its address and its byte strides over batch, channels or
# states, and length.
NUM_UNITS, BLOCKS, GROUPS, SCRATCH, SCRATCH_BYTES, CHANNELS, PADDED_CHANNELS, LENGTH, STATES, SOFTPLUS = range(2, 12)
A, D, BIAS, KEPT, GRAD_A, GRAD_D, GRAD_BIAS, GRAD_B, GRAD_C = range(12, 21)
U, DELTA, Z, B, C, OUT, GRAD_OUT, GRAD_U, GRAD_DELTA, GRAD_Z = range(21, 61, 4)
NUM_PARAMETERS = 61


def forward_scratch_bytes(states: int, groups: int) -> int:
    return 3 * ROWS + (2 * CHUNK * 4 + 2 * groups * VECTOR) * states


def backward_scratch_bytes(states: int, groups: int) -> int:
    return 16 * ROWS + 4 * VECTOR + (2 * CHUNK * 4 + 3 * groups * VECTOR + 2 * ROWS) * states


@njit(forceinline=True)
def _stride(parameters, tensor):
    """Bytes from one step of a sequence tensor to the next."""
    return load_int(parameters, tensor + 3)


@njit(forceinline=True)
def _row(parameters, tensor, batch, step, channel, bfloat16):
    """Address of (batch, channel, step) in a sequence tensor whose channels are adjacent."""
    row = load_int(parameters, tensor) + batch * load_int(parameters, tensor + 1)
    return row + step * load_int(parameters, tensor + 3) + channel * (2 if bfloat16 else 4)


@njit(forceinline=True)
def _pack(parameters, tensor, batch, start, steps, states, target, bfloat16):
    """Copy B or C of a chunk to `target`: (steps, states) without gaps."""
    row = load_int(parameters, tensor) + batch * load_int(parameters, tensor + 1)
    stride_state = load_int(parameters, tensor + 2)
    stride_step = load_int(parameters, tensor + 3)
    row += start * stride_step
    for step in range(steps):
        for state in range(states):
            address = row + state * stride_state
            value = load_bfloat16(address) if bfloat16 else load_float(address, 0)
            store_float(target, step * states + state, value)
        row += stride_step


@njit(forceinline=True)
def _clear(address, vectors):
    zero = splat(0.0)
    for index in range(vectors):
        store(address, index, zero)


@njit(forceinline=True)
def _load_rates(parameters, first_channel, channels, groups, states, target):
    """Write A times log2(e) to `target`: (groups, states) vectors."""
    row = load_int(parameters, A) + first_channel * 4
    stride = load_int(parameters, CHANNELS) * 4
    scale = splat(LOG2E)
    for state in range(states):
        for group in range(groups):
            lanes = min(16, channels - group * 16)
            store(target, group * states + state, load_first(row + group * VECTOR, lanes) * scale)
        row += stride


@njit(forceinline=True)
def _load_vector(parameters, tensor, channel, lanes):
    """16 channels of D or the bias; zero if absent."""
    address = load_int(parameters, tensor)
    if address == 0:
        return splat(0.0)
    return load_first(address + channel * 4, lanes)


@njit(forceinline=True)
def _decay(exponent, bounded):
    """2 ** `exponent`; `bounded` is a compile-time constant."""
    if bounded:
        return exp2_bounded(exponent)
    return exp2(exponent)


@njit(forceinline=True)
def _is_bounded(peak, rates):
    """Whether 2 ** (`peak` * rate) needs no clamping; `peak` is the largest |delta| of a chunk, 16 channels."""
    largest = maximum(absolute(load(rates, 0)), absolute(load(rates, 1)))
    largest = maximum(largest, absolute(load(rates, 2)))
    largest = maximum(largest, absolute(load(rates, 3)))
    return not any_above(peak * largest, splat(126.0))


@njit(forceinline=True)
def _scan_four(bounded, steps, delta, inputs, output, rates, state, b, c, stride):
    """Scan four states of 16 channels over a chunk: add outputs to `output`, advance `state` to the chunk's end."""
    a0 = load(rates, 0)
    a1 = load(rates, 1)
    a2 = load(rates, 2)
    a3 = load(rates, 3)
    h0 = load(state, 0)
    h1 = load(state, 1)
    h2 = load(state, 2)
    h3 = load(state, 3)
    for step in range(steps):
        dt = load(delta, step)
        x = load(inputs, step)
        h0 = multiply_add(_decay(dt * a0, bounded), h0, x * load_splat(b, 0))
        h1 = multiply_add(_decay(dt * a1, bounded), h1, x * load_splat(b, 1))
        h2 = multiply_add(_decay(dt * a2, bounded), h2, x * load_splat(b, 2))
        h3 = multiply_add(_decay(dt * a3, bounded), h3, x * load_splat(b, 3))
        y = multiply_add(h0, load_splat(c, 0), load(output, step))
        y = multiply_add(h1, load_splat(c, 1), y)
        y = multiply_add(h2, load_splat(c, 2), y)
        y = multiply_add(h3, load_splat(c, 3), y)
        store(output, step, y)
        b += stride
        c += stride
    store(state, 0, h0)
    store(state, 1, h1)
    store(state, 2, h2)
    store(state, 3, h3)


@njit(forceinline=True)
def _forward_unit(parameters, unit, scratch, bfloat16):
    blocks = load_int(parameters, BLOCKS)
    length = load_int(parameters, LENGTH)
    states = load_int(parameters, STATES)
    with_softplus = load_int(parameters, SOFTPLUS)
    with_gate = load_int(parameters, Z)
    with_skip = load_int(parameters, D)
    keep_states = load_int(parameters, KEPT)
    padded_channels = load_int(parameters, PADDED_CHANNELS)
    u_stride = _stride(parameters, U)
    delta_stride = _stride(parameters, DELTA)
    z_stride = _stride(parameters, Z)
    out_stride = _stride(parameters, OUT)
    batch = unit // blocks
    first_channel = unit % blocks * load_int(parameters, GROUPS) * 16
    channels = min(load_int(parameters, GROUPS) * 16, load_int(parameters, CHANNELS) - first_channel)
    groups = (channels + 15) // 16
    chunks = (length + CHUNK - 1) // CHUNK
    kept = keep_states + (batch * chunks * states * padded_channels + first_channel) * 4

    delta = scratch
    inputs = delta + ROWS
    output = inputs + ROWS
    b = output + ROWS
    c = b + CHUNK * states * 4
    rates = c + CHUNK * states * 4
    state = rates + groups * states * VECTOR
    _load_rates(parameters, first_channel, channels, groups, states, rates)
    _clear(state, groups * states)
    zero = splat(0.0)

    for chunk in range(chunks):
        start = chunk * CHUNK
        steps = min(CHUNK, length - start)
        _pack(parameters, B, batch, start, steps, states, b, bfloat16)
        _pack(parameters, C, batch, start, steps, states, c, bfloat16)
        for group in range(groups):
            channel = first_channel + group * 16
            lanes = min(16, channels - group * 16)
            four = group * states * VECTOR  # of the first four states
            if keep_states != 0:
                # (batch, chunks, states, padded_channels)
                target = kept + (chunk * states * padded_channels + group * 16) * 4
                for index in range(states):
                    store(target, 0, load(state + four, index))
                    target += padded_channels * 4

            # What does not depend on the state: the step, its input, and the skip. Rows are a page apart, so the
            # hardware prefetcher fetches neither those of the next group nor the ones to be written.
            bias = _load_vector(parameters, BIAS, channel, lanes)
            skip = _load_vector(parameters, D, channel, lanes)
            u_row = _row(parameters, U, batch, start, channel, bfloat16)
            delta_row = _row(parameters, DELTA, batch, start, channel, bfloat16)
            z_row = _row(parameters, Z, batch, start, channel, bfloat16)
            out_row = _row(parameters, OUT, batch, start, channel, bfloat16)
            peak = zero
            for step in range(steps):
                prefetch(u_row + VECTOR)
                prefetch(delta_row + VECTOR)
                prefetch(z_row + step * z_stride)
                prefetch_write(out_row + step * out_stride)
                u = load_sequence(u_row, lanes, bfloat16)
                dt = load_sequence(delta_row, lanes, bfloat16) + bias
                if with_softplus != 0:
                    dt = softplus(dt)
                peak = maximum(peak, absolute(dt))
                store(delta, step, dt)
                store(inputs, step, dt * u)
                # Without a skip, do not multiply by 0: it would turn an infinite input into NaN.
                store(output, step, skip * u if with_skip != 0 else zero)
                u_row += u_stride
                delta_row += delta_stride

            for index in range(0, states, 4):
                # Two copies of the loop, as clamping costs a tenth of its time.
                if _is_bounded(peak, rates + four):
                    _scan_four(
                        True,
                        steps,
                        delta,
                        inputs,
                        output,
                        rates + four,
                        state + four,
                        b + index * 4,
                        c + index * 4,
                        states * 4,
                    )
                else:
                    _scan_four(
                        False,
                        steps,
                        delta,
                        inputs,
                        output,
                        rates + four,
                        state + four,
                        b + index * 4,
                        c + index * 4,
                        states * 4,
                    )
                four += 4 * VECTOR

            for step in range(steps):
                y = load(output, step)
                if with_gate != 0:
                    z = load_sequence(z_row, lanes, bfloat16)
                    y = y * (z * sigmoid(z))
                store_sequence(out_row, y, lanes, bfloat16)
                z_row += z_stride
                out_row += out_stride


@njit(forceinline=True)
def _forward(parameters, bfloat16):
    """Draw units and run them."""
    scratch = load_int(parameters, SCRATCH) + take_ticket(parameters, 1) * load_int(parameters, SCRATCH_BYTES)
    unit = take_ticket(parameters, 0)
    while unit < load_int(parameters, NUM_UNITS):
        _forward_unit(parameters, unit, scratch, bfloat16)
        unit = take_ticket(parameters, 0)


def forward_kernel(parameters):
    _forward(parameters, False)


def forward_kernel_bfloat16(parameters):
    _forward(parameters, True)


@njit(forceinline=True)
def _recompute_four(bounded, steps, delta, inputs, output, rates, saved, b, c, stride):
    """Like `_scan_four`, from the four vectors at `saved`, but writes each step's decays and states after them."""
    a0 = load(rates, 0)
    a1 = load(rates, 1)
    a2 = load(rates, 2)
    a3 = load(rates, 3)
    h0 = load(saved, 0)
    h1 = load(saved, 1)
    h2 = load(saved, 2)
    h3 = load(saved, 3)
    for step in range(steps):
        dt = load(delta, step)
        x = load(inputs, step)
        e0 = _decay(dt * a0, bounded)
        e1 = _decay(dt * a1, bounded)
        e2 = _decay(dt * a2, bounded)
        e3 = _decay(dt * a3, bounded)
        h0 = multiply_add(e0, h0, x * load_splat(b, 0))
        h1 = multiply_add(e1, h1, x * load_splat(b, 1))
        h2 = multiply_add(e2, h2, x * load_splat(b, 2))
        h3 = multiply_add(e3, h3, x * load_splat(b, 3))
        y = multiply_add(h0, load_splat(c, 0), load(output, step))
        y = multiply_add(h1, load_splat(c, 1), y)
        y = multiply_add(h2, load_splat(c, 2), y)
        y = multiply_add(h3, load_splat(c, 3), y)
        store(output, step, y)
        store(saved, 4, e0)
        store(saved, 5, e1)
        store(saved, 6, e2)
        store(saved, 7, e3)
        store(saved, 8, h0)
        store(saved, 9, h1)
        store(saved, 10, h2)
        store(saved, 11, h3)
        b += stride
        c += stride
        saved += 8 * VECTOR


@njit(forceinline=True)
def _add(address, index, vector):
    store(address, index, load(address, index) + vector)


@njit(forceinline=True)
def _add_product(address, index, a, b):
    store(address, index, multiply_add(a, b, load(address, index)))


@njit(forceinline=True)
def _reverse_four(
    steps,
    delta,
    inputs,
    grad_y,
    grad_inputs,
    grad_delta,
    rates,
    saved,
    grad_state,
    grad_rates,
    b,
    c,
    stride,
    sum_b,
    sum_c,
):
    """The backward of `_scan_four`. It accumulates gradients; those of delta lack the factor ln 2."""
    a0 = load(rates, 0)
    a1 = load(rates, 1)
    a2 = load(rates, 2)
    a3 = load(rates, 3)
    g0 = load(grad_state, 0)
    g1 = load(grad_state, 1)
    g2 = load(grad_state, 2)
    g3 = load(grad_state, 3)
    # Sum over the chunk in registers first: a sum of sums loses fewer digits over a long sequence.
    ga0 = splat(0.0)
    ga1 = splat(0.0)
    ga2 = splat(0.0)
    ga3 = splat(0.0)
    saved += steps * 8 * VECTOR
    h0 = load(saved, 0)
    h1 = load(saved, 1)
    h2 = load(saved, 2)
    h3 = load(saved, 3)
    b += steps * stride
    c += steps * stride
    sum_b += steps * 4 * VECTOR
    sum_c += steps * 4 * VECTOR
    for step in range(steps - 1, -1, -1):
        b -= stride
        c -= stride
        sum_b -= 4 * VECTOR
        sum_c -= 4 * VECTOR
        saved -= 8 * VECTOR
        dt = load(delta, step)
        x = load(inputs, step)
        gy = load(grad_y, step)
        _add_product(sum_c, 0, gy, h0)
        _add_product(sum_c, 1, gy, h1)
        _add_product(sum_c, 2, gy, h2)
        _add_product(sum_c, 3, gy, h3)
        g0 = multiply_add(gy, load_splat(c, 0), g0)
        g1 = multiply_add(gy, load_splat(c, 1), g1)
        g2 = multiply_add(gy, load_splat(c, 2), g2)
        g3 = multiply_add(gy, load_splat(c, 3), g3)
        _add_product(sum_b, 0, x, g0)
        _add_product(sum_b, 1, x, g1)
        _add_product(sum_b, 2, x, g2)
        _add_product(sum_b, 3, x, g3)
        gx = multiply_add(g0, load_splat(b, 0), load(grad_inputs, step))
        gx = multiply_add(g1, load_splat(b, 1), gx)
        gx = multiply_add(g2, load_splat(b, 2), gx)
        gx = multiply_add(g3, load_splat(b, 3), gx)
        store(grad_inputs, step, gx)

        # Through the decay exp(delta A): r is the gradient of delta A.
        g0 = g0 * load(saved, 4)
        g1 = g1 * load(saved, 5)
        g2 = g2 * load(saved, 6)
        g3 = g3 * load(saved, 7)
        h0 = load(saved, 0)
        h1 = load(saved, 1)
        h2 = load(saved, 2)
        h3 = load(saved, 3)
        r0 = g0 * h0
        r1 = g1 * h1
        r2 = g2 * h2
        r3 = g3 * h3
        gdt = multiply_add(r0, a0, load(grad_delta, step))
        gdt = multiply_add(r1, a1, gdt)
        gdt = multiply_add(r2, a2, gdt)
        gdt = multiply_add(r3, a3, gdt)
        store(grad_delta, step, gdt)
        ga0 = multiply_add(r0, dt, ga0)
        ga1 = multiply_add(r1, dt, ga1)
        ga2 = multiply_add(r2, dt, ga2)
        ga3 = multiply_add(r3, dt, ga3)
    store(grad_state, 0, g0)
    store(grad_state, 1, g1)
    store(grad_state, 2, g2)
    store(grad_state, 3, g3)
    _add(grad_rates, 0, ga0)
    _add(grad_rates, 1, ga1)
    _add(grad_rates, 2, ga2)
    _add(grad_rates, 3, ga3)


@njit(forceinline=True)
def _write_sums(sums, steps, states, target):
    """Add the lanes of a chunk's dB or dC, (states / 4, CHUNK, 4) vectors, and write them to (steps, states)."""
    for step in range(steps):
        for state in range(0, states, 4):
            vectors = sums + (state * CHUNK + step * 4) * VECTOR
            store_lane_sums(target, state, load(vectors, 0), load(vectors, 1), load(vectors, 2), load(vectors, 3))
        target += states * 4


@njit(forceinline=True)
def _backward_unit(parameters, unit, scratch, bfloat16):
    blocks = load_int(parameters, BLOCKS)
    length = load_int(parameters, LENGTH)
    states = load_int(parameters, STATES)
    with_softplus = load_int(parameters, SOFTPLUS)
    with_gate = load_int(parameters, Z)
    with_skip = load_int(parameters, D)
    padded_channels = load_int(parameters, PADDED_CHANNELS)
    u_stride = _stride(parameters, U)
    delta_stride = _stride(parameters, DELTA)
    z_stride = _stride(parameters, Z)
    grad_out_stride = _stride(parameters, GRAD_OUT)
    grad_u_stride = _stride(parameters, GRAD_U)
    grad_delta_stride = _stride(parameters, GRAD_DELTA)
    grad_z_stride = _stride(parameters, GRAD_Z)
    batch = unit // blocks
    block = unit % blocks
    first_channel = block * load_int(parameters, GROUPS) * 16
    channels = min(load_int(parameters, GROUPS) * 16, load_int(parameters, CHANNELS) - first_channel)
    groups = (channels + 15) // 16
    chunks = (length + CHUNK - 1) // CHUNK
    kept = load_int(parameters, KEPT) + (batch * chunks * states * padded_channels + first_channel) * 4

    delta = scratch
    slope = delta + ROWS  # of softplus
    gate = slope + ROWS  # sigmoid(z)
    inputs = gate + ROWS
    output = inputs + ROWS
    grad_y = output + ROWS
    grad_inputs = grad_y + ROWS
    grad_delta = grad_inputs + ROWS
    saved = grad_delta + ROWS
    b = saved + 8 * ROWS + 4 * VECTOR
    c = b + CHUNK * states * 4
    rates = c + CHUNK * states * 4
    grad_state = rates + groups * states * VECTOR
    grad_rates = grad_state + groups * states * VECTOR
    sum_b = grad_rates + groups * states * VECTOR
    sum_c = sum_b + states * ROWS
    _load_rates(parameters, first_channel, channels, groups, states, rates)
    _clear(grad_state, groups * states)
    _clear(grad_rates, groups * states)
    zero = splat(0.0)
    one = splat(1.0)
    ln2 = splat(LN2)
    # The gradients of D and the bias accumulate in this unit's part of the output, (batch, padded_channels).
    grad_skips = load_int(parameters, GRAD_D) + (batch * padded_channels + first_channel) * 4
    grad_biases = load_int(parameters, GRAD_BIAS) + (batch * padded_channels + first_channel) * 4
    _clear(grad_skips, groups)
    _clear(grad_biases, groups)

    for chunk in range(chunks - 1, -1, -1):
        start = chunk * CHUNK
        steps = min(CHUNK, length - start)
        _pack(parameters, B, batch, start, steps, states, b, bfloat16)
        _pack(parameters, C, batch, start, steps, states, c, bfloat16)
        _clear(sum_b, 2 * states * CHUNK)
        for order in range(groups):
            # The last group first: see below.
            group = order - 1 if order > 0 else groups - 1
            channel = first_channel + group * 16
            lanes = min(16, channels - group * 16)
            bias = _load_vector(parameters, BIAS, channel, lanes)
            skip = _load_vector(parameters, D, channel, lanes)
            u_row = _row(parameters, U, batch, start, channel, bfloat16)
            delta_row = _row(parameters, DELTA, batch, start, channel, bfloat16)
            z_row = _row(parameters, Z, batch, start, channel, bfloat16)
            grad_out_row = _row(parameters, GRAD_OUT, batch, start, channel, bfloat16)
            grad_u_row = _row(parameters, GRAD_U, batch, start, channel, bfloat16)
            grad_delta_row = _row(parameters, GRAD_DELTA, batch, start, channel, bfloat16)
            grad_z_row = _row(parameters, GRAD_Z, batch, start, channel, bfloat16)
            peak = zero
            for step in range(steps):
                prefetch(u_row + step * u_stride + VECTOR)
                prefetch(delta_row + VECTOR)
                prefetch(z_row + step * z_stride + VECTOR)
                prefetch(grad_out_row + step * grad_out_stride + VECTOR)
                prefetch_write(grad_u_row + step * grad_u_stride)
                prefetch_write(grad_delta_row + step * grad_delta_stride)
                prefetch_write(grad_z_row + step * grad_z_stride)
                u = load_sequence(u_row + step * u_stride, lanes, bfloat16)
                dt = load_sequence(delta_row, lanes, bfloat16) + bias
                gy = load_sequence(grad_out_row + step * grad_out_stride, lanes, bfloat16)
                if with_softplus != 0:
                    store(slope, step, sigmoid(dt))
                    dt = softplus(dt)
                if with_gate != 0:
                    z = load_sequence(z_row + step * z_stride, lanes, bfloat16)
                    s = sigmoid(z)
                    store(gate, step, s)
                    gy = gy * (z * s)
                peak = maximum(peak, absolute(dt))
                store(delta, step, dt)
                store(inputs, step, dt * u)
                store(output, step, skip * u if with_skip != 0 else zero)
                store(grad_y, step, gy)
                store(grad_inputs, step, zero)
                store(grad_delta, step, zero)
                delta_row += delta_stride

            four = group * states * VECTOR  # of the first four states
            source = kept + (chunk * states * padded_channels + group * 16) * 4
            for index in range(0, states, 4):
                for state in range(4):
                    store(saved, state, load(source, 0))
                    source += padded_channels * 4
                if _is_bounded(peak, rates + four):
                    _recompute_four(
                        True,
                        steps,
                        delta,
                        inputs,
                        output,
                        rates + four,
                        saved,
                        b + index * 4,
                        c + index * 4,
                        states * 4,
                    )
                else:
                    _recompute_four(
                        False,
                        steps,
                        delta,
                        inputs,
                        output,
                        rates + four,
                        saved,
                        b + index * 4,
                        c + index * 4,
                        states * 4,
                    )
                _reverse_four(
                    steps,
                    delta,
                    inputs,
                    grad_y,
                    grad_inputs,
                    grad_delta,
                    rates + four,
                    saved,
                    grad_state + four,
                    grad_rates + four,
                    b + index * 4,
                    c + index * 4,
                    states * 4,
                    sum_b + index * ROWS,
                    sum_c + index * ROWS,
                )
                four += 4 * VECTOR
            if lanes < 16:
                # Lanes without a channel hold 0 * inf where B, C or delta is infinite. This group came first, so they
                # can be cleared.
                for index in range(2 * states * CHUNK):
                    store(sum_b, index, load_first(sum_b + index * VECTOR, lanes))

            grad_skip = zero
            grad_bias = zero
            for step in range(steps):
                u = load_sequence(u_row, lanes, bfloat16)
                gy = load(grad_y, step)
                gx = load(grad_inputs, step)
                gu = gx * load(delta, step)
                if with_skip != 0:
                    gu = multiply_add(skip, gy, gu)
                store_sequence(grad_u_row, gu, lanes, bfloat16)
                gdt = multiply_add(load(grad_delta, step), ln2, gx * u)
                if with_softplus != 0:
                    gdt = gdt * load(slope, step)
                store_sequence(grad_delta_row, gdt, lanes, bfloat16)
                grad_skip = multiply_add(gy, u, grad_skip)
                grad_bias = grad_bias + gdt
                if with_gate != 0:
                    # silu'(z) = s (1 + z (1 - s)) with s = sigmoid(z)
                    z = load_sequence(z_row, lanes, bfloat16)
                    s = load(gate, step)
                    gz = (
                        load_sequence(grad_out_row, lanes, bfloat16)
                        * load(output, step)
                        * (s * multiply_add(z, one - s, one))
                    )
                    store_sequence(grad_z_row, gz, lanes, bfloat16)
                u_row += u_stride
                z_row += z_stride
                grad_out_row += grad_out_stride
                grad_u_row += grad_u_stride
                grad_delta_row += grad_delta_stride
                grad_z_row += grad_z_stride
            _add(grad_skips, group, grad_skip)
            _add(grad_biases, group, grad_bias)
        # (blocks, batch, length, states)
        num_rows = load_int(parameters, NUM_UNITS) // blocks
        position = (((block * num_rows + batch) * length) + start) * states * 4
        _write_sums(sum_b, steps, states, load_int(parameters, GRAD_B) + position)
        _write_sums(sum_c, steps, states, load_int(parameters, GRAD_C) + position)

    # (batch, states, padded_channels)
    target = load_int(parameters, GRAD_A) + (batch * states * padded_channels + first_channel) * 4
    for state in range(states):
        for group in range(groups):
            store(target, group, load(grad_rates, group * states + state))
        target += padded_channels * 4


@njit(forceinline=True)
def _backward(parameters, bfloat16):
    """Draw units and run them."""
    scratch = load_int(parameters, SCRATCH) + take_ticket(parameters, 1) * load_int(parameters, SCRATCH_BYTES)
    unit = take_ticket(parameters, 0)
    while unit < load_int(parameters, NUM_UNITS):
        _backward_unit(parameters, unit, scratch, bfloat16)
        unit = take_ticket(parameters, 0)


def backward_kernel(parameters):
    _backward(parameters, False)


def backward_kernel_bfloat16(parameters):
    _backward(parameters, True)
