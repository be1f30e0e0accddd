"""A small picture of each class, all in one file beside the model: drawn here, shown on the page."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from ..pipelines import PISDMCascadePipeline
from ..utils.files import write_whole
from ..utils.shipped_files import CHECKPOINT, find_model


FILE_NAME = "class_thumbnails.webp"  # in the model's folder
COLUMNS = 32
CELL_SIZE = 64  # pixels
QUALITY = 80
BATCH_SIZE = 20


def find_sheet(model: str, num_classes: int) -> Path | None:
    """The sheet of a model's folder, if it has one with as many cells as the model has classes."""
    path = Path(model) / FILE_NAME
    if not path.is_file():
        return None
    with Image.open(path, formats=["WEBP"]) as sheet:
        return path if sheet.size == _sheet_size(num_classes) else None


def draw_sheet(pipe: DiffusionPipeline, seed: int = 0, num_inference_steps: int | list[int] | None = None) -> Image:
    """Draws every class once, all from the same seed, and returns them row by row in order of their ids."""
    num_classes = pipe.transformer.config.num_classes
    sheet = Image.new("RGB", _sheet_size(num_classes), "white")
    for start in tqdm(range(0, num_classes, BATCH_SIZE)):
        ids = list(range(start, min(start + BATCH_SIZE, num_classes)))
        generators = [torch.Generator().manual_seed(seed) for _ in ids]
        images = pipe(class_labels=ids, generator=generators, num_inference_steps=num_inference_steps).images
        for class_id, image in zip(ids, images):
            row, column = divmod(class_id, COLUMNS)
            cell = image.convert("RGB").resize((CELL_SIZE, CELL_SIZE), Image.Resampling.LANCZOS)
            sheet.paste(cell, (column * CELL_SIZE, row * CELL_SIZE))
    return sheet


def _sheet_size(num_classes: int) -> tuple[int, int]:
    return COLUMNS * CELL_SIZE, math.ceil(num_classes / COLUMNS) * CELL_SIZE


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(CHECKPOINT), help="a folder; the sheet is written into it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", help="one number, or one per stage")
    args = parser.parse_args(arguments)
    folder = Path(find_model(args.model))
    if not folder.is_dir():
        sys.exit(f"error: {folder} is not a folder. Pass the folder of a saved pipeline.")
    steps = args.num_inference_steps
    try:
        pipe = PISDMCascadePipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        sheet = draw_sheet(pipe, args.seed, steps[0] if steps and len(steps) == 1 else steps)
        with write_whole(folder / FILE_NAME) as unfinished:
            sheet.save(unfinished, format="WEBP", quality=QUALITY, method=6)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"Wrote {folder / FILE_NAME} ({(folder / FILE_NAME).stat().st_size / 1000:.0f} kB).")


if __name__ == "__main__":
    main()
