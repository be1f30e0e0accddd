"""Class-conditional image generation from low to high resolution, one diffusion model a stage."""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    PNDMScheduler,
    SchedulerMixin,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from typing_extensions import Self

from ..models.latents import decode_latents, vae_scale_factor
from ..models.strict_loading import StrictLoadingMixin
from ..models.transformer_pisdm import PISDMTransformer2DModel
from ..ops.conditioning_augmentation import augment_low_res, residual_to_image, upsample_low_res
from ..schedulers import check_residual_scheduler, check_scheduler, warn_of_uneven_steps
from .lora_loading import PISDMLoraLoaderMixin


# Numbered components are the one container of stages that diffusers saves, loads, offloads and shards.
TRANSFORMERS = ("transformer", "transformer_2", "transformer_3", "transformer_4")
SCHEDULERS = ("scheduler", "scheduler_2", "scheduler_3", "scheduler_4")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class PISDMCascadePipelineOutput(BaseOutput):
    """
    The output of [`PISDMCascadePipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The last stage's images: PIL images, an array of shape `(B, H, W, C)` in [0, 1], a tensor of shape
            `(B, C, H, W)` in [0, 1], or latents, by `output_type`.
        stage_images (`list`, *optional*):
            With `output_stages=True`, every stage's images in the form of `images`, lowest resolution first.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    stage_images: list[list[PIL.Image.Image]] | list[np.ndarray] | list[torch.Tensor] | None = None


class PISDMCascadePipeline(StrictLoadingMixin, DiffusionPipeline, PISDMLoraLoaderMixin):
    r"""
    Generates images of given classes with a cascade of 1 to 4 diffusion models: the first makes a small image from
    noise; each next one makes a larger image from noise and the image of the stage before, upsampled and slightly
    noised (conditioning augmentation). Stages are counted from 1, as the components are.

    This pipeline inherits from [`DiffusionPipeline`]: see there for loading, saving, devices and offloading. LoRA
    adapters come from [`~pipelines.lora_loading.PISDMLoraLoaderMixin`].

    Args:
        transformer ([`PISDMTransformer2DModel`]): The first stage.
        scheduler ([`SchedulerMixin`]):
            The first stage's scheduler, e.g. [`DPMSolverMultistepScheduler`]. Flow-matching schedulers are refused.
        transformer_2, transformer_3, transformer_4 ([`PISDMTransformer2DModel`], *optional*):
            The higher stages, without gaps.
        scheduler_2, scheduler_3, scheduler_4 ([`SchedulerMixin`], *optional*):
            Their schedulers; a stage without one takes a copy of `scheduler`.
        vae ([`AutoencoderKL`], [`AutoencoderTiny`] or [`AutoencoderDC`], *optional*):
            Makes all stages work on its latents. Without it they work on pixels in [-1, 1].
        id2label (`dict[int, str]` or `list[str]`, *optional*):
            Class names by id, saved with the pipeline. A name may list synonyms separated by commas.
        default_guidance_scale (`float` or `list[float]`, defaults to 4.0),
        default_num_inference_steps (`int` or `list[int]`, defaults to 20),
        default_noise_level (`float` or `list[float]`, defaults to 0.1):
            What a call takes where it is not told otherwise, in the forms of its arguments: what a checkpoint was
            found best with. Saved with the pipeline. Of a list, a shortened cascade takes the first values.

    Raises:
        ValueError: The stages have a gap or do not fit each other, or a scheduler is a flow-matching one.
    """

    model_cpu_offload_seq = "->".join((*TRANSFORMERS, "vae"))
    _optional_components = [*TRANSFORMERS[1:], *SCHEDULERS[1:], "vae"]
    _lora_loadable_modules = list(TRANSFORMERS)
    _callback_tensor_inputs = ["latents", "low_res", "class_labels", "stage"]
    _guidance_slicing = False

    def __init__(
        self,
        transformer: PISDMTransformer2DModel,
        scheduler: SchedulerMixin,
        transformer_2: PISDMTransformer2DModel | None = None,
        transformer_3: PISDMTransformer2DModel | None = None,
        transformer_4: PISDMTransformer2DModel | None = None,
        scheduler_2: SchedulerMixin | None = None,
        scheduler_3: SchedulerMixin | None = None,
        scheduler_4: SchedulerMixin | None = None,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None = None,
        id2label: dict | list | None = None,
        default_guidance_scale: float | list[float] = 4.0,
        default_num_inference_steps: int | list[int] = 20,
        default_noise_level: float | list[float] = 0.1,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            transformer_2=transformer_2,
            transformer_3=transformer_3,
            transformer_4=transformer_4,
            scheduler_2=scheduler_2,
            scheduler_3=scheduler_3,
            scheduler_4=scheduler_4,
            vae=vae,
        )
        if isinstance(id2label, list):
            id2label = dict(enumerate(id2label))
        if id2label is not None:
            id2label = {int(i): name for i, name in id2label.items()}  # JSON made the ids strings
        self.register_to_config(
            id2label=id2label,
            default_guidance_scale=_first_values(default_guidance_scale, self.num_stages),
            default_num_inference_steps=_first_values(default_num_inference_steps, self.num_stages),
            default_noise_level=_first_values(default_noise_level, self.num_stages - 1),
        )
        self.image_processor = VaeImageProcessor(do_resize=False)
        self.check_stages()

    @classmethod
    def from_stages(
        cls,
        transformers: Sequence[PISDMTransformer2DModel],
        schedulers: SchedulerMixin | Sequence[SchedulerMixin],
        **kwargs,
    ) -> Self:
        r"""
        Makes a pipeline of lists of stages.

        Args:
            transformers (`Sequence[PISDMTransformer2DModel]`): One to four, first stage first.
            schedulers ([`SchedulerMixin`] or a sequence):
                One for each stage, or one that the higher stages copy. Equal ones are kept once.
            kwargs (*optional*): Other arguments of the class: `vae`, `id2label`, ...

        Raises:
            ValueError: There are too many stages, or more or fewer schedulers; or the stages do not fit.
        """
        schedulers = [schedulers] if isinstance(schedulers, SchedulerMixin) else list(schedulers)
        if all(scheduler.config == schedulers[0].config for scheduler in schedulers):
            schedulers = schedulers[:1]
        elif len(schedulers) != len(transformers):
            raise ValueError(f"`schedulers` has {len(schedulers)} schedulers for {len(transformers)} `transformers`.")
        if not 1 <= len(transformers) <= len(TRANSFORMERS):
            raise ValueError(f"`transformers` has {len(transformers)} stages, but a cascade has 1 to 4.")
        return cls(**dict(zip(TRANSFORMERS, transformers)), **dict(zip(SCHEDULERS, schedulers)), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        r"""
        Loads a saved pipeline as [`DiffusionPipeline.from_pretrained`] does, with two differences: weights are read
        from safetensors only, unless `use_safetensors=False` asks for pickled ones, and `transformer_2=None` (or 3, 4)
        shortens the cascade to the stages before. To pass components, call this method: where they have defaults,
        `DiffusionPipeline.from_pretrained` itself ignores them.

        Raises:
            OSError: Weights are missing, pickled, truncated or corrupt.
            ValueError: The configuration holds an unknown key, or the stages do not fit.
        """
        return super().from_pretrained(pretrained_model_name_or_path, **_drop_higher_stages(kwargs))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> Self:
        r"""
        Makes a pipeline from another one's components as [`DiffusionPipeline.from_pipe`] does; `transformer_2=None`
        (or 3, 4) shortens the cascade to the stages before. Guidance slicing is taken over.
        """
        pipe = super().from_pipe(pipeline, **_drop_higher_stages(kwargs))
        pipe._guidance_slicing = getattr(pipeline, "_guidance_slicing", False)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        r"""Saves all components as [`DiffusionPipeline.save_pretrained`] does, later-set optional ones included."""
        # diffusers would leave out a component that was None at first and was then set as an attribute.
        self.register_modules(**self.components)
        super().save_pretrained(save_directory, **kwargs)

    def enable_guidance_slicing(self) -> None:
        r"""
        Enable sliced guidance. When this option is enabled, a guided step runs the model twice, on the unconditional
        and on the conditional half of the batch, instead of once on both. This saves memory, at the price of speed
        where a batch of twice the size does not take twice as long. It is not saved with the pipeline.
        """
        self._guidance_slicing = True

    def disable_guidance_slicing(self) -> None:
        r"""
        Disable sliced guidance. If `enable_guidance_slicing` was previously called, a guided step runs the model once
        again, on both halves.
        """
        self._guidance_slicing = False

    @property
    def stages(self) -> list[PISDMTransformer2DModel]:
        """The transformers of the cascade, first stage first."""
        transformers = [getattr(self, name) for name in TRANSFORMERS]
        return [transformer for transformer in transformers if transformer is not None]

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def stage(self) -> int:
        """The running stage, from 1."""
        return self._stage

    @property
    def guidance_scale(self) -> float:
        """The running stage's guidance scale; a callback may change it through `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of all stages together."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def get_label_ids(self, names: str | list[str]) -> list[int]:
        """
        Looks up class names in `config.id2label`.

        Args:
            names (`str` or `list[str]`): Full names, or one of a name's comma-separated synonyms.

        Returns:
            `list[int]`: One class id a name.

        Raises:
            ValueError: The pipeline has no names, or a name is unknown or belongs to several classes.
        """
        if self.config.id2label is None:
            raise ValueError(
                f"Cannot look up {names!r}: this pipeline has no class names. Pass class ids, or give the pipeline its"
                " names with `id2label`."
            )
        ids_by_name: dict[str, list[int]] = {}
        for class_id, label in self.config.id2label.items():
            for name in {label, *(synonym.strip() for synonym in label.split(","))}:
                ids_by_name.setdefault(name, []).append(class_id)
        return [_get_label_id(name, ids_by_name) for name in ([names] if isinstance(names, str) else names)]

    def check_stages(self) -> None:
        """
        Raises:
            ValueError: The stages have a gap, do not fit each other or the autoencoder, or a scheduler does not fit.
        """
        present = [getattr(self, name) is not None for name in TRANSFORMERS]
        if not all(present[: sum(present)]) or not present[0]:
            gap = TRANSFORMERS[present.index(False)]
            higher = [name for name, given in zip(TRANSFORMERS, present) if given and name > gap]
            remedy = f", or {' and '.join(f'`{name}=None`' for name in higher)}" if gap != "transformer" else ""
            raise ValueError(
                f"`{gap}` is None, but {', '.join(f'`{name}`' for name in higher) or 'it is the first stage'}"
                f" {'needs it' if higher else 'and required'}: stages may not have gaps. Pass `{gap}`{remedy}."
            )

        for index, transformer in enumerate(self.stages):
            self._check_transformer(TRANSFORMERS[index], transformer, self.stages[index - 1] if index else None)
        if self.vae is not None and self.vae.config.latent_channels != self.transformer.config.in_channels:
            raise ValueError(
                f"`vae` has {self.vae.config.latent_channels} latent channels (`latent_channels`), but `transformer`"
                f" has {self.transformer.config.in_channels} (`in_channels`). Pass the autoencoder that the"
                " transformers were trained with."
            )
        for name, transformer in zip(SCHEDULERS, self.stages):
            if getattr(self, name) is not None:
                check_scheduler(name, getattr(self, name))
            if transformer.config.get("residual_scale") is not None:
                check_residual_scheduler(name, getattr(self, name) or self.scheduler)

    def _check_transformer(
        self, name: str, transformer: PISDMTransformer2DModel, lower: PISDMTransformer2DModel | None
    ) -> None:
        config = transformer.config
        if lower is None and config.low_res_channels is not None:
            raise ValueError(
                f"`{name}` is a higher stage (`low_res_channels={config.low_res_channels}`) and cannot be the first."
                " Pass a transformer with `low_res_channels=None`."
            )
        if lower is not None and config.low_res_channels != lower.config.in_channels:
            raise ValueError(
                f"`{name}` takes a low-resolution condition of {config.low_res_channels} channels"
                f" (`low_res_channels`), but the stage before makes {lower.config.in_channels} (`in_channels`). Pass"
                " stages that were trained as one cascade."
            )
        if lower is not None and config.in_channels != lower.config.in_channels:
            raise ValueError(
                f"`{name}` makes {config.in_channels} channels (`in_channels`), but the stage before makes"
                f" {lower.config.in_channels}. Pass stages that were trained as one cascade."
            )
        if config.out_channels not in (None, config.in_channels, 2 * config.in_channels):
            raise ValueError(
                f"`{name}` has {config.out_channels} output channels (`out_channels`). Pass a transformer with"
                f" {config.in_channels}, or {2 * config.in_channels} where it learns variances."
            )
        if lower is not None and config.num_classes != lower.config.num_classes:
            raise ValueError(
                f"`{name}` knows {config.num_classes} classes (`num_classes`), but the stage before"
                f" {lower.config.num_classes}. Pass stages that were trained as one cascade."
            )

    def check_inputs(
        self,
        batch_size: int,
        num_images_per_prompt: int,
        num_inference_steps: list[int],
        guidance_scale: list[float],
        guidance_start: list[float],
        guidance_stop: list[float],
        noise_level: list[float],
        relay_strength: list[float | None],
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raises a `ValueError` that names the first argument of [`__call__`] with a value out of range."""
        _check_numbers("num_images_per_prompt", [num_images_per_prompt], "a positive integer", _is_positive_integer)
        _check_numbers("num_inference_steps", num_inference_steps, "a positive integer", _is_positive_integer)
        _check_numbers("guidance_scale", guidance_scale, "a finite number", math.isfinite)
        _check_numbers("guidance_start", guidance_start, "in [0, 1]", lambda value: 0 <= value <= 1)
        _check_numbers("guidance_stop", guidance_stop, "in [0, 1]", lambda value: 0 <= value <= 1)
        _check_numbers("noise_level", noise_level, "in [0, 1)", lambda value: 0 <= value < 1)
        strengths = [strength for strength in relay_strength if strength is not None]
        _check_numbers("relay_strength", strengths, "None or in (0, 1]", lambda value: 0 < value <= 1)
        if isinstance(generator, list) and len(generator) != batch_size * num_images_per_prompt:
            raise ValueError(
                f"You have passed a list of generators of length {len(generator)}, but requested an effective batch"
                f" size of {batch_size * num_images_per_prompt}. Pass one generator an image."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` has to be one of {', '.join(OUTPUT_TYPES)} but is {output_type!r}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found"
                f" {unknown}."
            )

    def get_class_ids(self, class_labels: int | str | list[int | str] | torch.Tensor) -> list[int]:
        """
        Brings any form of `class_labels` to a list of ids.

        Raises:
            TypeError: A label is neither an integer nor a name.
            ValueError: There are no labels, or one is out of range or unknown.
        """
        if isinstance(class_labels, torch.Tensor):
            if class_labels.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
                raise TypeError(
                    f"`class_labels` has to be an integer tensor but has dtype {class_labels.dtype}. Convert it with"
                    " `class_labels.long()`."
                )
            if class_labels.ndim > 1:
                raise ValueError(
                    f"`class_labels` has to have one dimension at most but has shape {tuple(class_labels.shape)}."
                )
            class_labels = class_labels.reshape(-1).tolist()
        if not isinstance(class_labels, (list, tuple)):
            class_labels = [class_labels]
        if len(class_labels) == 0:
            raise ValueError("`class_labels` is empty. Pass at least one class id or name.")

        num_classes = self.transformer.config.num_classes
        ids = []
        for label in class_labels:
            if isinstance(label, bool) or not isinstance(label, (Integral, str)):
                raise TypeError(
                    f"`class_labels` has to be class ids (`int`) or names (`str`) but contains {label!r} of type"
                    f" {type(label)}."
                )
            if isinstance(label, str):
                label = self.get_label_ids(label)[0]
            if not 0 <= label < num_classes:
                raise ValueError(
                    f"`class_labels` contains {label}, but this pipeline's classes are 0 to {num_classes - 1}."
                )
            ids.append(int(label))
        return ids

    def get_stage_sizes(self, height: int | None = None, width: int | None = None) -> list[tuple[int, int]]:
        """
        Splits the final image's size into the stages' sizes, in the proportions of their `sample_size`.

        Args:
            height, width (`int`, *optional*): Pixels of the final image; the last stage's `sample_size` by default.

        Returns:
            `list[tuple[int, int]]`: Height and width of each stage's latents (of its images, without a `vae`).

        Raises:
            ValueError: A size leaves some stage with a fraction of a patch.
        """
        heights, widths = self._get_stage_lengths("height", height), self._get_stage_lengths("width", width)
        return list(zip(heights, widths))

    def _get_stage_lengths(self, name: str, length: int | None) -> list[int]:
        configs = [transformer.config for transformer in self.stages]
        full = configs[-1].sample_size * vae_scale_factor(self.vae)
        length = full if length is None else length
        # Stage s gets length * sample_size_s / full, which must be a multiple of its patch size.
        units = [full * c.patch_size // math.gcd(c.sample_size, full * c.patch_size) for c in configs]
        unit = math.lcm(*units)
        if not _is_positive_integer(length) or length % unit != 0:
            nearest = max(unit, round(length / unit) * unit) if isinstance(length, Real) else full
            raise ValueError(
                f"`{name}` has to be divisible by {unit}, for every stage to have whole patches, but is {length}. Pass"
                f" `{name}={nearest}`."
            )
        return [length * config.sample_size // full for config in configs]

    def get_stage_schedulers(self) -> list[SchedulerMixin]:
        """Returns one scheduler a stage, no two the same object: where there is none, a copy of `scheduler`."""
        schedulers = []
        for name in SCHEDULERS[: self.num_stages]:
            scheduler = getattr(self, name) if getattr(self, name) is not None else self.scheduler
            if any(scheduler is other for other in schedulers):
                scheduler = scheduler.from_config(scheduler.config)
            schedulers.append(scheduler)
        return schedulers

    def retrieve_timesteps(
        self,
        scheduler: SchedulerMixin,
        num_inference_steps: int,
        timesteps: list[int] | None,
        sigmas: list[float] | None,
        relay_strength: float | None,
    ) -> torch.Tensor:
        """
        Prepares a scheduler for one run. Every scheduler forgets the run before here.

        Returns:
            `torch.Tensor` of shape `(T,)`: The timesteps to run, on the CPU: schedulers like DDIM's decide by their
            values, for which they would have to wait for another device at every step.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError("Only one of `timesteps` or `sigmas` can be passed. Please choose one.")
        if timesteps is None and sigmas is None:
            scheduler.set_timesteps(num_inference_steps, device="cpu")
            warn_of_uneven_steps(scheduler, num_inference_steps)
        else:
            name, schedule = ("sigmas", sigmas) if timesteps is None else ("timesteps", timesteps)
            if name not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"`{type(scheduler).__name__}.set_timesteps` does not support custom `{name}`. Please check"
                    " whether you are using the correct scheduler."
                )
            scheduler.set_timesteps(**{name: schedule}, device="cpu")
        if relay_strength is None:
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)  # instead of searching for the first timestep
            return scheduler.timesteps

        if isinstance(scheduler, PNDMScheduler):
            raise ValueError(
                "`relay_strength` needs a scheduler that can start midway, but PNDMScheduler's first steps are fixed."
                " Pass `relay_strength=None`, or another scheduler such as `DPMSolverMultistepScheduler`."
            )
        # Second-order schedulers list a step's two evaluations, and one for the last step.
        num_steps = math.ceil(len(scheduler.timesteps) / scheduler.order)
        start = (num_steps - max(int(num_steps * relay_strength), 1)) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        return scheduler.timesteps[start:]

    def check_latents(self, latents: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
        """Raises a `TypeError` or `ValueError` if `latents` is not a float tensor of this shape, on this device."""
        if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
            kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents)
            raise TypeError(f"`latents` has to be a floating point tensor but is {kind}. Pass `torch.randn({shape})`.")
        if latents.shape != shape:
            raise ValueError(
                f"`latents` has to have shape {shape} (images, channels, height, width) but has shape"
                f" {tuple(latents.shape)}."
            )
        if latents.device.type != device.type:
            raise ValueError(
                f"`latents` is on {latents.device}, but the pipeline runs on {device}. Move it with"
                f" `latents.to('{device}')`."
            )

    def prepare_extra_step_kwargs(
        self, scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None, eta: float
    ) -> dict[str, Any]:
        """Returns those of `generator` and DDIM's arguments that the scheduler's `step` takes."""
        accepted = inspect.signature(scheduler.step).parameters
        # A clipped image with the noise of the unclipped one, as DDIM takes it by default, leaves noise behind. Where
        # nothing is clipped, this changes nothing.
        extra = {"generator": generator, "eta": eta, "use_clipped_model_output": True}
        return {name: value for name, value in extra.items() if name in accepted}

    def prepare_condition(
        self,
        transformer: PISDMTransformer2DModel,
        class_labels: torch.Tensor,
        low_res: torch.Tensor | None,
        noise_level: float | None,
        guided: bool,
    ) -> dict[str, torch.Tensor]:
        r"""
        Prepares what the model is told beside latents and timestep: the same at all steps of a stage.

        Returns:
            `dict[str, torch.Tensor]`: `class_labels` of shape `(B,)`; in a higher stage `low_res` of shape
            `(B, C, H, W)`, in the model's precision, and `noise_level` of shape `(B,)`. All of twice the size if
            guided: first the unconditional half, then the conditional one.
        """
        condition = {"class_labels": class_labels}  # (B,)
        if low_res is not None:
            condition["low_res"] = low_res.to(transformer.dtype)  # (B, C, H, W)
            condition["noise_level"] = torch.full(
                class_labels.shape, noise_level, dtype=torch.float32, device=class_labels.device
            )  # (B,)
        if guided:
            null_labels = torch.full_like(class_labels, transformer.config.num_classes)  # (B,)
            unconditional = {**condition, "class_labels": null_labels}
            condition = {name: torch.cat([unconditional[name], condition[name]]) for name in condition}  # (2B, ...)
        return condition

    def predict(
        self,
        transformer: PISDMTransformer2DModel,
        scheduler: SchedulerMixin,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        condition: dict[str, torch.Tensor],
        guided: bool,
    ) -> torch.Tensor:
        r"""
        Runs the model and applies classifier-free guidance to all channels: `uncond + guidance_scale * (cond -
        uncond)`. If guided, the model runs once on a batch of twice the size or, with guidance slicing, on each half.

        Args:
            model_input (`torch.Tensor` of shape `(B, C, H, W)`): Latents as the scheduler scales them.
            timestep (`torch.Tensor` of shape `()`): On the model's device.
            condition (`dict[str, torch.Tensor]`): From `prepare_condition`, of twice the size if guided.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`, float32; `(B, 2C, H, W)` where model and scheduler learn variances.
        """
        channels = model_input.shape[1]
        model_input = model_input.to(transformer.dtype)
        inputs = [(model_input, condition)]
        if guided and self._guidance_slicing:
            halves = zip(*(value.chunk(2) for value in condition.values()))
            inputs = [(model_input, dict(zip(condition, half))) for half in halves]
        elif guided:
            inputs = [(torch.cat([model_input, model_input]), condition)]  # (2B, C, H, W)
        outputs = [
            # The timestep is never in half precision: as the scheduler made it.
            transformer(sample, timestep=timestep.expand(len(sample)), **kwargs, return_dict=False)[0].float()
            for sample, kwargs in inputs
        ]
        if guided and not self._guidance_slicing:
            outputs = outputs[0].chunk(2)  # (B, C or 2C, H, W) each

        output, variance = outputs[-1][:, :channels], outputs[-1][:, channels:]  # variance: 0 or C channels
        if guided:
            uncond = outputs[0][:, :channels]  # (B, C, H, W)
            output = uncond + self.guidance_scale * (output - uncond)
        if scheduler.config.get("variance_type") in ("learned", "learned_range"):
            output = torch.cat([output, variance], dim=1)
        return output

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | list[int] | None = None,
        timesteps: list[int] | list[list[int] | None] | None = None,
        sigmas: list[float] | list[list[float] | None] | None = None,
        guidance_scale: float | list[float] | None = None,
        guidance_start: float | list[float] = 0.0,
        guidance_stop: float | list[float] = 1.0,
        noise_level: float | list[float] | None = None,
        relay_strength: float | list[float | None] | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | list[torch.Tensor | None] | None = None,
        output_type: str = "pil",
        output_stages: bool = False,
        return_dict: bool = True,
        callback_on_step_end: Callable[[Self, int, torch.Tensor, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - diffusers' signature; only read
    ) -> PISDMCascadePipelineOutput | tuple:
        r"""
        Generates images.

        Arguments "per stage" take one value for all stages or a list with one value a stage. `noise_level` and
        `relay_strength` concern the higher stages only: their lists begin with the second stage's value.

        Args:
            class_labels (`int`, `str`, a list of either, or an integer `torch.Tensor` of at most one dimension):
                Class ids, or names from `config.id2label`.
            height, width (`int`, *optional*):
                Pixels of the final images; the last stage's `sample_size` by default. Lower stages scale with it.
            num_images_per_prompt (`int`, defaults to 1): Images a label; those of one label are neighbours.
            num_inference_steps (`int` or `list[int]`, *optional*):
                Denoising steps, per stage; `config.default_num_inference_steps` if not given. The paper takes 50; with
                DPM-Solver, small checkpoints gain nothing beyond 10 (`benchmarks/sampling_efficiency.py`).
            timesteps (`list[int]`, or one list a stage, *optional*):
                Own timesteps instead of `num_inference_steps`, for schedulers that take them; `None` in a list of
                lists leaves a stage its `num_inference_steps`.
            sigmas (`list[float]`, or one list a stage, *optional*): Likewise, as noise levels.
            guidance_scale (`float` or `list[float]`, *optional*):
                Weight w of classifier-free guidance, `eps_u + w (eps_c - eps_u)` on all channels, per stage;
                `config.default_guidance_scale` if not given. As in diffusers, guidance is off (and half of the work is
                saved) where w <= 1. The paper's value is 4.0.
            guidance_start, guidance_stop (`float` or `list[float]`, default to 0.0 and 1.0):
                The share of a stage's steps, from the noisy end, in which guidance is on, per stage. Steps outside of
                `[start, stop)` skip the unconditional half.
            noise_level (`float` or `list[float]`, *optional*):
                Noise on the low-resolution condition in [0, 1), per higher stage; `config.default_noise_level` if not
                given. A little hides what distinguishes a generated condition from the real ones of training; much
                makes a stage ignore it.
            relay_strength (`float` or `list[float | None]`, *optional*):
                Relay start, per higher stage: begin from the upsampled lower image, noised to this share in (0, 1] of
                the schedule, instead of from pure noise, and run that share of the steps.
            eta (`float`, defaults to 0.0): Stochasticity of [`DDIMScheduler`]; other schedulers do not take it.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes images reproducible. A list holds one generator an image, and all noise of an image (initial,
                augmentation, scheduler's) comes from its own: an image is then the same in any batch, up to
                rounding. A single generator draws for the whole batch at once, so that an image depends on the size
                of its batch, and equals the list's where the batch is one image.
            latents (`torch.Tensor` of shape `(B, C, h, w)`, or one tensor or `None` a stage, *optional*):
                Initial standard normal noise instead of drawn noise. A single tensor is the first stage's.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            output_stages (`bool`, defaults to `False`): Whether to return the images of every stage, too.
            return_dict (`bool`, defaults to `True`): Whether to return a [`PISDMCascadePipelineOutput`].
            callback_on_step_end (`Callable`, [`PipelineCallback`] or [`MultiPipelineCallbacks`], *optional*):
                Called as `callback(pipe, step, timestep, callback_kwargs)` after every step, `step` running over all
                stages up to `pipe.num_timesteps - 1`. It returns a dictionary; `latents`, `low_res` and `class_labels`
                in it take effect. Setting `pipe._interrupt` ends the run with the image of the running stage.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                What `callback_kwargs` holds: `"latents"`, `"low_res"` (the noised condition; `None` in the first
                stage), `"class_labels"` and `"stage"` (from 1). At a stage's last step, `latents` is its image;
                before, in a stage with `residual_scale`, the noisy residual.

        Returns:
            [`PISDMCascadePipelineOutput`], or a tuple of its values if `return_dict` is `False`.

        Raises:
            TypeError: A label or `latents` has the wrong type.
            ValueError: An argument has a wrong value, length, shape or device; the message names it.

        Latents, noise and scheduler steps are float32 whatever the transformers' precision, so that half precision
        changes the model's rounding but not the noise.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_pisdm import PISDMCascadePipeline

        >>> pipe = PISDMCascadePipeline.from_pretrained("checkpoints/pisdm-emoji128")
        >>> generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        >>> images = pipe(class_labels=[207, 42], generator=generators).images
        ```
        """
        # 1. Bring arguments to one value a stage and check them
        self.check_stages()
        num_stages = self.num_stages
        if num_inference_steps is None:
            num_inference_steps = _first_values(self.config.default_num_inference_steps, num_stages)
        if guidance_scale is None:
            guidance_scale = _first_values(self.config.default_guidance_scale, num_stages)
        if noise_level is None:
            noise_level = _first_values(self.config.default_noise_level, num_stages - 1)
        num_inference_steps = _per_stage("num_inference_steps", num_inference_steps, num_stages)
        timesteps = _per_stage("timesteps", timesteps, num_stages, value_is_list=True)
        sigmas = _per_stage("sigmas", sigmas, num_stages, value_is_list=True)
        guidance_scales = _per_stage("guidance_scale", guidance_scale, num_stages)
        guidance_start = _per_stage("guidance_start", guidance_start, num_stages)
        guidance_stop = _per_stage("guidance_stop", guidance_stop, num_stages)
        noise_level = _per_stage("noise_level", noise_level, num_stages - 1, "higher stage")
        relay_strength = _per_stage("relay_strength", relay_strength, num_stages - 1, "higher stage")
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        class_ids = self.get_class_ids(class_labels)
        self.check_inputs(
            len(class_ids),
            num_images_per_prompt,
            num_inference_steps,
            guidance_scales,
            guidance_start,
            guidance_stop,
            noise_level,
            relay_strength,
            generator,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        noise_level = [None, *noise_level]
        relay_strength = [None, *relay_strength]

        # 2. Labels, and initial noise where given
        device = self._execution_device
        batch_size = len(class_ids) * num_images_per_prompt
        class_labels = torch.tensor(class_ids, device=device).repeat_interleave(num_images_per_prompt)  # (B,)
        channels = self.transformer.config.in_channels
        shapes = [(batch_size, channels, *size) for size in self.get_stage_sizes(height, width)]
        if isinstance(latents, torch.Tensor):
            latents = [latents] + [None] * (num_stages - 1)
        initial_noise = _per_stage("latents", latents, num_stages)
        for noise, shape in zip(initial_noise, shapes):
            if noise is not None:
                self.check_latents(noise, shape, device)

        # 3. Schedules of all stages, for `num_timesteps` to be known from the first step on
        schedulers = self.get_stage_schedulers()
        schedules = [
            self.retrieve_timesteps(*arguments)
            for arguments in zip(schedulers, num_inference_steps, timesteps, sigmas, relay_strength)
        ]
        self._num_timesteps = sum(len(schedule) for schedule in schedules)
        self._current_timestep = None
        self._interrupt = False
        step = 0

        # 4. Stages, from low to high resolution
        stage_latents = []
        low_res = None
        for index, (transformer, scheduler, schedule) in enumerate(zip(self.stages, schedulers, schedules)):
            stage, shape = index + 1, shapes[index]
            residual_scale = transformer.config.get("residual_scale")
            self._stage = stage
            if index == 0 or isinstance(guidance_scale, (list, tuple)):
                # A single scale is set once: what a callback makes of it lasts.
                self._guidance_scale = guidance_scales[index]

            # 4.1 Condition on the stage before. The noise is drawn even at level 0, for levels to be comparable.
            if index > 0:
                upsampled = upsample_low_res(latents, shape[2:], residual_scale)  # (B, C, H, W)
                noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
                level = torch.full((1,), noise_level[index], device=device)
                low_res = augment_low_res(upsampled, noise, level)  # (B, C, H, W)

            # 4.2 Start from noise, or from the noised image of the stage before
            noise = initial_noise[index]
            if noise is None:
                noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
            noise = noise.to(device, torch.float32)
            if relay_strength[index] is None:
                latents = noise * scheduler.init_noise_sigma  # (B, C, H, W)
            else:
                # A residual stage's upsampled image is a residual of zero.
                image = upsampled if residual_scale is None else torch.zeros_like(upsampled)
                latents = scheduler.add_noise(image, noise, schedule[:1].expand(batch_size))  # (B, C, H, W)

            # 4.3 Denoise. Nothing here may wait for the device: the next steps are queued while it works.
            conditions: dict[bool, dict[str, torch.Tensor]] = {}  # by whether the step is guided
            # float32 at most, as not every device has float64
            device_schedule = schedule.to(device, torch.float32 if schedule.is_floating_point() else None)
            extra_step_kwargs = self.prepare_extra_step_kwargs(scheduler, generator, eta)
            with self.progress_bar(total=len(schedule)) as progress_bar:
                self._describe(progress_bar, shape)
                for i, (scheduler_t, t) in enumerate(zip(schedule, device_schedule)):
                    if self.interrupt:
                        if residual_scale is not None:
                            latents = residual_to_image(latents, upsampled, residual_scale)
                        break
                    self._current_timestep = t
                    in_interval = guidance_start[index] <= i / len(schedule) < guidance_stop[index]
                    guided = self.do_classifier_free_guidance and in_interval
                    if guided not in conditions:
                        conditions[guided] = self.prepare_condition(
                            transformer, class_labels, low_res, noise_level[index], guided
                        )
                    model_input = scheduler.scale_model_input(latents, scheduler_t)  # (B, C, H, W)
                    prediction = self.predict(transformer, scheduler, model_input, t, conditions[guided], guided)
                    (latents, *_) = scheduler.step(
                        prediction, scheduler_t, latents, **extra_step_kwargs, return_dict=False
                    )
                    if residual_scale is not None and i == len(schedule) - 1:
                        latents = residual_to_image(latents, upsampled, residual_scale)

                    if callback_on_step_end is not None:
                        available = {
                            "latents": latents,
                            "low_res": low_res,
                            "class_labels": class_labels,
                            "stage": stage,
                        }
                        callback_kwargs = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                        callback_outputs = callback_on_step_end(self, step, t, callback_kwargs)
                        latents = callback_outputs.pop("latents", latents)
                        low_res = callback_outputs.pop("low_res", low_res)
                        class_labels = callback_outputs.pop("class_labels", class_labels)
                        conditions.clear()  # a callback may change them, in place, too

                    progress_bar.update()
                    step += 1

            if output_stages:
                stage_latents.append(latents)
            if self.interrupt:
                break

        # 5. Images
        self._current_timestep = None
        images = self._postprocess(latents, output_type)
        stage_images = None
        if output_stages:
            stage_images = [self._postprocess(lower, output_type) for lower in stage_latents[:-1]] + [images]

        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, stage_images) if output_stages else (images,)
        return PISDMCascadePipelineOutput(images=images, stage_images=stage_images)

    def _describe(self, progress_bar: Any, shape: tuple[int, ...]) -> None:
        if "desc" not in self._progress_bar_config:
            height, width = (length * vae_scale_factor(self.vae) for length in shape[2:])
            progress_bar.set_description(f"stage {self.stage}/{self.num_stages} ({height}x{width})")

    def _postprocess(
        self, latents: torch.Tensor, output_type: str
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(decode_latents(self.vae, latents), output_type)


def _drop_higher_stages(kwargs: dict[str, Any]) -> dict[str, Any]:
    # A stage that is explicitly None takes the ones above it along: they would have no condition.
    dropped = [i for i, name in enumerate(TRANSFORMERS) if i > 0 and name in kwargs and kwargs[name] is None]
    if not dropped:
        return kwargs
    names = TRANSFORMERS[dropped[0] :] + SCHEDULERS[dropped[0] :]
    return {**dict.fromkeys(names), **kwargs}


def _per_stage(name: str, value: Any, num_values: int, unit: str = "stage", value_is_list: bool = False) -> list:
    # A list holds one value a stage, unless a value is itself a list of numbers.
    is_list = isinstance(value, (list, tuple))
    if is_list and value_is_list:
        is_list = all(item is None or not isinstance(item, Real) for item in value)
    if not is_list:
        return [value] * num_values
    if len(value) != num_values:
        raise ValueError(
            f"`{name}` has {len(value)} values, but this pipeline has {num_values} {unit}{'s' * (num_values != 1)}."
            f" Pass one value for all, or a list of one value a {unit}."
        )
    return list(value)


def _first_values(value: Any, num_values: int) -> Any:
    # The default of a cascade that may have been shortened since.
    return value[:num_values] if isinstance(value, (list, tuple)) else value


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value > 0


def _check_numbers(name: str, values: list, wanted: str, is_valid: Callable[[Any], bool]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real) or not is_valid(value):
            raise ValueError(f"`{name}` has to be {wanted} but is {value!r} of type {type(value)}.")


def _get_label_id(name: str, ids_by_name: dict[str, list[int]]) -> int:
    ids = ids_by_name.get(name)
    if ids is None:
        nearest = difflib.get_close_matches(name, ids_by_name, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"`class_labels` contains {name!r}, which is no class of this pipeline. Do you mean {nearest!r}?"
        )
    if len(ids) > 1:
        raise ValueError(
            f"`class_labels` contains {name!r}, the name of several classes: {ids}. Pass one of these ids."
        )
    return ids[0]
