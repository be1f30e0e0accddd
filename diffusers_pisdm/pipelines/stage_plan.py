"""What one call does in each stage, from arguments that may differ between stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import FrozenDict

from ..models.stage_models import StageModel
from ..models.transformer_pisdm import PISDMTransformer2DModel
from ..ops.conditioning_augmentation import image_to_residual, residual_to_image
from ..utils.messages import count_of
from .image_inputs import GivenImages
from .number_checks import NUMBERS, check_number, is_positive_integer


MAX_LENGTH = 2**14  # of an image's side: more is refused before it fills the memory


@dataclass(frozen=True)
class StagePlan:
    """Everything one call does in one stage, decided before anything is drawn."""

    number: int  # from 1
    first_step: int  # counted over all stages
    transformer: PISDMTransformer2DModel
    scheduler: SchedulerMixin
    timesteps: torch.Tensor  # (T,), on the CPU
    step_kwargs: dict[str, Any]  # what `scheduler.step` takes besides prediction, timestep and latents
    shape: tuple[int, int, int, int]  # (B, C, H, W)
    batch_size: int  # images that the model takes at once
    latents: torch.Tensor | None  # initial noise; None: drawn
    guidance_scale: float | None  # None: as the stage before left it
    guidance_start: float
    guidance_stop: float
    noise_level: float | None  # None in the first stage, which has no condition
    relay_strength: float | None  # None: starts from pure noise
    given: GivenImages
    class_weights: torch.Tensor | None  # (B, K): images are mixes of K classes
    guide: StageModel | None  # a weaker model of the stage; None: the model without the class guides

    @property
    def residual_scale(self) -> float | None:
        return self.transformer.config.get("residual_scale")

    def from_image(self, image: torch.Tensor, upsampled: torch.Tensor | None) -> torch.Tensor:
        """Turns an image into what the stage diffuses; both are `(B, C, H, W)`."""
        if self.residual_scale is None:
            return image
        return image_to_residual(image, upsampled, self.residual_scale)

    def to_image(self, latents: torch.Tensor, upsampled: torch.Tensor | None) -> torch.Tensor:
        """Turns what the stage diffuses into its image; both are `(B, C, H, W)`."""
        if self.residual_scale is None:
            return latents
        return residual_to_image(latents, upsampled, self.residual_scale)


def stage_lengths(name: str, length: int | None, configs: list[FrozenDict], scale_factor: int) -> list[int]:
    """
    Each stage's `height` or `width` in latents for a final image's in pixels, in proportion to the stages'
    `sample_size`. Raises a ValueError if it is absurdly long, or a stage would have a fraction of a patch.
    """
    full = configs[-1].sample_size * scale_factor
    length = full if length is None else length
    if is_positive_integer(length) and length > max(MAX_LENGTH, full):
        raise ValueError(f"`{name}` has to be at most {max(MAX_LENGTH, full):,} pixels but is {length!r}.")
    # Stage s gets length * sample_size_s / full, which must be a multiple of its patch size.
    units = [full * c.patch_size // math.gcd(c.sample_size, full * c.patch_size) for c in configs]
    unit = math.lcm(*units)
    if not is_positive_integer(length) or length % unit != 0:
        is_number = isinstance(length, Real) and math.isfinite(length)
        nearest = max(unit, round(length / unit) * unit) if is_number else full
        raise ValueError(
            f"`{name}` has to be a positive integer divisible by {unit}, so that every stage has whole patches,"
            f" but is {length!r}. Pass `{name}={nearest}`."
        )
    return [length * config.sample_size // full for config in configs]


def first_values(value: Any, num_values: int) -> Any:
    """A default without the values of stages that are gone: it may come from a cascade since shortened."""
    return value[:num_values] if isinstance(value, (list, tuple)) else value


def by_stage(num_stages: int, **arguments: Any) -> list[dict[str, Any]]:
    """Each stage's own values, by argument."""
    columns = [per_stage(name, value, num_stages) for name, value in arguments.items()]
    return [dict(zip(arguments, values)) for values in zip(*columns)]


def per_stage(name: str, value: Any, num_stages: int) -> list:
    """One value for each stage; raises a ValueError that names the argument if there are more, fewer or wrong ones."""
    is_list = isinstance(value, (list, tuple))
    if is_list and name in ("timesteps", "sigmas"):
        # One stage's value is also a list, but of numbers.
        is_list = all(item is None or not isinstance(item, Real) for item in value)
    only_higher = name in ("noise_level", "default_noise_level", "relay_strength")
    num_values, unit = (num_stages - 1, "higher stage") if only_higher else (num_stages, "stage")
    values = list(value) if is_list else [value] * num_values
    if len(values) != num_values:
        raise ValueError(
            f"`{name}` has {count_of(len(values), 'value')}, but this pipeline has {count_of(num_values, unit)}."
            f" Pass one value for all, or a list with one value per {unit}."
        )
    if name.removeprefix("default_") in NUMBERS:
        for number in values:
            check_number(name, number)
    return [None, *values] if only_higher else values
