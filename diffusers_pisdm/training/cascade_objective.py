"""The joint training objective of a cascade: the paper's eq. 17 over all stages."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from diffusers import DDPMScheduler
from diffusers.utils import logging

from ..models.transformer_pisdm import PISDMTransformer2DModel
from ..ops.conditioning_augmentation import augment_low_res, image_to_residual, upsample_low_res
from .denoising_loss import denoising_target, denoising_weights
from .noise import RowNoise
from .scale_invariant_loss import ScaleInvariantLoss


logger = logging.get_logger(__name__)


class CascadeLosses(NamedTuple):
    """
    Args:
        total (`torch.Tensor`, scalar): The loss to minimise.
        denoising (`list[torch.Tensor]` of shapes `(B_s,)`):
            Weighted squared error per image, one entry per trained stage; a stage may have fewer of the images.
        scale_invariant (`torch.Tensor` of shape `(P,)`): InfoNCE of each compared pair of stages; empty if off.
        timesteps (`torch.Tensor` of shape `(S, B)`): The images' timesteps in each trained stage.
    """

    total: torch.Tensor
    denoising: list[torch.Tensor]
    scale_invariant: torch.Tensor
    timesteps: torch.Tensor


def warn_of_narrow_stage(number: int, config: Mapping[str, Any]) -> None:
    """
    Logs a warning if a token is narrower than what it reads: the values of a patch of the image and its condition.
    """
    patch_size, width = config["patch_size"], config["hidden_size"]
    channels = config["in_channels"] + (config.get("low_res_channels") or 0)
    values = patch_size**2 * channels
    if values > width:
        logger.warning(
            f"Stage {number} may only ever draw noise, or a blur if it predicts the sample: a patch of"
            f" {patch_size}x{patch_size} with {channels} channels"
            f" has {values} values, more than its width of {width}. Raise `hidden_size` or lower `patch_size`."
        )


class CascadeObjective(nn.Module):
    r"""
    All stages of a cascade and the loss that trains some or all of them jointly (eq. 17):
    `L = sum_s w_s E[lambda(t) |eps_s(x_t, t, y, low_res) - eps|^2] + sil_weight * L_s`.

    The stages see the same images at the same timesteps, each at its own resolution and with its own noise. The
    options from `independent_conditions` to `sil_decay_steps` are ours: the paper says little of the form of L_s.

    Args:
        transformers (`list[PISDMTransformer2DModel]`): The stages, low resolution first.
        schedulers (`list[DDPMScheduler]`): The noise schedule and the prediction type of each stage.
        loss_weighting (`str` or `list[str]`, defaults to `"uniform"`):
            See [`denoising_weights`]; one for all stages, or one per stage.
        min_snr_gamma (`float`, defaults to 5.0): The gamma of `min_snr`.
        sigmoid_bias (`float`, defaults to 2.0): The bias of `sigmoid`.
        label_dropout (`float`, defaults to 0.1): Share of images whose label is replaced by the null label.
        factor_dropout (`float`, defaults to 0.0):
            In addition, the share of images in which a factor of the class is replaced by its null label, drawn
            independently per factor. For models with `class_factors`.
        max_noise_level (`float`, defaults to 0.5):
            Conditioning augmentation draws its level from [0, max_noise_level).
        sil_weight (`float`, defaults to 1.0): Weight of the scale-invariant loss (SIL); 0 removes it and its heads.
        sil_temperature (`float`, defaults to 0.1): See [`ScaleInvariantLoss`].
        sil_mask_same_class (`bool`, defaults to `False`): See [`ScaleInvariantLoss`].
        independent_conditions (`bool`, defaults to `False`):
            Whether each stage draws its own timesteps and drops its own labels in training: a positive pair of the
            scale-invariant loss then has less in common than its image.
        sil_form (`str`, defaults to `"info_nce"`), sil_stop_gradient (`bool`, defaults to `False`):
            See [`ScaleInvariantLoss`].
        sil_max_timestep (`int`, *optional*), sil_subtract_condition (`bool`, defaults to `False`):
            See [`ScaleInvariantLoss`].
        sil_per_value (`bool`, defaults to `True`):
            Whether `sil_weight` is divided by the number of values of the pair's higher image. Eq. 17 has a squared
            norm, a sum, where our denoising losses are means over values, so this is its weight read literally. Not
            divided, the scale-invariant loss outweighs the denoising losses, and their held-out values suffer.
        sil_decay_steps (`int`, *optional*):
            Over how many steps the trainer lets the weight fall to zero ([`~CascadeObjective.set_step`]).
        train_stages (`list[int]`, *optional*):
            The stages to train, counted from 1 as in the pipeline; all if not given. The others are frozen and do not
            run, except a stage below a trained one, with which the scale-invariant loss compares it.
        batch_shares (`list[float]`, *optional*):
            The share of the batch that each stage trains on, in (0, 1]; all of it if not given. Low stages are cheap
            and determine what the image shows, high stages are expensive and learn quickly.
        stage_loss_weights (`list[float]`, *optional*): The weight w_s of each stage's denoising loss, 1 if not given.
        process_index (`int`, defaults to 0), num_processes (`int`, defaults to 1):
            Which rows of the global batch this process trains on, see [`RowNoise`].

    Raises:
        ValueError: A list does not fit the number of stages.
    """

    def __init__(
        self,
        transformers: list[PISDMTransformer2DModel],
        schedulers: list[DDPMScheduler],
        loss_weighting: str | list[str] = "uniform",
        min_snr_gamma: float = 5.0,
        sigmoid_bias: float = 2.0,
        label_dropout: float = 0.1,
        factor_dropout: float = 0.0,
        max_noise_level: float = 0.5,
        sil_weight: float = 1.0,
        sil_temperature: float = 0.1,
        sil_mask_same_class: bool = False,
        independent_conditions: bool = False,
        sil_form: str = "info_nce",
        sil_stop_gradient: bool = False,
        sil_max_timestep: int | None = None,
        sil_subtract_condition: bool = False,
        sil_per_value: bool = True,
        sil_decay_steps: int | None = None,
        train_stages: list[int] | None = None,
        batch_shares: list[float] | None = None,
        stage_loss_weights: list[float] | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        super().__init__()
        count = len(transformers)
        batch_shares = [1.0] * count if batch_shares is None else batch_shares
        stage_loss_weights = [1.0] * count if stage_loss_weights is None else stage_loss_weights
        train_stages = list(range(1, count + 1)) if train_stages is None else train_stages
        loss_weighting = [loss_weighting] * count if isinstance(loss_weighting, str) else loss_weighting
        if len(schedulers) != count:
            raise ValueError(f"`schedulers` must have one scheduler for each of the {count} stages.")
        if len(loss_weighting) != count:
            raise ValueError(
                f"`loss_weighting` must be one name or one for each of the {count} stages, got {loss_weighting}."
            )
        if factor_dropout > 0 and any(stage.config.get("class_factors") is None for stage in transformers):
            raise ValueError("`factor_dropout` drops class factors, but a stage has no `class_factors`.")
        if len(batch_shares) != count or not all(0 < share <= 1 for share in batch_shares):
            raise ValueError(
                f"`batch_shares` must have one share in (0, 1] for each of the {count} stages, got {batch_shares}."
            )
        if len(stage_loss_weights) != count or not all(weight > 0 for weight in stage_loss_weights):
            raise ValueError(
                f"`stage_loss_weights` must have one positive weight for each of the {count} stages, got"
                f" {stage_loss_weights}."
            )
        if (
            not train_stages
            or len(set(train_stages)) < len(train_stages)
            or not set(train_stages) <= {*range(1, count + 1)}
        ):
            raise ValueError(
                f"`train_stages` must list each stage to train once, by its number from 1 to {count}, got"
                f" {train_stages}."
            )
        self.stages = nn.ModuleList(transformers)
        self.schedulers = schedulers
        self.label_dropout = label_dropout
        self.factor_dropout = factor_dropout
        self.max_noise_level = max_noise_level
        self.sil_weight = sil_weight
        self.sil_per_value = sil_per_value
        self.sil_decay_steps = sil_decay_steps
        self.independent_conditions = independent_conditions
        self.register_buffer("sil_share", torch.ones(()), persistent=False)  # of the weight, as it decays
        self.stages_trained = sorted(stage - 1 for stage in train_stages)
        self.batch_shares = batch_shares
        self.stage_loss_weights = stage_loss_weights
        self.process_index = process_index
        self.num_processes = num_processes
        for index, (stage, scheduler) in enumerate(zip(transformers, schedulers)):
            if index in self.stages_trained:
                warn_of_narrow_stage(index + 1, stage.config)
            else:
                stage.requires_grad_(False)
            weights = denoising_weights(scheduler, loss_weighting[index], min_snr_gamma, sigmoid_bias)
            self.register_buffer(f"loss_weights_{index}", weights, persistent=False)
        self.scale_invariant_loss = None
        compared = [index for index in self.stages_trained if index > 0]
        if sil_weight > 0 and compared:
            self.scale_invariant_loss = ScaleInvariantLoss(
                [stage.config.hidden_size for stage in transformers],
                compared,
                temperature=sil_temperature,
                mask_same_class=sil_mask_same_class,
                form=sil_form,
                stop_gradient=sil_stop_gradient,
                max_timestep=sil_max_timestep,
                subtract_condition=sil_subtract_condition,
                num_classes=transformers[0].config.num_classes,
            )
        # The stages that run: the trained ones, and those they are compared with.
        self.stages_run = sorted(
            {*self.stages_trained, *(index - 1 for index in compared if self.scale_invariant_loss is not None)}
        )

    def forward(
        self, pyramid: list[torch.Tensor], class_labels: torch.Tensor, seed: int | torch.Generator
    ) -> CascadeLosses:
        """
        In evaluation mode, every stage sees the whole batch, no label is dropped, and nothing depends on other
        processes.

        Args:
            pyramid (`list[torch.Tensor]` of shapes `(B, C, H_s, W_s)`):
                The images (in [-1, 1]) or latents of every stage, see [`image_pyramid`].
            class_labels (`torch.Tensor` of shape `(B,)`, int64): The images' classes.
            seed (`int` or `torch.Generator`): Determines all noise.

        Returns:
            [`CascadeLosses`].
        """
        batch_size, device = len(class_labels), class_labels.device
        noise = RowNoise(seed, device, *((self.process_index, self.num_processes) if self.training else ()))
        denoising, features = [], {}
        timesteps, labels, given = {}, {}, {}  # by stage: (B,), (B,) or (B, F), (B,)
        total = torch.zeros((), device=device)
        for index in self.stages_run:
            if not timesteps or (self.independent_conditions and self.training):
                conditions = self._draw_conditions(class_labels, noise)
            timesteps[index], labels[index], given[index] = conditions
            count = stage_batch_size(self.batch_shares[index], batch_size) if self.training else batch_size
            low_res = pyramid[index - 1][:count] if index > 0 else None
            with nullcontext() if index in self.stages_trained else torch.no_grad():
                errors, features[index] = self._stage_errors(
                    index, pyramid[index][:count], low_res, timesteps[index][:count], labels[index][:count], noise
                )
            if index in self.stages_trained:
                total = total + self.stage_loss_weights[index] * errors.mean()
                denoising.append(errors.detach())

        scale_invariant = total.new_zeros(0)
        if self.scale_invariant_loss is not None:
            scale_invariant = self.scale_invariant_loss(features, class_labels, timesteps, given)  # (P,)
            weighted = scale_invariant
            if self.sil_per_value:
                sizes = [pyramid[stage][0].numel() for stage in self.scale_invariant_loss.stages]
                weighted = torch.stack([loss / size for loss, size in zip(scale_invariant, sizes, strict=True)])
            total = total + self.sil_weight * weighted.mean() * self.sil_share
        timesteps = torch.stack([timesteps[index] for index in self.stages_trained])  # (S, B)
        return CascadeLosses(total, denoising, scale_invariant.detach(), timesteps)

    def set_step(self, step: int) -> None:
        """Sets how much is left of the scale-invariant loss's weight, by the number of steps taken."""
        if self.sil_decay_steps is not None:
            self.sil_share.fill_(max(0.0, 1 - step / self.sil_decay_steps))

    def _draw_conditions(
        self, class_labels: torch.Tensor, noise: RowNoise
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Timesteps (B,), labels as the models take them, some dropped, and these without dropped factors (B,)."""
        batch_size = len(class_labels)
        timesteps = noise.integers(self.schedulers[0].config.num_train_timesteps, batch_size)
        if not self.training:
            return timesteps, class_labels, class_labels
        dropped = noise.uniform(batch_size) < self.label_dropout
        labels = given = torch.where(dropped, self.stages[0].config.num_classes, class_labels)
        if self.factor_dropout > 0:
            factors = self.stages[0].class_factor_ids  # (num_classes + 1, F), the null labels last
            dropped = noise.uniform(batch_size, factors.shape[1]) < self.factor_dropout
            labels = torch.where(dropped, factors[-1], factors[labels])  # (B, F)
        return timesteps, labels, given

    def _stage_errors(
        self,
        index: int,
        clean: torch.Tensor,
        low_res: torch.Tensor | None,
        timesteps: torch.Tensor,
        labels: torch.Tensor,
        random: RowNoise,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scheduler, residual_scale = self.schedulers[index], self.stages[index].config.get("residual_scale")
        noise = random.normal(*clean.shape)
        noise_level = None
        if low_res is not None:
            noise_level = random.uniform(len(clean)) * self.max_noise_level
            upsampled = upsample_low_res(low_res, clean.shape[-2:], residual_scale)
            low_res = augment_low_res(upsampled, random.normal(*upsampled.shape), noise_level)
            if residual_scale is not None:  # relative to the noise-free image: the stage cannot remove noise from it
                clean = image_to_residual(clean, upsampled, residual_scale)
        noisy = scheduler.add_noise(clean, noise, timesteps)  # (B, C, H, W)
        prediction, features = self.stages[index](
            noisy, timesteps, labels, low_res=low_res, noise_level=noise_level, return_dict=False
        )
        target = denoising_target(scheduler, clean, noise, timesteps)
        errors = (prediction.float() - target).square().mean(dim=(1, 2, 3))  # (B,)
        return self.get_buffer(f"loss_weights_{index}")[timesteps] * errors, features


def stage_batch_size(share: float, batch_size: int) -> int:
    """The rounded size of a stage's part of a batch, at least 1; `share` is in (0, 1]."""
    return max(1, round(share * batch_size))
