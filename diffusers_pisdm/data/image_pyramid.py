"""One image at the resolution of every stage."""

from __future__ import annotations

import torch

from ..ops.conditioning_augmentation import downsample
from ..utils.messages import show_size


def image_pyramid(images: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """
    Downsamples images to each stage's size for the cascade (CN), by [`~ops.conditioning_augmentation.downsample`].

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1].
        sizes (`list[int]`): Height and width of each stage in pixels, none larger than the images.

    Returns:
        `list[torch.Tensor]` of shapes `(B, C, size, size)`.

    Raises:
        ValueError: A size is larger than the images.
    """
    if max(sizes) > min(images.shape[-2:]):
        raise ValueError(
            f"The images are {show_size(*images.shape[:-3:-1])} pixels, smaller than the largest stage ({max(sizes)})."
        )
    return [downsample(images, (size, size)) for size in sizes]
