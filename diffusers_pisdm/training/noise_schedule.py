"""The stages' noise schedules, in training and for sampling."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DDPMScheduler, DPMSolverMultistepScheduler


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


def stage_noise_schedules(
    schedulers: DDPMScheduler | Sequence[DDPMScheduler],
    num_stages: int,
    shifts: Sequence[float] | None = None,
    prediction_types: Sequence[str] | None = None,
) -> list[DDPMScheduler]:
    """
    Makes each stage's noise schedule of one, or of one for each.

    Args:
        schedulers (`DDPMScheduler` or `Sequence[DDPMScheduler]`): The schedule to start from; or each stage's.
        num_stages (`int`): How many to make; a given one is kept where nothing changes.
        shifts (`Sequence[float]`, *optional*): See [`shift_noise_schedule`]; one for each stage.
        prediction_types (`Sequence[str]`, *optional*): What each stage predicts, instead of its scheduler's.

    Returns:
        `list[DDPMScheduler]`: One for each stage.

    Raises:
        ValueError: There are more or fewer schedulers, shifts or prediction types than stages, or a shift is not
            positive.
    """
    schedulers = [schedulers] * num_stages if isinstance(schedulers, DDPMScheduler) else list(schedulers)
    shifts = [1.0] * num_stages if shifts is None else shifts
    if prediction_types is None:
        prediction_types = [scheduler.config.prediction_type for scheduler in schedulers]
    for name, values in (("schedulers", schedulers), ("shifts", shifts), ("prediction_types", prediction_types)):
        if len(values) != num_stages:
            raise ValueError(f"`{name}` must name one for each of the {num_stages} stages, got {list(values)}.")
    shifted = []
    for scheduler, shift, prediction_type in zip(schedulers, shifts, prediction_types):
        if prediction_type != scheduler.config.prediction_type:
            scheduler = DDPMScheduler.from_config(scheduler.config, prediction_type=prediction_type)
        shifted.append(shift_noise_schedule(scheduler, shift))
    return shifted


def sampling_schedulers(schedulers: Sequence[DDPMScheduler]) -> list[DPMSolverMultistepScheduler]:
    """
    The schedulers that a trained cascade is saved with: DPM-Solver, as in the paper.

    They start from the noisiest timestep and their steps meet in every scheduler, so that `from_config` can swap them:
    in DPM-Solver's default spacing, "linspace", DDIM leaves noise behind.
    """
    return [DPMSolverMultistepScheduler.from_config(s.config, timestep_spacing="trailing") for s in schedulers]
