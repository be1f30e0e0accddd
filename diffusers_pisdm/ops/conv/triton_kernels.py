"""The kernels of `causal_conv_triton`: forward and backward of a depthwise causal convolution with SiLU.

A program handles one batch row, a block of `CHANNELS` channels and a chunk of the sequence, which it walks in tiles of
(`STEPS`, `CHANNELS`) with channels adjacent in memory. It loads each of the `TAPS` shifted tiles, all but the first
from cache.
"""

import triton
import triton.language as tl

from ..common.triton_silu import silu_and_slope


@triton.jit
def _load(row, step, stride, channel, mask):
    """A tile of steps (steps, channels) in float32, zero where masked."""
    return tl.load(row + step[:, None] * stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_parameter(pointer, index, is_channel):
    """The block's part of a filter tap or of the bias (1, channels); zero if absent."""
    if pointer is None:
        return tl.zeros_like(index).to(tl.float32)[None, :]
    else:
        return tl.load(pointer + index, mask=is_channel, other=0.0).to(tl.float32)[None, :]


@triton.jit
def conv_forward_kernel(
    x,
    weight,
    bias,
    out,
    channels,
    length,
    chunk_steps,
    blocks,
    weight_channel,
    weight_tap,
    x_row,
    x_step,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The outputs of a chunk."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    start = tl.program_id(1).to(tl.int64) * chunk_steps
    x += row * x_row
    out += row * length * channels
    bias_ = _load_parameter(bias, channel, is_channel)
    for tile in range(tl.cdiv(tl.minimum(length - start, chunk_steps), STEPS)):
        step = start + tile * STEPS + tl.arange(0, STEPS)
        y = tl.zeros([STEPS, CHANNELS], tl.float32) + bias_
        for tap in tl.static_range(TAPS):
            source = step + tap - (TAPS - 1)
            is_valid = ((source >= 0) & (source < length))[:, None] & is_channel[None, :]
            taps = _load_parameter(weight + tap * weight_tap, channel * weight_channel, is_channel)
            y += taps * _load(x, source, x_step, channel, is_valid)
        if SILU:
            y, _slope = silu_and_slope(y)
        is_valid = (step < length)[:, None] & is_channel[None, :]
        tl.store(out + step[:, None] * channels + channel[None, :], y, mask=is_valid)


@triton.jit
def conv_backward_kernel(
    grad,
    x,
    weight,
    bias,
    grad_x,
    grad_weight,
    grad_bias,
    channels,
    length,
    chunk_steps,
    blocks,
    weight_channel,
    weight_tap,
    grad_row,
    grad_step,
    x_row,
    x_step,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """
    The gradients of a chunk: of x directly, of weight and bias as this chunk's partial sums, (taps, channels) and
    (channels,). The activation's input is recomputed.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    start = tl.program_id(1).to(tl.int64) * chunk_steps
    chunk = row * tl.num_programs(1) + tl.program_id(1)
    grad += row * grad_row
    x += row * x_row
    grad_x += row * length * channels
    bias_ = _load_parameter(bias, channel, is_channel)
    filters = ()
    sums = ()  # of the taps' gradients over tiles; steps within a tile are summed at the end
    for tap in tl.static_range(TAPS):
        filters = filters + (_load_parameter(weight + tap * weight_tap, channel * weight_channel, is_channel),)
        sums = sums + (tl.zeros([STEPS, CHANNELS], tl.float32),)
    sum_bias = tl.zeros([STEPS, CHANNELS], tl.float32)

    for tile in range(tl.cdiv(tl.minimum(length - start, chunk_steps), STEPS)):
        step = start + tile * STEPS + tl.arange(0, STEPS)
        inputs = ()  # x at `step` - (TAPS - 1), ..., `step` + (TAPS - 1)
        for index in tl.static_range(2 * TAPS - 1):
            source = step + index - (TAPS - 1)
            is_valid = ((source >= 0) & (source < length))[:, None] & is_channel[None, :]
            inputs = inputs + (_load(x, source, x_step, channel, is_valid),)
        grad_x_ = tl.zeros([STEPS, CHANNELS], tl.float32)
        for later in tl.static_range(TAPS):  # the outputs that see this step
            is_valid = (step + later < length)[:, None] & is_channel[None, :]
            grad_y = _load(grad, step + later, grad_step, channel, is_valid)
            if SILU:
                y = tl.zeros([STEPS, CHANNELS], tl.float32) + bias_
                for tap in tl.static_range(TAPS):
                    y += filters[tap] * inputs[later + tap]
                _silu, slope = silu_and_slope(y)
                grad_y = tl.where(is_valid, grad_y * slope, 0.0)
            grad_x_ += filters[TAPS - 1 - later] * grad_y
            if later == 0:
                added = ()
                for tap in tl.static_range(TAPS):
                    # Steps past the end add nothing, even if x before it is infinite.
                    added = added + (sums[tap] + tl.where(is_valid, inputs[tap] * grad_y, 0.0),)
                sums = added
                sum_bias += grad_y
        is_valid = (step < length)[:, None] & is_channel[None, :]
        tl.store(grad_x + step[:, None] * channels + channel[None, :], grad_x_, mask=is_valid)
    for tap in tl.static_range(TAPS):
        tl.store(grad_weight + (chunk * TAPS + tap) * channels + channel, tl.sum(sums[tap], 0), mask=is_channel)
    if bias is not None:
        tl.store(grad_bias + chunk * channels + channel, tl.sum(sum_bias, 0), mask=is_channel)
