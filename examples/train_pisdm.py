#!/usr/bin/env python
"""Trains a PIS-DM cascade on a folder of images or a data set: eq. 17 of the paper, all stages together or some.

    accelerate launch examples/train_pisdm.py --cascade_config examples/recipes/emoji64.json \
        --train_data_dir data/emoji64 --output_dir outputs/emoji64

The same command again continues from the newest checkpoint. The output folder is a pipeline that
`PISDMCascadePipeline.from_pretrained` loads, with checkpoints, sample grids and loss curves beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DDPMScheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi
from PIL import Image
from tqdm.auto import tqdm

import diffusers_pisdm
from diffusers_pisdm import PISDMCascadePipeline, PISDMTransformer2DModel
from diffusers_pisdm.models.class_embedding import class_factors_from_names
from diffusers_pisdm.models.latents import encode_latents, load_vae, vae_scale_factor
from diffusers_pisdm.schedulers import sampling_schedulers, stage_noise_schedules
from diffusers_pisdm.training import LOSS_WEIGHTINGS, CascadeObjective, LossMeter, image_pyramid
from diffusers_pisdm.training.checkpoints import (
    CheckpointError,
    find_checkpoints,
    find_fault,
    read_state,
    save_checkpoint,
)
from diffusers_pisdm.training.cost_report import cost_report, format_cost_report
from diffusers_pisdm.training.cost_settings import CostSettings
from diffusers_pisdm.training.data_errors import DataError
from diffusers_pisdm.training.fine_tuning import add_lora, check_noise_schedules, pretrained_defaults, start_cascade
from diffusers_pisdm.training.image_data import load_image_data, read_class_names
from diffusers_pisdm.training.image_rows import ON_BAD_IMAGE, ImageRows
from diffusers_pisdm.training.image_transform import ImageTransform
from diffusers_pisdm.training.latent_cache import LatentCache
from diffusers_pisdm.training.loss_curves import plot_loss_curves
from diffusers_pisdm.training.machine import describe_machine, peak_memory_gib
from diffusers_pisdm.training.metrics_file import append_metrics, forget_later_metrics
from diffusers_pisdm.training.optimization import learning_rate_factor, make_optimizer, parameter_groups
from diffusers_pisdm.training.publishing import publish_cascade
from diffusers_pisdm.training.recipes import Recipe, apply_recipe, read_recipe
from diffusers_pisdm.training.replace_files import save_in_place
from diffusers_pisdm.training.sample_sheets import draw_samples, forget_later_sheets, save_sample_sheets
from diffusers_pisdm.training.seeds import noise_seed
from diffusers_pisdm.training.stage_cost import estimate_cascade_cost
from diffusers_pisdm.training.stage_speed import measure_stage_speed
from diffusers_pisdm.training.training_batches import TrainingBatches, validation_batches
from diffusers_pisdm.training.weight_average import load_average, save_average


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output_dir", required=True)
    add("--cascade_config", help="A recipe: JSON of noise schedule, stages, and defaults of these arguments.")
    add("--pretrained_model_name_or_path", help="A cascade to start from; classes and stages may be added.")
    add("--seed", type=int, default=0)

    data = parser.add_argument_group("data: one of the first three")
    data.add_argument("--dataset_name", help="A data set on the Hub.")
    data.add_argument("--train_data_dir", help="A folder of images, one folder a class; of parquet; of webdataset.")
    data.add_argument("--latent_cache", help="What examples/cache_latents.py wrote; training then needs no VAE.")
    data.add_argument("--validation_latent_cache", help="Likewise of held-out images.")
    data.add_argument("--streaming", action="store_true", help="Read the data set as it comes, without a local copy.")
    data.add_argument("--shuffle_buffer_size", type=int, default=10_000, help="Rows a stream is shuffled among.")
    data.add_argument("--image_column", default="image")
    data.add_argument("--label_column", default="label")
    data.add_argument("--class_names_file", help="One class name a line, where the labels are bare numbers.")
    data.add_argument("--train_split", default="train")
    data.add_argument("--validation_split", help="A held-out split, whose loss is measured.")
    data.add_argument("--random_crop", action="store_true")
    data.add_argument("--random_flip", action="store_true", help="Mirror every other image.")
    data.add_argument("--flip_column", help="A column of truth values: which images may be mirrored.")
    data.add_argument("--class_name_factors", help="Embed a class as the sum of its name's parts, separated by this.")
    data.add_argument("--on_bad_image", choices=ON_BAD_IMAGE, default="stop")
    data.add_argument("--dataloader_num_workers", type=int, default=0)
    data.add_argument("--pretrained_vae_model_name_or_path", help="Train in the latents of this VAE.")

    loss = parser.add_argument_group("objective (eq. 17)")
    loss.add_argument(
        "--loss_weighting",
        choices=LOSS_WEIGHTINGS,
        nargs="+",
        default=["uniform"],
        help="lambda(t): one for all stages, or one for each.",
    )
    loss.add_argument("--snr_gamma", type=float, default=5.0, help="gamma of min_snr")
    loss.add_argument("--label_dropout", type=float, default=0.1)
    loss.add_argument("--factor_dropout", type=float, default=0.0, help="Beside it, of each factor of a class.")
    loss.add_argument("--max_noise_level", type=float, default=0.5, help="conditioning augmentation")
    loss.add_argument("--sil_weight", type=float, default=1.0, help="0 trains without the scale-invariant loss")
    loss.add_argument("--sil_temperature", type=float, default=0.1)
    loss.add_argument("--sil_mask_same_class", action="store_true")
    loss.add_argument("--train_stages", type=int, nargs="+", help="Stages to train, from 1; the others stay.")
    loss.add_argument("--batch_shares", type=float, nargs="+", help="Share of the batch for each stage.")
    loss.add_argument("--stage_loss_weights", type=float, nargs="+", help="Weight of each stage's denoising loss.")
    loss.add_argument("--prediction_types", nargs="+", help="Of each stage, instead of the recipe's scheduler's.")
    loss.add_argument("--noise_shifts", type=float, nargs="+", help="Shift of each stage's noise schedule.")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--train_batch_size", type=int, default=64, help="Images a process and step.")
    optim.add_argument("--gradient_accumulation_steps", type=int, default=1)
    optim.add_argument("--max_train_steps", type=int, default=500_000)
    optim.add_argument("--learning_rate", type=float, default=2e-4)
    optim.add_argument("--lr_warmup_steps", type=int, default=500)
    optim.add_argument("--lr_cooldown_steps", type=int, default=0, help="Last steps, over which the rate falls to 0.")
    optim.add_argument("--adam_beta1", type=float, default=0.99)
    optim.add_argument("--adam_beta2", type=float, default=0.999)
    optim.add_argument("--adam_weight_decay", type=float, default=0.03)
    optim.add_argument("--adam_epsilon", type=float, default=1e-8)
    optim.add_argument("--use_8bit_adam", action="store_true", help="bitsandbytes' AdamW8bit")
    optim.add_argument("--max_grad_norm", type=float, default=1.0)
    optim.add_argument("--max_skipped_steps", type=int, default=20, help="Non-finite steps in a row before stopping.")
    optim.add_argument("--ema_decay", type=float, default=0.9999)
    optim.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's configuration")
    optim.add_argument("--gradient_checkpointing", action="store_true")
    optim.add_argument("--compile", action="store_true", help="torch.compile each block")
    optim.add_argument("--lora_rank", type=int, help="Train LoRA adapters of this rank instead of all weights.")
    optim.add_argument("--lora_alpha", type=float, help="default: the rank")

    watch = parser.add_argument_group("watching and resuming")
    watch.add_argument("--dry_run", action="store_true", help="Print parameters, memory, FLOPs and time; then stop.")
    watch.add_argument("--logging_steps", type=int, default=50)
    watch.add_argument("--validation_steps", type=int, default=1000, help="Held-out loss and samples; 0: at the end.")
    watch.add_argument("--validation_classes", type=int, default=16, help="Classes in the sample grid.")
    watch.add_argument("--validation_guidance_scale", type=float, default=2.0)
    watch.add_argument("--validation_inference_steps", type=int, default=20)
    watch.add_argument("--checkpointing_steps", type=int, default=1000)
    watch.add_argument("--checkpoints_total_limit", type=int, default=2)
    watch.add_argument(
        "--resume_from_checkpoint", default="latest", help='"latest", "none" (start anew) or a checkpoint folder.'
    )
    watch.add_argument("--report_to", help="tensorboard, wandb, trackio, ...: any tracker of accelerate.")
    watch.add_argument("--tracker_project_name", default="pisdm")

    hub = parser.add_argument_group("publishing")
    hub.add_argument("--push_to_hub", action="store_true", help="At the end; see also examples/publish.py.")
    hub.add_argument("--hub_model_id", help="owner/name")
    hub.add_argument("--hub_private_repo", action="store_true")
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, Recipe | None]:
    """The recipe's training arguments are defaults: what the command line says counts more."""
    parser = make_parser()
    args, recipe = parser.parse_args(argv), None
    if args.cascade_config is not None:
        try:
            recipe = read_recipe(args.cascade_config)
            apply_recipe(recipe, parser)
        except (OSError, ValueError) as error:
            parser.error(f"--cascade_config {args.cascade_config}: {error}")
        args = parser.parse_args(argv)
    elif args.pretrained_model_name_or_path is None:
        parser.error("give --cascade_config, --pretrained_model_name_or_path or both")
    if sum(source is not None for source in (args.dataset_name, args.train_data_dir, args.latent_cache)) != 1:
        parser.error("give one of --dataset_name, --train_data_dir and --latent_cache")
    for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "logging_steps", "lora_rank"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.latent_cache is not None and args.pretrained_vae_model_name_or_path is None:
        parser.error("--latent_cache needs --pretrained_vae_model_name_or_path, to decode samples")
    if args.push_to_hub and args.hub_model_id is None:
        parser.error("--push_to_hub needs --hub_model_id owner/name")
    if args.push_to_hub and args.lora_rank is not None:
        parser.error("--push_to_hub publishes whole cascades: upload the LoRA file with `hf upload`")
    if args.class_name_factors is not None and args.pretrained_model_name_or_path is not None:
        parser.error("--class_name_factors is for new models: a pretrained cascade has its class embedding")
    if args.flip_column is not None and args.latent_cache is not None:
        parser.error("--flip_column is for pixels: a latent cache does not say what may be mirrored")
    if args.lora_rank is not None and args.pretrained_model_name_or_path is None:
        parser.error("--lora_rank adapts a trained cascade: give --pretrained_model_name_or_path")
    return args, recipe


