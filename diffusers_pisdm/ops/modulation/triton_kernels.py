"""
The kernels of `modulated_norm_triton` and `gated_residual_triton`: what surrounds a layer's mixer, in one launch each.

A program handles one image and a chunk of its tokens, a whole token of `WIDTH` (a power of two) channels at a time, in
float32. `order` is where a token comes from; the gradient goes back there.
"""

import triton
import triton.language as tl


@triton.jit
def _place(channels, length, chunk_tokens, WIDTH: tl.constexpr):
    """This program's image, its first token and the one after its last, its channels, and which of them exist."""
    channel = tl.arange(0, WIDTH)
    first = tl.program_id(1).to(tl.int64) * chunk_tokens
    return tl.program_id(0).to(tl.int64), first, tl.minimum(first + chunk_tokens, length), channel, channel < channels


@triton.jit
def _load(row, channel, is_channel):
    return tl.load(row + channel, mask=is_channel, other=0.0).to(tl.float32)


@triton.jit
def _source(order, token):
    """The place of a token before reordering."""
    if order is None:
        return token
    else:
        return tl.load(order + token)


@triton.jit
def _modulation(modulation, table, image, part, channels, channel, is_channel):
    """An image's shift (`part` 0), scale (1) or gate (2), the layer's own included."""
    shared = _load(modulation + (image * 3 + part) * channels, channel, is_channel)
    return shared + _load(table + part * channels, channel, is_channel)


@triton.jit
def _normalize(x, is_channel, channels, eps):
    """A token with mean 0 and variance 1, and what it was multiplied by."""
    centred = tl.where(is_channel, x - tl.sum(x, 0) / channels, 0.0)
    inverse_std = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / channels + eps)
    return centred * inverse_std, inverse_std


@triton.jit
def norm_forward_kernel(
    tokens,
    modulation,
    table,
    order,
    moved,
    normed,
    channels,
    length,
    chunk_tokens,
    tokens_image,
    tokens_token,
    eps,
    WIDTH: tl.constexpr,
):
    """The tokens in their new order (`moved`, if they have one), and after norm, scale and shift."""
    image, first, last, channel, is_channel = _place(channels, length, chunk_tokens, WIDTH)
    shift = _modulation(modulation, table, image, 0, channels, channel, is_channel)
    scale = _modulation(modulation, table, image, 1, channels, channel, is_channel) + 1.0
    for token in range(first, last):
        x = _load(tokens + image * tokens_image + _source(order, token) * tokens_token, channel, is_channel)
        place = (image * length + token) * channels
        if order is not None:
            tl.store(moved + place + channel, x, mask=is_channel)
        normal, _inverse_std = _normalize(x, is_channel, channels, eps)
        tl.store(normed + place + channel, normal * scale + shift, mask=is_channel)


@triton.jit
def norm_backward_kernel(
    grad_moved,
    grad_normed,
    tokens,
    modulation,
    table,
    order,
    grad_tokens,
    grad_shift,
    grad_scale,
    channels,
    length,
    chunk_tokens,
    tokens_image,
    tokens_token,
    eps,
    WIDTH: tl.constexpr,
):
    """The gradients of a chunk: of its tokens, and its part of the image's shift and scale."""
    image, first, last, channel, is_channel = _place(channels, length, chunk_tokens, WIDTH)
    scale = _modulation(modulation, table, image, 1, channels, channel, is_channel) + 1.0
    sum_shift = tl.zeros([WIDTH], tl.float32)
    sum_scale = tl.zeros([WIDTH], tl.float32)
    for token in range(first, last):
        source = _source(order, token)
        x = _load(tokens + image * tokens_image + source * tokens_token, channel, is_channel)
        normal, inverse_std = _normalize(x, is_channel, channels, eps)
        place = (image * length + token) * channels
        grad = _load(grad_normed + place, channel, is_channel)
        sum_shift += grad
        sum_scale += grad * normal
        grad *= scale
        along = tl.sum(grad * normal, 0) / channels
        grad = inverse_std * (grad - tl.sum(grad, 0) / channels - normal * along)
        if grad_moved is not None:
            grad += _load(grad_moved + place, channel, is_channel)
        tl.store(grad_tokens + (image * length + source) * channels + channel, grad, mask=is_channel)
    place = (image * tl.num_programs(1) + tl.program_id(1)) * channels
    tl.store(grad_shift + place + channel, sum_shift, mask=is_channel)
    tl.store(grad_scale + place + channel, sum_scale, mask=is_channel)


@triton.jit
def gate_forward_kernel(
    tokens,
    update,
    modulation,
    table,
    out,
    channels,
    length,
    chunk_tokens,
    tokens_image,
    tokens_token,
    update_image,
    update_token,
    WIDTH: tl.constexpr,
):
    """The tokens plus their gated update."""
    image, first, last, channel, is_channel = _place(channels, length, chunk_tokens, WIDTH)
    gate = _modulation(modulation, table, image, 2, channels, channel, is_channel)
    for token in range(first, last):
        x = _load(tokens + image * tokens_image + token * tokens_token, channel, is_channel)
        x += gate * _load(update + image * update_image + token * update_token, channel, is_channel)
        tl.store(out + (image * length + token) * channels + channel, x, mask=is_channel)


@triton.jit
def gate_backward_kernel(
    grad,
    update,
    modulation,
    table,
    grad_update,
    grad_gate,
    channels,
    length,
    chunk_tokens,
    grad_image,
    grad_token,
    update_image,
    update_token,
    WIDTH: tl.constexpr,
):
    """The gradient of a chunk's update, and its part of the image's gate."""
    image, first, last, channel, is_channel = _place(channels, length, chunk_tokens, WIDTH)
    gate = _modulation(modulation, table, image, 2, channels, channel, is_channel)
    sum_gate = tl.zeros([WIDTH], tl.float32)
    for token in range(first, last):
        grad_ = _load(grad + image * grad_image + token * grad_token, channel, is_channel)
        update_ = _load(update + image * update_image + token * update_token, channel, is_channel)
        sum_gate += grad_ * update_
        tl.store(grad_update + (image * length + token) * channels + channel, grad_ * gate, mask=is_channel)
    place = (image * tl.num_programs(1) + tl.program_id(1)) * channels
    tl.store(grad_gate + place + channel, sum_gate, mask=is_channel)
