"""A denoiser whose data are Gaussian, so that its prediction, and what sampling must give, are known exactly."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config


BETA_SCHEDULE = "squaredcos_cap_v2"


class GaussianDenoiser(ModelMixin, ConfigMixin):
    r"""
    Predicts exactly what data `x_0 ~ N(mean of the class, std^2)`, independent in every pixel, ask for. As a higher
    stage, the mean is the low-resolution condition plus the class's mean; with `residual_scale` the data are
    residuals, which know nothing of the condition.

    With `x_t = a x_0 + s eps`: `E[x_0 | x_t] = m + a std^2 / (a^2 std^2 + s^2) (x_t - a m)` and
    `E[eps | x_t] = s / (a^2 std^2 + s^2) (x_t - a m)`. Guidance between classes of one std moves the mean:
    `m_u + w (m_c - m_u)`.
    """

    @register_to_config
    def __init__(
        self,
        means: tuple[float, ...] = (-0.3, 0.5),
        null_mean: float = 0.1,
        std: float = 0.25,
        prediction_type: str = "epsilon",
        beta_schedule: str = BETA_SCHEDULE,
        sample_size: int = 64,
        patch_size: int = 1,
        in_channels: int = 1,
        out_channels: None = None,  # the pipeline asks every stage for it
        num_classes: int = 2,
        low_res_channels: int | None = None,
        residual_scale: float | None = None,
    ):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # gives the model a dtype and a device
        alphas = DDPMScheduler(beta_schedule=beta_schedule).alphas_cumprod.double().numpy()
        self.log_sigmas = 0.5 * np.log((1 - alphas) / alphas)
        self.calls = []

    def forward(self, hidden_states, timestep, class_labels, low_res=None, noise_level=None, return_dict=True):
        self.calls.append({"batch_size": len(hidden_states), "timestep": timestep, "noise_level": noise_level})
        # Some schedulers ask for noise levels between those of training, interpolated in log(sigma).
        log_sigma = np.interp(timestep.double().numpy(), np.arange(len(self.log_sigmas)), self.log_sigmas)  # (B,)
        sigma = torch.from_numpy(log_sigma).exp()[:, None, None, None]
        a, s = 1 / (sigma**2 + 1).sqrt(), sigma / (sigma**2 + 1).sqrt()
        means = torch.tensor([*self.config.means, self.config.null_mean], dtype=torch.float64)
        mean = means[class_labels][:, None, None, None]  # (B, 1, 1, 1)
        if low_res is not None and self.config.residual_scale is None:
            mean = mean + low_res.double()  # (B, C, H, W)

        centred = hidden_states.double() - a * mean
        variance = (a * self.config.std) ** 2 + s**2
        x_0 = mean + a * self.config.std**2 / variance * centred
        noise = s / variance * centred
        prediction = {"epsilon": noise, "sample": x_0, "v_prediction": a * noise - s * x_0}
        sample = prediction[self.config.prediction_type].to(hidden_states.dtype)
        return (sample, hidden_states)