def load_rows(
    args: argparse.Namespace, sizes: list[int], channels: int, factor: int
) -> tuple[ImageRows | LatentCache, ImageRows | LatentCache | None, list[str]]:
    """Training rows, held-out rows if there are any, and the names of the classes."""
    if args.latent_cache is not None:
        train, held_out = LatentCache(args.latent_cache, args.random_flip), None
        train.check_stages(sizes, channels)
        if args.validation_latent_cache is not None:
            held_out = LatentCache(args.validation_latent_cache)
            held_out.check_stages(sizes, channels)
        return train, held_out, train.class_names

    source, size = args.dataset_name or args.train_data_dir, sizes[-1] * factor
    class_names = None if args.class_names_file is None else read_class_names(args.class_names_file)

    def load(split: str, names: list[str] | None, transform: ImageTransform) -> ImageRows:
        columns = {"image_column": args.image_column, "label_column": args.label_column}
        columns["flip_column"] = args.flip_column
        data = load_image_data(source, split, args.streaming, class_names=names, **columns)
        return ImageRows(data, transform, args.on_bad_image)

    train = load(args.train_split, class_names, ImageTransform(size, args.random_crop, args.random_flip))
    class_names, held_out = train.data.class_names, None
    if args.validation_split is not None:
        held_out = load(args.validation_split, class_names, ImageTransform(size))
    return train, held_out, class_names


