"""The stages' schedulers: swaps and shifts them, rejects unsuitable ones, warns about bad settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import diffusers
import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    SchedulerMixin,
)
from diffusers.utils import logging


logger = logging.get_logger(__name__)


def swap_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """
    Replaces the schedulers of all stages of a pipeline with ones of another class and the same noise schedule.

    Args:
        pipe ([`DiffusionPipeline`]): The pipeline to change.
        name (`str`): A diffusers class, e.g. `"DDIMScheduler"`.

    Raises:
        ValueError: diffusers has no scheduler of that name.
    """
    scheduler_class = getattr(diffusers, name, None)
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, SchedulerMixin):
        known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flow")]
        raise ValueError(f"diffusers has no scheduler `{name}`. It has {', '.join(known)}.")
    for key, component in pipe.components.items():
        if isinstance(component, SchedulerMixin):
            setattr(pipe, key, scheduler_class.from_config(component.config))


def shift_noise_schedule(scheduler: DDPMScheduler, shift: float) -> DDPMScheduler:
    r"""
    Makes a schedule whose signal-to-noise ratio is `shift^2` times lower at every timestep:
    `abar' = abar / (abar + shift^2 (1 - abar))`.

    The same noise hides less of a larger image, whose neighbouring pixels are alike: "simple diffusion" (Hoogeboom et
    al., 2023) shifts by the ratio of the image's side to the side that the schedule was made for.

    The result is an ordinary scheduler with `trained_betas`, so any scheduler made from its config samples with the
    schedule used in training.

    Args:
        scheduler (`DDPMScheduler`): The schedule to shift.
        shift (`float`): A positive factor; above 1 adds noise, below 1 removes some.

    Returns:
        `DDPMScheduler`: `scheduler` itself if `shift` is 1.

    Raises:
        ValueError: `shift` is not positive.
    """
    if shift <= 0:
        raise ValueError(f"A noise schedule can only be shifted by a positive factor, got {shift}.")
    if shift == 1:
        return scheduler
    abar = scheduler.alphas_cumprod.double()  # (T,)
    abar = abar / (abar + shift**2 * (1 - abar))
    alphas = torch.cat([abar[:1], abar[1:] / abar[:-1]])  # (T,)
    return DDPMScheduler.from_config(scheduler.config, trained_betas=(1 - alphas).tolist())


def stage_noise_schedules(
    schedulers: DDPMScheduler | Sequence[DDPMScheduler],
    num_stages: int,
    shifts: Sequence[float] | None = None,
    prediction_types: Sequence[str] | None = None,
) -> list[DDPMScheduler]:
    """
    Makes each stage's noise schedule from one for all stages or one per stage.

    Args:
        schedulers (`DDPMScheduler` or `Sequence[DDPMScheduler]`): The schedule to start from, or one per stage.
        num_stages (`int`): The number of stages; a given scheduler is kept if nothing changes.
        shifts (`Sequence[float]`, *optional*): See [`shift_noise_schedule`]; one per stage.
        prediction_types (`Sequence[str]`, *optional*): What each stage predicts, instead of its scheduler's type.

    Returns:
        `list[DDPMScheduler]`: One per stage.

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
            raise ValueError(f"`{name}` must have one value for each of the {num_stages} stages, got {list(values)}.")
    shifted = []
    for scheduler, shift, prediction_type in zip(schedulers, shifts, prediction_types):
        if prediction_type != scheduler.config.prediction_type:
            scheduler = DDPMScheduler.from_config(scheduler.config, prediction_type=prediction_type)
        shifted.append(shift_noise_schedule(scheduler, shift))
    return shifted


def sampling_schedulers(schedulers: Sequence[DDPMScheduler]) -> list[DPMSolverMultistepScheduler]:
    """
    The schedulers that a trained cascade is saved with: DPM-Solver, as in the paper's experiments (`DDPMScheduler`
    samples by its eq. 18).

    They start from the noisiest timestep, with a spacing that suits every scheduler, so that `from_config` can swap
    them: with DPM-Solver's default spacing, "linspace", DDIM leaves noise behind.
    """
    return [DPMSolverMultistepScheduler.from_config(s.config, timestep_spacing="trailing") for s in schedulers]


