"""What a data loader hands to a training step, and the errors of bad data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class TrainingRow(NamedTuple):
    """
    Args:
        images (`torch.Tensor` or `list[torch.Tensor]`): As in [`TrainingBatch`], without the batch dimension.
        label (`int`): The class.
        bad_images (`list[str]`): Unreadable images that this one replaces: where they are, and the error.
    """

    images: torch.Tensor | list[torch.Tensor]
    label: int
    bad_images: list[str]


class TrainingBatch(NamedTuple):
    """
    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`, uint8, or `list[torch.Tensor]` of shapes `(B, C, H_s, W_s)`):
            Pixels, or the float32 latents of each stage from a [`LatentCache`].
        labels (`torch.Tensor` of shape `(B,)`, int64): The classes.
        bad_images (`list[str]`): Unreadable images that were replaced: where they are, and the error.
    """

    images: torch.Tensor | list[torch.Tensor]
    labels: torch.Tensor
    bad_images: list[str]


def stack_rows(rows: Sequence[TrainingRow]) -> TrainingBatch:
    """Stacks rows into a batch."""
    if isinstance(rows[0].images, list):
        images = [torch.stack(stage) for stage in zip(*(row.images for row in rows))]  # (B, C, H_s, W_s)
    else:
        images = torch.stack([row.images for row in rows])  # (B, 3, H, W)
    return TrainingBatch(
        images, torch.tensor([row.label for row in rows]), [bad for row in rows for bad in row.bad_images]
    )


class DataError(ValueError):
    """The data set cannot be trained on; the message says where the fault is and what to do."""


class BadImageError(DataError):
    """An image cannot be read."""
