"""The compiled loops of `causal_conv_numba`: forward and backward over raw addresses.

A unit of work is one batch row and up to 256 channels, walked in chunks of `CHUNK` steps; in a chunk, each group of 16
channels (the lanes of a vector) is done over all steps, so that the rows under the filter are still in the cache.
"""

from numba import njit

from .numba_vectors import (
    load,
    load_first,
    load_int,
    multiply_add,
    sigmoid,
    splat,
    store,
    store_first,
    take_ticket,
)


CHUNK = 32
GROUPS = 16  # groups of 16 channels in a unit of work
VECTOR = 64  # bytes of a vector

# Entries of the parameter array, as int64; the first two are the counters of `run_kernel`. A sequence tensor takes
# three: its address and its byte strides over batch and length.
NUM_UNITS, BLOCKS, SCRATCH, SCRATCH_BYTES, CHANNELS, LENGTH, TAPS, SILU = range(2, 10)
WEIGHT, BIAS, GRAD_WEIGHT, GRAD_BIAS, PADDED_CHANNELS = range(10, 15)
X, OUT, GRAD_OUT, GRAD_X = range(15, 27, 3)


def forward_scratch_bytes(taps: int) -> int:
    return GROUPS * (taps + 1) * VECTOR


def backward_scratch_bytes(taps: int) -> int:
    return (GROUPS * (taps + 1) + (1 + GROUPS) * (taps - 1) + CHUNK) * VECTOR


@njit(forceinline=True)
def _row(parameters, tensor, batch, step, channel):
    """Address of (batch, step, channel) in a sequence tensor of adjacent float32 channels."""
    return (
        load_int(parameters + 8 * tensor)
        + batch * load_int(parameters + 8 * tensor + 8)
        + step * load_int(parameters + 8 * tensor + 16)
        + channel * 4
    )


@njit(forceinline=True)
def _load_filters(parameters, first_channel, channels, groups, taps, target):
    """Write the filters and then the bias to `target`, (groups, taps + 1) vectors."""
    weight = load_int(parameters + 8 * WEIGHT)
    bias = load_int(parameters + 8 * BIAS)
    for group in range(groups):
        lanes = min(16, channels - group * 16)
        channel = first_channel + group * 16
        row = target + group * (taps + 1) * VECTOR
        for tap in range(taps):
            source = weight + (tap * load_int(parameters + 8 * CHANNELS) + channel) * 4
            store(row + tap * VECTOR, load_first(source, lanes))
        if bias != 0:
            store(row + taps * VECTOR, load_first(bias + channel * 4, lanes))
        else:
            store(row + taps * VECTOR, splat(0.0))


@njit(forceinline=True)
def _before_activation(x_row, x_stride, step, filters, taps, lanes):
    """The convolution at `step`; `x_row` is the address of step 0."""
    value = load(filters + taps * VECTOR)
    for tap in range(max(0, taps - 1 - step), taps):
        x = load_first(x_row + (step - taps + 1 + tap) * x_stride, lanes)
        value = multiply_add(load(filters + tap * VECTOR), x, value)
    return value


