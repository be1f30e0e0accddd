"""Noise schedules that suit a stage's resolution."""

from __future__ import annotations

from diffusers import DDPMScheduler


def shift_noise_schedule(scheduler: DDPMScheduler, shift: float) -> DDPMScheduler:
    r"""
    A schedule whose signal-to-noise ratio is `shift^2` times lower at every timestep:
    `abar' = abar / (abar + shift^2 (1 - abar))`.

    The same noise hides less of a larger image, whose neighbouring pixels are alike: "simple diffusion" (Hoogeboom et
    al., 2023) shifts by the ratio of the side to the side the schedule was made for.

    The result is an ordinary scheduler with `trained_betas`, so that any other made from its config samples with the
    schedule that was trained.

    Args:
        scheduler (`DDPMScheduler`): The schedule to shift.
        shift (`float`): Above 1 adds noise, below 1 takes some away; positive.

    Returns:
        `DDPMScheduler`: `scheduler` itself if `shift` is 1.

    Raises:
        ValueError: `shift` is not positive.
    """
    if shift <= 0:
        raise ValueError(f"A noise schedule can be shifted by a positive factor only, got {shift}.")
    if shift == 1:
        return scheduler
    abar = scheduler.alphas_cumprod.double()  # (T,)
    abar = abar / (abar + shift**2 * (1 - abar))
    alphas = abar.clone()
    alphas[1:] = abar[1:] / abar[:-1]
    return DDPMScheduler.from_config(scheduler.config, trained_betas=(1 - alphas).tolist())
