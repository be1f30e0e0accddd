"""Rows of all processes, with the gradient going back to the process each row came from."""

from __future__ import annotations

import torch
import torch.distributed as dist


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        # Every process has computed a loss of these rows; the sum is the gradient of the sum of those losses.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """
    Concatenates the rows of all processes, in the order of the processes; alone, returns its argument.

    The gradient that reaches a process's rows is the sum over the losses of all processes. Where each computes the
    same loss of all rows, averaging parameter gradients over processes (as DDP does) thus gives that loss's gradient.

    Args:
        rows (`torch.Tensor` of shape `(B, ...)`): As many rows in every process.

    Returns:
        `torch.Tensor` of shape `(B * num_processes, ...)`.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows.contiguous())
