"""Converts images to latents and back, for training and sampling, with any of the autoencoders or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, AutoModel
from diffusers.utils.torch_utils import randn_tensor

from ..utils.hub_names import hub_or_cache
from .strict_loading import check_finite_weights


IMAGE_CHANNELS = (1, 3)


def load_vae(
    name_or_path: str, channels: int, dtype: torch.dtype = torch.float32
) -> AutoencoderKL | AutoencoderTiny | AutoencoderDC:
    """
    Loads a frozen autoencoder of any of the three classes in evaluation mode; raises OSError if there is none,
    ValueError if it is of another class, its latents do not have `channels` channels or its weights are not finite.
    See `cast_vae` for its precision.
    """
    if not name_or_path:
        raise ValueError("The autoencoder's name is empty: pass its folder, or its repository on the Hub.")
    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        inside = path / "vae"
        place = inside if (inside / "config.json").is_file() else "the folder of one, e.g. a pipeline's vae/"
        raise ValueError(f"{name_or_path} holds no autoencoder (`config.json`). Pass {place}.")
    loaded_dtype = torch.float32 if dtype == torch.float16 else dtype
    with hub_or_cache(name_or_path) as local_files_only:
        vae = AutoModel.from_pretrained(name_or_path, torch_dtype=loaded_dtype, local_files_only=local_files_only)
    if not isinstance(vae, (AutoencoderKL, AutoencoderTiny, AutoencoderDC)):
        raise ValueError(
            f"{name_or_path} is a {type(vae).__name__}: it must be an AutoencoderKL, AutoencoderTiny or AutoencoderDC."
        )
    if vae.config.latent_channels != channels:
        raise ValueError(
            f"The stages have {channels} channels (`in_channels`), but the latents of {name_or_path} have"
            f" {vae.config.latent_channels}."
        )
    return cast_vae(vae.eval().requires_grad_(False), dtype)


def cast_vae(
    vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC, dtype: torch.dtype
) -> AutoencoderKL | AutoencoderTiny | AutoencoderDC:
    """
    Casts a float32 autoencoder in place; one with `force_upcast` stays as it is where `dtype` is too narrow for its
    weights. Raises ValueError if weights are not finite.
    """
    fits = all(weight.to(dtype).isfinite().all() for weight in vae.parameters())
    if vae.dtype != dtype and (fits or not vae.config.get("force_upcast")):  # diffusers warns of every cast
        vae.to(dtype)
    check_finite_weights(f"the autoencoder {vae.config.get('_name_or_path', '')}", vae)
    return vae


def vae_scale_factor(vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None) -> int:
    """Returns how many pixels a latent pixel spans in each direction; 1 without an autoencoder."""
    if vae is None:
        return 1
    if isinstance(vae, AutoencoderDC):
        return 2 ** (len(vae.config.encoder_block_out_channels) - 1)
    return 2 ** (len(vae.config.block_out_channels) - 1)


def are_latents(channels: int, vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None) -> bool:
    """Whether what stages of so many channels draw is for an autoencoder, even if there is none, and not pixels."""
    return vae is not None or channels not in IMAGE_CHANNELS


@contextmanager
def _upcast(vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC) -> Iterator[None]:
    # As in diffusers' pipelines: such an autoencoder (SDXL's) overflows in float16. Its weights come back exactly.
    needs_upcasting = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    if needs_upcasting:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if needs_upcasting:
            vae.to(torch.float16)


def encode_moments(
    vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The float32 mean and standard deviation that `encode_latents` samples from, for images (B, 3, H, W) in [-1, 1].
    Only an `AutoencoderKL` has a standard deviation; the other autoencoders' latents are the mean.
    """
    with _upcast(vae):
        encoded = vae.encode(images.to(vae.dtype))
    std = None
    if isinstance(vae, AutoencoderKL):
        mean = encoded.latent_dist.mean
        std = encoded.latent_dist.std.float() * vae.config.scaling_factor
    elif isinstance(vae, AutoencoderTiny):
        mean = encoded.latents
    else:
        mean = encoded.latent
    return (mean.float() - _shift_factor(vae)) * vae.config.scaling_factor, std


def encode_latents(
    vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None,
    images: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """
    Maps images (B, 3, H, W) in [-1, 1] to the space the transformers work in, scaled to about unit variance; without
    an autoencoder, returns them unchanged. `generator` samples the posterior of an `AutoencoderKL`.
    """
    if vae is None:
        return images
    mean, std = encode_moments(vae, images)
    if std is None:
        return mean
    first = generator[0] if isinstance(generator, list) else generator
    noise = randn_tensor(mean.shape, generator=generator, device=mean.device if first is None else first.device)
    return mean + std * noise.to(mean.device, non_blocking=True)


def decode_latents(vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None, latents: torch.Tensor) -> torch.Tensor:
    """Maps latents (B, C, H / f, W / f) back to images (B, 3, H, W), float32, roughly in [-1, 1], not clipped."""
    if vae is None:
        return latents
    latents = latents / vae.config.scaling_factor + _shift_factor(vae)
    with _upcast(vae):
        return vae.decode(latents.to(vae.dtype)).sample.float()


def _shift_factor(vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC) -> float:
    # AutoencoderDC has none, and AutoencoderKL's may be None.
    return vae.config.get("shift_factor") or 0.0
