"""Modulated norm and gated residual on GPUs: a Triton kernel each, as torch operators, instead of eight launches."""

from __future__ import annotations

import functools

import torch

from ..common.backends import refuse_float64
from ..common.sequence_layout import ceil_div
from ..common.triton_launch import check_device


WANTED_PROGRAMS = 1056  # of a launch; more tokens per program add up more of the modulation's gradient in registers
WARPS = 4


@functools.cache
def _kernels():
    """The kernels' module. The first call imports Triton; each kernel compiles at its first launch."""
    from . import triton_kernels

    return triton_kernels


def chunk_tokens(batch: int, length: int) -> int:
    """Tokens per program: as many as leave enough programs for a GPU."""
    return max(1, batch * length // WANTED_PROGRAMS)


def _start(kernel, tokens: torch.Tensor, tensors: tuple, strides: tuple[int, ...], *scalars: float) -> None:
    """One program per image and chunk of tokens."""
    batch, length, channels = tokens.shape
    step = chunk_tokens(batch, length)
    check_device(tokens, kernel)
    sizes = (channels, length, step, *strides, *scalars)
    constants = {"WIDTH": 1 << (channels - 1).bit_length(), "num_warps": WARPS}
    with torch.cuda.device_of(tokens):
        kernel[batch, ceil_div(length, step)](*tensors, *sizes, **constants)


def _adjacent_channels(tokens: torch.Tensor) -> torch.Tensor:
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def _parts(tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Space for each chunk's part of a sum over tokens (B, chunks, D), `count` times."""
    batch, length, channels = tokens.shape
    chunks = ceil_div(length, chunk_tokens(batch, length))
    return torch.empty(count, batch, chunks, channels, device=tokens.device).unbind()


@torch.library.custom_op("diffusers_pisdm::modulated_norm_triton", mutates_args=())
def _norm(
    tokens: torch.Tensor, modulation: torch.Tensor, table: torch.Tensor, order: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens in their new order, empty without one, and after norm and modulation."""
    moved, normed = _fake_norm(tokens, modulation, table, order, eps)
    if normed.numel() == 0:  # an empty grid cannot be launched
        return moved, normed
    tokens = _adjacent_channels(tokens)
    tensors = (tokens, modulation.contiguous(), table.contiguous(), order, moved, normed)
    _start(_kernels().norm_forward_kernel, tokens, tensors, tokens.stride()[:2], eps)
    return moved, normed


def _fake_norm(tokens, modulation, table, order, eps):
    moved = tokens.new_empty(0 if order is None else tokens.shape)
    return moved, tokens.new_empty(tokens.shape)


@torch.library.custom_op("diffusers_pisdm::modulated_norm_triton_backward", mutates_args=())
def _norm_backward(
    grad_moved: torch.Tensor | None,
    grad_normed: torch.Tensor,
    tokens: torch.Tensor,
    modulation: torch.Tensor,
    table: torch.Tensor,
    order: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the tokens, and of shift and scale (B, 2, D), float32."""
    grad_tokens = tokens.new_empty(tokens.shape)
    if grad_tokens.numel() == 0:
        return grad_tokens, torch.zeros(len(tokens), 2, tokens.shape[2], device=tokens.device)
    tokens, sums = _adjacent_channels(tokens), _parts(tokens, 2)
    grad_moved = None if grad_moved is None else grad_moved.contiguous()
    tensors = (grad_moved, grad_normed.contiguous(), tokens, modulation.contiguous(), table.contiguous(), order)
    kernel = _kernels().norm_backward_kernel
    _start(kernel, tokens, (*tensors, grad_tokens, *sums), tokens.stride()[:2], eps)
    return grad_tokens, torch.stack([part.sum(1) for part in sums], dim=1)


@torch.library.custom_op("diffusers_pisdm::gated_residual_triton", mutates_args=())
def _gate(tokens: torch.Tensor, update: torch.Tensor, modulation: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    out = _fake_gate(tokens, update, modulation, table)
    if out.numel() == 0:
        return out
    tokens, update = _adjacent_channels(tokens), _adjacent_channels(update)
    tensors = (tokens, update, modulation.contiguous(), table.contiguous(), out)
    _start(_kernels().gate_forward_kernel, tokens, tensors, (*tokens.stride()[:2], *update.stride()[:2]))
    return out


def _fake_gate(tokens, update, modulation, table):
    return tokens.new_empty(tokens.shape, dtype=torch.promote_types(tokens.dtype, update.dtype))


@torch.library.custom_op("diffusers_pisdm::gated_residual_triton_backward", mutates_args=())
def _gate_backward(
    grad: torch.Tensor, update: torch.Tensor, modulation: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the update and of the gate (B, D), float32."""
    grad_update = update.new_empty(update.shape)
    if grad_update.numel() == 0:
        return grad_update, torch.zeros(len(update), update.shape[2], device=update.device)
    grad, update = _adjacent_channels(grad), _adjacent_channels(update)
    (sums,) = _parts(update, 1)
    tensors = (grad, update, modulation.contiguous(), table.contiguous(), grad_update, sums)
    _start(_kernels().gate_backward_kernel, update, tensors, (*grad.stride()[:2], *update.stride()[:2]))
    return grad_update, sums.sum(1)


def _modulation_gradients(modulation, table, grad, first: int, last: int):
    """The gradients of modulation (B, 3, D) and table (3, D) from those of the parts `first` to `last`, (B, n, D)."""
    whole = grad.new_zeros(modulation.shape)
    whole[:, first:last] = grad
    return whole.to(modulation.dtype), whole.sum(0).to(table.dtype)


def _norm_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _norm_gradient(ctx, grad_moved, grad_normed):
    tokens, modulation, table, order = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = torch.zeros_like(tokens)
    grad_moved = None if order is None else grad_moved
    grad_tokens, sums = _norm_backward(grad_moved, grad_normed, tokens, modulation, table, order, ctx.eps)
    return grad_tokens, *_modulation_gradients(modulation, table, sums, 0, 2), None, None


def _gate_context(ctx, inputs, output):
    tokens, *tensors = inputs
    ctx.save_for_backward(*tensors)
    ctx.tokens_dtype = tokens.dtype


def _gate_gradient(ctx, grad):
    update, modulation, table = ctx.saved_tensors
    grad_update, sums = _gate_backward(grad, update, modulation, table)
    return grad.to(ctx.tokens_dtype), grad_update, *_modulation_gradients(modulation, table, sums[:, None], 2, 3)


_norm.register_fake(_fake_norm)
_norm.register_autograd(_norm_gradient, setup_context=_norm_context)
_gate.register_fake(_fake_gate)
_gate.register_autograd(_gate_gradient, setup_context=_gate_context)


@_norm_backward.register_fake
def _(grad_moved, grad_normed, tokens, modulation, table, order, eps):
    return tokens.new_empty(tokens.shape), tokens.new_empty(len(tokens), 2, tokens.shape[2], dtype=torch.float32)


@_gate_backward.register_fake
def _(grad, update, modulation, table):
    return update.new_empty(update.shape), update.new_empty(len(update), update.shape[2], dtype=torch.float32)


def modulated_norm_triton(
    tokens: torch.Tensor, modulation: torch.Tensor, table: torch.Tensor, order: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `modulated_norm`; `order` is a permutation of the tokens. Computed in float32."""
    refuse_float64("triton", (tokens, modulation, table))
    moved, normed = _norm(tokens, modulation, table, order, eps)
    return tokens if order is None else moved, normed


def gated_residual_triton(
    tokens: torch.Tensor, update: torch.Tensor, modulation: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """See `gated_residual`. Computed in float32."""
    refuse_float64("triton", (tokens, update, modulation, table))
    return _gate(tokens, update, modulation, table)
