#!/usr/bin/env python
"""Trains a cascade for a given time on a data set that fits in the device's memory, one stage after another.

    python examples/train_on_device.py --cascade_config examples/recipes/emoji128_gpu.json \\
        --train_data_dir data/emoji128 --output_dir outputs/emoji128

For small pictures and short runs: the decoded images stay on the device, and on a GPU a whole training step is one
CUDA graph. Each stage has its own batch size, learning rate and time. If interrupted, rerun the same command to resume
from the newest checkpoints. For large data, several processes, joint training or latents, use `train_pisdm.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from tqdm.auto import tqdm

from diffusers_pisdm import PISDMCascadePipeline, PISDMTransformer2DModel
from diffusers_pisdm.data.device_images import LabelledImages, load_labelled_images
from diffusers_pisdm.data.image_data import load_image_data
from diffusers_pisdm.data.image_rows import ON_BAD_IMAGE, ImageRows
from diffusers_pisdm.data.image_transform import ImageTransform
from diffusers_pisdm.data.rows import DataError
from diffusers_pisdm.schedulers import sampling_schedulers, stage_noise_schedules
from diffusers_pisdm.training import LOSS_WEIGHTINGS, CascadeObjective
from diffusers_pisdm.training.checkpoints import find_resume_point
from diffusers_pisdm.training.denoising_loss import PREDICTION_TYPES
from diffusers_pisdm.training.device_trainer import DeviceSettings, DeviceTrainer
from diffusers_pisdm.training.fine_tuning import (
    check_noise_schedules,
    known_class_order,
    new_cascade,
    pretrained_defaults,
    start_cascade,
)
from diffusers_pisdm.training.optimization import OPTIMIZERS
from diffusers_pisdm.training.recipes import (
    Recipe,
    argument,
    defaults_of,
    fit_to_stages,
    make_parser,
    parse_arguments,
    run_script,
    write_training_config,
)
from diffusers_pisdm.training.sample_sheets import draw_samples, save_sample_sheets
from diffusers_pisdm.training.trainer import Trainer
from diffusers_pisdm.utils.files import lock_folder, save_in_place
from diffusers_pisdm.utils.machine import describe_machine


ONE_OR_EACH = "One value, or one per stage."
OBJECTIVE = defaults_of(CascadeObjective)


@dataclass(kw_only=True)
class RunArguments:
    cascade_config: str = argument(help="A recipe: a JSON file with noise schedule, stages, and defaults.")
    train_data_dir: str = argument(help="A folder of images, or a data set on the Hub.")
    output_dir: str = argument()
    pretrained_model_name_or_path: str | None = argument(
        None, "A cascade of the same stages to start from; its classes may differ."
    )
    dataset_config_name: str | None = argument(None, "The data set's configuration, if it has several.")
    train_split: str = "train"
    validation_split: str | None = argument(None, "A held-out split on which to measure the loss.")
    flip_column: str | None = argument(None, "A boolean column that says which images may be mirrored.")
    random_flip: bool = argument(False, "Mirror half of the images at random, where allowed.")
    random_shift: int = argument(0, "Shift images by up to this many pixels.", minimum=0)
    on_bad_image: str = argument("stop", choices=ON_BAD_IMAGE)
    class_name_factors: str | None = argument(None, "Embed a class as the sum of its name's parts, split at this.")
    seed: int = argument(0, "Determines initial weights, the order of the images and all noise.", minimum=0)


@dataclass(kw_only=True)
class TimeArguments:
    title: ClassVar[str] = "duration (pass one of the first two)"

    minutes: list[float] | None = argument(None, f"Training time. {ONE_OR_EACH}", above=0)
    max_train_steps: list[int] | None = argument(None, ONE_OR_EACH, minimum=1)
    rehearse: bool = argument(False, "Run with a tenth of the time, steps and batch sizes.")


@dataclass(kw_only=True)
class StageArguments:
    title: ClassVar[str] = "stages"

    train_stages: list[int] | None = argument(
        None, "Stages to train, in this order; default: all, highest first.", minimum=1
    )
    train_batch_size: list[int] = argument([64], ONE_OR_EACH, minimum=1)
    learning_rate: list[float] = argument([1e-3], ONE_OR_EACH, minimum=0)
    ema_decay: list[float] = argument([0.999], ONE_OR_EACH, minimum=0, maximum=1)
    prediction_types: list[str] | None = argument(None, f"Instead of the recipe's. {ONE_OR_EACH}", PREDICTION_TYPES)
    noise_shifts: list[float] | None = argument(None, f"Shifts the noise schedule. {ONE_OR_EACH}", above=0)
    loss_weighting: list[str] = argument(["uniform"], ONE_OR_EACH, LOSS_WEIGHTINGS)


@dataclass(kw_only=True)
class SharedArguments:
    title: ClassVar[str] = "the same for all stages"

    snr_gamma: float = argument(OBJECTIVE["min_snr_gamma"], "Gamma of min_snr.", above=0)
    sigmoid_bias: float = argument(
        OBJECTIVE["sigmoid_bias"], "Bias of sigmoid: the log SNR above which weights fall.", minimum=-20, maximum=20
    )
    label_dropout: float = argument(OBJECTIVE["label_dropout"], "Of the class, for guidance.", minimum=0, maximum=1)
    factor_dropout: float = argument(
        OBJECTIVE["factor_dropout"], "In addition, dropout of each factor of a class.", minimum=0, maximum=1
    )
    max_noise_level: float = argument(
        OBJECTIVE["max_noise_level"], "Conditioning augmentation: the highest level.", minimum=0, maximum=1
    )
    lr_warmup_steps: int = argument(200, "First steps, over which the rate rises.", minimum=0)
    lr_cooldown: float = argument(
        0.3, "Share of the steps over which the learning rate falls to zero.", minimum=0, maximum=1
    )
    optimizer: str = argument(
        "adamw", "muon: Muon for the layers' matrices, AdamW for the rest. Try a rate of 3e-3.", OPTIMIZERS
    )
    adam_beta1: float = argument(0.9, "Decay of AdamW's mean gradient.", minimum=0, below=1)
    adam_beta2: float = argument(0.99, "Decay of AdamW's mean square.", minimum=0, below=1)
    adam_weight_decay: float = argument(0.03, "AdamW's, on matrices and filters.", minimum=0)
    adam_epsilon: float = argument(1e-8, "Added to AdamW's denominator.", above=0)
    max_grad_norm: float = argument(1.0, "Larger gradients are scaled down to this norm.", above=0)
    mixed_precision: str = argument("no", choices=("no", "bf16"))
    no_cuda_graph: bool = argument(False, "Launch a GPU's kernels individually.")


@dataclass(kw_only=True)
class WatchArguments:
    title: ClassVar[str] = "watching and resuming"

    logging_steps: int = argument(100, "Steps between log lines.", minimum=1)
    validation_minutes: float = argument(10, "Between held-out losses and saved pipelines.", minimum=0)
    checkpointing_minutes: float = argument(5, "Between checkpoints.", minimum=0)
    validation_classes: int = argument(32, "Classes in the sample grid.", minimum=1)
    validation_inference_steps: int = argument(10, "Steps per stage in the sample grid.", minimum=1)
    validation_guidance_scale: list[float] = argument([2.0], f"In the sample grid. {ONE_OR_EACH}", minimum=0)


@dataclass(kw_only=True)
class DeviceArguments(  # `--help` lists the last base first
    WatchArguments, SharedArguments, StageArguments, TimeArguments, RunArguments
):
    """All arguments of this script, with their defaults; recipes fill the same fields."""


def parse_args(argv: Sequence[str] | None = None) -> tuple[DeviceArguments, Recipe]:
    parser = make_parser(DeviceArguments, __doc__)
    given = parser.parse_args(argv)
    args, recipe = parse_arguments(parser, DeviceArguments, argv)
    if given.max_train_steps is not None and given.minutes is None:  # the command line overrides the recipe
        args.minutes = None
    elif given.minutes is not None and given.max_train_steps is None:
        args.max_train_steps = None
    if recipe.vae is not None:
        parser.error("this script trains on pixels; to train in latents, use train_pisdm.py")
    if (args.minutes is None) == (args.max_train_steps is None):
        parser.error("pass one of --minutes and --max_train_steps")
    count = len(recipe.stages)
    lists = ("minutes", "max_train_steps", "train_batch_size", "learning_rate", "ema_decay", "loss_weighting")
    lists += ("prediction_types", "noise_shifts", "validation_guidance_scale")
    try:
        fit_to_stages(args, lists, count)
    except ValueError as error:
        parser.error(str(error))
    if args.flip_column is not None and not args.random_flip:
        parser.error("--flip_column says which images --random_flip may mirror: pass both")
    if args.train_stages is None:
        args.train_stages = list(range(count, 0, -1))
    if args.rehearse:
        args.minutes = args.minutes and [minutes / 10 for minutes in args.minutes]
        args.max_train_steps = args.max_train_steps and [max(1, steps // 10) for steps in args.max_train_steps]
        args.train_batch_size = [max(1, size // 10) for size in args.train_batch_size]
        args.lr_warmup_steps //= 10
    return args, recipe


def load_data(
    args: DeviceArguments, size: int, device: torch.device, class_order: list[str] | None
) -> tuple[LabelledImages, ...]:
    """Training images and, where a split is named, held-out ones."""
    splits, class_names, data = [args.train_split, args.validation_split], None, []
    for split in filter(None, splits):
        options = {"flip_column": args.flip_column, "config_name": args.dataset_config_name}
        images = load_image_data(
            args.train_data_dir, split, class_names=class_names, class_order=class_order, **options
        )
        rows = ImageRows(images, ImageTransform(size), args.on_bad_image)
        data.append(load_labelled_images(rows).to(device))
        class_names = data[0].class_names
    return tuple(data)


def stage_settings(args: DeviceArguments, index: int, on_gpu: bool) -> DeviceSettings:
    """What the arguments say of one stage."""
    shared = (
        "optimizer",
        "lr_warmup_steps",
        "lr_cooldown",
        "adam_beta1",
        "adam_beta2",
        "adam_weight_decay",
        "adam_epsilon",
    )
    shared += ("max_grad_norm", "logging_steps", "validation_minutes", "checkpointing_minutes", "seed")
    own = ("minutes", "max_train_steps", "train_batch_size", "learning_rate", "ema_decay")
    return DeviceSettings(
        **{name: getattr(args, name) for name in (*shared, "random_flip", "random_shift")},
        **{name: getattr(args, name) and getattr(args, name)[index] for name in own},
        record=on_gpu and not args.no_cuda_graph,
    )


def train_stage(
    number: int,
    stages: list[PISDMTransformer2DModel],
    schedulers: list[DDPMScheduler],
    data: tuple[LabelledImages, ...],
    args: DeviceArguments,
    save: Callable[[Trainer], None],
) -> None:
    """Trains one stage; its averaged weights are in the model afterwards."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=args.mixed_precision)
    if accelerator.num_processes > 1:
        raise DataError("This script runs in one process: start it with `python`, or use train_pisdm.py.")
    for stage in stages:
        stage.to(accelerator.device).requires_grad_(True)
    objective = CascadeObjective(
        stages,
        schedulers,
        loss_weighting=args.loss_weighting,
        min_snr_gamma=args.snr_gamma,
        sigmoid_bias=args.sigmoid_bias,
        label_dropout=args.label_dropout,
        factor_dropout=args.factor_dropout,
        max_noise_level=args.max_noise_level,
        sil_weight=0.0,
        train_stages=[number],
    )
    settings = stage_settings(args, number - 1, accelerator.device.type == "cuda")
    folder = Path(args.output_dir) / f"stage_{number}"
    trainer = DeviceTrainer(accelerator, objective, data[0], settings, folder, *data[1:], on_validation=save)
    trainer.resume()
    if trainer.is_done and not trainer.owes_validation:
        tqdm.write(f"stage {number}: already complete, with {trainer.state.step} steps")
    else:
        trainer.train()
    trainer.average.copy_to(trainer.parameters)
    accelerator.free_memory()
    if trainer.stopped_by is not None:
        raise SystemExit(128 + trainer.stopped_by)


