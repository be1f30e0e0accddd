"""Images to latents and back, the same for training and sampling, for every kind of autoencoder and for none."""

from __future__ import annotations

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny


def vae_scale_factor(vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None) -> int:
    """Returns how many pixels a latent pixel spans in each direction; 1 without an autoencoder."""
    if vae is None:
        return 1
    if isinstance(vae, AutoencoderDC):
        return 2 ** (len(vae.config.encoder_block_out_channels) - 1)
    return 2 ** (len(vae.config.block_out_channels) - 1)


def encode_latents(
    vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None,
    images: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """
    Maps images to the space the transformers work in, scaled to about unit variance.

    Args:
        vae: The autoencoder; `None` is pixel space, where images are their own latents.
        images (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1].
        generator (`torch.Generator` or a list of them, *optional*):
            Draws from the posterior of an [`AutoencoderKL`]; the others are deterministic.

    Returns:
        `torch.Tensor` of shape `(B, C, H / f, W / f)` with `f` the [`vae_scale_factor`].
    """
    if vae is None:
        return images
    encoded = vae.encode(images.to(vae.dtype))
    if isinstance(vae, AutoencoderKL):
        latents = encoded.latent_dist.sample(generator)
    elif isinstance(vae, AutoencoderTiny):
        latents = encoded.latents
    else:
        latents = encoded.latent
    return (latents.float() - _shift_factor(vae)) * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None, latents: torch.Tensor) -> torch.Tensor:
    """
    Maps latents back to images: the inverse of [`encode_latents`].

    Args:
        vae: The autoencoder; `None` is pixel space, where latents are images.
        latents (`torch.Tensor` of shape `(B, C, H / f, W / f)`): Latents of about unit variance.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`, float32: images in about [-1, 1], not clipped.
    """
    if vae is None:
        return latents
    latents = latents / vae.config.scaling_factor + _shift_factor(vae)
    return vae.decode(latents.to(vae.dtype)).sample.float()


def _shift_factor(vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC) -> float:
    # AutoencoderDC has none, and AutoencoderKL's may be None.
    return vae.config.get("shift_factor") or 0.0
