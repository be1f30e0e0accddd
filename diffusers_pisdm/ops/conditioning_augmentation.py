"""How a higher stage sees the lower stage's image: upsampled, then noised (conditioning augmentation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def upsample_low_res(
    low_res: torch.Tensor, size: tuple[int, int], residual_scale: float | None = None
) -> torch.Tensor:
    """
    Upsamples the low-resolution image (or latent): bilinearly, as RDM and the paper's cascade, or bicubically and
    antialiased where the stage diffuses residuals, which are the smaller the better the upsampling is.

    Args:
        low_res (`torch.Tensor` of shape `(B, C, h, w)`): The lower stage's output.
        size (`tuple[int, int]`): Height and width `(H, W)` of the higher stage.
        residual_scale (`float`, *optional*): The higher stage's.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    if residual_scale is None:
        return F.interpolate(low_res, size=size, mode="bilinear", align_corners=False)
    return F.interpolate(low_res, size=size, mode="bicubic", align_corners=False, antialias=True)


def image_to_residual(image: torch.Tensor, upsampled: torch.Tensor, residual_scale: float) -> torch.Tensor:
    """
    What a residual stage diffuses: the image less the upsampled lower image, at about unit variance.

    Args:
        image (`torch.Tensor` of shape `(B, C, H, W)`): The stage's image, or its latent.
        upsampled (`torch.Tensor` of shape `(B, C, H, W)`): Of [`upsample_low_res`], without any noise.
        residual_scale (`float`): The stage's: about the standard deviation of the difference.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    return (image - upsampled) / residual_scale


def residual_to_image(residual: torch.Tensor, upsampled: torch.Tensor, residual_scale: float) -> torch.Tensor:
    """
    The inverse of [`image_to_residual`].

    Args:
        residual (`torch.Tensor` of shape `(B, C, H, W)`): What the stage has drawn.
        upsampled (`torch.Tensor` of shape `(B, C, H, W)`): Of [`upsample_low_res`], without any noise.
        residual_scale (`float`): The stage's.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: The image, or its latent.
    """
    return torch.add(upsampled, residual, alpha=residual_scale)


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
