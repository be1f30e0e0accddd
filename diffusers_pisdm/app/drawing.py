"""One drawing: checked, run in a thread of its own, and watched step by step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..models.latents import decode_latents
from ..ops.conditioning_augmentation import residual_to_image
from ..pipelines import PISDMCascadePipeline
from ..pipelines.number_checks import NUMBERS
from ..pipelines.pipeline_pisdm_cascade import SCHEDULERS
from ..utils.arguments import SEEDS
from ..utils.messages import count_of
from ..utils.names import show_name
from ..utils.png_recipe import dtype_name
from .models import Model


MOST_IMAGES = 16
LARGEST_SEED = 2**53 - 1  # larger whole numbers are rounded by browsers
# What one visitor may ask of a server that draws for many: less than the pipeline takes.
LIMITS = {"num_inference_steps": (1, 100), "guidance_scale": (1, 10)}
ELSEWHERE = "`pisdm generate` goes beyond that."


@dataclass(frozen=True)
class Drawing:
    """What to draw: image `i` shows class `class_ids[i]`, from a generator seeded with `seed + i`."""

    class_ids: list[int]
    seed: int
    num_inference_steps: list[int]  # per stage
    guidance_scale: list[float]  # per stage
    image: Image.Image | None = None  # to enlarge, of a stage's size

    def recipes(self, model: Model) -> list[dict[str, Any]]:
        """What each image is drawn by, to keep in its file."""
        shared = {
            "model": model.name,
            "weights": model.weights,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "noise_level": model.default("noise_level")[: model.pipe.num_stages - 1],
            "scheduler": type(model.pipe.scheduler).__name__,
            "dtype": dtype_name(model.pipe.transformer.dtype),
        }
        if self.image is not None:
            shared["image"] = f"a picture of {self.image.width}x{self.image.height} pixels"
        labels = [model.labels[class_id] for class_id in self.class_ids]
        return [
            {"class_label": int(label) if label.isdigit() else label, "seed": self.seed + i, **shared}
            for i, label in enumerate(labels)
        ]


@dataclass(frozen=True)
class Progress:
    """What there is after a step: the images so far, of the running stage's size."""

    stage: int  # from 1
    step: int  # of this stage, from 1
    images: list[Image.Image]


def plan_drawing(
    model: Model,
    class_labels: list[str | int],
    images_per_class: int,
    seed: int,
    num_inference_steps: int | list[int],
    guidance_scale: float | list[float],
    image: Image.Image | None = None,
) -> Drawing:
    """Checks what is asked for; raises a TypeError or ValueError that says what is wrong."""
    if not isinstance(class_labels, list):
        raise TypeError(
            f"`class_labels` has to be a list of class names or ids but is {_quote(class_labels)}."
            f" Pass {[model.labels[0]]}, for example."
        )
    if not class_labels:
        raise ValueError("No class is chosen. Pick at least one.")
    _check_whole("The number of pictures per class", images_per_class, 1, MOST_IMAGES)
    num_images = len(class_labels) * int(images_per_class)
    if num_images > MOST_IMAGES:
        raise ValueError(
            f"{len(class_labels)} classes with {images_per_class} pictures each are {num_images}, but at most"
            f" {MOST_IMAGES} are drawn at once. Choose fewer."
        )
    _check_whole("The seed", seed, 0, LARGEST_SEED, is_valid=_is_whole(seed) and SEEDS.fault(seed) is None)
    steps = _per_stage(model, "num_inference_steps", num_inference_steps)
    scales = _per_stage(model, "guidance_scale", guidance_scale)
    class_ids = [class_id for class_id in model.find_classes(class_labels) for _ in range(int(images_per_class))]
    return Drawing(class_ids, int(seed), [int(value) for value in steps], [float(value) for value in scales], image)


def _per_stage(model: Model, name: str, values: Any) -> list:
    """One value for each stage, within what the pipeline takes and what this page allows."""
    num_stages = model.pipe.num_stages
    values = values if isinstance(values, list) else [values] * num_stages
    if len(values) != num_stages:
        raise ValueError(
            f"`{name}` has {count_of(len(values), 'value')}, but this model has {count_of(num_stages, 'stage')}."
            " Pass one value per stage."
        )
    words, is_valid = NUMBERS[name]
    least, most = LIMITS[name]
    for stage, value in enumerate(values, start=1):
        if not is_valid(value):
            raise ValueError(f"`{name}` of stage {stage} has to be {words} but is {_quote(value)}.")
        if not least <= value <= most:
            raise ValueError(
                f"`{name}` of stage {stage} is {_quote(value)}, but this page draws with {least} to {most}."
                f" {ELSEWHERE}"
            )
    return values


def _check_whole(what: str, value: Any, least: int, most: int, is_valid: bool = False) -> None:
    """Raises a ValueError unless a number is whole and in a range; if `is_valid`, the range is this page's own."""
    if not _is_whole(value) or not least <= value <= most:
        elsewhere = f" {ELSEWHERE}" if is_valid else ""
        raise ValueError(f"{what} has to be a whole number from {least} to {most} but is {_quote(value)}.{elsewhere}")


def _is_whole(value: Any) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer or (isinstance(value, float) and value.is_integer())


def _quote(value: Any) -> str:
    return show_name(repr(value)) if value is not None else "empty"


def draw(pipe: PISDMCascadePipeline, drawing: Drawing) -> Iterator[Progress]:
    """Draws and yields after every step. Whoever stops iterating also stops the drawing, within a step."""
    done: queue.SimpleQueue[Progress | Exception | None] = queue.SimpleQueue()
    abandoned = threading.Event()  # of this drawing alone: the pipeline is shared
    last_stage = step = 0

    def on_step_end(pipe: PISDMCascadePipeline, _: int, __: torch.Tensor, now: dict[str, Any]) -> dict:
        nonlocal last_stage, step
        step = step + 1 if now["stage"] == last_stage else 1
        last_stage = now["stage"]
        if abandoned.is_set():
            pipe._interrupt = True
        elif (images := _show(pipe, now, step == drawing.num_inference_steps[last_stage - 1])) is not None:
            done.put(Progress(last_stage, step, images))
        return {}

    def run() -> None:
        try:
            pipe(
                class_labels=drawing.class_ids,
                generator=[torch.Generator().manual_seed(drawing.seed + i) for i in range(len(drawing.class_ids))],
                num_inference_steps=drawing.num_inference_steps,
                guidance_scale=drawing.guidance_scale,
                image=drawing.image,
                output_type="latent",
                callback_on_step_end=on_step_end,
                callback_on_step_end_tensor_inputs=["latents", "low_res", "stage"],
            )
            done.put(None)
        except Exception as error:  # of the thread: raised below
            done.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while (item := done.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        abandoned.set()


def _show(pipe: PISDMCascadePipeline, now: dict[str, Any], is_last: bool) -> list[Image.Image] | None:
    """The images after a step; before a stage's last one, what the model takes them to be."""
    latents, low_res, stage = now["latents"], now["low_res"], now["stage"]  # (B, C, H, W)
    if not is_last:
        if pipe.vae is not None:  # decoding takes longer than a step
            return None
        scheduler = getattr(pipe, SCHEDULERS[stage - 1])
        if getattr(getattr(scheduler, "config", None), "algorithm_type", "").endswith("++"):
            latents = scheduler.model_outputs[-1]  # the predicted image, without the noise of later steps
        scale = pipe.stages[stage - 1].config.get("residual_scale")
        latents = latents if scale is None else residual_to_image(latents, low_res, scale)
    return pipe.image_processor.postprocess(decode_latents(pipe.vae, latents).clamp(-1, 1), "pil")
