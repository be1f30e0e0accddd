"""The joint training objective of a cascade: eq. 17 of the paper over all of its stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from diffusers import DDPMScheduler

from ..models.transformer_pisdm import PISDMTransformer2DModel
from ..ops.conditioning_augmentation import augment_low_res, upsample_low_res
from .denoising_loss import denoising_target, denoising_weights
from .image_pyramid import image_pyramid
from .scale_invariant_loss import ScaleInvariantLoss


@dataclass
class CascadeLosses:
    """
    Args:
        total (`torch.Tensor`, scalar): What is minimised.
        denoising (`torch.Tensor` of shape `(S,)`): Mean weighted squared error of each stage.
        scale_invariant (`torch.Tensor` of shape `(S - 1,)`): InfoNCE of each pair of adjacent stages; empty if off.
    """

    total: torch.Tensor
    denoising: torch.Tensor
    scale_invariant: torch.Tensor


class CascadeObjective(nn.Module):
    r"""
    All stages of a cascade and the loss that trains them together:
    `L = sum_s E[lambda(t) |eps_s(x_t, t, y, low_res) - eps|^2] + sil_weight * L_s` (eq. 17).

    The stages see the same images at the same timesteps, each at its own resolution, with noise of its own.

    Args:
        transformers (`list[PISDMTransformer2DModel]`): The stages, low resolution first; pixel space.
        scheduler (`DDPMScheduler`): The noise schedule and the prediction type of all stages.
        loss_weighting (`str`, defaults to `"uniform"`): See [`denoising_weights`].
        min_snr_gamma (`float`, defaults to 5.0): The gamma of `min_snr`.
        label_dropout (`float`, defaults to 0.1): Share of images whose label is replaced by the null label.
        max_noise_level (`float`, defaults to 0.5):
            Conditioning augmentation draws its level from [0, max_noise_level).
        sil_weight (`float`, defaults to 1.0): Weight of the scale-invariant loss; 0 removes it and its heads.
        sil_temperature (`float`, defaults to 0.1): See [`ScaleInvariantLoss`].
        sil_mask_same_class (`bool`, defaults to `False`): See [`ScaleInvariantLoss`].
        batch_shares (`list[float]`, *optional*):
            The share of the batch each stage is trained on, in (0, 1]; all of it if not given. Low stages are cheap
            and decide what the image shows, high stages are costly and learn quickly.

    Raises:
        ValueError: A list does not fit the number of stages.
    """

    def __init__(
        self,
        transformers: list[PISDMTransformer2DModel],
        scheduler: DDPMScheduler,
        loss_weighting: str = "uniform",
        min_snr_gamma: float = 5.0,
        label_dropout: float = 0.1,
        max_noise_level: float = 0.5,
        sil_weight: float = 1.0,
        sil_temperature: float = 0.1,
        sil_mask_same_class: bool = False,
        batch_shares: list[float] | None = None,
    ):
        super().__init__()
        if batch_shares is None:
            batch_shares = [1.0] * len(transformers)
        if len(batch_shares) != len(transformers) or not all(0 < share <= 1 for share in batch_shares):
            raise ValueError(
                f"`batch_shares` must hold one share in (0, 1] for each of the {len(transformers)} stages, got"
                f" {batch_shares}."
            )
        self.stages = nn.ModuleList(transformers)
        self.scheduler = scheduler
        self.label_dropout = label_dropout
        self.max_noise_level = max_noise_level
        self.sil_weight = sil_weight
        self.batch_shares = batch_shares
        self.sizes = [stage.config.sample_size for stage in transformers]
        self.register_buffer(
            "loss_weights", denoising_weights(scheduler, loss_weighting, min_snr_gamma), persistent=False
        )
        self.scale_invariant_loss = None
        if sil_weight > 0 and len(transformers) > 1:
            self.scale_invariant_loss = ScaleInvariantLoss(
                [stage.config.hidden_size for stage in transformers],
                temperature=sil_temperature,
                mask_same_class=sil_mask_same_class,
            )

    def forward(self, images: torch.Tensor, class_labels: torch.Tensor) -> CascadeLosses:
        """
        In evaluation mode every stage sees the whole batch and no label is dropped.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1] at the last stage's size or larger.
            class_labels (`torch.Tensor` of shape `(B,)`, int64): Their classes.

        Returns:
            [`CascadeLosses`].
        """
        batch_size, device = len(images), images.device
        pyramid = image_pyramid(images, self.sizes)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (batch_size,), device=device)
        labels = class_labels
        if self.training:
            dropped = torch.rand(batch_size, device=device) < self.label_dropout
            labels = torch.where(dropped, self.stages[0].config.num_classes, class_labels)

        denoising, features = [], []
        for index, share in enumerate(self.batch_shares):
            count = max(1, round(share * batch_size)) if self.training else batch_size
            low_res = pyramid[index - 1][:count] if index > 0 else None
            loss, stage_features = self._stage_loss(
                index, pyramid[index][:count], low_res, timesteps[:count], labels[:count]
            )
            denoising.append(loss)
            features.append(stage_features)

        denoising = torch.stack(denoising)
        total = denoising.sum()
        scale_invariant = denoising.new_zeros(0)
        if self.scale_invariant_loss is not None:
            scale_invariant = self.scale_invariant_loss(features, class_labels)
            total = total + self.sil_weight * scale_invariant.mean()
        return CascadeLosses(total, denoising.detach(), scale_invariant.detach())

    def _stage_loss(
        self,
        index: int,
        clean: torch.Tensor,
        low_res: torch.Tensor | None,
        timesteps: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn_like(clean)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)  # (B, C, H, W)
        noise_level = None
        if low_res is not None:
            noise_level = torch.rand(len(clean), device=clean.device) * self.max_noise_level
            low_res = upsample_low_res(low_res, clean.shape[-2:])
            low_res = augment_low_res(low_res, torch.randn_like(low_res), noise_level)
        prediction, features = self.stages[index](
            noisy, timesteps, labels, low_res=low_res, noise_level=noise_level, return_dict=False
        )
        target = denoising_target(self.scheduler, clean, noise, timesteps)
        error = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))  # (B,)
        return (self.loss_weights[timesteps] * error).mean(), features
