"""The compiled loops of `causal_conv_numba`: forward and backward over raw addresses.

Units, chunks, groups, lanes and the two types in memory are as in the scan's kernels; the tour at the top of
`ops/scan/numba_kernels.py` draws them. Each group of 16 channels runs over all steps of a chunk at once, while the
rows under the filter are still in the cache.
"""

from numba import njit

from ..common.numba_vectors import (
    load,
    load_first,
    load_int,
    load_sequence,
    multiply_add,
    prefetch,
    prefetch_write,
    sigmoid,
    splat,
    store,
    store_sequence,
    take_ticket,
)


CHUNK = 32
VECTOR = 64  # bytes of a vector

# Entries of the parameter array; the first two are the counters of `run_kernel`. A unit has up to `GROUPS` groups of
# channels, a batch row has `BLOCKS` units. `PADDED_CHANNELS` is a multiple of 16. A tensor is its address, 0 if
# absent; a sequence tensor takes four entries: its address and its byte strides over batch, channels and length.
NUM_UNITS, BLOCKS, GROUPS, SCRATCH, SCRATCH_BYTES, CHANNELS, PADDED_CHANNELS, LENGTH, TAPS, SILU = range(2, 12)
WEIGHT, BIAS, GRAD_WEIGHT, GRAD_BIAS = range(12, 16)
X, OUT, GRAD_OUT, GRAD_X = range(16, 32, 4)
NUM_PARAMETERS = 32


def forward_scratch_bytes(taps: int, groups: int) -> int:
    return groups * (taps + 1) * VECTOR


def backward_scratch_bytes(taps: int, groups: int) -> int:
    return (groups * (taps + 1) + (1 + groups) * (taps - 1) + CHUNK) * VECTOR


@njit(forceinline=True)
def _row(parameters, tensor, batch, channel, bfloat16):
    """Address of (batch, channel, 0) in a sequence tensor whose channels are adjacent."""
    row = load_int(parameters, tensor) + batch * load_int(parameters, tensor + 1)
    return row + channel * (2 if bfloat16 else 4)


@njit(forceinline=True)
def _load_filters(parameters, first_channel, channels, groups, taps, target):
    """Write the filters, then the bias, to `target`: (groups, taps + 1) vectors."""
    bias = load_int(parameters, BIAS)
    for group in range(groups):
        lanes = min(16, channels - group * 16)
        channel = first_channel + group * 16
        source = load_int(parameters, WEIGHT) + channel * 4
        for tap in range(taps):
            store(target, tap, load_first(source, lanes))
            source += load_int(parameters, CHANNELS) * 4
        store(target, taps, load_first(bias + channel * 4, lanes) if bias != 0 else splat(0.0))
        target += (taps + 1) * VECTOR


@njit(forceinline=True)
def _before_activation(row, stride, step, filters, taps, lanes, bfloat16):
    """The convolution at `step`, whose address is `row`."""
    value = load(filters, taps)
    first = max(0, taps - 1 - step)
    row -= (taps - 1 - first) * stride
    for tap in range(first, taps):
        value = multiply_add(load(filters, tap), load_sequence(row, lanes, bfloat16), value)
        row += stride
    return value


