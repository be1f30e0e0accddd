"""A stage and a training step of it, on noise instead of images: to be counted, or timed."""

from __future__ import annotations

import torch

from ..models.transformer_pisdm import PISDMTransformer2DModel
from .cost_settings import AUTOCAST_DTYPES, CostSettings


def make_stage(config: dict, num_classes: int, settings: CostSettings) -> PISDMTransformer2DModel:
    """A stage as it is at the start of training; `config` is without `num_classes`."""
    model = PISDMTransformer2DModel(num_classes=num_classes, **config).train()
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def stage_loss(model: PISDMTransformer2DModel, batch_size: int, settings: CostSettings) -> torch.Tensor:
    """A forward pass as the cascade's objective makes it, on noise, up to a loss that reaches every parameter."""
    config, device = model.config, model.device
    noisy = torch.randn(batch_size, config.in_channels, config.sample_size, config.sample_size, device=device)
    zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
    low_res = noise_level = None
    if config.low_res_channels is not None:
        low_res = torch.randn(batch_size, config.low_res_channels, *noisy.shape[2:], device=device)
        noise_level = torch.zeros(batch_size, device=device)
    dtype = AUTOCAST_DTYPES[settings.mixed_precision]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        sample, features = model(noisy, zeros, zeros, low_res=low_res, noise_level=noise_level, return_dict=False)
    return sample.float().square().mean() + features.mean(dim=1).float().square().mean()