def main(argv: Sequence[str] | None = None) -> None:
    args, recipe = parse_args(argv)
    with lock_folder(args.output_dir):
        run(args, recipe)


def run(args: DeviceArguments, recipe: Recipe) -> None:
    output_dir = Path(args.output_dir)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    pretrained, defaults = None, {}
    if args.pretrained_model_name_or_path is not None:
        pretrained = PISDMCascadePipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.float32)
    data = load_data(args, recipe.stages[-1]["sample_size"], device, known_class_order(output_dir, pretrained))
    class_names = data[0].class_names
    schedulers = stage_noise_schedules(
        recipe.noise_schedule(), len(recipe.stages), args.noise_shifts, args.prediction_types
    )
    if pretrained is not None:
        stages = start_cascade(pretrained, recipe.stages, class_names)
        check_noise_schedules(pretrained, schedulers)
        defaults = pretrained_defaults(pretrained, len(stages))
        if args.factor_dropout > 0 and any(stage.config.class_factors is None for stage in stages):
            print("The classes differ from the pretrained ones and have no factors: --factor_dropout has no effect.")
            args.factor_dropout = 0.0
    else:
        stages = new_cascade(recipe.stages, class_names, args.class_name_factors)
    for number, stage in enumerate(stages, start=1):  # what an earlier run has trained
        checkpoint, _ = find_resume_point(output_dir / f"stage_{number}", "latest", lambda message: None)
        if checkpoint is not None:
            prefix, weights = f"{number - 1}.", load_file(checkpoint / "ema.safetensors")
            stage.load_state_dict({name.removeprefix(prefix): weight for name, weight in weights.items()})
    arguments = {name: str(value) for name, value in vars(args).items()}
    write_training_config(output_dir, arguments, hardware=describe_machine(device))

    def save(trainer: Trainer) -> None:
        """The pipeline as it is now, and samples of it."""
        pipeline = PISDMCascadePipeline.from_stages(
            stages, sampling_schedulers(schedulers), id2label=dict(enumerate(class_names)), **defaults
        )
        save_in_place(partial(pipeline.save_pretrained, max_shard_size="15MB"), output_dir)
        images, labels = draw_samples(
            pipeline,
            args.validation_classes,
            args.seed,
            guidance_scale=args.validation_guidance_scale,
            num_inference_steps=args.validation_inference_steps,
        )
        save_sample_sheets(output_dir / "samples" / trainer.output_dir.name, trainer.state.step, images, labels)

    for number in args.train_stages:
        train_stage(number, stages, schedulers, data, args, save)


if __name__ == "__main__":
    run_script(main)
