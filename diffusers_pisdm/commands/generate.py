"""Draws images of chosen classes, as one labelled picture or as single files.

    pisdm generate --classes 207 fluent3d/animal-mammal --images_per_class 8 --seed 1 --output grid.png
    pisdm generate --classes noto/animal-bird --output_dir birds --scheduler UniPCMultistepScheduler
    pisdm generate --list_classes cat
    pisdm generate --recipe birds/0003_noto-animal-bird.png --output_dir again

A PNG of a single image keeps the recipe that it was drawn by, from which `--recipe` and `pisdm app` draw it again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import PISDMCascadePipeline, PISDMTransformer2DModel
from ..evaluation.samples.settings import CALL_ARGUMENTS
from ..pipelines.class_names import check_id2label, ids_by_name
from ..pipelines.lora_fit import read_classes as read_adapter_classes
from ..pipelines.lora_fit import split_by_component
from ..schedulers import swap_scheduler
from ..utils.arguments import COUNT, SEED, CommandParser, not_empty, output_path, picture_path, with_options
from ..utils.files import check_writable
from ..utils.hub_names import hub_or_cache
from ..utils.image_grid import make_image_grid
from ..utils.messages import count_of, show_duration, show_size
from ..utils.names import did_you_mean, names_with, show_name
from ..utils.png_recipe import dtype_name, fingerprint, read_recipe, save_image
from ..utils.shipped_files import CHECKPOINT, model_name
from .drawing import (
    ERRORS,
    MODEL_HELP,
    add_adapter_arguments,
    add_call_arguments,
    call_arguments,
    check_adapter_arguments,
    find_class_ids,
    pipeline_name,
    place,
)


NUM_DEFAULT_CLASSES = 8
COLUMNS = 8
CELL_SIZE = 128  # wide enough for the class names of the published model
STAGE_COLUMNS = 16
STAGE_CELL_SIZE = 64
DEFAULT_OUTPUT = Path("grid.png")
RECIPE_DEFAULTS = ("num_inference_steps", "guidance_scale", "noise_level")
RECIPE_KEYS = ("model", "seed", "scheduler", "dtype", "lora", "lora_scale", *CALL_ARGUMENTS)
LONGEST_STEM = 60  # characters of a class name in a file's name, whose bytes are limited


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=pipeline_name, default=str(CHECKPOINT), help=f"{MODEL_HELP} (the default).")
    add_adapter_arguments(add)
    add(
        "--list_classes",
        nargs="?",
        const="",
        metavar="WORD",
        help="Print ids and names of the classes, or of those whose name contains the word, and draw nothing.",
    )
    add(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="Names or ids, separated by spaces or commas; a number that is a name is that class. "
        f"Default: {NUM_DEFAULT_CLASSES} classes spread evenly over the model's.",
    )
    add(
        "--recipe",
        type=not_empty,
        metavar="PNG",
        help="Draw the picture of this PNG again; options given beside it replace its recipe's.",
    )
    add("--images_per_class", type=COUNT, default=4)
    add("--seed", type=SEED, default=0, help="Image i is drawn with seed + i.")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=picture_path, help=f"One labelled picture of all images; default: {DEFAULT_OUTPUT}."
    )
    output.add_argument("--output_dir", type=output_path, help="A folder for single files: a PNG for each image.")
    output.add_argument("--stages_output", type=picture_path, help="A picture of the same images at every stage.")

    how = parser.add_argument_group("how images are drawn")
    add_call_arguments(how.add_argument)
    how.add_argument("--steps", dest="num_inference_steps", type=COUNT, nargs="+", help=argparse.SUPPRESS)

    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    args.classes_given_by = "--classes"
    if args.recipe is not None:
        given = args
        try:
            args = parser.parse_args([*recipe_arguments(args.recipe), *arguments])  # the later ones win
            args.classes_given_by = "--recipe" if given.classes is None else "--classes"
            check_models(args, given)
        except ValueError as error:
            parser.error(f"argument --recipe: {error}")
    check_adapter_arguments(parser, args)
    if args.output is None and args.output_dir is None:
        args.output = DEFAULT_OUTPUT
    return args


def recipe_arguments(path: str) -> list[str]:
    """The command line that draws the picture again whose recipe a file carries; raises a ValueError if none does."""
    try:
        recipe = read_recipe(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    for key in ("versions", "weights"):
        recipe.pop(key, None)
    absent = [key for key in ("class_label", "seed") if key not in recipe]
    if absent:
        raise ValueError(f"the recipe has no `{absent[0]}`")
    arguments = [f"--classes={recipe.pop('class_label')}", "--images_per_class=1"]
    for key, value in recipe.items():
        if key not in RECIPE_KEYS:  # a stranger's recipe must not say where to write, for example
            raise ValueError(f"the picture was drawn with `{show_name(key)}`, which a recipe cannot bring back")
        if not isinstance(value, list):
            arguments.append(f"--{key}={value}")
        elif value:  # of one stage, there are no noise levels
            arguments += [f"--{key}", *map(json.dumps, value)]  # quotes keep a text from being an option
    return arguments


def check_models(args: argparse.Namespace, given: argparse.Namespace) -> None:
    """Raises a ValueError for a model that a recipe names but is not here: a stranger's must not choose a download."""
    for key in ("model", "lora"):
        name = getattr(args, key)
        if name is not None and name != getattr(given, key) and not os.path.exists(name):
            raise ValueError(
                f"the recipe of {args.recipe} names the {key} {show_name(name)!r}, which is no folder here:"
                f" pass --{key}"
            )


