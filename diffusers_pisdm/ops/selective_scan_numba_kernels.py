"""The compiled loops of `selective_scan_numba`: forward and backward over raw addresses.

A unit of work is one batch row and up to 256 channels. A unit walks over the sequence in chunks of `CHUNK` steps, in a
chunk over groups of 16 channels (the lanes of a vector), in a group over four states at a time, whose state stays in
registers over the chunk's steps. The order matters: going through the whole sequence for one group would touch a new
page at every step. Everything a chunk needs again lies in a scratch buffer that fits the first-level cache.

The backward walks over the chunks from the last to the first, and recomputes a chunk's states from the state at its
start, which the forward kept. Gradients of B and C are sums over channels: lanes and groups are added within a unit, and
each unit writes its own partial sum, so the result does not depend on which thread did what.
"""

from numba import njit

from .numba_vectors import (
    exp2,
    lane_sum,
    load,
    load_first,
    load_float,
    load_int,
    load_splat,
    multiply_add,
    sigmoid,
    softplus,
    splat,
    store,
    store_first,
    store_float,
    take_ticket,
)


CHUNK = 32  # steps between two kept states
GROUPS = 16  # groups of 16 channels in a unit of work
VECTOR = 64  # bytes of a vector
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

# Entries of the parameter array, as int64; the first two are the counters of `run_kernel`. A sequence tensor x takes
# four: its address (0 if absent) and its byte strides over batch, (state,) and length.
NUM_UNITS, BLOCKS, SCRATCH, SCRATCH_BYTES, CHANNELS, LENGTH, STATES, SOFTPLUS, KEEP = range(2, 11)
A, D, BIAS, KEPT, KEPT_CHANNELS = range(11, 16)
U, DELTA, Z, OUT, B, C = range(16, 40, 4)
GRAD_OUT, GRAD_U, GRAD_DELTA, GRAD_Z, GRAD_A, GRAD_D, GRAD_BIAS, GRAD_B, GRAD_C = range(40, 76, 4)
NUM_PARAMETERS = 76


def padded_states(states: int) -> int:
    """States are done four at a time; missing ones are zero."""
    return (states + 3) // 4 * 4


def forward_scratch_bytes(states: int) -> int:
    padded = padded_states(states)
    return 3 * CHUNK * VECTOR + 2 * CHUNK * padded * 4 + 2 * GROUPS * padded * VECTOR


def backward_scratch_bytes(states: int) -> int:
    padded = padded_states(states)
    rows = 7 * CHUNK * VECTOR + (8 * CHUNK + 4) * VECTOR
    return rows + 2 * CHUNK * padded * 4 + 3 * GROUPS * padded * VECTOR + 2 * CHUNK * padded * VECTOR


@njit(forceinline=True)
def _row(parameters, tensor, batch, step, channel):
    """Address of (batch, step, channel) in a sequence tensor of adjacent float32 channels."""
    return (
        load_int(parameters + 8 * tensor)
        + batch * load_int(parameters + 8 * tensor + 8)
        + step * load_int(parameters + 8 * tensor + 24)
        + channel * 4
    )


@njit(forceinline=True)
def _pack(parameters, tensor, batch, start, steps, states, padded, target):
    """Copy B or C of a chunk to `target`, (steps, padded) without gaps; the padding is zero."""
    source = load_int(parameters + 8 * tensor) + batch * load_int(parameters + 8 * tensor + 8)
    stride_state = load_int(parameters + 8 * tensor + 16)
    stride_step = load_int(parameters + 8 * tensor + 24)
    for step in range(steps):
        row = source + (start + step) * stride_step
        for state in range(0, states):
            store_float(target + (step * padded + state) * 4, load_float(row + state * stride_state))


@njit(forceinline=True)
def _clear(address, vectors):
    zero = splat(0.0)
    for index in range(vectors):
        store(address + index * VECTOR, zero)


@njit(forceinline=True)
def _load_rates(parameters, first_channel, channels, groups, states, padded, target):
    """Write A times log2(e) to `target`, (groups, padded) vectors; the padding is zero."""
    source = load_int(parameters + 8 * A)
    scale = splat(LOG2E)
    for group in range(groups):
        lanes = min(16, channels - group * 16)
        for state in range(states):
            row = source + (state * load_int(parameters + 8 * CHANNELS) + first_channel + group * 16) * 4
            store(target + (group * padded + state) * VECTOR, load_first(row, lanes) * scale)


