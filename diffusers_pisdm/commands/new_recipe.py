"""Writes a recipe for a cascade that this machine can train on your images in the time you have.

    pisdm new-recipe my_images --size 32 --minutes 30
    pisdm train --cascade_config recipe.json --train_data_dir my_images --output_dir outputs/mine

Measures this machine, then chooses stages, patches, widths, batch size and steps. `recipe.json` is yours to edit.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.image_data import ImageData
from ..data.image_pyramid import image_pyramid
from ..data.image_rows import ImageRows
from ..data.image_transform import ImageTransform
from ..ops.conditioning_augmentation import residual_deviations
from ..training.cost.stage_cost import CostSettings, StageCost, estimate_cascade_cost
from ..training.cost.stage_speed import measure_stage_speed, seconds_per_step
from ..utils.arguments import Bounds, CommandParser, bounded, output_path
from ..utils.files import check_writable, write_whole
from ..utils.messages import count_of, show_duration
from .data_sources import add_data_arguments, add_folder_argument, check_source, load_data, source_options


# Layers and width of the first stage and of those above it, from small to large; the last is `pisdm-emoji128`'s.
SHAPES = (((7, 128), (5, 96)), ((9, 192), (5, 128)), ((11, 256), (7, 160)), ((15, 384), (9, 224)))
ENOUGH_IMAGES = 40_000  # that a run should show to its model, before a larger model is worth it
REFERENCE_IMAGES = 8_288  # after which a cascade of the first shape drew eight simple classes
FEW_IMAGES = REFERENCE_IMAGES // 2
FEWEST_STEPS = 1000  # with smaller batches until there are as many
BATCH_SIZES = (64, 32, 16, 8)
OPTIMIZER = "muon"
SHARE_OF_TRAINING = 0.85  # of the minutes: the rest goes to reading, sample grids and checkpoints
SECONDS_PER_MEASUREMENT = 10.0  # of each stage: with fewer images than a batch, it would look slower
SMALLEST_FIRST_STAGE = 16  # pixels: from 8 px, small cascades drew worse
LARGEST_PATCHES_OF_2 = 32  # pixels: from 64 on, patches of 4 keep the sequence short
IMAGES_FOR_SCALE = 256
SHORT_RUN = 5.0  # minutes: what a run takes besides training counts


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_folder_argument(parser)
    parser.add_argument(
        "--size", type=bounded(int, Bounds(minimum=8, maximum=512)), default=32, help="Side in pixels (default: 32)."
    )
    parser.add_argument(
        "--minutes", type=bounded(float, Bounds(above=0)), default=30.0, help="Training time (default: 30)."
    )
    parser.add_argument(
        "--output", type=output_path, default=Path("recipe.json"), help="The recipe (default: recipe.json)."
    )
    add_data_arguments(parser)
    args = parser.parse_args(arguments)
    check_source(parser, args)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        check_writable(args.output, is_folder=False)
        data = load_data(args)
        plan = choose_plan(args.size, args.minutes, data)
        with write_whole(args.output) as unfinished:
            unfinished.write_text(json.dumps(plan.recipe(), indent=2) + "\n", encoding="utf-8")
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(plan.describe()))
    print(f"Wrote {args.output}")
    print(
        f"Next: pisdm train --cascade_config {args.output} {source_options(args, of_training=True)}"
        f"{' --on_bad_image skip' * bool(plan.unreadable)} --output_dir outputs/mine"
    )


@dataclass
class Plan:
    """
    What to train and what it takes.

    Args:
        stages (`list[dict]`): Each stage's arguments of [`PISDMTransformer2DModel`], without `num_classes`.
        batch_size, steps (`int`): Images per step, and steps.
        costs (`list[StageCost]`), seconds (`list[float]`): Of each stage, and its time per step, measured here.
        num_images (`int`): In the data, without those known to be unreadable.
        minutes (`float`): That were asked for.
        unreadable (`list[str]`): Of the images that were looked at, those that cannot be read, and why.
    """

    stages: list[dict[str, Any]]
    batch_size: int
    steps: int
    costs: list[StageCost]
    seconds: list[float]
    num_images: int
    minutes: float
    unreadable: list[str] = field(default_factory=list)

    @property
    def images_seen(self) -> int:
        return self.steps * self.batch_size

    def recipe(self) -> dict[str, Any]:
        """
        The recipe, as `--cascade_config` reads it. Optimizer, rate and the first stage's loss weights are the best of
        our trials of ten minutes (docs/experiments/quality.md); the other settings are `emoji128_gpu`'s.
        """
        upper = len(self.stages) - 1
        every_quarter = max(1, self.steps // 4)
        return {
            "scheduler": {
                "num_train_timesteps": 1000,
                "beta_schedule": "squaredcos_cap_v2",
                "prediction_type": "v_prediction",
                "clip_sample": False,
            },
            "stages": self.stages,
            "training": {
                "train_batch_size": self.batch_size,
                "max_train_steps": self.steps,
                "batch_shares": batch_shares(len(self.stages)),
                "prediction_types": ["v_prediction"] + ["sample"] * upper,
                "loss_weighting": ["sigmoid"] + ["min_snr"] * upper,
                "optimizer": OPTIMIZER,
                "learning_rate": 3e-3,
                "lr_warmup_steps": self.steps // 20,
                "lr_cooldown_steps": self.steps // 3,
                "adam_beta1": 0.9,
                "adam_beta2": 0.99,
                "ema_decay": round(max(0.9, min(0.9995, 1 - 10 / self.steps)), 4),  # averages a tenth of the run
                "sil_weight": 0,
                "max_noise_level": 0.4,
                "logging_steps": max(1, min(50, self.steps // 20)),
                "validation_steps": every_quarter,
                "checkpointing_steps": every_quarter,
            },
        }

    def describe(self) -> list[str]:
        """What to expect, for the terminal."""
        lines = []
        for number, (stage, cost, seconds) in enumerate(zip(self.stages, self.costs, self.seconds), start=1):
            lines.append(
                f"Stage {number}: {stage['sample_size']} px, patches of {stage['patch_size']},"
                f" {stage['num_layers']} layers of width {stage['hidden_size']},"
                f" {cost.parameters / 1e6:.1f}M parameters;"
                f" {count_of(cost.batch_size, 'image')} a step, {show_duration(seconds * self.steps)} in all"
            )
        passes = self.images_seen / self.num_images
        lines.append(
            f"Training: {count_of(self.steps, 'step')} of {count_of(self.batch_size, 'image')},"
            f" {self.images_seen:,} in all: {count_of(round(passes), 'pass')} over"
            f" {count_of(self.num_images, 'image')}"
        )
        lines.append(
            f"Time: about {show_duration(sum(self.seconds) * self.steps / SHARE_OF_TRAINING)}, sample grids included,"
            " if the machine stays as busy as it is now"
        )
        lines.append(
            f"For comparison: folder icons in 8 colours took {REFERENCE_IMAGES:,} images of 32 px (docs/training.md);"
            " the first stage of pisdm-emoji128 saw 1.5 million"
        )
        if self.images_seen < FEW_IMAGES:
            lines.append(
                "Warning: that is very little, and the pictures will be rough: allow more --minutes, or start from"
                " pisdm-emoji128 (--pretrained_model_name_or_path)"
            )
        if self.minutes < SHORT_RUN:
            lines.append("Note: starting, compiling and saving take up to a minute more, which --minutes leaves out")
        if self.unreadable:
            count = count_of(len(self.unreadable), "image")
            lines.append(
                f"Warning: {count} of those looked at cannot be read. `pisdm check-data` names all; the command below"
                f" skips them. The first: {self.unreadable[0]}"
            )
        return lines


def batch_shares(num_stages: int) -> list[float]:
    """Of the batch: low stages decide what the image shows and are cheap; high ones learn sooner."""
    return [1.0] + [0.25] * (num_stages - 1)


def stage_sizes(size: int) -> list[int]:
    """The stages' sides in pixels: halved as often as that leaves an even number that is not too small."""
    sizes = [size]
    while sizes[0] % 4 == 0 and sizes[0] // 2 >= SMALLEST_FIRST_STAGE:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def stage_configs(sizes: list[int], scales: list[float], shape: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    """The arguments of each stage's model; `scales` are the residual scales of all stages but the first."""
    configs = []
    for size, scale in zip(sizes, [None, *scales]):
        layers, width = shape[scale is not None]
        config = {
            "sample_size": size,
            "patch_size": 2 if size <= LARGEST_PATCHES_OF_2 else 4,
            "in_channels": 3,
            "num_layers": layers,
            "hidden_size": width,
            "overlapping_patches": True,
            "pixel_head_channels": 24,
        }
        configs.append(config if scale is None else {**config, "low_res_channels": 3, "residual_scale": scale})
    return configs


