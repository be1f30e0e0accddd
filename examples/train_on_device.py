#!/usr/bin/env python
"""Trains a cascade on a data set that fits in the device's memory, one stage after another, for a given time.

    python examples/train_on_device.py --cascade_config examples/recipes/emoji128_gpu.json \
        --train_data_dir data/emoji128 --output_dir outputs/emoji128

For small pictures and short times: the images lie decoded on the device, and on a GPU a whole training step is one
CUDA graph. Every stage has a batch size, learning rate and time of its own. The same command again continues from the
newest checkpoints; `train_pisdm.py` trains everything else (large data, several processes, stages together, latents).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from tqdm.auto import tqdm

from diffusers_pisdm import PISDMCascadePipeline, PISDMTransformer2DModel
from diffusers_pisdm.models.class_embedding import class_factors_from_names
from diffusers_pisdm.schedulers import sampling_schedulers, stage_noise_schedules
from diffusers_pisdm.training import LOSS_WEIGHTINGS, CascadeObjective, LossMeter, image_pyramid
from diffusers_pisdm.training.checkpoints import CheckpointError, find_checkpoints, read_state, save_checkpoint
from diffusers_pisdm.training.data_errors import DataError
from diffusers_pisdm.training.device_images import LabelledImages, load_labelled_images
from diffusers_pisdm.training.device_step import WARM_UP_STEPS, DeviceStep
from diffusers_pisdm.training.fine_tuning import check_noise_schedules, pretrained_defaults, start_cascade
from diffusers_pisdm.training.image_data import load_image_data
from diffusers_pisdm.training.image_rows import ON_BAD_IMAGE, ImageRows
from diffusers_pisdm.training.image_transform import ImageTransform
from diffusers_pisdm.training.machine import describe_machine, peak_memory_gib
from diffusers_pisdm.training.metrics_file import append_metrics, forget_later_metrics
from diffusers_pisdm.training.optimization import learning_rate_factor, make_optimizer, parameter_groups
from diffusers_pisdm.training.recipes import Recipe, apply_recipe, read_recipe
from diffusers_pisdm.training.replace_files import save_in_place
from diffusers_pisdm.training.sample_sheets import draw_samples, save_sample_sheets
from diffusers_pisdm.training.seeds import noise_seed
from diffusers_pisdm.training.weight_average import load_average, save_average


PROBE_SECONDS = 4  # over which the speed is measured that decides how many steps there will be
PER_STAGE = "One value, or one for each stage."


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--cascade_config", required=True, help="A recipe: JSON of noise schedule, stages, and defaults of these.")
    add("--train_data_dir", required=True, help="A folder of images, or a data set on the Hub.")
    add("--output_dir", type=Path, required=True)
    add("--pretrained_model_name_or_path", help="A cascade of the same stages to start from; its classes may differ.")
    add("--train_split", default="train")
    add("--validation_split", help="A held-out split, whose loss is measured.")
    add("--flip_column", help="A column of truth values: which images may be mirrored.")
    add("--random_flip", action="store_true", help="Mirror every other image, of those that may be.")
    add("--random_shift", type=int, default=0, help="Move images by up to so many pixels.")
    add("--on_bad_image", choices=ON_BAD_IMAGE, default="stop")
    add("--class_name_factors", help="Embed a class as the sum of its name's parts, separated by this.")
    add("--seed", type=int, default=0)

    time_ = parser.add_argument_group("how long: one of the two")
    time_.add_argument("--minutes", type=float, nargs="+", help=f"Time to train. {PER_STAGE}")
    time_.add_argument("--max_train_steps", type=int, nargs="+", help=PER_STAGE)
    time_.add_argument("--rehearse", action="store_true", help="A tenth of the time, steps and batches.")

    stage = parser.add_argument_group("stages")
    stage.add_argument("--train_stages", type=int, nargs="+", help="Which, in this order, from 1; all, highest first.")
    stage.add_argument("--train_batch_size", type=int, nargs="+", default=[64], help=PER_STAGE)
    stage.add_argument("--learning_rate", type=float, nargs="+", default=[1e-3], help=PER_STAGE)
    stage.add_argument("--ema_decay", type=float, nargs="+", default=[0.999], help=PER_STAGE)
    stage.add_argument("--prediction_types", nargs="+", help="Of each stage, instead of the recipe's scheduler's.")
    stage.add_argument("--noise_shifts", type=float, nargs="+", help="Shift of each stage's noise schedule.")
    stage.add_argument("--loss_weighting", choices=LOSS_WEIGHTINGS, nargs="+", default=["uniform"], help=PER_STAGE)

    loss = parser.add_argument_group("the same for all stages")
    loss.add_argument("--snr_gamma", type=float, default=5.0, help="gamma of min_snr")
    loss.add_argument("--label_dropout", type=float, default=0.1)
    loss.add_argument("--factor_dropout", type=float, default=0.0)
    loss.add_argument("--max_noise_level", type=float, default=0.5, help="conditioning augmentation")
    loss.add_argument("--lr_warmup_steps", type=int, default=200)
    loss.add_argument("--lr_cooldown", type=float, default=0.3, help="Share of the steps over which the rate falls.")
    loss.add_argument("--adam_beta1", type=float, default=0.9)
    loss.add_argument("--adam_beta2", type=float, default=0.99)
    loss.add_argument("--adam_weight_decay", type=float, default=0.03)
    loss.add_argument("--adam_epsilon", type=float, default=1e-8)
    loss.add_argument("--max_grad_norm", type=float, default=1.0)
    loss.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    loss.add_argument("--no_cuda_graph", action="store_true", help="Launch a GPU's kernels one by one.")

    watch = parser.add_argument_group("watching and resuming")
    watch.add_argument("--logging_steps", type=int, default=100)
    watch.add_argument("--validation_minutes", type=float, default=10, help="Held-out loss, and the pipeline saved.")
    watch.add_argument("--checkpointing_minutes", type=float, default=5)
    watch.add_argument("--validation_classes", type=int, default=32, help="Classes in the sample grid.")
    watch.add_argument("--validation_inference_steps", type=int, default=10)
    watch.add_argument("--validation_guidance_scale", type=float, nargs="+", default=[2.0], help=PER_STAGE)
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    """The recipe's training arguments are defaults: what the command line says counts more."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        recipe = read_recipe(args.cascade_config)
        apply_recipe(recipe, parser)
    except (OSError, ValueError) as error:
        parser.error(f"--cascade_config {args.cascade_config}: {error}")
    given, args = args, parser.parse_args(argv)
    if given.max_train_steps is not None and given.minutes is None:  # the command line overrides the recipe
        args.minutes = None
    elif given.minutes is not None and given.max_train_steps is None:
        args.max_train_steps = None
    if recipe.vae is not None:
        parser.error("this script trains on pixels: train_pisdm.py trains in latents")
    if (args.minutes is None) == (args.max_train_steps is None):
        parser.error("give one of --minutes and --max_train_steps")
    count = len(recipe.stages)
    lists = ("minutes", "max_train_steps", "train_batch_size", "learning_rate", "ema_decay", "loss_weighting")
    for name in (*lists, "validation_guidance_scale"):
        values = getattr(args, name)
        if values is not None and len(values) not in (1, count):
            parser.error(f"--{name} takes one value, or one for each of the {count} stages, got {len(values)}")
        if values is not None:
            setattr(args, name, values * (count // len(values)))
    if args.train_stages is None:
        args.train_stages = list(range(count, 0, -1))
    if args.rehearse:
        args.minutes = args.minutes and [minutes / 10 for minutes in args.minutes]
        args.max_train_steps = args.max_train_steps and [max(1, steps // 10) for steps in args.max_train_steps]
        args.train_batch_size = [max(1, size // 10) for size in args.train_batch_size]
        args.lr_warmup_steps //= 10
    return args, recipe


def load_data(args: argparse.Namespace, size: int, device: torch.device) -> tuple[LabelledImages, ...]:
    """Training images and, where a split is named, held-out ones."""
    splits, class_names, data = [args.train_split, args.validation_split], None, []
    for split in filter(None, splits):
        columns = {"class_names": class_names, "flip_column": args.flip_column}
        rows = ImageRows(
            load_image_data(args.train_data_dir, split, **columns), ImageTransform(size), args.on_bad_image
        )
        data.append(load_labelled_images(rows).to(device))
        class_names = data[0].class_names
    return tuple(data)


def batch_rows(step: int, num_images: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of one step's batch: each epoch goes through all images in an order of its own."""
    first = step * batch_size
    positions = np.arange(first, first + batch_size)
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(positions // num_images):
        order = np.random.default_rng((seed, epoch)).permutation(num_images)
        now = positions // num_images == epoch
        rows[now] = order[positions[now] % num_images]
    return rows


@torch.no_grad()
def held_out_losses(accelerator: Accelerator, objective: CascadeObjective, data: LabelledImages, seed: int) -> dict:
    """Mean losses on held-out images, with the same noise at every call."""
    meter, size = LossMeter(objective), 64
    sizes = [stage.config.sample_size for stage in objective.stages]
    for first in range(0, len(data.images), size):
        batch = slice(first, first + size)
        pyramid = image_pyramid(data.images[batch].float() / 127.5 - 1.0, sizes)
        with accelerator.autocast():
            meter.add(objective(pyramid, data.labels[batch], noise_seed(seed, first)))
    return meter.means("validation")


def train_stage(
    number: int,
    stages: list[PISDMTransformer2DModel],
    schedulers: list[DDPMScheduler],
    data: tuple[LabelledImages, ...],
    args: argparse.Namespace,
    save: Callable[[int, int], None],
) -> None:
    """Trains one stage; its averaged weights are in the model afterwards."""
    index, folder = number - 1, args.output_dir / f"stage_{number}"
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=args.mixed_precision, gradient_accumulation_steps=1
    )
    if accelerator.num_processes > 1:
        raise DataError("This script trains in one process: start it with `python`, or use train_pisdm.py.")
    device, train, on_gpu = accelerator.device, data[0], accelerator.device.type == "cuda"
    for stage in stages:
        stage.to(device).requires_grad_(True)
    objective = CascadeObjective(
        stages,
        schedulers,
        loss_weighting=args.loss_weighting,
        min_snr_gamma=args.snr_gamma,
        label_dropout=args.label_dropout,
        factor_dropout=args.factor_dropout,
        max_noise_level=args.max_noise_level,
        sil_weight=0.0,
        train_stages=[number],
    ).train()
    optimizer = make_optimizer(
        parameter_groups(objective, args.adam_weight_decay),
        args.learning_rate[index],
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
        capturable=on_gpu,
    )
    objective, optimizer = accelerator.prepare(objective, optimizer)
    named = [(name, p) for name, p in objective.stages.named_parameters() if p.requires_grad]
    names, parameters = [name for name, _ in named], [p for _, p in named]
    average = EMAModel(parameters, decay=args.ema_decay[index])
    batch_size = args.train_batch_size[index]
    train_step = DeviceStep(
        accelerator,
        objective,
        optimizer,
        average,
        train,
        batch_size,
        args.max_grad_norm,
        random_flip=args.random_flip,
        max_shift=args.random_shift,
        record=on_gpu and not args.no_cuda_graph,
    )

    step, before = 0, 0.0
    settings = {"batch_size": batch_size, "minutes": args.minutes and args.minutes[index]}
    total = None if args.max_train_steps is None else args.max_train_steps[index]
    complete, _ = find_checkpoints(folder)
    if complete:
        accelerator.load_state(complete[-1])
        state = read_state(complete[-1])
        if state["settings"] != settings:
            raise CheckpointError(
                f"{complete[-1]} is of a run with {state['settings']}, but this one has {settings}. Rerun the command"
                " that made it (with --rehearse, if it was a rehearsal), or name another --output_dir."
            )
        step, before = state["step"], state["elapsed_seconds"]
        total = state["total_steps"] if args.max_train_steps is None else total
        load_average(average, names, complete[-1] / "ema.safetensors", state["average_updates"])
    folder.mkdir(parents=True, exist_ok=True)
    metrics_file, started = folder / "metrics.jsonl", time.time()
    forget_later_metrics(metrics_file, step)

    def write(checkpoint: Path) -> None:
        accelerator.save_state(checkpoint)
        save_average(average, names, checkpoint / "ema.safetensors")

    def write_checkpoint() -> None:
        state = {
            "elapsed_seconds": before + time.time() - started,
            "total_steps": total,
            "average_updates": average.optimization_step,
            "settings": settings,
        }
        save_checkpoint(accelerator, folder, step, state, write, total_limit=1)

    def validate() -> None:
        average.store(parameters)
        average.copy_to(parameters)
        objective.eval()
        if len(data) > 1:
            append_metrics(metrics_file, step, held_out_losses(accelerator, objective, data[1], args.seed))
        save(step, number)
        objective.train()
        average.restore(parameters)

    if total is not None and step >= total:
        tqdm.write(f"stage {number}: complete, with {step} steps")
    progress = tqdm(total=total, initial=step, desc=f"stage {number}")
    first_step, logged, logged_at, saved_at, validated_at = step, step, *[time.time()] * 3
    probe_at = None
    while total is None or step < total:
        # While the number of steps is unknown, the end is not in sight.
        cooldown = 0 if total is None else max(1, round(args.lr_cooldown * total))
        factor = learning_rate_factor(step, args.lr_warmup_steps, cooldown, step + 1 if total is None else total)
        rows = batch_rows(step, len(train.images), batch_size, args.seed + number)
        train_step(rows, noise_seed(args.seed, number, step), args.learning_rate[index] * factor)
        step += 1
        progress.update()
        if total is None and step - first_step > WARM_UP_STEPS + 1:
            if on_gpu:
                torch.cuda.synchronize()
            now = time.time()
            if probe_at is None:
                probe_at, probe_step = now, step
            elif now - probe_at > PROBE_SECONDS:
                rate = (step - probe_step) / (now - probe_at)
                total = step + max(1, int((args.minutes[index] * 60 - (before + now - started)) * rate))
                progress.total = total
                tqdm.write(f"stage {number}: {rate * batch_size:.0f} images/s, {total} steps of {batch_size} images")
        done = step == total
        if step % args.logging_steps == 0 or done:
            values = train_step.meter.means("train")  # waits for the device
            now = time.time()
            values |= {
                "images_per_second": (step - logged) * batch_size / (now - logged_at),
                "learning_rate": args.learning_rate[index] * factor,
                "peak_memory_gib": peak_memory_gib(device),
                "skipped_steps": train_step.skipped_steps.item(),
                "seconds": before + now - started,
            }
            append_metrics(metrics_file, step, values)
            progress.set_postfix(loss=f"{values[f'train/denoising_{number}']:.4f}")
            train_step.meter.reset()
            logged, logged_at = step, now
        if done or time.time() - validated_at > args.validation_minutes * 60:
            validate()
            validated_at = time.time()
        if done or time.time() - saved_at > args.checkpointing_minutes * 60:
            write_checkpoint()
            saved_at = time.time()
    progress.close()
    average.copy_to(parameters)
    accelerator.free_memory()


def main(argv: list[str] | None = None) -> None:
    args, recipe = parse_args(argv)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    sizes = [stage["sample_size"] for stage in recipe.stages]
    data = load_data(args, sizes[-1], device)
    class_names = data[0].class_names
    schedulers = stage_noise_schedules(
        DDPMScheduler(**recipe.scheduler), len(recipe.stages), args.noise_shifts, args.prediction_types
    )
    defaults = {}
    if args.pretrained_model_name_or_path is not None:
        pretrained = PISDMCascadePipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.float32)
        stages = start_cascade(pretrained, recipe.stages, class_names)
        check_noise_schedules(pretrained, schedulers)
        defaults = pretrained_defaults(pretrained, len(stages))
        if args.factor_dropout > 0 and any(stage.config.class_factors is None for stage in stages):
            print("The classes are others than the pretrained ones, a row each: --factor_dropout does nothing.")
            args.factor_dropout = 0.0
    else:
        factors = None
        if args.class_name_factors is not None:
            factors = class_factors_from_names(class_names, args.class_name_factors)
        classes = {"num_classes": len(class_names), "class_factors": factors}
        stages = [PISDMTransformer2DModel(**classes, **config) for config in recipe.stages]
    for number, stage in enumerate(stages, start=1):  # what an earlier run has trained
        complete, _ = find_checkpoints(args.output_dir / f"stage_{number}")
        if complete:
            prefix, weights = f"{number - 1}.", load_file(complete[-1] / "ema.safetensors")
            stage.load_state_dict({name.removeprefix(prefix): weight for name, weight in weights.items()})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    config = {"arguments": {k: str(v) for k, v in vars(args).items()}, "hardware": describe_machine(device)}
    (args.output_dir / "training_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def save(step: int, number: int) -> None:
        """The pipeline as it is now, and samples of it."""
        pipeline = PISDMCascadePipeline.from_stages(
            stages, sampling_schedulers(schedulers), id2label=dict(enumerate(class_names)), **defaults
        )
        save_in_place(partial(pipeline.save_pretrained, max_shard_size="15MB"), args.output_dir)
        images, labels = draw_samples(
            pipeline,
            args.validation_classes,
            args.seed,
            guidance_scale=args.validation_guidance_scale,
            num_inference_steps=args.validation_inference_steps,
        )
        save_sample_sheets(args.output_dir / "samples" / f"stage_{number}", step, images, labels)

    for number in args.train_stages:
        train_stage(number, stages, schedulers, data, args, save)


if __name__ == "__main__":
    try:
        main()
    except (DataError, CheckpointError, ValueError) as error:  # the user's to mend: no traceback
        sys.exit(f"error: {error}")