@njit(forceinline=True)
def _forward_unit(parameters, unit, scratch, bfloat16):
    blocks = load_int(parameters, BLOCKS)
    length = load_int(parameters, LENGTH)
    taps = load_int(parameters, TAPS)
    with_silu = load_int(parameters, SILU)
    x_stride = load_int(parameters, X + 3)
    out_stride = load_int(parameters, OUT + 3)
    batch = unit // blocks
    first_channel = unit % blocks * load_int(parameters, GROUPS) * 16
    channels = min(load_int(parameters, GROUPS) * 16, load_int(parameters, CHANNELS) - first_channel)
    groups = (channels + 15) // 16
    _load_filters(parameters, first_channel, channels, groups, taps, scratch)
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        for group in range(groups):
            lanes = min(16, channels - group * 16)
            filters = scratch + group * (taps + 1) * VECTOR
            x_row = _row(parameters, X, batch, first_channel + group * 16, bfloat16) + start * x_stride
            out_row = _row(parameters, OUT, batch, first_channel + group * 16, bfloat16) + start * out_stride
            for step in range(start, stop):
                # Rows may be a page apart, too far for the hardware prefetcher.
                prefetch(x_row + VECTOR)
                prefetch_write(out_row + VECTOR)
                value = _before_activation(x_row, x_stride, step, filters, taps, lanes, bfloat16)
                if with_silu != 0:
                    value = value * sigmoid(value)
                store_sequence(out_row, value, lanes, bfloat16)
                x_row += x_stride
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
def _backward_unit(parameters, unit, scratch, bfloat16):
    blocks = load_int(parameters, BLOCKS)
    length = load_int(parameters, LENGTH)
    taps = load_int(parameters, TAPS)
    with_silu = load_int(parameters, SILU)
    padded_channels = load_int(parameters, PADDED_CHANNELS)
    x_stride = load_int(parameters, X + 3)
    grad_out_stride = load_int(parameters, GRAD_OUT + 3)
    grad_x_stride = load_int(parameters, GRAD_X + 3)
    batch = unit // blocks
    first_channel = unit % blocks * load_int(parameters, GROUPS) * 16
    channels = min(load_int(parameters, GROUPS) * 16, load_int(parameters, CHANNELS) - first_channel)
    groups = (channels + 15) // 16
    # The gradient before the activation of a chunk, followed by the first taps - 1 rows of that of the next chunk,
    # which each group keeps.
    gradient = scratch + groups * (taps + 1) * VECTOR
    behind = gradient + (CHUNK + taps - 1) * VECTOR
    zero = splat(0.0)
    one = splat(1.0)

    _load_filters(parameters, first_channel, channels, groups, taps, scratch)
    for index in range(groups * (taps - 1)):
        store(behind, index, zero)
    grad_weight = load_int(parameters, GRAD_WEIGHT) + (batch * taps * padded_channels + first_channel) * 4
    grad_bias = load_int(parameters, GRAD_BIAS) + (batch * padded_channels + first_channel) * 4
    for group in range(groups):
        store(grad_bias, group, zero)
        for tap in range(taps):
            store(grad_weight + tap * padded_channels * 4, group, zero)

    for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
        start = chunk * CHUNK
        steps = min(CHUNK, length - start)
        for group in range(groups):
            channel = first_channel + group * 16
            lanes = min(16, channels - group * 16)
            filters = scratch + group * (taps + 1) * VECTOR
            x_rows = _row(parameters, X, batch, channel, bfloat16)
            x_row = x_rows + start * x_stride
            grad_out_row = _row(parameters, GRAD_OUT, batch, channel, bfloat16) + start * grad_out_stride
            grad_x_row = _row(parameters, GRAD_X, batch, channel, bfloat16) + start * grad_x_stride

            total = zero
            for step in range(steps):
                prefetch(x_row + VECTOR)
                prefetch(grad_out_row + VECTOR)
                prefetch_write(grad_x_row + step * grad_x_stride)
                g = load_sequence(grad_out_row, lanes, bfloat16)
                if with_silu != 0:
                    # silu'(v) = s (1 + v (1 - s)) with s = sigmoid(v)
                    value = _before_activation(x_row, x_stride, start + step, filters, taps, lanes, bfloat16)
                    s = sigmoid(value)
                    g = g * (s * multiply_add(value, one - s, one))
                store(gradient, step, g)
                total = total + g
                x_row += x_stride
                grad_out_row += grad_out_stride
            store(grad_bias, group, load(grad_bias, group) + total)
            for index in range(taps - 1):
                store(gradient, steps + index, load(behind, group * (taps - 1) + index))
            for index in range(taps - 1):
                store(behind, group * (taps - 1) + index, load(gradient, index))

            for step in range(steps):
                value = zero
                for tap in range(taps):
                    value = multiply_add(load(filters, tap), load(gradient, step + taps - 1 - tap), value)
                store_sequence(grad_x_row, value, lanes, bfloat16)
                grad_x_row += grad_x_stride
            for tap in range(taps):
                # Tap `tap` of step t sees x[t - back].
                back = taps - 1 - tap
                first = max(0, back - start)
                row = x_rows + (start + first - back) * x_stride
                total = zero
                for step in range(first, steps):
                    total = multiply_add(load(gradient, step), load_sequence(row, lanes, bfloat16), total)
                    row += x_stride
                target = grad_weight + tap * padded_channels * 4
                store(target, group, load(target, group) + total)


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
