#!/usr/bin/env python
"""Trains a PIS-DM cascade on a folder of images or a data set: all stages together, with eq. 17 of the paper.

    accelerate launch examples/train_pisdm.py --cascade_config examples/recipes/emoji64.json \
        --train_data_dir data/emoji64 --output_dir outputs/emoji64

The same command again continues from the newest checkpoint. The output folder is a pipeline that
`PISDMCascadePipeline.from_pretrained` loads, with checkpoints, sample grids and loss curves beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from datasets import load_dataset
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_pisdm import PISDMCascadePipeline, PISDMTransformer2DModel
from diffusers_pisdm.image_grid import make_image_grid
from diffusers_pisdm.training import LOSS_WEIGHTINGS, CascadeObjective
from diffusers_pisdm.training.checkpoints import list_checkpoints, read_state, save_checkpoint
from diffusers_pisdm.training.loss_curves import plot_loss_curves
from diffusers_pisdm.training.optimization import parameter_groups, warmup_cooldown_schedule
from diffusers_pisdm.training.seeds import noise_seed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="A data set on the Hub, or a folder of parquet files.")
    data.add_argument("--train_data_dir", help="A folder of images, one folder a class; or of parquet files.")
    data.add_argument("--image_column", default="image")
    data.add_argument("--label_column", default="label")
    data.add_argument("--validation_split", default="validation", help="Held-out split, if the data set has it.")
    data.add_argument("--dataloader_num_workers", type=int, default=0)

    add("--cascade_config", required=True, help="JSON: the noise schedule and each stage's model configuration.")
    add("--output_dir", required=True)
    add("--pretrained_model_name_or_path", help="A cascade of the same configuration whose weights to start from.")
    add("--seed", type=int, default=0)

    loss = parser.add_argument_group("objective (eq. 17)")
    loss.add_argument("--loss_weighting", choices=LOSS_WEIGHTINGS, default="uniform", help="lambda(t)")
    loss.add_argument("--snr_gamma", type=float, default=5.0, help="gamma of min_snr")
    loss.add_argument("--label_dropout", type=float, default=0.1)
    loss.add_argument("--max_noise_level", type=float, default=0.5, help="conditioning augmentation")
    loss.add_argument("--sil_weight", type=float, default=1.0, help="0 trains without the scale-invariant loss")
    loss.add_argument("--sil_temperature", type=float, default=0.1)
    loss.add_argument("--sil_mask_same_class", action="store_true")
    loss.add_argument("--batch_shares", type=float, nargs="+", help="Share of the batch for each stage.")

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
    optim.add_argument("--max_grad_norm", type=float, default=1.0)
    optim.add_argument("--ema_decay", type=float, default=0.9999)
    optim.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    optim.add_argument("--gradient_checkpointing", action="store_true")

    watch = parser.add_argument_group("watching and resuming")
    watch.add_argument("--logging_steps", type=int, default=50)
    watch.add_argument("--validation_steps", type=int, default=1000, help="Held-out loss and sample grid.")
    watch.add_argument("--validation_classes", type=int, default=16, help="Classes in the sample grid.")
    watch.add_argument("--validation_guidance_scale", type=float, default=2.0)
    watch.add_argument("--validation_inference_steps", type=int, default=20)
    watch.add_argument("--checkpointing_steps", type=int, default=1000)
    watch.add_argument("--checkpoints_total_limit", type=int, default=2)
    watch.add_argument(
        "--resume_from_checkpoint", default="latest", help='"latest", "none" (start anew) or a checkpoint folder.'
    )
    watch.add_argument("--report_to", help="tensorboard, wandb, ...: any tracker of accelerate.")

    args = parser.parse_args(argv)
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give either --dataset_name or --train_data_dir")
    return args


def make_dataloaders(args: argparse.Namespace, size: int) -> tuple[DataLoader, DataLoader | None, dict[int, str]]:
    splits = load_dataset(args.dataset_name or args.train_data_dir)
    labels = splits["train"].features[args.label_column]
    id2label = dict(enumerate(labels.names))

    def transform(rows: dict) -> dict:
        images = [ImageOps.fit(image.convert("RGB"), (size, size), Image.LANCZOS) for image in rows[args.image_column]]
        return {"image": images, "label": rows[args.label_column]}

    def collate(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = [torch.frombuffer(bytearray(row["image"].tobytes()), dtype=torch.uint8) for row in rows]
        images = torch.stack(pixels).view(-1, size, size, 3).permute(0, 3, 1, 2)  # (B, 3, H, W)
        return images.float() / 127.5 - 1.0, torch.tensor([row["label"] for row in rows])

    def loader(split: str, train: bool) -> DataLoader:
        return DataLoader(
            splits[split].with_transform(transform),
            batch_size=args.train_batch_size,
            shuffle=train,
            drop_last=train,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
        )

    validation = loader(args.validation_split, train=False) if args.validation_split in splits else None
    return loader("train", train=True), validation, id2label


def make_pipeline(
    objective: CascadeObjective, scheduler: DDPMScheduler, id2label: dict[int, str]
) -> PISDMCascadePipeline:
    stages = list(objective.stages) + [None] * (4 - len(objective.stages))
    return PISDMCascadePipeline(
        transformer=stages[0],
        transformer_2=stages[1],
        transformer_3=stages[2],
        transformer_4=stages[3],
        scheduler=DPMSolverMultistepScheduler.from_config(scheduler.config),
        id2label=id2label,
    )


@torch.no_grad()
def held_out_losses(objective: CascadeObjective, loader: DataLoader, seed: int) -> dict[str, float]:
    """Mean loss of each stage on held-out images, with the same noise at every call."""
    objective.eval()
    sums, count = 0.0, 0
    device = next(objective.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for images, labels in loader:
            losses = objective(images.to(device), labels.to(device))
            sums = sums + torch.cat([losses.denoising, losses.scale_invariant]).cpu() * len(images)
            count += len(images)
    objective.train()
    return name_losses("validation", (sums / count).tolist(), len(objective.stages))


def name_losses(prefix: str, values: list[float], num_stages: int) -> dict[str, float]:
    names = [f"{prefix}/denoising_{i + 1}" for i in range(num_stages)]
    names += [f"{prefix}/scale_invariant_{i + 1}_{i + 2}" for i in range(len(values) - num_stages)]
    return dict(zip(names, values, strict=True))


def sample_grid(pipeline: PISDMCascadePipeline, args: argparse.Namespace, picture: Path) -> None:
    """The same classes and seeds at every call, evenly spread over the classes."""
    num_classes = len(pipeline.config.id2label)
    count = min(args.validation_classes, num_classes)
    classes = [i * num_classes // count for i in range(count)]
    columns = max(4, math.ceil(math.sqrt(count)))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        class_labels=classes,
        guidance_scale=args.validation_guidance_scale,
        num_inference_steps=args.validation_inference_steps,
        generator=[torch.Generator().manual_seed(args.seed + i) for i in range(count)],
    ).images
    picture.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, [pipeline.config.id2label[i] for i in classes], columns).save(picture)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    cascade = json.loads(Path(args.cascade_config).read_text())
    scheduler = DDPMScheduler(**cascade["scheduler"])
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / "logs"),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(args.seed)  # the same initial weights in every process

    # Data, models, optimizer
    train_loader, validation_loader, id2label = make_dataloaders(args, cascade["stages"][-1]["sample_size"])
    stages = [PISDMTransformer2DModel(num_classes=len(id2label), **config) for config in cascade["stages"]]
    if args.pretrained_model_name_or_path is not None:
        pretrained = PISDMCascadePipeline.from_pretrained(args.pretrained_model_name_or_path, vae=None)
        for stage, start in zip(stages, pretrained.stages, strict=True):
            stage.load_state_dict(start.state_dict())
    if args.gradient_checkpointing:
        for stage in stages:
            stage.enable_gradient_checkpointing()
    objective = CascadeObjective(
        stages,
        scheduler,
        loss_weighting=args.loss_weighting,
        min_snr_gamma=args.snr_gamma,
        label_dropout=args.label_dropout,
        max_noise_level=args.max_noise_level,
        sil_weight=args.sil_weight,
        sil_temperature=args.sil_temperature,
        sil_mask_same_class=args.sil_mask_same_class,
        batch_shares=args.batch_shares,
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(objective, args.adam_weight_decay),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    # accelerate steps the schedule once a process
    lr_scheduler = warmup_cooldown_schedule(
        optimizer,
        args.lr_warmup_steps * accelerator.num_processes,
        args.lr_cooldown_steps * accelerator.num_processes,
        args.max_train_steps * accelerator.num_processes,
    )
    objective, optimizer, train_loader, lr_scheduler = accelerator.prepare(
        objective, optimizer, train_loader, lr_scheduler
    )
    bare = accelerator.unwrap_model(objective)
    ema_names = [name for name, _ in bare.stages.named_parameters()]
    ema = EMAModel(bare.stages.parameters(), decay=args.ema_decay)
    if args.report_to:
        accelerator.init_trackers("pisdm", config={k: v for k, v in vars(args).items() if not isinstance(v, list)})

    # Resume
    step, elapsed = 0, 0.0
    resume_from = None
    if args.resume_from_checkpoint == "latest":
        resume_from = next(iter(list_checkpoints(output_dir)[::-1]), None)
    elif args.resume_from_checkpoint != "none":
        resume_from = Path(args.resume_from_checkpoint)
    if resume_from is not None:
        accelerator.print(f"Resuming from {resume_from}")
        accelerator.load_state(resume_from)
        shadow = load_file(resume_from / "ema.safetensors")
        ema.shadow_params = [shadow[name].to(accelerator.device) for name in ema_names]
        state = read_state(resume_from)
        step, elapsed = state["step"], state["elapsed_seconds"]
        ema.optimization_step = step

    def write_checkpoint() -> None:
        def write(folder: Path) -> None:
            accelerator.save_state(folder)
            save_file(dict(zip(ema_names, ema.shadow_params)), folder / "ema.safetensors")

        save_checkpoint(
            output_dir, step, {"elapsed_seconds": elapsed + time.time() - start}, write, args.checkpoints_total_limit
        )

    metrics_file = output_dir / "metrics.jsonl"
    if accelerator.is_main_process:  # what a killed run logged after its last checkpoint will be logged again
        output_dir.mkdir(parents=True, exist_ok=True)
        kept = metrics_file.read_text().splitlines() if metrics_file.exists() else []
        kept = [line for line in kept if json.loads(line)["step"] <= step]
        metrics_file.write_text("".join(line + "\n" for line in kept))

    def log(values: dict[str, float]) -> None:
        accelerator.log(values, step=step)
        with metrics_file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def validate() -> None:
        ema.store(bare.stages.parameters())
        ema.copy_to(bare.stages.parameters())
        if validation_loader is not None:
            log(held_out_losses(bare, validation_loader, args.seed))
        bare.eval()
        pipeline = make_pipeline(bare, scheduler, id2label)
        sample_grid(pipeline, args, output_dir / "samples" / f"step-{step:07d}.png")
        pipeline.save_pretrained(output_dir)
        bare.train()
        ema.restore(bare.stages.parameters())
        plot_loss_curves(metrics_file, output_dir / "loss_curves.png")

    # Train
    start = time.time()
    steps_per_epoch = len(train_loader) // args.gradient_accumulation_steps
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_local_main_process)
    running, running_count, running_since = 0.0, 0, time.time()
    while step < args.max_train_steps:
        epoch, seen = divmod(step, steps_per_epoch)
        train_loader.set_epoch(epoch)
        skipped = seen * args.gradient_accumulation_steps
        for position, (images, labels) in enumerate(skip_first_batches(train_loader, skipped), start=skipped):
            # Noise depends on the position alone: a resumed run draws what an uninterrupted one would have drawn.
            torch.manual_seed(noise_seed(args.seed, accelerator.process_index, epoch, position))
            with accelerator.accumulate(objective):
                losses = objective(images, labels)
                accelerator.backward(losses.total)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(objective.parameters(), args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            running = running + torch.cat([losses.denoising, losses.scale_invariant])
            running_count += 1
            if not accelerator.sync_gradients:
                continue

            step += 1
            ema.step(bare.stages.parameters())
            progress.update()
            done = step == args.max_train_steps
            if accelerator.is_main_process and (step % args.logging_steps == 0 or done):
                values = name_losses("train", (running / running_count).tolist(), len(bare.stages))
                seconds = time.time() - running_since
                values["images_per_second"] = running_count * len(images) * accelerator.num_processes / seconds
                values["learning_rate"] = lr_scheduler.get_last_lr()[0]
                log(values)
                progress.set_postfix({name.split("/")[-1]: f"{value:.3g}" for name, value in values.items()})
                running, running_count, running_since = 0.0, 0, time.time()
            if accelerator.is_main_process and (step % args.validation_steps == 0 or done):
                validate()
            if accelerator.is_main_process and (step % args.checkpointing_steps == 0 or done):
                write_checkpoint()
            if done:
                break
    accelerator.end_training()


if __name__ == "__main__":
    main()