def dry_run(args: argparse.Namespace, accelerator: Accelerator, configs: list[dict], num_classes: int) -> None:
    settings = CostSettings(
        gradient_checkpointing=args.gradient_checkpointing,
        mixed_precision=accelerator.mixed_precision,
        use_8bit_adam=args.use_8bit_adam,
        num_processes=accelerator.num_processes,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        device_type=accelerator.device.type,
    )
    trained = [stage - 1 for stage in args.train_stages or range(1, len(configs) + 1)]
    configs = [configs[index] for index in trained]
    shares = None if args.batch_shares is None else [args.batch_shares[index] for index in trained]
    costs = estimate_cascade_cost(configs, num_classes, args.train_batch_size, settings, shares)
    speeds = [
        measure_stage_speed(config, num_classes, cost.batch_size, settings, accelerator.device)
        for config, cost in zip(configs, costs)
    ]
    report = cost_report(costs, settings, args.train_batch_size, args.max_train_steps, speeds)
    accelerator.print(format_cost_report(report))


def stage_config(stage: PISDMTransformer2DModel) -> dict:
    of_the_data = ("num_classes", "class_factors")
    return {key: value for key, value in stage.config.items() if not key.startswith("_") and key not in of_the_data}


def make_pyramid(
    images: torch.Tensor | list[torch.Tensor],
    sizes: list[int],
    vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None,
    accelerator: Accelerator,
    seed: int,
) -> list[torch.Tensor]:
    """What each stage is trained on: pixels in [-1, 1], or latents, for which images of a cache are taken."""
    if isinstance(images, list):
        return [latents.to(accelerator.device) for latents in images]
    pixels = images.to(accelerator.device).float() / 127.5 - 1.0  # (B, 3, H, W)
    pyramid = image_pyramid(pixels, [size * vae_scale_factor(vae) for size in sizes])
    if vae is None:
        return pyramid
    # An image's latents depend on its place in the global batch, not on the processes it is spread over.
    places = [row * accelerator.num_processes + accelerator.process_index for row in range(len(pixels))]
    generators = [torch.Generator().manual_seed(noise_seed(seed, place)) for place in places]
    with torch.no_grad():
        return [encode_latents(vae, stage, generators) for stage in pyramid]


