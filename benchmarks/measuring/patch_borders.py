"""Defects that people notice first in a picture: the grid of the model's patches, and dirt on a white background."""

from __future__ import annotations

import torch
import torch.nn.functional as F


FLAT = 8  # of 255: an area is flat if the colour changes by less over three pixels
WHITE = 220  # of 255: the lowest channel value in a white neighbourhood


def patch_border_ratio(images: torch.Tensor, patch_size: int) -> float:
    """
    How much more neighbouring pixels in flat areas differ across patch borders than within patches, for images (N, 3,
    H, W), uint8: about 1 without a grid, `nan` if nothing is flat.
    """
    across, within = [], []
    for x in (images.float(), images.float().mT):
        steps = (x[..., 2:-1] - x[..., 1:-2]).abs().mean(dim=1)  # (N, H, W - 3): of pixels k + 1 and k + 2
        is_flat = (x[..., 3:] - x[..., :-3]).abs().mean(dim=1) < FLAT
        position = torch.arange(steps.shape[-1], device=x.device) + 2
        is_border = (position % patch_size == 0).expand_as(steps)
        across.append(steps[is_flat & is_border])
        within.append(steps[is_flat & ~is_border])
    return (torch.cat(across).mean() / torch.cat(within).mean()).item()


def white_roughness(images: torch.Tensor) -> float:
    """
    The mean difference of neighbouring pixels, in 1/255, where all surrounding 5x5 pixels are nearly white, for images
    (N, 3, H, W), uint8: 0 for a clean background, `nan` without one.
    """
    x = images.float()
    is_white = -F.max_pool2d(-x.amin(dim=1, keepdim=True), 5, stride=1, padding=2) >= WHITE  # (N, 1, H, W)
    steps = []
    for y, mask in ((x, is_white), (x.mT, is_white.mT)):
        steps.append((y[..., 1:] - y[..., :-1]).abs().mean(dim=1, keepdim=True)[mask[..., 1:] & mask[..., :-1]])
    return torch.cat(steps).mean().item()
