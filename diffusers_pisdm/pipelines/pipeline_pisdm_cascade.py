"""Class-conditional image generation from low to high resolution, with one diffusion model per stage."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    SchedulerMixin,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import BaseOutput, logging
from safetensors import SafetensorError
from typing_extensions import Self

from ..models.latents import are_latents, cast_vae, decode_latents, vae_scale_factor
from ..models.stage_models import StageModel
from ..models.strict_loading import StrictLoadingMixin
from ..models.transformer_pisdm import PISDMTransformer2DModel
from ..schedulers import check_steps, relay_start, set_timesteps
from ..utils.messages import count_of, show_size
from .call_checks import check_attention_kwargs, check_callback, check_generator, check_latents
from .call_lock import CallLock, one_call_at_a_time
from .class_names import (
    ClassLabels,
    check_id2label,
    for_each_label,
    get_class_id,
    get_class_mix,
    ids_by_name,
    list_labels,
    stack_mixes,
)
from .cuda_graphs import CudaGraphs
from .image_inputs import GivenImages, place_image, repeat_images
from .lora_loading import PISDMLoraLoaderMixin
from .number_checks import check_number
from .saved_files import check_saved_pipeline
from .stage_denoising import StageDenoisingMixin
from .stage_fit import check_cascade, check_guides
from .stage_plan import StagePlan, by_stage, first_values, per_stage, stage_lengths


logger = logging.get_logger(__name__)

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


class PISDMCascadePipeline(StrictLoadingMixin, StageDenoisingMixin, DiffusionPipeline, PISDMLoraLoaderMixin):
    r"""
    Generates images of given classes with a cascade (the paper's CN) of one to four diffusion models. The first makes
    a small image from noise; each of the others makes a larger one from noise and the image of the stage before,
    upsampled and slightly noised (conditioning augmentation). Stages are counted from 1, like the components.

    This pipeline inherits from [`DiffusionPipeline`]; see there for loading, saving, devices and offloading. LoRA
    adapters come from [`~pipelines.lora_loading.PISDMLoraLoaderMixin`].

    Args:
        transformer ([`PISDMTransformer2DModel`] or [`DiMTransformer2DModel`]): The first stage.
        scheduler ([`SchedulerMixin`]):
            The first stage's scheduler, e.g. [`DPMSolverMultistepScheduler`]. docs/schedulers.md lists which fit.
        transformer_2, transformer_3, transformer_4 ([`PISDMTransformer2DModel`], *optional*):
            The higher stages, without gaps.
        scheduler_2, scheduler_3, scheduler_4 ([`SchedulerMixin`], *optional*):
            Their schedulers; a stage without its own uses a copy of `scheduler`.
        vae ([`AutoencoderKL`], [`AutoencoderTiny`] or [`AutoencoderDC`], *optional*):
            The autoencoder whose latents all stages work on. Without it, they work on pixels in [-1, 1].
        id2label (`dict[int, str]` or `list[str]`, *optional*):
            Class names by id, all or some of `0..num_classes - 1`, saved with the pipeline. A name may list synonyms
            separated by commas.
        default_guidance_scale (`float` or `list[float]`, defaults to 4.0),
        default_num_inference_steps (`int` or `list[int]`, defaults to 20),
        default_noise_level (`float` or `list[float]`, defaults to 0.1):
            Used by a call that does not pass `guidance_scale` and so on, in the same form: the settings that suit
            the checkpoint best. Saved with the pipeline. A shortened cascade uses the first values of a list.

    Raises:
        ValueError: There is a gap between the stages, they do not fit together, a scheduler does not fit its stage, or
            a default or class name is wrong.
    """

    model_cpu_offload_seq = "->".join((*TRANSFORMERS, "vae"))
    _optional_components = [*TRANSFORMERS[1:], *SCHEDULERS[1:], "vae"]
    _lora_loadable_modules = list(TRANSFORMERS)
    _callback_tensor_inputs = ["latents", "low_res", "class_labels", "stage"]
    _guidance_slicing = False
    _cuda_graphs: CudaGraphs | None = None

    def __init__(
        self,
        transformer: StageModel,
        scheduler: SchedulerMixin,
        transformer_2: PISDMTransformer2DModel | None = None,
        transformer_3: PISDMTransformer2DModel | None = None,
        transformer_4: PISDMTransformer2DModel | None = None,
        scheduler_2: SchedulerMixin | None = None,
        scheduler_3: SchedulerMixin | None = None,
        scheduler_4: SchedulerMixin | None = None,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None = None,
        id2label: dict | Sequence | None = None,
        default_guidance_scale: float | list[float] = 4.0,
        default_num_inference_steps: int | list[int] = 20,
        default_noise_level: float | list[float] = 0.1,
    ):
        super().__init__()
        self._call_lock = CallLock()
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
        self.check_stages()
        defaults = {
            "default_guidance_scale": first_values(default_guidance_scale, self.num_stages),
            "default_num_inference_steps": first_values(default_num_inference_steps, self.num_stages),
            "default_noise_level": first_values(default_noise_level, self.num_stages - 1),
        }
        for name, value in defaults.items():
            per_stage(name, value, self.num_stages)
        self.register_to_config(id2label=check_id2label(id2label, self.transformer.config.num_classes), **defaults)
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_stages(
        cls,
        transformers: Sequence[PISDMTransformer2DModel],
        schedulers: SchedulerMixin | Sequence[SchedulerMixin],
        **kwargs,
    ) -> Self:
        r"""
        Makes a pipeline from lists of stages.

        Args:
            transformers (`Sequence[PISDMTransformer2DModel]`): One to four, first stage first.
            schedulers ([`SchedulerMixin`] or a sequence):
                One per stage, or one that the higher stages copy. Equal ones are kept once.
            kwargs (*optional*): The other arguments of the class: `vae`, `id2label`, ...

        Raises:
            ValueError: There are too many stages, too many or too few schedulers, or they do not fit together.
        """
        schedulers = [schedulers] if isinstance(schedulers, SchedulerMixin) else list(schedulers)
        if not 1 <= len(transformers) <= len(TRANSFORMERS):
            raise ValueError(f"`transformers` has {len(transformers)} stages, but a cascade has 1 to 4.")
        if len(schedulers) not in (1, len(transformers)):
            raise ValueError(
                f"`schedulers` has {count_of(len(schedulers), 'scheduler')} for {len(transformers)} `transformers`."
                " Pass one for all stages, or one per stage."
            )
        first = schedulers[0]
        if all(type(scheduler) is type(first) and scheduler.config == first.config for scheduler in schedulers):
            schedulers = [first]
        return cls(**dict(zip(TRANSFORMERS, transformers)), **dict(zip(SCHEDULERS, schedulers)), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        r"""
        Loads a saved pipeline like [`DiffusionPipeline.from_pretrained`], with three differences: it reads weights
        from safetensors only, unless `use_safetensors=False` asks for pickled ones; `transformer_2=None` (or 3, 4)
        shortens the cascade to the stages before; and with `dtype=torch.float16`, an autoencoder with `force_upcast`
        whose weights need it stays in float32. To pass components, call this method on the class itself:
        `DiffusionPipeline.from_pretrained` ignores those that have defaults.

        Raises:
            OSError: Weights are missing, pickled, truncated or corrupt.
            TypeError: There is no such argument.
            ValueError: The configuration holds an unknown key, weights are NaN or infinite, or the stages do not fit
                together.
        """
        kwargs = _drop_higher_stages(kwargs)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        if dtype != torch.float16 or "vae" in kwargs:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs.pop("torch_dtype", None)
        kwargs["dtype"] = {"default": dtype, "vae": torch.float32}
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if pipe.vae is not None:
            cast_vae(pipe.vae, dtype)
        return pipe

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """A published repository also names the file of its code, `publishing/remote_pipeline.py`: not needed here."""
        config = super()._dict_from_json_file(json_file)
        if isinstance(config, dict) and config.get("_class_name") == ["pipeline", cls.__name__]:
            config["_class_name"] = cls.__name__
        return config

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs) -> Any:
        """Reads a pipeline's configuration like diffusers; a damaged file in a local folder is a ValueError."""
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        folder = Path(pretrained_model_name_or_path)
        if (folder / cls.config_name).is_file():
            check_saved_pipeline(folder, loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, dtype: torch.dtype | None = None, **kwargs) -> Self:
        r"""
        Makes a pipeline from another one's components, without copying their weights; `transformer_2=None` (or 3, 4)
        shortens the cascade to the stages before. Guidance slicing stays on where it was on. Schedulers are copied, so
        that each pipeline may run in a thread of its own.

        Args:
            pipeline ([`DiffusionPipeline`]): The pipeline to take components and configuration from.
            dtype (`torch.dtype`, *optional*):
                The new pipeline's precision: models of another one are copied, so that `pipeline` keeps its own. By
                default, all models are shared as they are.
            kwargs (*optional*): Arguments of the class, instead of what `pipeline` has.
        """
        dtype = kwargs.pop("torch_dtype", dtype)  # diffusers' former name
        known = inspect.signature(cls).parameters
        arguments = {**pipeline.config, **pipeline.components, **_drop_higher_stages(kwargs)}
        arguments = {name: value for name, value in arguments.items() if name in known or name in kwargs}
        for name, value in arguments.items():
            if dtype is not None and isinstance(value, torch.nn.Module) and value.dtype != dtype:
                arguments[name] = copy.deepcopy(value).to(dtype)
        pipe = cls(**arguments)
        pipe.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        pipe._copy_schedulers()
        pipe._guidance_slicing = getattr(pipeline, "_guidance_slicing", False)
        pipe._cuda_graphs = copy.copy(getattr(pipeline, "_cuda_graphs", None))  # records its own
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        r"""
        Saves all components like [`DiffusionPipeline.save_pretrained`], with those that were set later. LoRA adapters
        have files of their own and are left out with a warning, unless they are fused. Raises OSError if a file cannot
        be written.
        """
        # diffusers would leave out a component that was None at first and was then set as an attribute.
        self.register_modules(**self.components)
        try:
            with self._base_classes():
                super().save_pretrained(save_directory, **kwargs)
        except SafetensorError as error:  # a full disk
            raise OSError(f"Cannot write to {save_directory}: {error}") from error

    def enable_guidance_slicing(self) -> None:
        """
        Enable sliced guidance: a guided step then runs the model on each half of its batch in turn. This saves memory,
        but is slower where a batch of twice the size takes less than twice as long. It is not saved with the pipeline.
        """
        self._guidance_slicing = True

    def disable_guidance_slicing(self) -> None:
        """Disable sliced guidance: a guided step runs the model once, on a batch of twice the size."""
        self._guidance_slicing = False

    def enable_cuda_graphs(self, max_graphs: int = 8) -> None:
        """
        Run the models as CUDA graphs, which launch all kernels of a pass at once: several times as fast for small
        images and batches, whose kernels take a GPU less time than launching them one by one takes the host. The
        images are the same.

        A graph is recorded at the second step with the same stage, size, batch and precision, and kept for later
        calls. It costs memory for all that a pass computes; graphs share it. Where there are hooks (offloading,
        layerwise casting), compiled models or no CUDA device, models run as without. It is not saved with the
        pipeline.

        Args:
            max_graphs (`int`, defaults to 8):
                How many graphs are kept, the most recently used ones. A stage takes one, or two if only some of its
                steps are guided; so does each further size or batch.

        Raises:
            ValueError: `max_graphs` is not a positive integer.
        """
        if not isinstance(max_graphs, int) or isinstance(max_graphs, bool) or max_graphs < 1:
            raise ValueError(f"`max_graphs` must be a positive integer, got {max_graphs!r}.")
        self._cuda_graphs = CudaGraphs(max_graphs)

    def disable_cuda_graphs(self) -> None:
        """Run the models without CUDA graphs, and free the memory of those that were recorded."""
        self._cuda_graphs = None

    def to(self, *args, **kwargs) -> Self:
        r"""Like [`DiffusionPipeline.to`]; CUDA graphs are recorded anew."""
        if self._cuda_graphs is not None:
            self._cuda_graphs.check([])
        return super().to(*args, **kwargs)

    @property
    def stages(self) -> list[PISDMTransformer2DModel]:
        """The transformers of the cascade, first stage first."""
        transformers = [getattr(self, name) for name in TRANSFORMERS]
        return [transformer for transformer in transformers if transformer is not None]

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def draws_latents(self) -> bool:
        """Whether the stages draw latents, which have no bounds and need an autoencoder to become images."""
        return are_latents(self.transformer.config.in_channels, self.vae)

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

    @property
    def labels(self) -> dict[str, int]:
        """Class ids by name, sorted, from `config.id2label`: full names and synonyms, each of just one class."""
        return {name: ids[0] for name, ids in sorted(ids_by_name(self.config.id2label).items()) if len(ids) == 1}

    def get_label_ids(self, class_labels: ClassLabels) -> list[int]:
        """
        Turns `class_labels` in any form into class ids.

        Args:
            class_labels (`int`, `str`, or a sequence, `np.ndarray` or `torch.Tensor` of these, nested or not):
                Class ids, or names from `config.id2label`: full ones, or one of a name's comma-separated synonyms.

        Returns:
            `list[int]`: One id per label, each in [0, `num_classes`).

        Raises:
            TypeError: A label is neither an integer nor a name.
            ValueError: There are no labels, an id is out of range, or a name is unknown or that of several classes.
        """
        num_classes = self.transformer.config.num_classes
        return for_each_label(get_class_id, list_labels(class_labels), self.config.id2label, num_classes)

    def get_class_mixes(self, class_labels: ClassLabels) -> list[dict[int, float]]:
        """
        Turns `class_labels` in any form that a call takes into the shares of each label's classes, by class id.

        Args:
            class_labels (`int`, `str`, `dict`, or a sequence, `np.ndarray` or `torch.Tensor` of these, nested or not):
                As of [`~PISDMCascadePipeline.get_label_ids`], or mixes: `{class: weight}`.

        Returns:
            `list[dict[int, float]]`: One per label; a single class has the share 1.

        Raises:
            TypeError: A class is neither an integer nor a name.
            ValueError: A class is none of the pipeline's, a weight is not in [0, 1], or weights do not sum to 1.
        """
        num_classes = self.transformer.config.num_classes
        return for_each_label(get_class_mix, list_labels(class_labels), self.config.id2label, num_classes)

    def check_stages(self) -> None:
        """Raises a `ValueError` if a stage is missing or does not fit the one before, or a scheduler its stage."""
        transformers = {name: getattr(self, name) for name in TRANSFORMERS}
        check_cascade(transformers, {name: getattr(self, name) for name in SCHEDULERS}, self.vae)

    def check_inputs(
        self,
        num_labels: int,
        num_images_per_prompt: int,
        batch_size: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        eta: float,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
        attention_kwargs: dict[str, Any] | None,
    ) -> None:
        """
        Raises a `TypeError` or `ValueError` that names the first wrong argument, of those that are the same for all
        stages.
        """
        check_number("num_images_per_prompt", num_images_per_prompt)
        check_number("eta", eta)
        if batch_size is not None:
            check_number("batch_size", batch_size)
        check_generator(generator, num_labels * num_images_per_prompt)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` has to be one of {', '.join(OUTPUT_TYPES)} but is {output_type!r}.")
        if output_type != "latent" and self.vae is None and self.draws_latents:
            raise ValueError(
                f"The stages draw latents of {self.transformer.config.in_channels} channels, and there is no"
                " autoencoder to make images of them. Load the pipeline with the one that they were trained with"
                ' (`vae=`), or pass `output_type="latent"`. `pisdm convert-dim --vae` adds DiM\'s.'
            )
        check_attention_kwargs(attention_kwargs)
        check_callback(callback_on_step_end)
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found"
                f" {unknown}."
            )

    def plan_stages(
        self,
        num_images: int,
        batch_size: int | None,
        height: int | None,
        width: int | None,
        num_inference_steps: int | list[int] | None,
        timesteps: list[int] | list[list[int] | None] | None,
        sigmas: list[float] | list[list[float] | None] | None,
        guidance_scale: float | list[float] | None,
        guidance_start: float | list[float],
        guidance_stop: float | list[float],
        noise_level: float | list[float] | None,
        relay_strength: float | list[float | None] | None,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | list[torch.Tensor | None] | None,
        class_weights: torch.Tensor | None,
        given: list[GivenImages | None],
        guidance_model: StageModel | list[StageModel | None] | None,
    ) -> list[StagePlan]:
        """
        Checks the arguments of `__call__` that may differ between stages, and gives each stage its own; those without
        `given` do not run.
        """
        num_stages = self.num_stages
        if num_inference_steps is None:
            num_inference_steps = first_values(self.config.default_num_inference_steps, num_stages)
        if guidance_scale is None:
            guidance_scale = first_values(self.config.default_guidance_scale, num_stages)
        if noise_level is None:
            noise_level = first_values(self.config.default_noise_level, num_stages - 1)
        if isinstance(latents, torch.Tensor):
            latents = [latents] + [None] * (num_stages - 1)
        schedules = by_stage(num_stages, num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        settings = by_stage(
            num_stages,
            latents=latents,
            guidance_scale=guidance_scale,
            guidance_start=guidance_start,
            guidance_stop=guidance_stop,
            noise_level=noise_level,
            relay_strength=relay_strength,
        )
        first = next(i for i, images in enumerate(given) if images is not None)
        if not isinstance(guidance_scale, (list, tuple)):
            # A single scale is set once: what a callback makes of it lasts.
            for setting in settings[first + 1 :]:
                setting["guidance_scale"] = None

        for setting in settings:
            if setting["guidance_start"] > setting["guidance_stop"]:
                raise ValueError(
                    f"`guidance_start` is {setting['guidance_start']}, after `guidance_stop`, which is"
                    f" {setting['guidance_stop']}. Pass a start that is not above the stop; to turn guidance off, pass"
                    " `guidance_scale=1.0`."
                )
        guides = check_guides(guidance_model, self.stages, self._execution_device)
        for setting, size, images, guide in zip(settings, self.get_stage_sizes(height, width), given, guides):
            setting["shape"] = (num_images, self.transformer.config.in_channels, *size)
            setting["given"] = images
            setting["guide"] = guide
            if images is not None and images.strength is not None:
                setting["relay_strength"] = images.strength
            if setting["latents"] is not None:
                check_latents(setting["latents"], setting["shape"], self._execution_device)
        if any(setting["latents"] is not None for setting in settings[:first]):
            raise ValueError(
                f"`latents` is the noise of a stage that does not run: `image` begins with stage {first + 1}. Pass a"
                " list, with None for the stages below."
            )

        plans: list[StagePlan] = []
        stages = list(zip(self.stages, self.get_stage_schedulers(), schedules, settings))
        for number, (transformer, scheduler, schedule, setting) in enumerate(stages[first:], first + 1):
            plans.append(
                StagePlan(
                    number=number,
                    first_step=sum(len(plan.timesteps) for plan in plans),
                    transformer=transformer,
                    scheduler=scheduler,
                    timesteps=self.retrieve_timesteps(scheduler, **schedule, relay_strength=setting["relay_strength"]),
                    step_kwargs=self.prepare_extra_step_kwargs(scheduler, generator, eta),
                    class_weights=class_weights,
                    batch_size=num_images if batch_size is None else batch_size,
                    **setting,
                )
            )
        return plans

    def get_stage_sizes(self, height: int | None = None, width: int | None = None) -> list[tuple[int, int]]:
        """
        Scales the final image's size down to each stage's, in proportion to their `sample_size`.

        Args:
            height, width (`int`, *optional*): Size of the final image in pixels; the last stage's by default.

        Returns:
            `list[tuple[int, int]]`: Height and width of each stage's latents (its images, without a `vae`).

        Raises:
            ValueError: A size leaves a stage with a fraction of a patch.
        """
        configs, factor = [transformer.config for transformer in self.stages], vae_scale_factor(self.vae)
        heights, widths = (
            stage_lengths(name, length, configs, factor) for name, length in (("height", height), ("width", width))
        )
        return list(zip(heights, widths))

    def _copy_schedulers(self) -> None:
        for name in SCHEDULERS:
            if getattr(self, name) is not None:
                setattr(self, name, copy.deepcopy(getattr(self, name)))

    def get_stage_schedulers(self) -> list[SchedulerMixin]:
        """Returns one scheduler per stage, no two the same object; where a stage has none, a copy of `scheduler`."""
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
        """Makes a scheduler forget its last run, and returns the timesteps `(T,)` of the next one, on the CPU."""
        set_timesteps(scheduler, num_inference_steps, timesteps, sigmas)
        start = 0 if relay_strength is None else relay_start(scheduler, relay_strength)
        check_steps(scheduler, start)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)  # a search would take the second of two equal timesteps
        return scheduler.timesteps[start:]

    def prepare_extra_step_kwargs(
        self, scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None, eta: float
    ) -> dict[str, Any]:
        """Returns what the scheduler's `step` takes of `generator` and DDIM's arguments."""
        accepted = inspect.signature(scheduler.step).parameters
        # By default, DDIM combines the clipped image with the noise of the unclipped one, which leaves noise behind.
        # If nothing is clipped, this changes nothing.
        extra = {"generator": generator, "eta": eta, "use_clipped_model_output": True}
        return {name: value for name, value in extra.items() if name in accepted}

    def place_image(
        self,
        image: PipelineImageInput | None,
        mask_image: PipelineImageInput | None,
        strength: float | None,
        num_labels: int,
        height: int | None,
        width: int | None,
    ) -> list[GivenImages | None]:
        """Checks a given image, and returns what each stage does with it; `None` for those that do not run."""
        scale_factor = vae_scale_factor(self.vae)
        sizes = [(scale_factor * h, scale_factor * w) for h, w in self.get_stage_sizes(height, width)]
        config = self.transformer.config if self.vae is None else self.vae.config
        return place_image(image, mask_image, strength, sizes, config.in_channels, num_labels)

    @torch.no_grad()
    @one_call_at_a_time
    def __call__(
        self,
        class_labels: ClassLabels,
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
        attention_kwargs: dict[str, Any] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float | None = None,
        batch_size: int | None = None,
        guidance_model: StageModel | list[StageModel | None] | None = None,
    ) -> PISDMCascadePipelineOutput | tuple:
        r"""
        Generates images.

        Arguments "per stage" take one value for all stages, or a list with one value per stage. `noise_level` and
        `relay_strength` only concern the higher stages: their lists begin with the second stage's value.

        Args:
            class_labels (`int`, `str`, `dict`, or a sequence, `np.ndarray` or `torch.Tensor` of these, nested or not):
                Class ids, or names from `config.id2label` (`pipe.labels` lists them). A dictionary is a mix of
                classes, `{class: weight}`, whose embeddings are averaged; its weights are in [0, 1] and sum to 1.
            height, width (`int`, *optional*):
                Size of the final images in pixels; the last stage's `sample_size` by default. Lower stages scale with
                it.
            num_images_per_prompt (`int`, defaults to 1): Images per label; those of one label are neighbours.
            num_inference_steps (`int` or `list[int]`, *optional*):
                Denoising steps, per stage; `config.default_num_inference_steps` by default. The paper takes 50; with
                DPM-Solver, small checkpoints gain nothing beyond 10 (`benchmarks/sampling_efficiency.py`).
            timesteps (`list[int]` or `list[list[int] | None]`, *optional*):
                Custom timesteps, per stage, for schedulers that support them. They replace `num_inference_steps`; a
                stage whose list is `None` keeps it.
            sigmas (`list[float]` or `list[list[float] | None]`, *optional*): Custom noise levels, likewise.
            guidance_scale (`float` or `list[float]`, *optional*):
                Weight w of classifier-free guidance, `eps_u + w (eps_c - eps_u)` on all channels, per stage;
                `config.default_guidance_scale` by default. As in diffusers, guidance is off where w <= 1, which saves
                half the work. The paper's value is 4.0.
            guidance_start, guidance_stop (`float` or `list[float]`, default to 0.0 and 1.0):
                Guidance is on from the share `start` of a stage's steps, counted from the noisy end, until before the
                share `stop`, per stage; both in [0, 1], the start not above the stop. The other steps skip the
                unconditional half.
            noise_level (`float` or `list[float]`, *optional*):
                Noise on the low-resolution condition in [0, 1), per higher stage; `config.default_noise_level` by
                default. A little hides what tells a generated condition from the real ones of training; a lot makes
                a stage ignore its condition.
            relay_strength (`float` or `list[float | None]`, *optional*):
                Relay start, per higher stage: begin with the upsampled lower image, noised to this share of the
                schedule in (0, 1], instead of pure noise, and run only that share of the steps.
            eta (`float`, defaults to 0.0):
                Stochasticity of [`DDIMScheduler`] in [0, 1]; ignored by other schedulers.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes images reproducible. A list holds one generator per image, which draws all of that image's noise
                (initial, augmentation, the scheduler's): the image is then the same in any batch, up to rounding. A
                single generator draws for the whole batch at once, so that an image depends on the size of its batch;
                for a batch of one image, it does the same as a list.
            latents (`torch.Tensor` of shape `(B, C, h, w)` or `list[torch.Tensor | None]`, *optional*):
                Initial standard normal noise to use instead of drawing it, per stage. A single tensor is the first
                stage's.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            output_stages (`bool`, defaults to `False`): Whether to also return the images of every stage that ran.
            return_dict (`bool`, defaults to `True`): Whether to return a [`PISDMCascadePipelineOutput`].
            callback_on_step_end (`Callable`, [`PipelineCallback`] or [`MultiPipelineCallbacks`], *optional*):
                Called as `callback(pipe, step, timestep, callback_kwargs)` after every step; `step` counts over all
                stages, up to `pipe.num_timesteps - 1`. It returns a dictionary, whose `latents`, `low_res` and
                `class_labels` take effect. Setting `pipe._interrupt` ends the run with the running stage's image; a
                warning says which stage that was unless it was the last.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                What `callback_kwargs` holds: `"latents"`, `"low_res"` (the noised condition; `None` in the first
                stage), `"class_labels"` and `"stage"` (from 1). At a stage's last step, `latents` is its image; before
                that, in a stage with `residual_scale`, the noisy residual.
            attention_kwargs (`dict`, *optional*):
                `{"scale": s}` multiplies the strength of the LoRA adapters by `s` for this call, as in diffusers.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these, *optional*):
                An image to begin with, or one per label: PIL images, arrays `(H, W, C)` or tensors `(C, H, W)` in
                [0, 1], also in batches. Transparent pixels become white. The image belongs to the stage of its size,
                or between two sizes to the lower stage, for which it is shrunk. By itself, it is taken as that stage's
                output: only the stages above run, and enlarge it.
            mask_image (the types of `image`, *optional*):
                What to repaint of `image`, of its size: white pixels are repainted, black ones kept, as in diffusers.
                Arrays and tensors may be `(H, W)`.
                All stages run. Up to the image's stage, the known pixels are noised to the level of each step, and
                returned as they were; the stages above enlarge the result.
            strength (`float`, *optional*):
                Image-to-image: how much to change `image`, in [0, 1]. Its stage begins with the image noised to this
                share of the schedule, and runs that share of the steps; 0 keeps the image, the default. Shrink an
                image to let lower stages change it. With `mask_image`, it is the first stage that begins with the
                noised image; by default, 1.0, with pure noise.
            batch_size (`int`, *optional*):
                The most images that the models and the autoencoder take at once, to bound memory; all by default. The
                images are the same up to rounding: noise is drawn for all of them.
            guidance_model ([`PISDMTransformer2DModel`], [`DiMTransformer2DModel`] or a list of these, *optional*):
                Autoguidance (Karras et al., 2024): `eps_g + w (eps - eps_g)`, with w as in `guidance_scale`, where
                `eps_g` is a weaker model's prediction, given the same class: a model of the same stage, target and
                noise schedule that is smaller, or trained less. A single one is the first stage's; a list has one per
                stage, or None where the model without the class guides. It is not part of the pipeline, which neither
                saves nor moves it.

        Returns:
            [`PISDMCascadePipelineOutput`], or a tuple of its values if `return_dict` is `False`.

        Raises:
            TypeError: A label, `latents`, `generator`, the callback or what it returns has the wrong type.
            ValueError: An argument has a wrong value, length, shape or device; the message names it. Or the images are
                NaN or infinite, and `output_type` is `"pil"`.

        A pipeline draws for one thread at a time; others wait. For several at once, give each thread a pipeline of its
        own with [`~PISDMCascadePipeline.from_pipe`]: they share the models. Each call puts copies in the place of the
        schedulers and runs on them.

        Latents, noise and scheduler steps are float32 whatever the precision of the transformers, so that half
        precision changes the model's rounding but not the noise.

        Example:

        ```py
        >>> import torch
        >>> from diffusers_pisdm import PISDMCascadePipeline

        >>> pipe = PISDMCascadePipeline.from_pretrained("checkpoints/pisdm-emoji128")
        >>> generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        >>> images = pipe(class_labels=[207, 42], generator=generators).images
        ```
        """
        # 1. Check all arguments, and decide what each stage does
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_stages()
        self._copy_schedulers()  # another pipeline, in another thread, may hold the same ones
        mixes = self.get_class_mixes(class_labels)
        self.check_inputs(
            len(mixes),
            num_images_per_prompt,
            batch_size,
            generator,
            output_type,
            eta,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            attention_kwargs,
        )
        class_labels, class_weights = stack_mixes(mixes, num_images_per_prompt, self._execution_device)
        stages = self.plan_stages(
            len(class_labels),
            batch_size,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guidance_start=guidance_start,
            guidance_stop=guidance_stop,
            noise_level=noise_level,
            relay_strength=relay_strength,
            eta=eta,
            generator=generator,
            latents=latents,
            class_weights=class_weights,
            given=self.place_image(image, mask_image, strength, len(mixes), height, width),
            guidance_model=guidance_model,
        )
        self._num_timesteps = sum(len(stage.timesteps) for stage in stages)
        self._current_timestep = None
        self._interrupt = False

        # 2. Run the stages, from low to high resolution
        stage_latents = []
        upsampled = low_res = None
        if stages[0].given.lower is not None:
            latents = self.encode_image(stages[0], stages[0].given.lower)  # (B, C, h, w)
        for stage in stages:
            self._stage = stage.number
            if stage.guidance_scale is not None:
                self._guidance_scale = stage.guidance_scale
            if stage.number > 1:
                upsampled, low_res = self.prepare_low_res(stage, latents, generator)  # (B, C, H, W) each
            latents, known = self.prepare_latents(stage, upsampled, generator)  # (B, C, H, W)
            with self._scaled_adapters((attention_kwargs or {}).get("scale", 1.0)):
                latents, class_labels = self.denoise(
                    stage,
                    latents,
                    upsampled,
                    low_res,
                    known,
                    class_labels,
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                )
            if output_stages:
                stage_latents.append((stage, latents))
            if self.interrupt:
                if stage.number < self.num_stages:
                    height, width = (length * vae_scale_factor(self.vae) for length in stage.shape[2:])
                    logger.warning(
                        f"The run was interrupted in stage {stage.number} of {self.num_stages}: its images are that"
                        f" stage's, of {show_size(width, height)} pixels."
                    )
                break

        # 3. Turn latents into images
        self._current_timestep = None
        images = self._postprocess(stage, latents, output_type)
        stage_images = None
        if output_stages:
            stage_images = [self._postprocess(*lower, output_type) for lower in stage_latents[:-1]] + [images]

        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, stage_images) if output_stages else (images,)
        return PISDMCascadePipelineOutput(images=images, stage_images=stage_images)

    def _postprocess(
        self, stage: StagePlan, latents: torch.Tensor, output_type: str
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        if output_type == "latent":
            return latents
        images = torch.cat([decode_latents(self.vae, batch) for batch in latents.split(stage.batch_size)])
        if stage.given.known is not None:  # an autoencoder does not give back what it was given
            given = (stage.given.known, stage.given.mask)
            known, mask = (repeat_images(part, len(images)).to(images.device) for part in given)
            images = torch.where(mask, images, known)
        if output_type == "pil" and not images.isfinite().all():  # which 8 bits cannot show
            raise ValueError(
                "The images came out as NaN or infinity. Lower `guidance_scale` if it is large, and draw in bfloat16"
                " or float32 instead of float16."
            )
        return self.image_processor.postprocess(images, output_type)


def _drop_higher_stages(kwargs: dict[str, Any]) -> dict[str, Any]:
    # A stage that is explicitly None also removes those above it: they would have no condition.
    dropped = [i for i, name in enumerate(TRANSFORMERS) if name in kwargs and kwargs[name] is None]
    if not dropped:
        return kwargs
    names = TRANSFORMERS[dropped[0] :] + SCHEDULERS[dropped[0] :]
    return {**dict.fromkeys(names), **kwargs}
