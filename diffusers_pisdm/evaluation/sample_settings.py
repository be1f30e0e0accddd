"""What a set of samples is drawn with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from numbers import Integral

from diffusers import DiffusionPipeline

from .sample_seeds import MAX_SAMPLES


CLASS_RULES = ("balanced", "uniform")
# The settings that are arguments of a pipeline's call.
CALL_ARGUMENTS = (
    "num_inference_steps",
    "guidance_scale",
    "guidance_start",
    "guidance_stop",
    "noise_level",
    "relay_strength",
)
NEEDED_ARGUMENTS = ("class_labels", "generator", "output_type")


@dataclass(frozen=True)
class SampleSettings:
    """
    What, with a model, makes a set of samples: equal settings give equal images.

    Args:
        num_samples (`int`, defaults to 50,000): From 1; evaluations of ImageNet models take 50,000.
        seed (`int`, defaults to 0): Not negative. Sample i's noise and class follow from it and i alone.
        classes (`str` or `list[int]`, defaults to `"balanced"`):
            `"balanced"` gives every class the same number of samples, up to one, in any first part of the set, too;
            `"uniform"` draws each sample's class anew, as ADM and DiT do; a list of ids balances over these,
            where one that is given twice gets twice as many samples.
        num_inference_steps, guidance_scale, guidance_start, guidance_stop, noise_level, relay_strength (*optional*):
            See [`PISDMCascadePipeline.__call__`]. `None` is the pipeline's default, or that it has no such argument.
        scheduler (`str`, *optional*):
            A scheduler class of diffusers to sample with instead of the pipeline's own, e.g. `"DDIMScheduler"`.

    Raises:
        TypeError: A number or class id is no integer.
        ValueError: A value is out of range.
    """

    num_samples: int = 50_000
    seed: int = 0
    classes: str | list[int] = "balanced"
    num_inference_steps: int | list[int] | None = None
    guidance_scale: float | list[float] | None = None
    guidance_start: float | list[float] | None = None
    guidance_stop: float | list[float] | None = None
    noise_level: float | list[float] | None = None
    relay_strength: float | list[float | None] | None = None
    scheduler: str | None = None

    def __post_init__(self):
        for name in ("num_samples", "seed"):
            object.__setattr__(self, name, _integer(f"`{name}`", getattr(self, name)))
        if not 1 <= self.num_samples <= MAX_SAMPLES:
            raise ValueError(f"`num_samples` has to be from 1 to 2^32 but is {self.num_samples}.")
        if self.seed < 0:
            raise ValueError(f"`seed` has to be 0 or more but is {self.seed}.")
        if isinstance(self.classes, str):
            if self.classes not in CLASS_RULES:
                raise ValueError(
                    f"`classes` has to be {' or '.join(map(repr, CLASS_RULES))} or a list of class ids but is"
                    f" {self.classes!r}."
                )
            return
        if len(self.classes) == 0:
            raise ValueError(f"`classes` is empty. Pass class ids, or one of {', '.join(CLASS_RULES)}.")
        ids = [_integer("A class id in `classes`", class_id) for class_id in self.classes]
        object.__setattr__(self, "classes", ids)

    def resolve(self, pipe: DiffusionPipeline) -> SampleSettings:
        """
        Fills in the pipeline's defaults.

        Args:
            pipe ([`DiffusionPipeline`]): What is to draw the samples.

        Returns:
            [`SampleSettings`]: With a value wherever the pipeline takes one.

        Raises:
            ValueError: The pipeline does not take an argument that is set, or is not class-conditional.
        """
        parameters = inspect.signature(pipe.__call__).parameters
        name = type(pipe).__name__
        missing = [f"`{argument}`" for argument in NEEDED_ARGUMENTS if argument not in parameters]
        if missing:
            raise ValueError(
                f"{name} does not take {', '.join(missing)}. Pass a class-conditional pipeline, such as"
                " `PISDMCascadePipeline` or `DiTPipeline`."
            )
        absent = [argument for argument in CALL_ARGUMENTS if argument not in parameters]
        refused = [f"`{argument}`" for argument in absent if getattr(self, argument) is not None]
        if refused:
            raise ValueError(f"{name} does not take {', '.join(refused)}. Leave it out (None).")
        # What the call itself leaves open is in the configuration.
        defaults = {
            argument: pipe.config.get(f"default_{argument}", parameters[argument].default)
            for argument in CALL_ARGUMENTS
            if argument in parameters and getattr(self, argument) is None
        }
        return replace(self, **defaults)


def _integer(name: str, value: int) -> int:
    """NumPy's integers, which JSON does not know, become Python's."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} has to be an integer but is {value!r} of type {type(value)}.")
    return int(value)