def usable_device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # no such device, a torch built without it
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from error


def load_pipeline(args: argparse.Namespace) -> PISDMCascadePipeline:
    pipe = PISDMCascadePipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    if args.scheduler:
        swap_scheduler(pipe, args.scheduler)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    return pipe


def read_classes(model: str, lora: str | None) -> tuple[int, dict[int, str] | None]:
    """The number of a model's classes, or of its adapter's, and their names, without loading the model's weights."""
    if lora:
        weights, metadata = PISDMCascadePipeline.lora_state_dict(lora, return_lora_metadata=True)
        classes = read_adapter_classes(split_by_component(weights), split_by_component(metadata or {}))
        if classes is not None:
            return classes
    with hub_or_cache(model) as local_files_only:
        options = {"local_files_only": local_files_only}
        names = PISDMCascadePipeline.load_config(model, **options).get("id2label")
        num_classes = PISDMTransformer2DModel.load_config(model, subfolder="transformer", **options)["num_classes"]
    return num_classes, check_id2label(names, num_classes)


def list_classes(model: str, word: str, lora: str | None = None) -> None:
    """Prints the ids and names of the classes whose name contains a word."""
    num_classes, names = read_classes(model, lora)
    if not names:
        raise ValueError(f"This model's classes have no names: they are 0 to {num_classes - 1}.")
    found = set(names_with(word, names.values()))
    if not found:
        hint = did_you_mean(word, names.values()) or "Without a word, all are listed."
        raise ValueError(f"No class name contains '{show_name(word)}'. {hint}")
    for class_id, name in names.items():
        if name in found:
            print(f"{class_id:>6}  {show_name(name)}")


def make_recipes(
    args: argparse.Namespace, pipe: PISDMCascadePipeline, call: dict[str, Any], class_ids: list[int]
) -> list[dict[str, Any]]:
    """What each image is drawn by, to keep in its PNG."""
    names, ids = pipe.config.id2label or {}, ids_by_name(pipe.config.id2label)
    names = {class_id: name for class_id, name in names.items() if ids[name] == [class_id]}  # of one class only
    shared = {"model": model_name(args.model), "weights": fingerprint(pipe.stages)}
    shared["scheduler"] = type(pipe.scheduler).__name__
    shared["dtype"] = dtype_name(pipe.transformer.dtype)
    shared |= {name: pipe.config[f"default_{name}"] for name in RECIPE_DEFAULTS} | call
    if args.lora:
        shared |= {"lora": args.lora, "lora_scale": 1.0 if args.lora_scale is None else args.lora_scale}
    return [
        {"class_label": names.get(class_id, class_id), "seed": args.seed + index, **shared}
        for index, class_id in enumerate(class_ids)
    ]


