"""The denoising term of the training loss (the paper's eq. 17)."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


LOSS_WEIGHTINGS = ("uniform", "vlb", "min_snr", "sigmoid")


def denoising_target(
    scheduler: DDPMScheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """
    What the model should predict: the noise (as in eq. 17), the velocity or the clean image, according to the
    scheduler's `prediction_type`.

    Args:
        scheduler (`DDPMScheduler`): The noise schedule.
        clean, noise (`torch.Tensor` of shape `(B, C, H, W)`): The image x_0 and the noise added to it.
        timesteps (`torch.Tensor` of shape `(B,)`, int64): In `0..num_train_timesteps - 1`.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.

    Raises:
        ValueError: The scheduler's `prediction_type` is not one of the three.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    if prediction_type == "sample":
        return clean
    raise ValueError(f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type}.")


def denoising_weights(
    scheduler: DDPMScheduler, weighting: str, min_snr_gamma: float = 5.0, sigmoid_bias: float = 2.0
) -> torch.Tensor:
    r"""
    The weight of the squared error of the model's own prediction at every timestep: lambda(t) of eq. 17.

    Eq. 17 weights the squared error of the *noise* by lambda(t). Other predictions have the same error up to a factor
    that depends on the timestep: `|eps - eps'|^2 = SNR |x_0 - x_0'|^2 = abar |v - v'|^2`.

    - `uniform`: 1 for the model's own prediction; for noise that is lambda = 1, as in DDPM, U-ViT and DiM.
    - `vlb`: lambda(t) = beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t)) of eq. 17, with sigma_t^2 = beta_t (the
      posterior variance is zero at the first step).
    - `min_snr`: lambda(t) = min(SNR, gamma) / SNR (Hang et al., 2023).
    - `sigmoid`: sigmoid(bias - log SNR) for every log SNR (Kingma and Gao, 2023), and so
      lambda(t) = -(d log SNR / dt) sigmoid(bias - log SNR); scaled so that the result is 1 on average.

    Args:
        scheduler (`DDPMScheduler`): The noise schedule and `prediction_type`.
        weighting (`str`): One of `uniform`, `vlb`, `min_snr`, `sigmoid`.
        min_snr_gamma (`float`, defaults to 5.0): The gamma of `min_snr`.
        sigmoid_bias (`float`, defaults to 2.0): The bias of `sigmoid`: higher means more weight on little noise.

    Returns:
        `torch.Tensor` of shape `(num_train_timesteps,)`, float32.

    Raises:
        ValueError: `weighting` is unknown.
    """
    alphas_cumprod = scheduler.alphas_cumprod.double()
    if weighting == "uniform":
        return torch.ones_like(alphas_cumprod).float()

    snr = alphas_cumprod / (1 - alphas_cumprod)
    if weighting == "vlb":
        weights = scheduler.betas / (2 * scheduler.alphas * (1 - alphas_cumprod))
    elif weighting == "min_snr":
        weights = snr.clamp(max=min_snr_gamma) / snr
    elif weighting == "sigmoid":
        log_snr = torch.logit(alphas_cumprod, eps=1e-12)
        weights = -torch.gradient(log_snr)[0] * torch.sigmoid(sigmoid_bias - log_snr)
    else:
        raise ValueError(f"`weighting` must be one of {', '.join(LOSS_WEIGHTINGS)}, got {weighting}.")

    per_prediction = {"epsilon": 1.0, "v_prediction": alphas_cumprod, "sample": snr}
    weights = weights * per_prediction[scheduler.config.prediction_type]
    return (weights / weights.mean() if weighting == "sigmoid" else weights).float()
