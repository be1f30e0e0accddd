"""How a higher stage sees the lower stage's image: upsampled, then noised (conditioning augmentation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def upsample_low_res(low_res: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Upsamples the low-resolution image (or latent) bilinearly.

    Args:
        low_res (`torch.Tensor` of shape `(B, C, h, w)`): The lower stage's output.
        size (`tuple[int, int]`): Height and width `(H, W)` of the higher stage.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    return F.interpolate(low_res, size=size, mode="bilinear", align_corners=False)


def augment_low_res(low_res: torch.Tensor, noise: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
    r"""
    Mixes noise into the condition, keeping its variance: `sqrt(1 - level^2) * low_res + level * noise`. In training
    the level is drawn per sample, so that a stage learns not to trust the errors of the one below.

    Args:
        low_res (`torch.Tensor` of shape `(B, C, H, W)`): The upsampled low-resolution image.
        noise (`torch.Tensor` of shape `(B, C, H, W)`): Standard normal noise.
        noise_level (`torch.Tensor` of shape `(B,)`): Levels in [0, 1): 0 leaves the image as it is.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    level = noise_level.float()[:, None, None, None]  # (B, 1, 1, 1)
    return ((1 - level**2).sqrt() * low_res + level * noise).to(low_res.dtype)
