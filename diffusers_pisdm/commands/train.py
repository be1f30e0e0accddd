"""Trains a cascade on a folder of images or a data set: all stages together, or some.

    pisdm train --cascade_config emoji64 --train_data_dir data/emoji64 --output_dir outputs/emoji64
    pisdm train --pretrained_model_name_or_path pisdm-emoji128 --train_data_dir my_images --output_dir outputs/mine

On several GPUs or machines: accelerate launch -m diffusers_pisdm.commands.train ...

If interrupted, rerun the same command to resume from the newest checkpoint. The output folder is a pipeline that
`PISDMCascadePipeline.from_pretrained` loads, with checkpoints, sample grids and loss curves next to it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DDPMScheduler
from PIL import Image
from tqdm.auto import tqdm

from .. import PISDMCascadePipeline, __version__
from ..data.batches import TrainingBatches
from ..data.image_data import load_image_data, read_class_names
from ..data.image_rows import ON_BAD_IMAGE, ImageRows, inspect_images
from ..data.image_transform import ImageTransform
from ..data.latent_cache import LatentCache
from ..data.rows import DataError
from ..models.latents import are_latents, load_vae, vae_scale_factor
from ..models.stage_models import StageModel, stage_config
from ..pipelines.saved_files import RIGHTS_KEY
from ..publishing.hub import check_login, publish_cascade
from ..publishing.model_card import public_base
from ..schedulers import sampling_schedulers, stage_noise_schedules
from ..training import LOSS_WEIGHTINGS, CascadeObjective
from ..training.cascade_objective import warn_of_narrow_stage
from ..training.checkpoints import whole_stages
from ..training.cost.report import cost_report, format_cost_report
from ..training.cost.stage_cost import AUTOCAST_DTYPES, CostSettings, estimate_cascade_cost
from ..training.cost.stage_speed import measure_stage_speed
from ..training.denoising_loss import PREDICTION_TYPES
from ..training.fine_tuning import (
    add_lora,
    check_noise_schedules,
    known_class_order,
    new_cascade,
    pretrained_defaults,
    start_cascade,
)
from ..training.metrics import plot_loss_curves
from ..training.recipes import (
    Recipe,
    TrainerSettings,
    argument,
    defaults_of,
    fit_to_stages,
    make_parser,
    parse_arguments,
    run_script,
    write_training_config,
)
from ..training.sample_sheets import draw_samples, save_sample_sheets
from ..training.scale_invariant_loss import FORMS
from ..training.trainer import Trainer
from ..utils.files import lock_folder, save_in_place
from ..utils.machine import describe_machine, slow_precision_warning
from ..utils.messages import count_of, show_duration, show_range
from ..utils.names import show_name
from ..utils.shipped_files import find_model


MOST_FAULTS_SHOWN = 20
OBJECTIVE = defaults_of(CascadeObjective)
ONE_OR_EACH = "One value, or one per stage."
STAGE_ARGUMENTS = ("loss_weighting", "batch_shares", "stage_loss_weights", "prediction_types", "noise_shifts")
STAGE_ARGUMENTS += ("validation_guidance_scale",)


@dataclass(kw_only=True)
class RunArguments:
    output_dir: str = argument()
    cascade_config: str | None = argument(
        None,
        "A recipe with noise schedule, stages and defaults for these arguments: a file, or the name of one of ours.",
    )
    pretrained_model_name_or_path: str | None = argument(
        None, "A cascade to start from; you may add classes and stages."
    )
    dry_run: bool = argument(False, "Print parameters, memory, FLOPs and time, then stop.")
    check_data: bool = argument(False, "Decode every image once before the first step, to find those that are broken.")


@dataclass(kw_only=True)
class DataArguments:
    title: ClassVar[str] = "data (pass one of the first three)"

    dataset_name: str | None = argument(None, "A data set on the Hub.")
    train_data_dir: str | None = argument(None, "A folder: one subfolder of images per class, parquet or webdataset.")
    latent_cache: str | None = argument(None, "A folder from `pisdm cache-latents`; training then needs no VAE.")
    validation_latent_cache: str | None = argument(None, "The same for held-out images.")
    streaming: bool = argument(False, "Read the data set as it arrives, without a local copy.")
    shuffle_buffer_size: int = argument(10_000, "Shuffle a stream within this many rows.", minimum=1)
    image_column: str = "image"
    label_column: str = "label"
    dataset_config_name: str | None = argument(None, "The data set's configuration, if it has several.")
    class_names_file: str | None = argument(None, "A file with one class name per line, if labels are bare numbers.")
    train_split: str = "train"
    validation_split: str | None = argument(None, "A held-out split on which to measure the loss.")
    random_crop: bool = False
    random_flip: bool = argument(False, "Mirror half of the images at random.")
    flip_column: str | None = argument(None, "A boolean column that says which images may be mirrored.")
    on_bad_image: str = argument("stop", choices=ON_BAD_IMAGE)
    keep_images_gib: float = argument(
        1.0,
        "Keep decoded images in memory if a split takes at most this much; not with --random_crop or --streaming.",
        minimum=0,
    )


@dataclass(kw_only=True)
class ObjectiveArguments:
    title: ClassVar[str] = "objective (eq. 17)"

    loss_weighting: list[str] = argument([OBJECTIVE["loss_weighting"]], f"lambda(t). {ONE_OR_EACH}", LOSS_WEIGHTINGS)
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
    sil_weight: float = argument(
        OBJECTIVE["sil_weight"], "0 trains without the scale-invariant loss; see sil_per_value.", minimum=0
    )
    sil_temperature: float = argument(OBJECTIVE["sil_temperature"], "Of the scale-invariant loss.", above=0)
    sil_mask_same_class: bool = argument(
        OBJECTIVE["sil_mask_same_class"], "Do not contrast images of one class in the scale-invariant loss."
    )
    independent_conditions: bool = argument(
        OBJECTIVE["independent_conditions"], "Draw timesteps and dropped labels for each stage, not once for all."
    )
    sil_form: str = argument(OBJECTIVE["sil_form"], "Of the scale-invariant loss.", FORMS)
    sil_stop_gradient: bool = argument(
        OBJECTIVE["sil_stop_gradient"], "Do not train the lower stage of a pair with the scale-invariant loss."
    )
    sil_max_timestep: int | None = argument(
        OBJECTIVE["sil_max_timestep"], "Only compare images below this timestep in both stages.", minimum=1
    )
    sil_subtract_condition: bool = argument(
        OBJECTIVE["sil_subtract_condition"], "Compare features minus what timestep and class alone say about them."
    )
    sil_per_value: bool = argument(
        OBJECTIVE["sil_per_value"], "Divide sil_weight by an image's number of values, as eq. 17 reads literally."
    )
    sil_decay_steps: int | None = argument(
        OBJECTIVE["sil_decay_steps"], "Steps over which sil_weight falls to zero.", minimum=1
    )
    train_stages: list[int] | None = argument(
        None, "Stages to train, counted from 1; the others are frozen.", minimum=1
    )
    batch_shares: list[float] | None = argument(None, f"Of the batch. {ONE_OR_EACH}", above=0, maximum=1)
    stage_loss_weights: list[float] | None = argument(None, f"Of the denoising loss. {ONE_OR_EACH}", above=0)
    prediction_types: list[str] | None = argument(None, f"Instead of the recipe's. {ONE_OR_EACH}", PREDICTION_TYPES)
    noise_shifts: list[float] | None = argument(None, f"Shifts the noise schedule. {ONE_OR_EACH}", above=0)


@dataclass(kw_only=True)
class ModelArguments:
    title: ClassVar[str] = "models"

    class_name_factors: str | None = argument(None, "Embed a class as the sum of its name's parts, split at this.")
    pretrained_vae_model_name_or_path: str | None = argument(None, "Train in the latents of this VAE.")
    mixed_precision: str | None = argument(None, "Default: accelerate's configuration.", ("no", "fp16", "bf16"))
    gradient_checkpointing: bool = False
    compile: bool = argument(False, "Apply torch.compile to each block.")
    lora_rank: int | None = argument(None, "Train LoRA adapters of this rank instead of all weights.", minimum=1)
    lora_alpha: float | None = argument(None, "Default: the rank.", above=0)


@dataclass(kw_only=True)
class SampleArguments:
    title: ClassVar[str] = "samples and trackers"

    validation_classes: int = argument(16, "Classes in the sample grid.", minimum=1)
    validation_guidance_scale: list[float] = argument([2.0], f"In the sample grid. {ONE_OR_EACH}", minimum=0)
    validation_inference_steps: int = argument(20, "Steps per stage in the sample grid.", minimum=1)
    report_to: str | None = argument(None, "tensorboard, wandb, trackio or another accelerate tracker.")
    tracker_project_name: str = "pisdm"


@dataclass(kw_only=True)
class HubArguments:
    title: ClassVar[str] = "publishing"

    push_to_hub: bool = argument(False, "Publish at the end; see also `pisdm publish`.")
    hub_model_id: str | None = argument(None, "The repository: owner/name.")
    hub_private_repo: bool = False


@dataclass(kw_only=True)
class TrainingArguments(  # `--help` lists the last base first
    HubArguments, SampleArguments, TrainerSettings, ModelArguments, ObjectiveArguments, DataArguments, RunArguments
):
    """All arguments of this command, with their defaults; recipes fill the same fields."""


def parse_args(argv: Sequence[str] | None = None) -> tuple[TrainingArguments, Recipe | None]:
    parser = make_parser(TrainingArguments, __doc__)
    args, recipe = parse_arguments(parser, TrainingArguments, argv)
    if args.cascade_config is None and args.pretrained_model_name_or_path is None:
        parser.error("pass --cascade_config, --pretrained_model_name_or_path or both")
    if sum(source is not None for source in (args.dataset_name, args.train_data_dir, args.latent_cache)) != 1:
        parser.error("pass one of --dataset_name, --train_data_dir and --latent_cache")
    if args.latent_cache is not None and args.pretrained_vae_model_name_or_path is None:
        parser.error("--latent_cache needs --pretrained_vae_model_name_or_path to decode samples")
    if args.push_to_hub and args.hub_model_id is None:
        parser.error("--push_to_hub needs --hub_model_id owner/name")
    if args.class_name_factors is not None and args.pretrained_model_name_or_path is not None:
        parser.error("--class_name_factors is for new models; a pretrained cascade already has a class embedding")
    if args.check_data and args.latent_cache is not None:
        parser.error("--check_data is for images; a latent cache holds none")
    if args.flip_column is not None and args.latent_cache is not None:
        parser.error("--flip_column is for pixels; a latent cache does not record what may be mirrored")
    if args.flip_column is not None and not args.random_flip:
        parser.error("--flip_column says which images --random_flip may mirror: pass both")
    if args.lora_rank is not None and args.pretrained_model_name_or_path is None:
        parser.error("--lora_rank adapts a trained cascade: pass --pretrained_model_name_or_path")
    return args, recipe


def load_rows(
    args: TrainingArguments, sizes: list[int], channels: int, factor: int, class_order: list[str] | None
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
        columns |= {"flip_column": args.flip_column, "config_name": args.dataset_config_name}
        data = load_image_data(source, split, args.streaming, class_names=names, class_order=class_order, **columns)
        return ImageRows(data, transform, args.on_bad_image, args.keep_images_gib)

    train = load(args.train_split, class_names, ImageTransform(size, args.random_crop, args.random_flip))
    class_names, held_out = train.data.class_names, None
    if args.validation_split is not None:
        held_out = load(args.validation_split, class_names, ImageTransform(size))
    return train, held_out, class_names


def load_pretrained(args: TrainingArguments) -> PISDMCascadePipeline | None:
    if args.pretrained_model_name_or_path is None:
        return None
    return PISDMCascadePipeline.from_pretrained(find_model(args.pretrained_model_name_or_path), dtype=torch.float32)


def dry_run(args: TrainingArguments, recipe: Recipe | None, accelerator: Accelerator) -> None:
    pretrained = load_pretrained(args)
    configs, _ = describe_stages(recipe, pretrained)
    fit_to_stages(args, STAGE_ARGUMENTS, len(configs))
    sizes, channels = [config["sample_size"] for config in configs], configs[-1]["in_channels"]
    class_order = known_class_order(args.output_dir, pretrained)
    _, _, class_names = load_rows(args, sizes, channels, 1, class_order)  # neither the VAE nor images are read
    num_classes = len(class_names)
    for number, config in enumerate(configs, start=1):
        warn_of_narrow_stage(number, config)
    settings = CostSettings(
        gradient_checkpointing=args.gradient_checkpointing,
        mixed_precision=accelerator.mixed_precision,
        optimizer=args.optimizer,
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


def describe_stages(recipe: Recipe | None, pretrained: PISDMCascadePipeline | None) -> tuple[list[dict], list]:
    """Each stage's configuration without its classes, and noise schedule: the recipe's, or those of the cascade."""
    if recipe is not None:
        return recipe.stages, [recipe.noise_schedule()] * len(recipe.stages)
    configs = [stage_config(stage) for stage in pretrained.stages]
    return configs, [DDPMScheduler.from_config(s.config) for s in pretrained.get_stage_schedulers()]


def load_autoencoder(
    args: TrainingArguments, pretrained: PISDMCascadePipeline | None, channels: int
) -> AutoencoderKL | AutoencoderTiny | AutoencoderDC | None:
    if args.latent_cache is not None:
        return None  # it is read without one
    if args.pretrained_vae_model_name_or_path is not None:
        return load_vae(args.pretrained_vae_model_name_or_path, channels)
    if pretrained is not None and pretrained.vae is not None:
        return pretrained.vae.eval().requires_grad_(False)
    if are_latents(channels, None):
        raise ValueError(
            f"The stages work on latents of {channels} channels, and there is no autoencoder to make them of images."
            " Pass --pretrained_vae_model_name_or_path."
        )
    return None


def make_stages(
    args: TrainingArguments, configs: list[dict], pretrained: PISDMCascadePipeline | None, class_names: list[str]
) -> list[StageModel]:
    """New models, or those of the pretrained cascade, with LoRA adapters if asked for."""
    if pretrained is None:
        stages = new_cascade(configs, class_names, args.class_name_factors)
    else:
        stages = start_cascade(pretrained, configs, class_names)
        if args.lora_rank is not None and len(stages) > len(pretrained.stages):
            raise ValueError("--lora_rank only adapts pretrained stages: drop --lora_rank to add stages.")
    for number, stage in enumerate(stages, start=1):
        if args.lora_rank is not None and number in (args.train_stages or range(1, len(stages) + 1)):
            alpha = args.lora_rank if args.lora_alpha is None else args.lora_alpha
            add_lora(stage, args.lora_rank, alpha, train_class_embedding=has_new_classes(pretrained, class_names))
        if args.gradient_checkpointing:
            stage.enable_gradient_checkpointing()
        if args.compile:
            stage.compile_repeated_blocks(fullgraph=True)
    return stages


def has_new_classes(pretrained: PISDMCascadePipeline, class_names: list[str]) -> bool:
    return class_names != list(pretrained.config.id2label.values())


def cascade_saver(
    args: TrainingArguments,
    schedulers: list[DDPMScheduler],
    class_names: list[str],
    vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None,
    defaults: dict,
    save_class_embeddings: bool,
) -> Callable[[Trainer], None]:
    """What draws samples and saves the pipeline, or its adapters, whenever the run is validated."""
    id2label = dict(enumerate(class_names))

    def save(trainer: Trainer) -> None:
        accelerator, step, decoder = trainer.accelerator, trainer.state.step, vae
        samplers = sampling_schedulers(schedulers)
        if args.latent_cache is not None:
            channels = trainer.objective.stages[0].config.in_channels
            decoder = load_vae(args.pretrained_vae_model_name_or_path, channels).to(accelerator.device)
        parts = {"vae": decoder, "id2label": id2label, **defaults}
        pipeline = PISDMCascadePipeline.from_stages(list(trainer.objective.stages), samplers, **parts)
        drawn = trainer.attempt(
            "drawing samples",
            draw_samples,
            pipeline,
            args.validation_classes,
            args.seed,
            guidance_scale=args.validation_guidance_scale,
            num_inference_steps=args.validation_inference_steps,
        )
        stages = whole_stages(accelerator, trainer.model)
        if not accelerator.is_main_process:
            return
        if args.lora_rank is None:
            pipeline = PISDMCascadePipeline.from_stages(stages, samplers, **parts)
            save_in_place(pipeline.save_pretrained, trainer.output_dir)
        else:
            write = partial(pipeline.save_lora_weights, save_class_embeddings=save_class_embeddings)
            save_in_place(write, trainer.output_dir)
        if drawn is not None:
            sheets = trainer.output_dir / "samples"
            grid = trainer.attempt("saving samples", save_sample_sheets, sheets, step, *drawn)
            if grid is not None:
                trainer.attempt("logging samples to the tracker", log_picture, accelerator, grid, step)
        curves = trainer.output_dir / "loss_curves.png"
        trainer.attempt("plotting the losses", plot_loss_curves, trainer.metrics_file, curves)

    return save


def log_picture(accelerator: Accelerator, picture: Path, step: int) -> None:
    """To the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            with Image.open(picture) as image:
                tracker.log_images({"samples": np.array(image.convert("RGB"))[None]}, step, dataformats="NHWC")
        elif tracker.name in ("wandb", "trackio"):
            tracker.log_images({"samples": [Image.open(picture)]}, step)