@torch.no_grad()
def held_out_losses(
    accelerator: Accelerator,
    objective: CascadeObjective,
    rows: ImageRows | LatentCache,
    vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Mean losses on held-out images, with the same noise at every call."""
    is_sharded = accelerator.distributed_type == DistributedType.FSDP  # then all processes run every batch together
    place = (1, 0) if is_sharded else (accelerator.num_processes, accelerator.process_index)
    sizes = [stage.config.sample_size for stage in objective.stages]
    meter = LossMeter(objective)
    batches = validation_batches(rows, args.train_batch_size, *place, args.dataloader_num_workers)
    for position, batch in enumerate(batches):
        seed = noise_seed(args.seed, position)
        pyramid = make_pyramid(batch.images, sizes, vae, accelerator, seed)
        meter.add(objective(pyramid, batch.labels.to(accelerator.device), seed))
    return meter.means("validation", lambda tensor: accelerator.reduce(tensor, "sum"))


def log_picture(accelerator: Accelerator, picture: Path, step: int) -> None:
    """To the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            with Image.open(picture) as image:
                tracker.log_images({"samples": np.array(image.convert("RGB"))[None]}, step, dataformats="NHWC")
        elif tracker.name in ("wandb", "trackio"):
            tracker.log_images({"samples": [Image.open(picture)]}, step)


def whole_stages(
    accelerator: Accelerator, objective: torch.nn.Module, bare: CascadeObjective
) -> list[PISDMTransformer2DModel]:
    """The stages with all of their weights; copies in main memory where the processes hold a part each."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return list(bare.stages)
    state, stages = accelerator.get_state_dict(objective), []
    for index, stage in enumerate(bare.stages):
        copy = PISDMTransformer2DModel.from_config(stage.config)
        prefix = f"stages.{index}."
        if accelerator.is_main_process:  # the others get no weights
            copy.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        stages.append(copy)
    return stages


def find_resume_point(args: argparse.Namespace, accelerator: Accelerator) -> Path | None:
    if args.resume_from_checkpoint == "none":
        return None
    if args.resume_from_checkpoint != "latest":
        named = Path(args.resume_from_checkpoint)  # also by its name in the output folder
        checkpoint = next((path for path in (named, Path(args.output_dir) / named) if path.exists()), named)
        fault = find_fault(checkpoint)
        if fault is not None:
            raise ValueError(f"Cannot resume from {checkpoint}: {fault}.")
    else:
        complete, incomplete = find_checkpoints(args.output_dir)
        for path, fault in incomplete.items():
            accelerator.print(f"Ignoring {path}: {fault}.")
        checkpoint = complete[-1] if complete else None
    if checkpoint is not None:
        accelerator.print(f"Resuming from {checkpoint}")
    return checkpoint


def write_training_config(args: argparse.Namespace, num_rows: int | None, accelerator: Accelerator) -> None:
    """What the model card says about the run."""
    config = {
        "arguments": vars(args),
        "images": num_rows,
        "num_processes": accelerator.num_processes,
        "hardware": describe_machine(accelerator.device),
        "versions": {
            "diffusers_pisdm": diffusers_pisdm.__version__,
            **{name: version(name) for name in ("diffusers", "accelerate", "torch")},
        },
    }
    Path(args.output_dir, "training_config.json").write_text(json.dumps(config, indent=2) + "\n")


def report_bad_images(bad_images: list[str], args: argparse.Namespace) -> int:
    if bad_images:
        with Path(args.output_dir, "bad_images.txt").open("a") as file:
            file.writelines(f"{bad}\n" for bad in bad_images)
        tqdm.write("\n".join(f"Skipped: {bad}" for bad in bad_images))
    return len(bad_images)


def main(argv: list[str] | None = None) -> None:
    args, recipe = parse_args(argv)
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        # Told so, accelerate runs several processes on a CPU; DeepSpeed asks for the CPU by DS_ACCELERATOR.
        cpu=not torch.accelerator.is_available() and not os.environ.get("ACCELERATE_USE_DEEPSPEED"),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / "logs"),
    )
    device, num_processes, process_index = accelerator.device, accelerator.num_processes, accelerator.process_index
    if args.push_to_hub and accelerator.is_main_process:
        HfApi().whoami()  # a missing login should not show after days
    set_seed(args.seed)  # the same initial weights in every process

    # Stages: their configurations, noise schedules and sizes
    pretrained, vae_name = None, args.pretrained_vae_model_name_or_path
    if args.pretrained_model_name_or_path is not None:
        pretrained = PISDMCascadePipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.float32)
    if recipe is not None:
        configs, schedulers = recipe.stages, DDPMScheduler(**recipe.scheduler)
    else:
        configs = [stage_config(stage) for stage in pretrained.stages]
        schedulers = [DDPMScheduler.from_config(s.config) for s in pretrained.get_stage_schedulers()]
    sizes, channels = [config["sample_size"] for config in configs], configs[-1]["in_channels"]
    if args.dry_run:
        _, _, class_names = load_rows(args, sizes, channels, factor=1)  # neither the VAE nor images are read
        return dry_run(args, accelerator, configs, len(class_names))
    vae = None
    if args.latent_cache is None:  # it is read without one
        if vae_name is not None:
            vae = load_vae(vae_name, channels).to(device)
        elif pretrained is not None and pretrained.vae is not None:
            vae = pretrained.vae.to(device).eval().requires_grad_(False)
    schedulers = stage_noise_schedules(schedulers, len(configs), args.noise_shifts, args.prediction_types)
    defaults = {}
    if pretrained is not None:
        defaults = pretrained_defaults(pretrained, len(configs))
        if recipe is not None:
            check_noise_schedules(pretrained, schedulers)

    # Data
    rows, held_out_rows, class_names = load_rows(args, sizes, channels, vae_scale_factor(vae))

    # Models, optimizer, averages
    new_classes = False
    if pretrained is None:
        factors = None
        if args.class_name_factors is not None:
            factors = class_factors_from_names(class_names, args.class_name_factors)
        classes = {"num_classes": len(class_names), "class_factors": factors}
        stages = [PISDMTransformer2DModel(**classes, **config) for config in configs]
    else:
        stages = start_cascade(pretrained, configs, class_names)
        new_classes = class_names != list(pretrained.config.id2label.values())
        if args.lora_rank is not None and len(stages) > len(pretrained.stages):
            raise ValueError("--lora_rank adapts the stages that the pretrained cascade has: add stages without it.")
    trained = args.train_stages or range(1, len(stages) + 1)
    for number, stage in enumerate(stages, start=1):
        if args.lora_rank is not None and number in trained:
            alpha = args.lora_rank if args.lora_alpha is None else args.lora_alpha
            add_lora(stage, args.lora_rank, alpha, train_class_embedding=new_classes)
        if args.gradient_checkpointing:
            stage.enable_gradient_checkpointing()
        if args.compile:
            stage.compile_repeated_blocks(fullgraph=True)
    objective = CascadeObjective(
        stages,
        schedulers,
        loss_weighting=args.loss_weighting * (len(stages) if len(args.loss_weighting) == 1 else 1),
        min_snr_gamma=args.snr_gamma,
        label_dropout=args.label_dropout,
        factor_dropout=args.factor_dropout,
        max_noise_level=args.max_noise_level,
        sil_weight=args.sil_weight,
        sil_temperature=args.sil_temperature,
        sil_mask_same_class=args.sil_mask_same_class,
        train_stages=args.train_stages,
        batch_shares=args.batch_shares,
        stage_loss_weights=args.stage_loss_weights,
        process_index=process_index,
        num_processes=num_processes,
    )
    optimizer = make_optimizer(
        parameter_groups(objective, args.adam_weight_decay),
        args.learning_rate,
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
        args.use_8bit_adam,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it would take it from a data loader
        accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    objective, optimizer = accelerator.prepare(objective, optimizer)
    bare = accelerator.unwrap_model(objective)
    named = [(name, p) for name, p in bare.stages.named_parameters() if p.requires_grad]
    names, parameters = [name for name, _ in named], [p for _, p in named]
    average = EMAModel(parameters, decay=args.ema_decay)  # its decay rises to this one over the first steps

    # Where an earlier run got to
    batches = TrainingBatches(
        rows,
        args.train_batch_size,
        args.seed,
        num_processes,
        process_index,
        args.dataloader_num_workers,
        args.shuffle_buffer_size,
    )
    step, elapsed, skipped_steps, bad_images = 0, 0.0, 0, 0
    checkpoint = find_resume_point(args, accelerator)
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
        state = read_state(checkpoint)
        step, elapsed = state["step"], state["elapsed_seconds"]
        skipped_steps = state["skipped_steps"]
        load_average(average, names, checkpoint / "ema.safetensors", state["average_updates"])
        places = state["processes"]
        if rows.is_stream and len(places) != num_processes:
            raise ValueError(f"{checkpoint} is of {len(places)} processes with a stream each, not of {num_processes}.")
        place = places[min(process_index, len(places) - 1)]  # the same for all but streams
        batches.load_state_dict(place["data"])
        bad_images = place["bad_images"] if process_index < len(places) else 0

    # What the run leaves behind
    metrics_file, started = output_dir / "metrics.jsonl", time.time()
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        forget_later_metrics(metrics_file, step)  # a killed run logged more after its last checkpoint
        forget_later_sheets(output_dir / "samples", step)
        write_training_config(args, None if rows.is_stream else len(rows), accelerator)
    if args.report_to:
        accelerator.init_trackers(args.tracker_project_name, {k: str(v) for k, v in vars(args).items()})

    def log(values: dict[str, float]) -> None:
        accelerator.log(values, step=step)
        if accelerator.is_main_process:
            append_metrics(metrics_file, step, values)

    def write_checkpoint() -> None:
        def write(folder: Path) -> None:
            accelerator.save_state(folder)
            save_average(average, names, folder / "ema.safetensors", accelerator.is_main_process)

        state = {
            "elapsed_seconds": elapsed + time.time() - started,
            "average_updates": average.optimization_step,
            "skipped_steps": skipped_steps,
            "processes": gather_object([{"data": batches.state_dict(), "bad_images": bad_images}]),
        }
        save_checkpoint(accelerator, output_dir, step, state, write, args.checkpoints_total_limit)

    def validate() -> None:
        """With the averaged weights, in all processes: sharded models need them all."""
        average.store(parameters)
        average.copy_to(parameters)
        bare.eval()
        if held_out_rows is not None:
            log(held_out_losses(accelerator, bare, held_out_rows, vae, args))
        decoder = vae
        if args.latent_cache is not None:
            decoder = load_vae(vae_name, channels).to(device)
        samplers, id2label = sampling_schedulers(schedulers), dict(enumerate(class_names))
        pipeline = PISDMCascadePipeline.from_stages(
            list(bare.stages), samplers, vae=decoder, id2label=id2label, **defaults
        )
        images, labels = draw_samples(
            pipeline,
            args.validation_classes,
            args.seed,
            guidance_scale=args.validation_guidance_scale,
            num_inference_steps=args.validation_inference_steps,
        )
        whole = whole_stages(accelerator, objective, bare)
        if accelerator.is_main_process:
            grid = save_sample_sheets(output_dir / "samples", step, images, labels)
            log_picture(accelerator, grid, step)
            if args.lora_rank is None:
                pipeline = PISDMCascadePipeline.from_stages(
                    whole, samplers, vae=decoder, id2label=id2label, **defaults
                )
                save_in_place(pipeline.save_pretrained, output_dir)
            else:
                save = partial(pipeline.save_lora_weights, save_class_embeddings=new_classes)
                save_in_place(save, output_dir)
            plot_loss_curves(metrics_file, output_dir / "loss_curves.png")
        average.restore(parameters)
        bare.train()

    # Train
    bare.train()
    meter, images_seen, since, failures = LossMeter(bare), 0, time.time(), 0
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_local_main_process)
    while step < args.max_train_steps:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_factor(
                step, args.lr_warmup_steps, args.lr_cooldown_steps, args.max_train_steps
            )
        finite = True
        for micro_step in range(args.gradient_accumulation_steps):
            batch = next(batches)
            bad_images += report_bad_images(batch.bad_images, args)
            seed = noise_seed(args.seed, step, micro_step)
            with accelerator.accumulate(objective):
                pyramid = make_pyramid(batch.images, sizes, vae, accelerator, seed)
                losses = objective(pyramid, batch.labels.to(device), seed)
                # All processes take a step or none does: one of them alone would wait for the others for ever.
                finite = finite and accelerator.reduce(losses.total.detach().isfinite().float(), "mean").item() == 1.0
                if finite:
                    meter.add(losses)
                    accelerator.backward(losses.total)
                if finite and accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(objective.parameters(), args.max_grad_norm)
                    finite = norm is None or math.isfinite(norm)  # DeepSpeed need not tell
                    if finite or accelerator.scaler is not None:  # fp16's scaler skips the step, and learns from it
                        optimizer.step()
                if accelerator.sync_gradients:
                    optimizer.zero_grad()
            images_seen += len(batch.labels) * num_processes

        step += 1
        failures = 0 if finite else failures + 1
        skipped_steps += not finite
        if finite:
            average.step(parameters)
        if failures > args.max_skipped_steps:
            raise FloatingPointError(
                f"The loss or its gradient was not finite in {failures} steps in a row, up to step {step}. Go on from"
                " the last checkpoint with a lower --learning_rate, more --lr_warmup_steps or --mixed_precision bf16."
            )
        progress.update()
        done = step == args.max_train_steps
        if step % args.logging_steps == 0 or done:
            values = meter.means("train", lambda tensor: accelerator.reduce(tensor, "sum"))
            counted = accelerator.reduce(torch.tensor(float(bad_images), device=device), "sum")
            values |= {
                "images_per_second": images_seen / (time.time() - since),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "peak_memory_gib": peak_memory_gib(device),
                "skipped_steps": skipped_steps,
                "bad_images": counted.item(),
            }
            log(values)
            progress.set_postfix({name.split("/")[-1]: f"{v:.3g}" for name, v in values.items() if "_t" not in name})
            meter.reset()
            images_seen, since = 0, time.time()
        if done or (args.validation_steps > 0 and step % args.validation_steps == 0):
            validate()
        if step % args.checkpointing_steps == 0 or done:
            write_checkpoint()
    progress.close()
    if args.push_to_hub and accelerator.is_main_process:
        publish_cascade(output_dir, args.hub_model_id, private=args.hub_private_repo)
    # DDP goes before its process group does: as the group's last owner it would close it while it holds Python's lock,
    # which Gloo's thread may be waiting for to drop the last message (torch 2.13 then hangs or aborts).
    objective, optimizer = accelerator.free_memory(objective, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (DataError, CheckpointError, FloatingPointError) as error:  # the user's to mend: no traceback
        sys.exit(f"error: {error}")