@njit(forceinline=True)
def _load_vector(parameters, tensor, channel, lanes):
    """16 channels of a per-channel tensor (D or the bias); zero if absent."""
    address = load_int(parameters + 8 * tensor)
    if address == 0:
        return splat(0.0)
    return load_first(address + channel * 4, lanes)


@njit(forceinline=True)
def _scan_four(steps, delta, inputs, output, rates, state, b, c, stride):
    """Four states of 16 channels over a chunk: outputs are added to `output`, `state` is moved to the chunk's end."""
    a0 = load(rates)
    a1 = load(rates + VECTOR)
    a2 = load(rates + 2 * VECTOR)
    a3 = load(rates + 3 * VECTOR)
    h0 = load(state)
    h1 = load(state + VECTOR)
    h2 = load(state + 2 * VECTOR)
    h3 = load(state + 3 * VECTOR)
    for step in range(steps):
        dt = load(delta + step * VECTOR)
        x = load(inputs + step * VECTOR)
        y = load(output + step * VECTOR)
        bt = b + step * stride
        ct = c + step * stride
        h0 = multiply_add(exp2(dt * a0), h0, x * load_splat(bt))
        h1 = multiply_add(exp2(dt * a1), h1, x * load_splat(bt + 4))
        h2 = multiply_add(exp2(dt * a2), h2, x * load_splat(bt + 8))
        h3 = multiply_add(exp2(dt * a3), h3, x * load_splat(bt + 12))
        y = multiply_add(h0, load_splat(ct), y)
        y = multiply_add(h1, load_splat(ct + 4), y)
        y = multiply_add(h2, load_splat(ct + 8), y)
        y = multiply_add(h3, load_splat(ct + 12), y)
        store(output + step * VECTOR, y)
    store(state, h0)
    store(state + VECTOR, h1)
    store(state + 2 * VECTOR, h2)
    store(state + 3 * VECTOR, h3)


