"""How a higher stage sees the lower stage's image: upsampled, then noised (CN's conditioning augmentation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def upsample_low_res(
    low_res: torch.Tensor, size: tuple[int, int], residual_scale: float | None = None
) -> torch.Tensor:
    """
    Upsamples the low-resolution image (or latent): bilinearly, as in RDM and the paper's cascade (CN), or bicubically
    with antialiasing if the stage diffuses residuals, which better upsampling makes smaller.

    Args:
        low_res (`torch.Tensor` of shape `(B, C, h, w)`): The lower stage's output.
        size (`tuple[int, int]`): Height and width `(H, W)` of the higher stage.
        residual_scale (`float`, *optional*): The higher stage's `residual_scale`.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    if residual_scale is None:
        return F.interpolate(low_res, size=size, mode="bilinear", align_corners=False)
    return F.interpolate(low_res, size=size, mode="bicubic", align_corners=False, antialias=True)


def downsample(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Makes a lower stage's image of a higher one by area averaging: antialiased, exact means where the sizes divide
    evenly.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): The higher stage's images in pixels.
        size (`tuple[int, int]`): Height and width `(h, w)` of the lower stage.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`: `images` themselves if they have this size.
    """
    return images if tuple(images.shape[-2:]) == size else F.interpolate(images, size, mode="area")


def image_to_residual(image: torch.Tensor, upsampled: torch.Tensor, residual_scale: float) -> torch.Tensor:
    """
    What a residual stage diffuses: the image minus the upsampled lower image, scaled to about unit variance.

    Args:
        image (`torch.Tensor` of shape `(B, C, H, W)`): The stage's image or latent.
        upsampled (`torch.Tensor` of shape `(B, C, H, W)`): From [`upsample_low_res`], without noise.
        residual_scale (`float`): The stage's `residual_scale`, about the standard deviation of the difference.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    return (image - upsampled) / residual_scale


def residual_deviations(pyramid: list[torch.Tensor]) -> list[float]:
    """
    What suits as each higher stage's `residual_scale`: the standard deviation of what its upsampled condition lacks.

    Args:
        pyramid (`list[torch.Tensor]` of shapes `(N, C, H_s, W_s)`): The stages' images, the smallest first.

    Returns:
        `list[float]`: One per stage but the first.
    """
    pairs = zip(pyramid, pyramid[1:])
    return [(high - upsample_low_res(low, high.shape[-2:], residual_scale=1.0)).std().item() for low, high in pairs]


def residual_to_image(residual: torch.Tensor, upsampled: torch.Tensor, residual_scale: float) -> torch.Tensor:
    """
    The inverse of [`image_to_residual`].

    Args:
        residual (`torch.Tensor` of shape `(B, C, H, W)`): What the stage has sampled.
        upsampled (`torch.Tensor` of shape `(B, C, H, W)`): From [`upsample_low_res`], without noise.
        residual_scale (`float`): The stage's `residual_scale`.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: The image or latent.
    """
    return torch.add(upsampled, residual, alpha=residual_scale)


def augment_low_res(low_res: torch.Tensor, noise: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
    r"""
    Mixes noise into the cascade's condition (CN) while preserving its variance: `sqrt(1 - level^2) * low_res + level *
    noise`. In training, the level is drawn per sample, so a stage learns not to trust errors of the stage below.

    Args:
        low_res (`torch.Tensor` of shape `(B, C, H, W)`): The upsampled low-resolution image.
        noise (`torch.Tensor` of shape `(B, C, H, W)`): Standard normal noise.
        noise_level (`torch.Tensor` of shape `(B,)`): Levels in [0, 1); 0 leaves the image unchanged.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    level = noise_level.float()[:, None, None, None]  # (B, 1, 1, 1)
    return ((1 - level**2).sqrt() * low_res + level * noise).to(low_res.dtype)
