"""Shapes and autograd registration for the scans with their own backward kernel."""

from __future__ import annotations

from collections.abc import Callable

from ..common.sequence_layout import empty_channels_last


def register_scan_autograd(scan: Callable, scan_backward: Callable) -> None:
    """
    Registers one operator as the gradient of another, and its output shapes for tracing.

    `scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, keep_states)` returns the output and the states kept for
    `scan_backward(grad_out, kept, u, delta, A, B, C, D, z, delta_bias, delta_softplus)`, which returns the gradients
    of the eight tensors, empty for absent ones. Those of sequences over channels have adjacent channels.
    """

    def setup_context(ctx, inputs, output):
        *tensors, ctx.delta_softplus, _ = inputs
        ctx.save_for_backward(output[1], *tensors)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_out, grad_kept):
        if grad_out is None:
            return (None,) * 10
        kept, *tensors = ctx.saved_tensors
        gradients = scan_backward(grad_out, kept, *tensors, ctx.delta_softplus)
        return (*[None if x is None else gradient for gradient, x in zip(gradients, tensors)], None, None)

    scan.register_autograd(backward, setup_context=setup_context)
    scan_backward.register_fake(_fake_gradients)


def _fake_gradients(grad_out, kept, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    return [
        empty_channels_last(u, u.dtype),
        empty_channels_last(delta, delta.dtype),
        A.new_empty(A.shape),
        empty_channels_last(B, B.dtype),
        empty_channels_last(C, C.dtype),
        grad_out.new_empty(0) if D is None else D.new_empty(D.shape),
        grad_out.new_empty(0) if z is None else empty_channels_last(z, z.dtype),
        grad_out.new_empty(0) if delta_bias is None else delta_bias.new_empty(delta_bias.shape),
    ]
