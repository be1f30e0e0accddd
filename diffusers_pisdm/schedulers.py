"""The stages' schedulers: swaps and shifts them, rejects unsuitable ones, warns about bad settings."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

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
from diffusers.utils import DummyObject, logging

from .utils.names import did_you_mean


logger = logging.get_logger(__name__)

# docs/schedulers.md lists the classes; `benchmarks/schedulers.py` compares them on the published checkpoint.

# What `swap_scheduler` sets, as with what `from_config` takes over the class draws noise, or cannot be made.
SETTINGS = {
    "CogVideoXDDIMScheduler": {"snr_shift_scale": 1.0},  # by default, it shifts the noise schedule
    "EulerAncestralDiscreteScheduler": {"rescale_betas_zero_snr": True},  # a first sigma of 4,096 instead of 20,291
    "HeunDiscreteScheduler": {"use_exponential_sigmas": True},
    "KDPM2AncestralDiscreteScheduler": {"use_exponential_sigmas": True},
    "SASolverScheduler": {"algorithm_type": "data_prediction"},  # it refuses DPM-Solver's values
}

# Steps that divide sigma by more than this go wrong: Heun's and KDPM2's on the published checkpoint, Euler's as in
# float32 what is left of the noise is lost, or NaN.
LARGEST_RATIOS = {
    "EulerAncestralDiscreteScheduler": 2900.0,
    "HeunDiscreteScheduler": 5.0,
    "KDPM2AncestralDiscreteScheduler": 2.5,
}

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
NO_SAMPLE_PREDICTION = (  # in diffusers
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
)

# Schedulers of other models, by what they do.
UNSUITABLE = {
    "is for flow matching": (
        "FlowMapEulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "HeliosDMDScheduler",
        "HeliosScheduler",
        "LTXEulerAncestralRFScheduler",
        "MiniMaxH3Scheduler",
        "PiflowScheduler",
        "RFD4ProteinaScheduler",
    ),
    "is for EDM models": (
        "CosineDPMSolverMultistepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
    ),
    "is for consistency models": ("CMStochasticIterativeScheduler", "LCMScheduler", "SCMScheduler"),
    "turns images into noise": ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    "fills masked images": ("RePaintScheduler",),
    "samples tokens": (
        "AmusedScheduler",
        "BlockRefinementScheduler",
        "DiscreteDDIMScheduler",
        "EntropyBoundScheduler",
        "VQDiffusionScheduler",
    ),
    "has a noise schedule of its own": (
        "DDPMWuerstchenScheduler",
        "IPNDMScheduler",
        "KarrasVeScheduler",
        "ScoreSdeVeScheduler",
        "UnCLIPScheduler",
    ),
    "takes the prediction of the step before": ("CogVideoXDPMScheduler",),
}


def find_scheduler(name: str) -> type[SchedulerMixin]:
    """
    The diffusers class of a name, e.g. `"DDIMScheduler"`.

    Raises:
        ImportError: The class needs a package that is not installed.
        ValueError: diffusers has no scheduler of that name, or it is for other models.
    """
    scheduler_class = getattr(diffusers, name, None)
    if isinstance(scheduler_class, DummyObject):
        scheduler_class.from_config()  # says which package is missing
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, SchedulerMixin):
        known = [
            n for n in dir(diffusers) if n.endswith("Scheduler") and _why_unsuitable(getattr(diffusers, n)) is None
        ]
        hint = did_you_mean(name, known) or f"It has {', '.join(known)}."
        raise ValueError(f"diffusers has no scheduler `{name}`. {hint}")
    reason = _why_unsuitable(scheduler_class)
    if reason is not None:
        raise ValueError(_refusal(f"`{name}`", reason))
    return scheduler_class


def swap_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """
    Replaces the schedulers of all stages of a pipeline with ones of another class and the same noise schedule, with
    the settings that the class needs (docs/schedulers.md).

    Args:
        pipe ([`DiffusionPipeline`]): The pipeline to change; it stays as it was if there is an error.
        name (`str`): A diffusers class, e.g. `"DDIMScheduler"`.

    Raises:
        ImportError: The class needs a package that is not installed.
        ValueError: diffusers has no scheduler of that name, or it cannot sample one of the stages.
    """
    scheduler_class = find_scheduler(name)
    bounds = {"clip_sample": False} if pipe.draws_latents else {}
    swapped = {
        key: scheduler_class.from_config(
            _without_settings(component), **bounds, **_missing_settings(name, component.config)
        )
        for key, component in pipe.components.items()
        if isinstance(component, SchedulerMixin)
    }
    for key, scheduler in swapped.items():
        check_scheduler(key, scheduler)
    for key, scheduler in swapped.items():
        setattr(pipe, key, scheduler)


def _without_settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    # What the last swap set, the next class does not need.
    settings = SETTINGS.get(type(scheduler).__name__, {})
    return {name: value for name, value in scheduler.config.items() if settings.get(name) != value}


def _missing_settings(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    settings = SETTINGS.get(class_name, {})
    if any(config.get(f"use_{kind}_sigmas") for kind in ("karras", "beta")):  # only one kind of sigmas is possible
        return {name: value for name, value in settings.items() if name != "use_exponential_sigmas"}
    return settings


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
        shift (`float`): A factor in [0.001, 1000]; above 1 adds noise, below 1 removes some.

    Returns:
        `DDPMScheduler`: `scheduler` itself if `shift` is 1.

    Raises:
        ValueError: `shift` is out of range: the schedule would be all noise or none, and rounded to NaN.
    """
    if not 1e-3 <= shift <= 1e3:
        raise ValueError(f"A noise schedule can only be shifted by a factor from 0.001 to 1000, got {shift}.")
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
        ValueError: There are more or fewer schedulers, shifts or prediction types than stages, or a shift is out of
            range.
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
    Rejects schedulers that cannot sample PIS-DM's models.

    Args:
        name (`str`): The pipeline's component, for the message.
        scheduler ([`SchedulerMixin`]): A stage's scheduler.

    Raises:
        ValueError: It is for other models, changes the noise schedule, cannot sample what the stage predicts, or needs
            a model that also predicts variances.
    """
    config = scheduler.config
    class_name = type(scheduler).__name__
    reason = _why_unsuitable(type(scheduler))
    if reason is None and (config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"):
        reason = "is set to flow matching (`use_flow_sigmas` or `prediction_type`)"
    if config.get("timestep_type") == "continuous":
        reason = 'asks for continuous noise levels (`timestep_type="continuous"`)'
    if reason is not None:
        raise ValueError(_refusal(f"`{name}` is a `{class_name}`, which", reason))
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"`{name}` has `prediction_type={config.prediction_type!r}`, which has to be one of"
            f" {', '.join(PREDICTION_TYPES)}. Pass what its stage was trained to predict."
        )
    if config.prediction_type == "sample" and _find(type(scheduler), NO_SAMPLE_PREDICTION):
        raise ValueError(
            f"`{name}` is a `{class_name}`, which cannot sample a stage that predicts the sample"
            ' (`prediction_type="sample"`). Pass another scheduler, such as `DPMSolverMultistepScheduler`.'
        )
    if str(config.get("variance_type")).startswith("learned"):
        raise ValueError(
            f"`{name}` has `variance_type={config.variance_type!r}`, but PIS-DM's models predict no variances. Pass"
            f" `{class_name}.from_config(scheduler.config, variance_type=None)`."
        )
    if config.get("snr_shift_scale", 1.0) != 1.0:
        raise ValueError(
            f"`{name}` shifts the noise schedule (`snr_shift_scale={config.snr_shift_scale}`) that its stage was"
            f" trained with. Pass `{class_name}.from_config(scheduler.config, snr_shift_scale=1.0)`."
        )


def _why_unsuitable(scheduler_class: type) -> str | None:
    for reason, names in UNSUITABLE.items():
        if _find(scheduler_class, names):
            return reason
    parameters = inspect.signature(scheduler_class.__init__).parameters
    if not {"trained_betas", "prediction_type"} <= parameters.keys() or not hasattr(scheduler_class, "add_noise"):
        return "does not take the noise schedule of a `DDPMScheduler`"
    return None


def _find(scheduler_class: type, names: Sequence[str]) -> bool:
    # A user's own class behaves as the one it comes from.
    return any(parent.__name__ in names for parent in scheduler_class.__mro__)


def _refusal(subject: str, reason: str) -> str:
    return (
        f"{subject} {reason}, but the pipeline's models predict noise, velocity or the sample at the timesteps they"
        " were trained with. Pass another scheduler, such as `DPMSolverMultistepScheduler`."
    )


def check_unbounded_scheduler(name: str, scheduler: SchedulerMixin, drawn: str) -> None:
    """
    Rejects schedulers that clip their samples to the range of images, in a stage that draws what has no bounds.

    Args:
        name (`str`): The pipeline's component, for the message.
        scheduler ([`SchedulerMixin`]): The stage's scheduler.
        drawn (`str`): What the stage draws, for the message: latents, or residuals.

    Raises:
        ValueError: It clips its samples.
    """
    # A configuration also keeps, from scheduler to scheduler, the options of those that have them.
    own = inspect.signature(type(scheduler).__init__).parameters
    bounds = [option for option in ("clip_sample", "thresholding") if option in own and scheduler.config.get(option)]
    if bounds:
        raise ValueError(
            f"`{name}` clips its samples (`{bounds[0]}=True`), but its stage diffuses {drawn}, which have"
            f" no bounds. Pass `{type(scheduler).__name__}.from_config(scheduler.config,"
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
        ValueError: Both timesteps and sigmas are given, the scheduler does not support custom ones, these are not
            falling numbers, or it needs more steps.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("Only one of `timesteps` or `sigmas` can be passed. Please choose one.")
    if timesteps is None and sigmas is None:
        if isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps and num_inference_steps < 4:
            raise ValueError(
                f"`PNDMScheduler` needs at least 4 steps to start, got {num_inference_steps}. Take more steps, or pass"
                " `PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True)`."
            )
        scheduler.set_timesteps(num_inference_steps, device="cpu")
        warn_of_uneven_steps(scheduler, num_inference_steps)
        return
    name, schedule = ("sigmas", sigmas) if timesteps is None else ("timesteps", timesteps)
    _check_schedule(name, schedule, math.inf if timesteps is None else scheduler.config.num_train_timesteps - 1)
    if name not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(
            f"`{type(scheduler).__name__}.set_timesteps` does not support custom `{name}`. Please check whether you"
            " are using the correct scheduler."
        )
    scheduler.set_timesteps(**{name: schedule}, device="cpu")


def _check_schedule(name: str, schedule: Sequence[float], highest: float) -> None:
    """Raises a ValueError unless these are finite numbers that fall from at most `highest` to at least 0."""
    try:
        values = [float(value) for value in schedule]
    except (TypeError, ValueError):
        values = []
    falls = all(a > b for a, b in itertools.pairwise(values))
    if not values or not falls or not math.isfinite(sum(values)) or values[0] > highest or values[-1] < 0:
        limit = "" if highest == math.inf else f" from at most {highest}"
        raise ValueError(
            f"`{name}` has to be a list of numbers that fall{limit} to at least 0 but is {schedule!r:.200}."
        )


def check_steps(scheduler: SchedulerMixin, start: int = 0) -> None:
    """
    Rejects steps from which a scheduler makes noise or NaN.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler, with its timesteps set.
        start (`int`, defaults to 0): The first of its timesteps that is run.

    Raises:
        ValueError: Its steps between noise levels are too long.
    """
    limits = [name for name in LARGEST_RATIOS if _find(type(scheduler), [name])]
    if not limits:
        return
    pairs = itertools.pairwise(scheduler.sigmas[start:].tolist())
    # The last goes to 0, and those just before have nothing left to spoil.
    longest = max(((a, b) for a, b in pairs if a > 1 and b > 0), key=lambda pair: pair[0] / pair[1], default=None)
    if longest is None or longest[0] / longest[1] <= LARGEST_RATIOS[limits[0]]:
        return
    settings = ", ".join(f"{name}={value!r}" for name, value in SETTINGS[limits[0]].items())
    raise ValueError(
        f"`{type(scheduler).__name__}` draws noise with such long steps: one goes from sigma {longest[0]:,.4g} to"
        f" {longest[1]:,.4g}. Pass `{type(scheduler).__name__}.from_config(scheduler.config, {settings})`,"
        " take more steps, or pass another scheduler, such as `DPMSolverMultistepScheduler`."
    )


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
            "`strength` and `relay_strength` need a scheduler that can start midway, but PNDMScheduler's first steps"
            " are fixed. Leave them out, or pass another scheduler such as `DPMSolverMultistepScheduler`."
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
