"""
Sample a PIS-DM cascade into a labelled grid.

    python examples/generate.py --model checkpoints/pisdm-emoji128 --output grid.png
    python examples/generate.py --classes 207 fluent3d/animal-mammal --images_per_class 8 --seed 1
    python examples/generate.py --scheduler UniPCMultistepScheduler --num_inference_steps 20 10 10 10
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.schedulers import swap_scheduler
from diffusers_pisdm.utils.arguments import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE
from diffusers_pisdm.utils.files import write_whole
from diffusers_pisdm.utils.image_grid import make_image_grid
from drawing import find_class_ids


NUM_DEFAULT_CLASSES = 8
COLUMNS = 8
CELL_SIZE = 128  # wide enough for the class names of the published model
STAGE_COLUMNS = 16
STAGE_CELL_SIZE = 64


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample a PIS-DM cascade into a labelled grid.")
    parser.add_argument("--model", default="checkpoints/pisdm-emoji128", help="a folder or Hub repository")
    parser.add_argument(
        "--classes",
        nargs="+",
        help="class names or ids, separated by spaces or commas; a number that is a name is that class "
        f"(default: {NUM_DEFAULT_CLASSES} classes spread evenly over the model's classes)",
    )
    parser.add_argument("--images_per_class", type=COUNT, default=4)
    parser.add_argument(
        "--num_inference_steps", "--steps", type=COUNT, nargs="+", help="denoising steps: one number, or one per stage"
    )
    parser.add_argument(
        "--guidance_scale", type=NOT_NEGATIVE, nargs="+", help="one number, or one per stage; 1 turns it off"
    )
    parser.add_argument("--seed", type=COUNT_OR_ZERO, default=0, help="image i of the grid is drawn with seed + i")
    parser.add_argument("--scheduler", help="a diffusers scheduler class to sample with, e.g. DDIMScheduler")
    parser.add_argument("--output", type=Path, default=Path("grid.png"), help="the picture to write")
    parser.add_argument("--stages_output", type=Path, help="a second picture: the same images at every stage")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def draw_stages(stage_images: list[list[Image.Image]], labels: list[str]) -> Image.Image:
    """
    Draw every image at every stage: a column per image, with its label below, and a row per stage, from the first
    down to the last.
    """
    columns = min(STAGE_COLUMNS, len(labels))
    cells, captions = [], []
    for start in range(0, len(labels), columns):
        block = slice(start, start + columns)
        empty = columns - len(labels[block])
        for stage, images in enumerate(stage_images):
            is_last = stage == len(stage_images) - 1
            cells += images[block] + [Image.new("RGB", (1, 1), "white")] * empty
            captions += labels[block] if is_last else [f"{image.width} px" for image in images[block]]
            captions += [""] * empty
    return make_image_grid(cells, captions, columns=columns, cell_size=STAGE_CELL_SIZE)


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image so that an interruption leaves either the old file or the new one, never a torn one."""
    with write_whole(path, f".unfinished{path.suffix}") as unfinished:  # Pillow goes by the suffix
        image.save(unfinished)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    start = time.perf_counter()

    try:
        pipe = PISDMCascadePipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        if args.scheduler:
            swap_scheduler(pipe, args.scheduler)
        id2label = pipe.config.id2label or {}
        num_classes = pipe.transformer.config.num_classes
        if args.classes:
            classes = pipe.get_label_ids(find_class_ids(pipe, args.classes))
        else:
            classes = torch.linspace(0, num_classes - 1, min(NUM_DEFAULT_CLASSES, num_classes)).long().tolist()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    pipe.to(args.device)

    class_labels = [label_id for label_id in classes for _ in range(args.images_per_class)]
    # CPU generators draw the same noise whatever the device.
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(class_labels))]
    options = {}
    if args.num_inference_steps:
        steps = args.num_inference_steps
        options["num_inference_steps"] = steps if len(steps) > 1 else steps[0]
    if args.guidance_scale:
        options["guidance_scale"] = args.guidance_scale if len(args.guidance_scale) > 1 else args.guidance_scale[0]
    try:
        output = pipe(class_labels=class_labels, generator=generators, output_stages=True, **options)
    except (NotImplementedError, ValueError) as error:  # a scheduler that cannot, a list of another length
        sys.exit(f"error: {error}")

    names = [id2label.get(label_id, str(label_id)) for label_id in class_labels]
    save_image(make_image_grid(output.images, names, columns=COLUMNS, cell_size=CELL_SIZE), args.output)
    written = str(args.output)
    if args.stages_output:
        save_image(draw_stages(output.stage_images, names), args.stages_output)
        written += f" and {args.stages_output}"
    width, height = output.images[0].size
    print(
        f"Wrote {written}: {len(names)} images of {len(set(names))} classes at {width}x{height} pixels "
        f"in {time.perf_counter() - start:.1f} s."
    )


if __name__ == "__main__":
    main()
