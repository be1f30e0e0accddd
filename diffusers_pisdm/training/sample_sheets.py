"""Sample sheets of a model in training, with the same classes and seeds every time, and a sheet over time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..utils.files import write_whole
from ..utils.image_grid import make_image_grid


STRIP_LENGTH = 8  # images per row of the sheet over time
MAX_ROWS = 40  # of that sheet, spread evenly over a longer run


def draw_samples(
    pipeline: DiffusionPipeline, max_classes: int, seed: int, **arguments: Any
) -> tuple[list[Image.Image], list[str]]:
    """
    Draws one image for each of several evenly spread classes, the same in every call, image i with `seed + i`; returns
    images and class names. `arguments` go to the pipeline's call; its progress bars stay off from then on.
    """
    num_classes = len(pipeline.config.id2label)
    count = min(max_classes, num_classes)
    classes = [i * num_classes // count for i in range(count)]
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    images = pipeline(class_labels=classes, generator=generators, **arguments).images
    return images, [pipeline.config.id2label[i] for i in classes]


def save_sample_sheets(folder: str | Path, step: int, images: list[Image.Image], labels: list[str]) -> Path:
    """
    Writes `step-<step>.png`, a labelled grid of the images, and adds a row with the first few to `over_time.png`,
    beside the step. Classes and seeds must be the same in every call.
    """
    folder = Path(folder)
    strips = folder / "strips"
    strips.mkdir(parents=True, exist_ok=True)
    strip = images[:STRIP_LENGTH]
    width, height = strip[0].size
    row = Image.new("RGB", (width * len(strip), height))
    for index, image in enumerate(strip):
        row.paste(image, (index * width, 0))
    _save(row, strips / f"step-{step:07d}.png")
    _save(_over_time(strips, labels, width, height), folder / "over_time.png")

    grid = folder / f"step-{step:07d}.png"
    columns = max(4, round(len(images) ** 0.5))
    _save(make_image_grid(images, labels, columns), grid)
    return grid


def forget_later_sheets(folder: str | Path, step: int) -> None:
    """Removes the pictures of steps after `step`: a run that resumes there draws them again."""
    for picture in [*Path(folder).glob("step-*.png"), *Path(folder).glob("strips/step-*.png")]:
        number = _step_of(picture)
        if number is not None and number > step:
            picture.unlink()


def _over_time(strips: Path, names: list[str], width: int, height: int) -> Image.Image:
    rows = sorted((row for row in strips.glob("step-*.png") if _step_of(row) is not None), key=_step_of)
    if len(rows) > MAX_ROWS:
        rows = [rows[round(i * (len(rows) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]
    images, labels = [], []
    for row in rows:
        with Image.open(row) as strip:
            count = strip.width // width
            images += [Image.new("RGB", (width, height), "white")]  # above the step
            images += [strip.crop((i * width, 0, (i + 1) * width, height)) for i in range(count)]
            labels += [f"step {_step_of(row)}", *names[:count]]
    return make_image_grid(images, labels, columns=count + 1)


def _save(picture: Image.Image, path: Path) -> None:
    with write_whole(path) as unfinished:
        picture.save(unfinished, format="PNG")


def _step_of(picture: Path) -> int | None:
    match = re.fullmatch(r"step-(\d+)", picture.stem)
    return None if match is None else int(match[1])  # not one of ours