def residual_scales(data: ImageData, sizes: list[int]) -> tuple[list[float], list[str]]:
    """
    The standard deviation of what each stage adds to the upsampled image below, over some of the data; and which of
    these images cannot be read, and why.
    """
    rows = ImageRows(data, ImageTransform(sizes[-1]), on_bad_image="skip")
    count = min(IMAGES_FOR_SCALE, len(rows))
    read = [rows.read(i * len(rows) // count, epoch=0, seed=0) for i in range(count)]
    images = torch.stack([row.images for row in read])  # (N, 3, H, W)
    pyramid = image_pyramid(images.float() / 127.5 - 1.0, sizes)  # (N, 3, H_s, W_s) each
    scales = [max(0.01, round(scale, 3)) for scale in residual_deviations(pyramid)]  # 0 for plain colours
    return scales, list(dict.fromkeys(fault for row in read for fault in row.bad_images))


def choose_plan(size: int, minutes: float, data: ImageData) -> Plan:
    """
    The largest shape that sees enough images in the minutes, or the smallest one; raises ValueError if there is no
    time for anything.
    """
    sizes = stage_sizes(size)
    (scales, unreadable), plan = residual_scales(data, sizes), None
    num_images = len(data.dataset) - len(unreadable)
    for shape in SHAPES:
        larger = plan_for(stage_configs(sizes, scales, shape), minutes, len(data.class_names), num_images)
        if plan is None or larger.images_seen >= ENOUGH_IMAGES:
            plan = larger
        if larger.images_seen < 2 * ENOUGH_IMAGES:  # the next one costs at least twice as much
            break
    plan.unreadable = unreadable
    return plan


def plan_for(stages: list[dict[str, Any]], minutes: float, num_classes: int, num_images: int) -> Plan:
    """Times the stages, then takes the largest batch that leaves enough steps."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    settings = CostSettings(device_type=device.type, optimizer=OPTIMIZER)
    shares, budget = batch_shares(len(stages)), SHARE_OF_TRAINING * 60 * minutes
    batch_sizes = [size for size in BATCH_SIZES if size <= num_images] or [num_images]
    speeds = None
    for batch_size in batch_sizes:
        costs = estimate_cascade_cost(stages, num_classes, batch_size, settings, shares)
        if speeds is None:  # FLOP/s at the largest batch stand for the others
            measured = [
                measure_stage_speed(stage, num_classes, cost.batch_size, settings, device, SECONDS_PER_MEASUREMENT)
                for stage, cost in zip(stages, costs)
            ]
            if None in measured:
                raise ValueError("Not even two layers and one image fit into the free memory: lower --size.")
            speeds = measured
        seconds = [seconds_per_step(cost, speed) for cost, speed in zip(costs, speeds)]
        steps = int(budget / sum(seconds))
        if steps >= FEWEST_STEPS:
            break
    if steps < 1:
        raise ValueError(f"A step takes {show_duration(sum(seconds))} here: allow more --minutes, or lower --size.")
    return Plan(stages, batch_size, steps, costs, seconds, num_images, minutes)


if __name__ == "__main__":
    main()
