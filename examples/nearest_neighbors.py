#!/usr/bin/env python
"""Checks whether a cascade repeats its training images.

    python examples/nearest_neighbors.py --model checkpoints/pisdm-emoji128 --train_data_dir data/emoji128

Draws samples with random classes and seeds, finds each one's nearest training image in pixel space, and reports the
share that is closer than near-duplicates within the training set (its 1st percentile of nearest-neighbour distances).
Writes the figures as JSON and the closest pairs as a picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.data.image_data import load_image_data
from diffusers_pisdm.data.image_transform import decode_image
from diffusers_pisdm.evaluation import memorization_report
from diffusers_pisdm.utils.arguments import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, PERCENT
from diffusers_pisdm.utils.image_grid import make_image_grid


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/pisdm-emoji128")
    parser.add_argument("--train_data_dir", required=True, help="A folder of images or parquet files.")
    parser.add_argument("--dataset_config_name", help="The data set's configuration, if it has several.")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--num_samples", type=COUNT, default=500)
    parser.add_argument("--batch_size", type=COUNT, default=50)
    parser.add_argument("--num_inference_steps", type=COUNT, default=None, help="Default: the pipeline's.")
    parser.add_argument("--guidance_scale", type=NOT_NEGATIVE, default=None, help="Default: the pipeline's.")
    parser.add_argument("--percentile", type=PERCENT, default=1.0)
    parser.add_argument("--seed", type=COUNT_OR_ZERO, default=0)
    parser.add_argument("--output", default="nearest_neighbors.json")
    parser.add_argument("--picture", default="nearest_neighbors.png", help="The closest pairs, side by side.")
    return parser.parse_args(argv)


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255  # (N, 3, H, W)


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pipe = PISDMCascadePipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    settings = {
        name: value for name in ("num_inference_steps", "guidance_scale") if (value := getattr(args, name)) is not None
    }

    random = np.random.default_rng(args.seed)
    classes = random.integers(len(pipe.config.id2label), size=args.num_samples).tolist()
    samples = []
    for start in tqdm(range(0, args.num_samples, args.batch_size), desc="sampling"):
        labels = classes[start : start + args.batch_size]
        generators = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(labels))]
        samples += pipe(class_labels=labels, generator=generators, **settings).images

    size = samples[0].size
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    data = load_image_data(args.train_data_dir, "train", config_name=args.dataset_config_name, **columns)
    images = (decode_image(data.encoded_image(row)) for row in data.dataset)
    training_images = to_tensor([ImageOps.fit(image, size, Image.LANCZOS) for image in images])
    report = memorization_report(to_tensor(samples), training_images, args.percentile)

    figures = {
        "model": args.model,
        "samples": args.num_samples,
        "training_images": len(training_images),
        "seed": args.seed,
        **settings,
        "percentile": args.percentile,
        "threshold_rms": report.threshold,
        "share_below_threshold": report.share_below,
        "nearest_rms_median": report.distances.median().item(),
        "nearest_rms_minimum": report.distances.min().item(),
    }
    Path(args.output).write_text(json.dumps(figures, indent=2) + "\n")
    pairs, labels = [], []
    for index in report.distances.argsort()[:16].tolist():
        pairs += [samples[index], to_pil(training_images[report.indices[index]])]
        labels += [f"sample {report.distances[index]:.3f}", "nearest"]
    make_image_grid(pairs, labels, columns=8).save(args.picture)
    print(json.dumps(figures, indent=2))
    print(f"Wrote {args.output} and {args.picture}")


if __name__ == "__main__":
    main()