@njit(forceinline=True)
def _forward_unit(parameters, unit, scratch):
    blocks = load_int(parameters + 8 * BLOCKS)
    length = load_int(parameters + 8 * LENGTH)
    states = load_int(parameters + 8 * STATES)
    with_softplus = load_int(parameters + 8 * SOFTPLUS)
    with_gate = load_int(parameters + 8 * Z)
    keep = load_int(parameters + 8 * KEEP)
    kept_channels = load_int(parameters + 8 * KEPT_CHANNELS)
    padded = (states + 3) // 4 * 4
    batch = unit // blocks
    first_channel = unit % blocks * (GROUPS * 16)
    channels = min(GROUPS * 16, load_int(parameters + 8 * CHANNELS) - first_channel)
    groups = (channels + 15) // 16
    chunks = (length + CHUNK - 1) // CHUNK

    delta = scratch
    inputs = delta + CHUNK * VECTOR
    output = inputs + CHUNK * VECTOR
    b = output + CHUNK * VECTOR
    c = b + CHUNK * padded * 4
    rates = c + CHUNK * padded * 4
    state = rates + GROUPS * padded * VECTOR

    # All padding is cleared once: nothing writes to it later.
    _clear(b, 2 * CHUNK * padded // 16 + 2 * GROUPS * padded)
    _load_rates(parameters, first_channel, channels, groups, states, padded, rates)

    for chunk in range(chunks):
        start = chunk * CHUNK
        steps = min(CHUNK, length - start)
        _pack(parameters, B, batch, start, steps, states, padded, b)
        _pack(parameters, C, batch, start, steps, states, padded, c)
        for group in range(groups):
            channel = first_channel + group * 16
            lanes = min(16, channels - group * 16)
            group_state = state + group * padded * VECTOR
            if keep != 0 and chunk > 0:
                kept = keep + ((batch * (chunks - 1) + chunk - 1) * padded * kept_channels + channel) * 4
                for index in range(padded):
                    store(kept + index * kept_channels * 4, load(group_state + index * VECTOR))

            # What does not depend on the state index: the step, its input, and the skip.
            bias = _load_vector(parameters, BIAS, channel, lanes)
            skip = _load_vector(parameters, D, channel, lanes)
            u_row = _row(parameters, U, batch, start, channel)
            delta_row = _row(parameters, DELTA, batch, start, channel)
            for step in range(steps):
                u = load_first(u_row + step * load_int(parameters + 8 * U + 24), lanes)
                dt = load_first(delta_row + step * load_int(parameters + 8 * DELTA + 24), lanes) + bias
                if with_softplus != 0:
                    dt = softplus(dt)
                store(delta + step * VECTOR, dt)
                store(inputs + step * VECTOR, dt * u)
                store(output + step * VECTOR, skip * u)

            for index in range(0, padded, 4):
                _scan_four(
                    steps,
                    delta,
                    inputs,
                    output,
                    rates + (group * padded + index) * VECTOR,
                    group_state + index * VECTOR,
                    b + index * 4,
                    c + index * 4,
                    padded * 4,
                )

            out_row = _row(parameters, OUT, batch, start, channel)
            z_row = _row(parameters, Z, batch, start, channel)
            for step in range(steps):
                y = load(output + step * VECTOR)
                if with_gate != 0:
                    z = load_first(z_row + step * load_int(parameters + 8 * Z + 24), lanes)
                    y = y * (z * sigmoid(z))
                store_first(out_row + step * load_int(parameters + 8 * OUT + 24), y, lanes)


def forward_kernel(parameters):
    """Draw units and run them."""
    slot = take_ticket(parameters + 8)
    scratch = load_int(parameters + 8 * SCRATCH) + slot * load_int(parameters + 8 * SCRATCH_BYTES)
    num_units = load_int(parameters + 8 * NUM_UNITS)
    unit = take_ticket(parameters)
    while unit < num_units:
        _forward_unit(parameters, unit, scratch)
        unit = take_ticket(parameters)


@njit(forceinline=True)
def _recompute_four(steps, delta, inputs, output, rates, saved, b, c, stride, with_output):
    """As `_scan_four`, from the state at `saved`, but writes every step's decay and state behind it."""
    a0 = load(rates)
    a1 = load(rates + VECTOR)
    a2 = load(rates + 2 * VECTOR)
    a3 = load(rates + 3 * VECTOR)
    h0 = load(saved)
    h1 = load(saved + VECTOR)
    h2 = load(saved + 2 * VECTOR)
    h3 = load(saved + 3 * VECTOR)
    for step in range(steps):
        dt = load(delta + step * VECTOR)
        x = load(inputs + step * VECTOR)
        bt = b + step * stride
        target = saved + (4 + step * 8) * VECTOR
        e0 = exp2(dt * a0)
        e1 = exp2(dt * a1)
        e2 = exp2(dt * a2)
        e3 = exp2(dt * a3)
        store(target, e0)
        store(target + VECTOR, e1)
        store(target + 2 * VECTOR, e2)
        store(target + 3 * VECTOR, e3)
        h0 = multiply_add(e0, h0, x * load_splat(bt))
        h1 = multiply_add(e1, h1, x * load_splat(bt + 4))
        h2 = multiply_add(e2, h2, x * load_splat(bt + 8))
        h3 = multiply_add(e3, h3, x * load_splat(bt + 12))
        store(target + 4 * VECTOR, h0)
        store(target + 5 * VECTOR, h1)
        store(target + 6 * VECTOR, h2)
        store(target + 7 * VECTOR, h3)
        if with_output != 0:
            ct = c + step * stride
            y = load(output + step * VECTOR)
            y = multiply_add(h0, load_splat(ct), y)
            y = multiply_add(h1, load_splat(ct + 4), y)
            y = multiply_add(h2, load_splat(ct + 8), y)
            y = multiply_add(h3, load_splat(ct + 12), y)
            store(output + step * VECTOR, y)


@njit(forceinline=True)
def _add_product(address, a, b):
    store(address, multiply_add(a, b, load(address)))


@njit(forceinline=True)
def _reverse_four(
    steps, delta, inputs, grad_y, grad_inputs, grad_delta, rates, saved, grad_state, grad_rates, b, c, stride, sum_b, sum_c
):
    """The backward of `_scan_four`. All gradients are added to what is there; that of delta lacks the factor ln 2."""
    a0 = load(rates)
    a1 = load(rates + VECTOR)
    a2 = load(rates + 2 * VECTOR)
    a3 = load(rates + 3 * VECTOR)
    g0 = load(grad_state)
    g1 = load(grad_state + VECTOR)
    g2 = load(grad_state + 2 * VECTOR)
    g3 = load(grad_state + 3 * VECTOR)
    # Sums over the chunk are taken in registers first: a sum of sums loses fewer digits over a long sequence.
    ga0 = splat(0.0)
    ga1 = splat(0.0)
    ga2 = splat(0.0)
    ga3 = splat(0.0)
    last = saved + (steps * 8) * VECTOR
    h0 = load(last)
    h1 = load(last + VECTOR)
    h2 = load(last + 2 * VECTOR)
    h3 = load(last + 3 * VECTOR)
    for back in range(steps):
        step = steps - 1 - back
        dt = load(delta + step * VECTOR)
        x = load(inputs + step * VECTOR)
        gy = load(grad_y + step * VECTOR)
        gx = load(grad_inputs + step * VECTOR)
        gdt = load(grad_delta + step * VECTOR)
        bt = b + step * stride
        ct = c + step * stride
        sum_bt = sum_b + step * 4 * VECTOR
        sum_ct = sum_c + step * 4 * VECTOR
        decay = saved + (4 + step * 8) * VECTOR
        before = saved + step * 8 * VECTOR

        _add_product(sum_ct, gy, h0)
        _add_product(sum_ct + VECTOR, gy, h1)
        _add_product(sum_ct + 2 * VECTOR, gy, h2)
        _add_product(sum_ct + 3 * VECTOR, gy, h3)
        g0 = multiply_add(gy, load_splat(ct), g0)
        g1 = multiply_add(gy, load_splat(ct + 4), g1)
        g2 = multiply_add(gy, load_splat(ct + 8), g2)
        g3 = multiply_add(gy, load_splat(ct + 12), g3)
        _add_product(sum_bt, x, g0)
        _add_product(sum_bt + VECTOR, x, g1)
        _add_product(sum_bt + 2 * VECTOR, x, g2)
        _add_product(sum_bt + 3 * VECTOR, x, g3)
        gx = multiply_add(g0, load_splat(bt), gx)
        gx = multiply_add(g1, load_splat(bt + 4), gx)
        gx = multiply_add(g2, load_splat(bt + 8), gx)
        gx = multiply_add(g3, load_splat(bt + 12), gx)

        # Through the decay exp(delta A): r is the gradient of delta A.
        g0 = g0 * load(decay)
        g1 = g1 * load(decay + VECTOR)
        g2 = g2 * load(decay + 2 * VECTOR)
        g3 = g3 * load(decay + 3 * VECTOR)
        h0 = load(before)
        h1 = load(before + VECTOR)
        h2 = load(before + 2 * VECTOR)
        h3 = load(before + 3 * VECTOR)
        r0 = g0 * h0
        r1 = g1 * h1
        r2 = g2 * h2
        r3 = g3 * h3
        gdt = multiply_add(r0, a0, gdt)
        gdt = multiply_add(r1, a1, gdt)
        gdt = multiply_add(r2, a2, gdt)
        gdt = multiply_add(r3, a3, gdt)
        ga0 = multiply_add(r0, dt, ga0)
        ga1 = multiply_add(r1, dt, ga1)
        ga2 = multiply_add(r2, dt, ga2)
        ga3 = multiply_add(r3, dt, ga3)
        store(grad_inputs + step * VECTOR, gx)
        store(grad_delta + step * VECTOR, gdt)
    store(grad_state, g0)
    store(grad_state + VECTOR, g1)
    store(grad_state + 2 * VECTOR, g2)
    store(grad_state + 3 * VECTOR, g3)
    store(grad_rates, load(grad_rates) + ga0)
    store(grad_rates + VECTOR, load(grad_rates + VECTOR) + ga1)
    store(grad_rates + 2 * VECTOR, load(grad_rates + 2 * VECTOR) + ga2)
    store(grad_rates + 3 * VECTOR, load(grad_rates + 3 * VECTOR) + ga3)


@njit(forceinline=True)
def _write_sums(parameters, tensor, row, start, steps, states, sums):
    """Add the lanes of dB or dC of a chunk and write them to this unit's (length, states) block."""
    target = load_int(parameters + 8 * tensor) + (row * load_int(parameters + 8 * LENGTH) + start) * states * 4
    for step in range(steps):
        for state in range(states):
            # (padded / 4, CHUNK, 4) vectors: what four states touch lies together
            vector = (state // 4 * CHUNK + step) * 4 + state % 4
            store_float(target + (step * states + state) * 4, lane_sum(load(sums + vector * VECTOR)))


@njit(forceinline=True)
def _backward_unit(parameters, unit, scratch):
    blocks = load_int(parameters + 8 * BLOCKS)
    length = load_int(parameters + 8 * LENGTH)
    states = load_int(parameters + 8 * STATES)
    all_channels = load_int(parameters + 8 * CHANNELS)
    with_softplus = load_int(parameters + 8 * SOFTPLUS)
    with_gate = load_int(parameters + 8 * Z)
    keep = load_int(parameters + 8 * KEEP)
    kept_channels = load_int(parameters + 8 * KEPT_CHANNELS)
    padded = (states + 3) // 4 * 4
    batch = unit // blocks
    first_channel = unit % blocks * (GROUPS * 16)
    channels = min(GROUPS * 16, all_channels - first_channel)
    groups = (channels + 15) // 16
    chunks = (length + CHUNK - 1) // CHUNK

    delta = scratch
    slope = delta + CHUNK * VECTOR  # of softplus
    inputs = slope + CHUNK * VECTOR
    output = inputs + CHUNK * VECTOR
    grad_y = output + CHUNK * VECTOR
    grad_inputs = grad_y + CHUNK * VECTOR
    grad_delta = grad_inputs + CHUNK * VECTOR
    saved = grad_delta + CHUNK * VECTOR
    b = saved + (8 * CHUNK + 4) * VECTOR
    c = b + CHUNK * padded * 4
    rates = c + CHUNK * padded * 4
    grad_state = rates + GROUPS * padded * VECTOR
    grad_rates = grad_state + GROUPS * padded * VECTOR
    sum_b = grad_rates + GROUPS * padded * VECTOR
    sum_c = sum_b + CHUNK * padded * VECTOR

    _clear(b, 2 * CHUNK * padded // 16 + 3 * GROUPS * padded)
    _load_rates(parameters, first_channel, channels, groups, states, padded, rates)
    zero = splat(0.0)
    one = splat(1.0)
    ln2 = splat(LN2)
    # The gradients of D and of the bias gather in the output itself.
    grad_skips = load_int(parameters + 8 * GRAD_D) + (batch * kept_channels + first_channel) * 4
    grad_biases = load_int(parameters + 8 * GRAD_BIAS) + (batch * kept_channels + first_channel) * 4
    for group in range(groups):
        store(grad_skips + group * VECTOR, zero)
        store(grad_biases + group * VECTOR, zero)

    for chunk in range(chunks - 1, -1, -1):
        start = chunk * CHUNK
        steps = min(CHUNK, length - start)
        _pack(parameters, B, batch, start, steps, states, padded, b)
        _pack(parameters, C, batch, start, steps, states, padded, c)
        _clear(sum_b, 2 * CHUNK * padded)
        for group in range(groups):
            channel = first_channel + group * 16
            lanes = min(16, channels - group * 16)
            bias = _load_vector(parameters, BIAS, channel, lanes)
            skip = _load_vector(parameters, D, channel, lanes)
            u_row = _row(parameters, U, batch, start, channel)
            u_stride = load_int(parameters + 8 * U + 24)
            delta_row = _row(parameters, DELTA, batch, start, channel)
            z_row = _row(parameters, Z, batch, start, channel)
            z_stride = load_int(parameters + 8 * Z + 24)
            grad_out_row = _row(parameters, GRAD_OUT, batch, start, channel)
            grad_out_stride = load_int(parameters + 8 * GRAD_OUT + 24)
            for step in range(steps):
                u = load_first(u_row + step * u_stride, lanes)
                dt = load_first(delta_row + step * load_int(parameters + 8 * DELTA + 24), lanes) + bias
                gy = load_first(grad_out_row + step * grad_out_stride, lanes)
                if with_softplus != 0:
                    store(slope + step * VECTOR, sigmoid(dt))
                    dt = softplus(dt)
                if with_gate != 0:
                    z = load_first(z_row + step * z_stride, lanes)
                    gy = gy * (z * sigmoid(z))
                store(delta + step * VECTOR, dt)
                store(inputs + step * VECTOR, dt * u)
                store(output + step * VECTOR, skip * u)
                store(grad_y + step * VECTOR, gy)
                store(grad_inputs + step * VECTOR, zero)
                store(grad_delta + step * VECTOR, zero)

            for index in range(0, padded, 4):
                kept = keep + (((batch * (chunks - 1) + chunk - 1) * padded + index) * kept_channels + channel) * 4
                for state in range(4):
                    if chunk > 0:
                        store(saved + state * VECTOR, load(kept + state * kept_channels * 4))
                    else:
                        store(saved + state * VECTOR, zero)
                _recompute_four(
                    steps,
                    delta,
                    inputs,
                    output,
                    rates + (group * padded + index) * VECTOR,
                    saved,
                    b + index * 4,
                    c + index * 4,
                    padded * 4,
                    with_gate,
                )
                _reverse_four(
                    steps,
                    delta,
                    inputs,
                    grad_y,
                    grad_inputs,
                    grad_delta,
                    rates + (group * padded + index) * VECTOR,
                    saved,
                    grad_state + (group * padded + index) * VECTOR,
                    grad_rates + (group * padded + index) * VECTOR,
                    b + index * 4,
                    c + index * 4,
                    padded * 4,
                    sum_b + index * CHUNK * VECTOR,
                    sum_c + index * CHUNK * VECTOR,
                )

            grad_u_row = _row(parameters, GRAD_U, batch, start, channel)
            grad_delta_row = _row(parameters, GRAD_DELTA, batch, start, channel)
            grad_z_row = _row(parameters, GRAD_Z, batch, start, channel)
            grad_skip = zero
            grad_bias = zero
            for step in range(steps):
                u = load_first(u_row + step * u_stride, lanes)
                gy = load(grad_y + step * VECTOR)
                gx = load(grad_inputs + step * VECTOR)
                gu = multiply_add(gx, load(delta + step * VECTOR), skip * gy)
                store_first(grad_u_row + step * load_int(parameters + 8 * GRAD_U + 24), gu, lanes)
                gdt = multiply_add(load(grad_delta + step * VECTOR), ln2, gx * u)
                if with_softplus != 0:
                    gdt = gdt * load(slope + step * VECTOR)
                store_first(grad_delta_row + step * load_int(parameters + 8 * GRAD_DELTA + 24), gdt, lanes)
                grad_skip = multiply_add(gy, u, grad_skip)
                grad_bias = grad_bias + gdt
                if with_gate != 0:
                    # silu'(z) = s (1 + z (1 - s)) with s = sigmoid(z)
                    z = load_first(z_row + step * z_stride, lanes)
                    go = load_first(grad_out_row + step * grad_out_stride, lanes)
                    s = sigmoid(z)
                    gz = go * load(output + step * VECTOR) * (s * multiply_add(z, one - s, one))
                    store_first(grad_z_row + step * load_int(parameters + 8 * GRAD_Z + 24), gz, lanes)
            store(grad_skips + group * VECTOR, load(grad_skips + group * VECTOR) + grad_skip)
            store(grad_biases + group * VECTOR, load(grad_biases + group * VECTOR) + grad_bias)
        # (blocks, batch, length, states)
        row = unit % blocks * (load_int(parameters + 8 * NUM_UNITS) // blocks) + batch
        _write_sums(parameters, GRAD_B, row, start, steps, states, sum_b)
        _write_sums(parameters, GRAD_C, row, start, steps, states, sum_c)

    # (batch, states, kept_channels)
    grad_a = load_int(parameters + 8 * GRAD_A) + (batch * states * kept_channels + first_channel) * 4
    for group in range(groups):
        for state in range(states):
            value = load(grad_rates + (group * padded + state) * VECTOR)
            store(grad_a + state * kept_channels * 4 + group * VECTOR, value)


def backward_kernel(parameters):
    """Draw units and run them."""
    slot = take_ticket(parameters + 8)
    scratch = load_int(parameters + 8 * SCRATCH) + slot * load_int(parameters + 8 * SCRATCH_BYTES)
    num_units = load_int(parameters + 8 * NUM_UNITS)
    unit = take_ticket(parameters)
    while unit < num_units:
        _backward_unit(parameters, unit, scratch)
        unit = take_ticket(parameters)
