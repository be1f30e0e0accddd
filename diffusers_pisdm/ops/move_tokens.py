"""Gathers along the token axis whose gradient is a gather as well."""

from __future__ import annotations

import torch

from .scan_paths import TokenMove


class _PermuteTokens(torch.autograd.Function):
    # `index_select` differentiates to `index_add_`, which must assume repeated indices and is an order of magnitude
    # slower than the gather by the inverse permutation.
    @staticmethod
    def forward(ctx, tokens: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index, inverse)
        return tokens.index_select(1, index)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _PermuteTokens.apply(grad, inverse, index), None, None


def move_tokens(tokens: torch.Tensor, move: TokenMove) -> torch.Tensor:
    """
    Reorders tokens by one move of [`scan_transitions`].

    Args:
        tokens (`torch.Tensor` of shape `(B, L, D)`): The sequence.
        move (`TokenMove`): Indices into the token axis, of length `M`.

    Returns:
        `torch.Tensor` of shape `(B, M, D)`.
    """
    if move.inverse is None:
        return tokens.index_select(1, move.index)
    return _PermuteTokens.apply(tokens, move.index, move.inverse)
