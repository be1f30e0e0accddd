"""One image at the resolution of every stage."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def image_pyramid(images: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """
    Downsamples images to each stage's size for the cascade (CN) by area averaging (antialiased; exact means where the
    sizes divide evenly).

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
            f"The images are {images.shape[-2]}x{images.shape[-1]} pixels, smaller than the largest stage"
            f" ({max(sizes)})."
        )
    return [
        images if images.shape[-2:] == (size, size) else F.interpolate(images, size, mode="area") for size in sizes
    ]