def warn_of_other_weights(path: str, recipe: dict[str, Any]) -> None:
    """Tells on stderr that a picture was drawn by other weights of the same name than `recipe` is of."""
    theirs = read_recipe(path)
    keys = ("model", "lora", "dtype")
    if "weights" in theirs and [recipe.get(key) for key in keys] == [theirs.get(key) for key in keys]:
        if recipe["weights"] != theirs["weights"]:
            print(
                f"Warning: {show_name(str(recipe['model']))} has other weights now than when {path} was drawn: the"
                " picture will be another.",
                file=sys.stderr,
            )


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


def write_images(images: list[Image.Image], names: list[str], recipes: list[dict[str, Any]], folder: Path) -> None:
    """Writes a PNG for each image, named by seed and class."""
    for image, name, recipe in zip(images, names, recipes):
        stem = re.sub(r"[^\w.-]+", "-", name)[:LONGEST_STEM]
        save_image(image, folder / f"{recipe['seed']:04d}_{stem}.png", recipe)


def generate(args: argparse.Namespace) -> str:
    """Draws and writes what the arguments say; returns what to tell of it."""
    start = time.perf_counter()
    for path in (args.output, args.stages_output):
        if path is not None:
            check_writable(path, is_folder=False)
    if args.output_dir is not None:
        check_writable(args.output_dir, is_folder=True)

    pipe = load_pipeline(args)
    num_classes = pipe.transformer.config.num_classes
    if args.classes:
        classes = find_class_ids(pipe, args.classes, args.model, args.lora, args.classes_given_by)
    else:
        classes = torch.linspace(0, num_classes - 1, min(NUM_DEFAULT_CLASSES, num_classes)).long().tolist()
    pipe = place(pipe, args.device)

    class_ids = [class_id for class_id in classes for _ in range(args.images_per_class)]
    call = {name: value for name, value in call_arguments(args).items() if value is not None}
    recipes = make_recipes(args, pipe, call, class_ids)
    if args.recipe is not None:
        warn_of_other_weights(args.recipe, recipes[0])
    # CPU generators draw the same noise whatever the device.
    generators = [torch.Generator().manual_seed(recipe["seed"]) for recipe in recipes]
    lora = {} if args.lora_scale is None else {"attention_kwargs": {"scale": args.lora_scale}}
    output = pipe(class_labels=class_ids, generator=generators, output_stages=True, **call, **lora)

    names = [(pipe.config.id2label or {}).get(class_id, str(class_id)) for class_id in class_ids]
    written = []
    if args.output_dir is not None:
        write_images(output.images, names, recipes, args.output_dir)
        written.append(args.output_dir)
    if args.output is not None:
        grid = make_image_grid(output.images, names, columns=COLUMNS, cell_size=CELL_SIZE)
        save_image(grid, args.output, recipes[0] if len(recipes) == 1 else None)
        written.append(args.output)
    if args.stages_output is not None:
        save_image(draw_stages(output.stage_images, names), args.stages_output)
        written.append(args.stages_output)
    return (
        f"Wrote {' and '.join(map(str, written))}: {count_of(len(names), 'image')} of"
        f" {count_of(len(set(names)), 'class')} at {show_size(*output.images[0].size)} pixels in"
        f" {show_duration(time.perf_counter() - start)}."
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        if args.list_classes is not None:
            list_classes(args.model, args.list_classes, args.lora)
        else:
            print(generate(args))
    except (*ERRORS, NotImplementedError) as error:  # the last: a scheduler that cannot
        sys.exit(f"error: {with_options(error, args)}")
