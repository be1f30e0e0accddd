#!/usr/bin/env python
"""
Evaluates the pictures of a class-conditional cascade: Fréchet distances to training and held-out images, precision and
recall, the share of pictures nearest to their own class, the patch grid, dirt on a white background, copied training
images, and the time per picture.

    python -m benchmarks.picture_quality --model checkpoints/pisdm-emoji128 --data_dir data/emoji128 --output quality
    python -m benchmarks.picture_quality ... --size 64 --styles fluent3d noto twemoji  # as for a model of these

Samples have the classes of the training images in the same proportions. If interrupted, rerun the same command to
resume. Writes the samples, `picture_quality.json`, and an uncurated grid of the first 64 samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring.class_centroids import class_centroids, nearest_class
from benchmarks.measuring.patch_borders import patch_border_ratio, white_roughness
from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.data.image_data import load_image_data
from diffusers_pisdm.data.image_sources import ImageSource
from diffusers_pisdm.data.image_transform import ImageTransform, decode_image
from diffusers_pisdm.evaluation import (
    DatasetImages,
    FeatureStatistics,
    FolderImages,
    SampleSettings,
    collect_statistics,
    load_feature_extractor,
    memorization_report,
    write_sample_set,
)
from diffusers_pisdm.evaluation.metrics.frechet_distance import frechet_distance
from diffusers_pisdm.evaluation.metrics.precision_recall import precision_recall
from diffusers_pisdm.evaluation.samples.settings import sample_classes
from diffusers_pisdm.utils.arguments import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, SHARE
from diffusers_pisdm.utils.files import write_whole
from diffusers_pisdm.utils.image_grid import make_image_grid
from diffusers_pisdm.utils.machine import describe_machine


SHOWN = 64
TIMED = 8  # images drawn again for timing
NEIGHBOUR_SIZE = 64  # pixels at which training images are searched


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="A folder, or a repository on the Hub.")
    add("--data_dir", required=True, help="A folder that `datasets` reads, or a data set on the Hub.")
    add("--train_split", default="train")
    add("--held_out_split", default="validation")
    add("--styles", nargs="+", help="Only classes whose name begins with one of these and a slash.")
    add("--num_samples", type=COUNT, default=2000)
    add("--size", type=COUNT, help="Resize all images to this many pixels first; default: the model's size.")
    add("--seed", type=COUNT_OR_ZERO, default=0)
    add("--num_inference_steps", type=COUNT, nargs="+", help="One number, or one per stage; default: the pipeline's.")
    add("--guidance_scale", type=NOT_NEGATIVE, nargs="+", help="Likewise.")
    add("--noise_level", type=SHARE, nargs="+", help="One number, or one per higher stage; default: the pipeline's.")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--batch_size", type=COUNT, default=50)
    add("--features", default="efficientnet_lite0", help="See `pisdm evaluate`.")
    add("--output", type=Path, required=True)
    return parser.parse_args(argv)


def read_all(source: ImageSource) -> torch.Tensor:
    """All images, `(N, 3, H, W)`, uint8."""
    return torch.cat(list(source.batches(100)))


def keep(statistics: FeatureStatistics, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of a subset of the stored features."""
    features = statistics.features[rows].double()
    return features.mean(dim=0), torch.cov(features.T)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        pipe = PISDMCascadePipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        train, held_out = (load_image_data(args.data_dir, s) for s in (args.train_split, args.held_out_split))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipe.to("cuda")
    model_size, patch_size = (pipe.stages[-1].config[name] for name in ("sample_size", "patch_size"))
    size = args.size or model_size

    # Match classes by name: the model's ids may differ from the data set's.
    ids = {name: i for i, name in pipe.config.id2label.items()}
    styles = args.styles and tuple(f"{style}/" for style in args.styles)

    def ids_of(data) -> torch.Tensor:
        names = [data.class_names[data.class_ids[label]] for label in data.dataset[data.label_column]]
        chosen = [name in ids and (styles is None or name.startswith(styles)) for name in names]
        return torch.tensor([ids[name] if ok else -1 for name, ok in zip(names, chosen)])  # (N,), -1: left out

    labels = {"train": ids_of(train), "held_out": ids_of(held_out)}
    wanted = labels["train"][labels["train"] >= 0].tolist()

    single = {
        name: value[0] if value is not None and len(value) == 1 else value
        for name in ("num_inference_steps", "guidance_scale", "noise_level")
        for value in [getattr(args, name)]
    }
    settings = SampleSettings(args.num_samples, args.seed, wanted, **single).resolve(pipe)
    write_sample_set(pipe, args.output / "samples", settings, args.batch_size)
    drawn = torch.tensor(sample_classes(settings, len(ids)))
    started = time.perf_counter()
    arguments = {name: getattr(settings, name) for name in single}
    pipe(class_labels=drawn[:TIMED].tolist(), generator=torch.Generator().manual_seed(args.seed), **arguments)
    seconds = (time.perf_counter() - started) / TIMED

    extractor = load_feature_extractor(args.features)
    crop = partial(ImageTransform(size), random=np.random.default_rng(0))  # uses no randomness
    sources = {
        "train": DatasetImages(f"{args.data_dir}, {args.train_split}", train, decode_image, crop),
        "held_out": DatasetImages(f"{args.data_dir}, {args.held_out_split}", held_out, decode_image, crop),
        "samples": FolderImages(args.output / "samples", decode_image, crop),
    }
    labels["samples"] = drawn
    found = {name: collect_statistics(source, extractor, max_features=None) for name, source in sources.items()}
    gaussians, features = {}, {}
    for name, statistics in found.items():
        gaussians[name] = keep(statistics, labels[name] >= 0)
        features[name] = statistics.features[labels[name] >= 0]
        labels[name] = labels[name][labels[name] >= 0]

    result = {
        "model": str(args.model),
        "settings": {name: getattr(settings, name) for name in ("num_samples", "seed", *single)},
        "dtype": args.dtype,
        "size": size,
        "styles": args.styles,
        "network": extractor.title,
        "hardware": describe_machine(pipe.device),
        "seconds_per_picture": seconds,
        "threads": torch.get_num_threads(),
        "images": {name: len(rows) for name, rows in labels.items()},
    }
    for name in ("train", "held_out"):
        result[f"frechet_distance_{name}"] = frechet_distance(*gaussians[name], *gaussians["samples"]).item()
    result["frechet_distance_of_held_out_to_train"] = frechet_distance(
        *gaussians["train"], *gaussians["held_out"]
    ).item()
    result["precision"], result["recall"] = precision_recall(features["train"], features["samples"], 3)
    means = class_centroids(features["train"], labels["train"])
    parts = [pipe.config.id2label[i].split("/") for i in range(len(ids))]
    for name in ("samples", "held_out"):
        nearest = nearest_class(features[name], *means)
        result[f"nearest_class_{name}"] = (nearest == labels[name]).double().mean().item()
        same = [parts[a][-1] == parts[b][-1] for a, b in zip(nearest.tolist(), labels[name].tolist())]
        result[f"nearest_subject_{name}"] = sum(same) / len(same)

    for name in ("samples", "held_out"):
        # At the model's own size: a downscaled picture has no patches.
        whole = partial(ImageTransform(model_size), random=np.random.default_rng(0))
        source = FolderImages(args.output / "samples", decode_image)
        if name == "held_out":
            source = DatasetImages(sources[name].name, held_out, decode_image, whole)
        images = read_all(source)
        result[f"patch_border_ratio_{name}"] = patch_border_ratio(images, patch_size)
        result[f"white_roughness_{name}"] = white_roughness(images)

    small = partial(ImageTransform(NEIGHBOUR_SIZE), random=np.random.default_rng(0))
    neighbours = memorization_report(
        read_all(FolderImages(args.output / "samples", decode_image, small)).float() / 255,
        read_all(DatasetImages(sources["train"].name, train, decode_image, small)).float() / 255,
    )
    result["nearest_training_image"] = {
        "share_below_first_percentile": neighbours.share_below,
        "threshold_rms": neighbours.threshold,
        "median_rms": neighbours.distances.median().item(),
        "smallest_rms": neighbours.distances.min().item(),
        "at_pixels": NEIGHBOUR_SIZE,
    }
    with write_whole(args.output / "picture_quality.json") as file:
        Path(file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shown = sorted((args.output / "samples").rglob("*.png"))[:SHOWN]
    names = [pipe.config.id2label[i] for i in drawn[: len(shown)].tolist()]
    make_image_grid([Image.open(path) for path in shown], names, columns=8, cell_size=128).save(
        args.output / "samples.png"
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