def describe_run(args: TrainingArguments, num_rows: int | None, trainer: Trainer) -> None:
    """Writes what the model card says about the run."""
    versions = {name: version(name) for name in ("diffusers", "accelerate", "torch")}
    write_training_config(
        args.output_dir,
        vars(args),
        images=num_rows,
        num_processes=trainer.accelerator.num_processes,
        hardware=describe_machine(trainer.accelerator.device),
        changes=trainer.state.changes,
        versions={"diffusers_pisdm": __version__, **versions},
    )


def check_images(rows: ImageRows, accelerator: Accelerator) -> list[int]:
    """
    Decodes all images, shared among the processes; broken ones end the run, or are named if they are skipped. Returns
    the positions of those.
    """
    reports = inspect_images(rows.data, accelerator.process_index, accelerator.num_processes)
    hidden = not accelerator.is_local_main_process
    total = None if rows.data.num_rows is None else -(-rows.data.num_rows // accelerator.num_processes)
    found = [r for r in tqdm(reports, "checking images", total, leave=False, disable=hidden) if r.fault]
    found = gather_object(found)
    faults = [report.fault for report in found]
    if not faults:
        return []
    more = f"\n  ... and {len(faults) - MOST_FAULTS_SHOWN:,} more" if len(faults) > MOST_FAULTS_SHOWN else ""
    message = f"{count_of(len(faults), 'image')} cannot be read:" + "".join(
        f"\n  {f}" for f in faults[:MOST_FAULTS_SHOWN]
    )
    if rows.on_bad_image == "stop":
        raise DataError(f"{message}{more}\nFix or remove them, or pass --on_bad_image skip.")
    accelerator.print(f"Skipping {message}{more}")
    return [report.position for report in found]


def summarize(
    trainer: Trainer, rows: ImageRows | LatentCache, class_names: list[str], unreadable: list[int]
) -> list[str]:
    """What is about to be trained, on what and for how long, for the terminal."""
    objective, settings = trainer.objective, trainer.settings
    num_images = None if rows.is_stream else len(rows) - len(unreadable)
    images = "a stream of images" if num_images is None else count_of(num_images, "image")
    lines = [f"Data: {images} of {count_of(len(class_names), 'class')}"]
    if num_images is not None and isinstance(rows, ImageRows):
        counts = rows.data.class_counts(unreadable)
        empty = [show_name(name) for name, count in zip(class_names, counts) if count == 0]
        lines[0] += f", {show_range(min(counts), max(counts))} of each"
        if unreadable:
            lines[0] += f"; {len(unreadable):,} more cannot be read"
        if empty:
            names = ", ".join(empty[:MOST_FAULTS_SHOWN]) + (", ..." if len(empty) > MOST_FAULTS_SHOWN else "")
            lines.append(f"Warning: {count_of(len(empty), 'class')} without images, which it will not draw: {names}")
    for number, stage in enumerate(objective.stages, start=1):
        counts = [p.numel() for p in stage.parameters()], [p.numel() for p in stage.parameters() if p.requires_grad]
        total, trained = map(sum, counts)
        what = "frozen" if trained == 0 else "all trained" if trained == total else f"{trained / 1e6:.2g}M trained"
        lines.append(f"Stage {number}: {stage.config.sample_size} px, {total / 1e6:.1f}M parameters, {what}")
    per_step = settings.train_batch_size * settings.gradient_accumulation_steps * trainer.accelerator.num_processes
    lines.append(f"Training: {count_of(settings.max_train_steps, 'step')} of {count_of(per_step, 'image')}")
    if num_images:
        passes = settings.max_train_steps * per_step / num_images
        lines[-1] += f", {passes:.2g} passes over the data" if passes < 10 else f", {passes:.0f} passes over the data"
    if trainer.state.step > 0:
        lines[-1] += f"; {count_of(trainer.state.step, 'step')} done"
    accelerator = trainer.accelerator
    lines += slow_precision_warning(AUTOCAST_DTYPES.get(accelerator.mixed_precision), accelerator.device)
    if settings.lr_warmup_steps > settings.max_train_steps:
        reached = settings.max_train_steps / settings.lr_warmup_steps
        lines.append(
            f"Warning: the warm-up of {count_of(settings.lr_warmup_steps, 'step')} is longer than the run, whose"
            f" learning rate only reaches {reached:.0%} of --learning_rate: pass"
            f" --lr_warmup_steps {settings.max_train_steps // 20}, for example"
        )
    return lines


def what_next(args: TrainingArguments, trainer: Trainer) -> list[str]:
    """What a finished run has left where, and the commands to go on with."""
    folder = shlex.quote(args.output_dir)
    saved = f"Saved after {count_of(trainer.state.step, 'step')} and {show_duration(trainer.state.elapsed_seconds)}:"
    if args.lora_rank is not None:
        base = shlex.quote(args.pretrained_model_name_or_path)
        return [
            f"{saved} LoRA adapters in {args.output_dir}, sample grids in {Path(args.output_dir, 'samples')}",
            f"Next: pisdm generate --model {base} --lora {folder} --output grid.png",
        ]
    return [
        f"{saved} a pipeline in {args.output_dir}, sample grids in {Path(args.output_dir, 'samples')}",
        f"Next: pisdm generate --model {folder} --output grid.png",
        f"      pisdm publish {folder} your-name/your-model --dry_run",
    ]


def train(argv: Sequence[str] | None = None) -> None:
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
    if args.dry_run:
        return dry_run(args, recipe, accelerator)
    if args.push_to_hub and accelerator.is_main_process:
        # A missing login, or base of LoRA adapters, should not show after days.
        check_login(args.hub_model_id)
        if args.lora_rank is not None:
            public_base(args.pretrained_model_name_or_path)
    with lock_folder(output_dir) if accelerator.is_main_process else nullcontext():
        stopped_by = run(args, recipe, accelerator)
        if stopped_by is None and args.push_to_hub and accelerator.is_main_process:
            publish_cascade(output_dir, args.hub_model_id, private=args.hub_private_repo)
    accelerator.end_training()
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)