def check_scheduler(name: str, scheduler: SchedulerMixin) -> None:
    """
    Rejects flow-matching schedulers.

    Args:
        name (`str`): The pipeline's component, for the message.
        scheduler ([`SchedulerMixin`]): A stage's scheduler.

    Raises:
        ValueError: It interpolates between data and noise (`scale_noise`) instead of adding noise (`add_noise`).
    """
    config = scheduler.config
    flow_options = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if flow_options or not hasattr(scheduler, "add_noise"):
        raise ValueError(
            f"`{name}` is a flow-matching scheduler ({type(scheduler).__name__}), but PIS-DM's models are trained to"
            " predict noise, velocity or the sample. Pass a diffusion scheduler such as"
            " `DPMSolverMultistepScheduler`, with `use_flow_sigmas=False`."
        )


def check_residual_scheduler(name: str, scheduler: SchedulerMixin) -> None:
    """
    Rejects schedulers that cannot sample a stage with `residual_scale`.

    Args:
        name (`str`): The pipeline's component, for the message.
        scheduler ([`SchedulerMixin`]): The stage's scheduler.

    Raises:
        ValueError: It clips its samples to the range of images; residuals have unit variance and no bounds.
    """
    bounds = [option for option in ("clip_sample", "thresholding") if scheduler.config.get(option)]
    if bounds:
        raise ValueError(
            f"`{name}` clips its samples (`{bounds[0]}=True`), but its stage diffuses residuals (`residual_scale`),"
            f" which have no bounds. Pass `{type(scheduler).__name__}.from_config(scheduler.config,"
            f" {', '.join(f'{option}=False' for option in bounds)})`."
        )


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
) -> None:
    """
    Prepares a scheduler for a run; warns if its steps would leave noise behind.

    The timesteps are on the CPU: schedulers like DDIM branch on their values and would have to wait for any other
    device at every step.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler; its previous run is forgotten.
        num_inference_steps (`int`): Steps, unless custom ones are given.
        timesteps (`Sequence[int]`, *optional*): Custom timesteps.
        sigmas (`Sequence[float]`, *optional*): Custom noise levels.

    Raises:
        ValueError: Both timesteps and sigmas are given, or the scheduler does not support custom ones.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("Only one of `timesteps` or `sigmas` can be passed. Please choose one.")
    if timesteps is None and sigmas is None:
        scheduler.set_timesteps(num_inference_steps, device="cpu")
        warn_of_uneven_steps(scheduler, num_inference_steps)
        return
    name, schedule = ("sigmas", sigmas) if timesteps is None else ("timesteps", timesteps)
    if name not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(
            f"`{type(scheduler).__name__}.set_timesteps` does not support custom `{name}`. Please check whether you"
            " are using the correct scheduler."
        )
    scheduler.set_timesteps(**{name: schedule}, device="cpu")


def relay_start(scheduler: SchedulerMixin, relay_strength: float) -> int:
    """
    Finds where a run that begins with a noised image starts.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler, with its timesteps set.
        relay_strength (`float`): The share of the steps to run, in (0, 1]; at least one step runs.

    Returns:
        `int`: An index into the scheduler's timesteps.

    Raises:
        ValueError: The scheduler cannot start midway.
    """
    if isinstance(scheduler, PNDMScheduler):
        raise ValueError(
            "`relay_strength` needs a scheduler that can start midway, but PNDMScheduler's first steps are fixed. Pass"
            " `relay_strength=None`, or another scheduler such as `DPMSolverMultistepScheduler`."
        )
    # Second-order schedulers list two evaluations per step, except for the last.
    num_steps = math.ceil(len(scheduler.timesteps) / scheduler.order)
    return (num_steps - max(int(num_steps * relay_strength), 1)) * scheduler.order


def warn_of_uneven_steps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """
    Warns about schedulers that denoise by a fixed stride that does not match their timesteps.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler, with its `timestep_spacing`.
        num_inference_steps (`int`): Steps of the run.
    """
    has_fixed_stride = isinstance(scheduler, (DDIMScheduler, DDIMParallelScheduler, PNDMScheduler))
    if not has_fixed_stride or scheduler.config.timestep_spacing != "linspace":
        return
    stride = scheduler.config.num_train_timesteps // num_inference_steps
    distance = (scheduler.config.num_train_timesteps - 1) / max(num_inference_steps - 1, 1)
    if stride != distance:
        name = type(scheduler).__name__
        logger.warning(
            f"{name} denoises {stride} timesteps at a time, but its `timestep_spacing` 'linspace' places the"
            f" {num_inference_steps} steps {distance:.1f} apart, which leaves noise in the images. Use"
            f" `{name}.from_config(scheduler.config, timestep_spacing='trailing')`."
        )