@njit(forceinline=True)
def _forward_unit(parameters, unit, scratch):
    blocks = load_int(parameters + 8 * BLOCKS)
    length = load_int(parameters + 8 * LENGTH)
    taps = load_int(parameters + 8 * TAPS)
    with_silu = load_int(parameters + 8 * SILU)
    x_stride = load_int(parameters + 8 * X + 16)
    out_stride = load_int(parameters + 8 * OUT + 16)
    batch = unit // blocks
    first_channel = unit % blocks * (GROUPS * 16)
    channels = min(GROUPS * 16, load_int(parameters + 8 * CHANNELS) - first_channel)
    groups = (channels + 15) // 16
    _load_filters(parameters, first_channel, channels, groups, taps, scratch)
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        for group in range(groups):
            lanes = min(16, channels - group * 16)
            filters = scratch + group * (taps + 1) * VECTOR
            x_row = _row(parameters, X, batch, 0, first_channel + group * 16)
            out_row = _row(parameters, OUT, batch, 0, first_channel + group * 16)
            for step in range(start, stop):
                value = _before_activation(x_row, x_stride, step, filters, taps, lanes)
                if with_silu != 0:
                    value = value * sigmoid(value)
                store_first(out_row + step * out_stride, value, lanes)


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
def _backward_unit(parameters, unit, scratch):
    blocks = load_int(parameters + 8 * BLOCKS)
    length = load_int(parameters + 8 * LENGTH)
    taps = load_int(parameters + 8 * TAPS)
    with_silu = load_int(parameters + 8 * SILU)
    padded_channels = load_int(parameters + 8 * PADDED_CHANNELS)
    x_stride = load_int(parameters + 8 * X + 16)
    grad_out_stride = load_int(parameters + 8 * GRAD_OUT + 16)
    grad_x_stride = load_int(parameters + 8 * GRAD_X + 16)
    batch = unit // blocks
    first_channel = unit % blocks * (GROUPS * 16)
    channels = min(GROUPS * 16, load_int(parameters + 8 * CHANNELS) - first_channel)
    groups = (channels + 15) // 16
    # The gradient before the activation of a chunk, followed by the first taps - 1 rows of the chunk behind it, which
    # are kept for each group.
    gradient = scratch + GROUPS * (taps + 1) * VECTOR
    behind = gradient + (CHUNK + taps - 1) * VECTOR
    zero = splat(0.0)
    one = splat(1.0)

    _load_filters(parameters, first_channel, channels, groups, taps, scratch)
    for index in range(groups * (taps - 1)):
        store(behind + index * VECTOR, zero)
    grad_weight = load_int(parameters + 8 * GRAD_WEIGHT) + (batch * taps * padded_channels + first_channel) * 4
    grad_bias = load_int(parameters + 8 * GRAD_BIAS) + (batch * padded_channels + first_channel) * 4
    for group in range(groups):
        store(grad_bias + group * VECTOR, zero)
        for tap in range(taps):
            store(grad_weight + tap * padded_channels * 4 + group * VECTOR, zero)

    chunks = (length + CHUNK - 1) // CHUNK
    for chunk in range(chunks - 1, -1, -1):
        start = chunk * CHUNK
        steps = min(CHUNK, length - start)
        for group in range(groups):
            lanes = min(16, channels - group * 16)
            filters = scratch + group * (taps + 1) * VECTOR
            x_row = _row(parameters, X, batch, 0, first_channel + group * 16)
            grad_out_row = _row(parameters, GRAD_OUT, batch, start, first_channel + group * 16)
            grad_x_row = _row(parameters, GRAD_X, batch, start, first_channel + group * 16)

            total = zero
            for step in range(steps):
                g = load_first(grad_out_row + step * grad_out_stride, lanes)
                if with_silu != 0:
                    # silu'(v) = s (1 + v (1 - s)) with s = sigmoid(v)
                    value = _before_activation(x_row, x_stride, start + step, filters, taps, lanes)
                    s = sigmoid(value)
                    g = g * (s * multiply_add(value, one - s, one))
                store(gradient + step * VECTOR, g)
                total = total + g
            store(grad_bias + group * VECTOR, load(grad_bias + group * VECTOR) + total)
            for index in range(taps - 1):
                row = load(behind + (group * (taps - 1) + index) * VECTOR)
                store(gradient + (steps + index) * VECTOR, row)
            for index in range(taps - 1):
                row = load(gradient + index * VECTOR)
                store(behind + (group * (taps - 1) + index) * VECTOR, row)

            for step in range(steps):
                value = zero
                for tap in range(taps):
                    g = load(gradient + (step + taps - 1 - tap) * VECTOR)
                    value = multiply_add(load(filters + tap * VECTOR), g, value)
                store_first(grad_x_row + step * grad_x_stride, value, lanes)
            for tap in range(taps):
                total = zero
                for step in range(max(0, taps - 1 - tap - start), steps):
                    x = load_first(x_row + (start + step - taps + 1 + tap) * x_stride, lanes)
                    total = multiply_add(load(gradient + step * VECTOR), x, total)
                target = grad_weight + tap * padded_channels * 4 + group * VECTOR
                store(target, load(target) + total)


def backward_kernel(parameters):
    """Draw units and run them."""
    slot = take_ticket(parameters + 8)
    scratch = load_int(parameters + 8 * SCRATCH) + slot * load_int(parameters + 8 * SCRATCH_BYTES)
    num_units = load_int(parameters + 8 * NUM_UNITS)
    unit = take_ticket(parameters)
    while unit < num_units:
        _backward_unit(parameters, unit, scratch)
        unit = take_ticket(parameters)