def run(args: TrainingArguments, recipe: Recipe | None, accelerator: Accelerator) -> int | None:
    """Trains; returns the number of the signal that stopped the run early, if one did."""
    set_seed(args.seed)  # the same initial weights in every process

    # Stages: their configurations, noise schedules and sizes
    pretrained, defaults = load_pretrained(args), {}
    if args.push_to_hub and pretrained is not None:
        for stage in pretrained.stages:
            if RIGHTS_KEY in stage.config:  # publishing would be refused, after days
                raise ValueError(
                    f"--push_to_hub: the pretrained cascade holds weights of others: {stage.config[RIGHTS_KEY]}. Train"
                    " without it; `pisdm publish` then asks whether you may publish them."
                )
    configs, schedulers = describe_stages(recipe, pretrained)
    fit_to_stages(args, STAGE_ARGUMENTS, len(configs))
    sizes, channels = [config["sample_size"] for config in configs], configs[-1]["in_channels"]
    class_order = known_class_order(args.output_dir, pretrained)
    vae = load_autoencoder(args, pretrained, channels)
    vae = None if vae is None else vae.to(accelerator.device)
    schedulers = stage_noise_schedules(schedulers, len(configs), args.noise_shifts, args.prediction_types)
    if pretrained is not None:
        defaults = pretrained_defaults(pretrained, len(configs))
        if recipe is not None:
            check_noise_schedules(pretrained, schedulers)

    # Data, models and what is minimised
    rows, held_out_rows, class_names = load_rows(args, sizes, channels, vae_scale_factor(vae), class_order)
    unreadable = check_images(rows, accelerator) if args.check_data else []
    if args.check_data and held_out_rows is not None:
        check_images(held_out_rows, accelerator)
    stages = make_stages(args, configs, pretrained, class_names)  # refuses a cascade without class names
    new_classes = pretrained is not None and has_new_classes(pretrained, class_names)
    place = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    objective = CascadeObjective(
        stages,
        schedulers,
        loss_weighting=args.loss_weighting,
        min_snr_gamma=args.snr_gamma,
        sigmoid_bias=args.sigmoid_bias,
        label_dropout=args.label_dropout,
        factor_dropout=args.factor_dropout,
        max_noise_level=args.max_noise_level,
        sil_weight=args.sil_weight,
        sil_temperature=args.sil_temperature,
        sil_mask_same_class=args.sil_mask_same_class,
        independent_conditions=args.independent_conditions,
        sil_form=args.sil_form,
        sil_stop_gradient=args.sil_stop_gradient,
        sil_max_timestep=args.sil_max_timestep,
        sil_subtract_condition=args.sil_subtract_condition,
        sil_per_value=args.sil_per_value,
        sil_decay_steps=args.sil_decay_steps,
        train_stages=args.train_stages,
        batch_shares=args.batch_shares,
        stage_loss_weights=args.stage_loss_weights,
        **place,
    )

    # Train
    batches = TrainingBatches(
        rows,
        args.train_batch_size,
        args.seed,
        **place,
        num_workers=args.dataloader_num_workers,
        shuffle_buffer=args.shuffle_buffer_size,
    )
    save = cascade_saver(args, schedulers, class_names, vae, defaults, new_classes)
    data = {"vae": vae, "held_out_rows": held_out_rows, "class_names": class_names}
    trainer = Trainer(accelerator, objective, batches, args, args.output_dir, **data, on_validation=save)
    trainer.resume()
    if accelerator.is_main_process:
        describe_run(args, None if rows.is_stream else len(rows), trainer)
        print("\n".join(summarize(trainer, rows, class_names, unreadable)))
    if args.report_to:
        accelerator.init_trackers(args.tracker_project_name, {k: str(v) for k, v in vars(args).items()})
    trainer.train()
    # DDP goes before its process group does: as the group's last owner it would close it while it holds Python's lock,
    # which Gloo's thread may be waiting for to drop the last message (torch 2.13 then hangs or aborts).
    trainer.model, trainer.optimizer = accelerator.free_memory(trainer.model, trainer.optimizer)
    if trainer.stopped_by is None and accelerator.is_main_process:
        print("\n".join(what_next(args, trainer)))
    return trainer.stopped_by


def main(arguments: list[str] | None = None) -> None:
    run_script(lambda: train(arguments))


if __name__ == "__main__":
    main()
