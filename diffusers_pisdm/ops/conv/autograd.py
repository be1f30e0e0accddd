"""Shapes and autograd registration for the convolutions with their own backward kernel."""

from __future__ import annotations

from collections.abc import Callable

from ..common.sequence_layout import empty_channels_last


def register_conv_autograd(conv: Callable, conv_backward: Callable) -> None:
    """
    Registers one operator as the gradient of another, and the output shapes of both for tracing.

    `conv(x, weight, bias, activation)` returns the output, `conv_backward(grad_out, x, weight, bias, activation)` the
    gradients of the three tensors, empty for an absent bias. The output and the gradient of x have adjacent channels.
    """

    def setup_context(ctx, inputs, output):
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx, grad_out):
        x, weight, bias = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = conv_backward(grad_out, x, weight, bias, ctx.activation)
        return grad_x, grad_weight, None if bias is None else grad_bias, None

    conv.register_autograd(backward, setup_context=setup_context)
    conv.register_fake(_fake_output)
    conv_backward.register_fake(_fake_gradients)


def _fake_output(x, weight, bias, activation):
    return empty_channels_last(x, x.dtype)


def _fake_gradients(grad_out, x, weight, bias, activation):
    return (
        empty_channels_last(x, x.dtype),
        weight.new_empty(weight.shape),
        grad_out.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )
