"""Trains a contestant on images that fit in memory; a killed run goes on from its last checkpoint to the same end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from benchmarks.equal_budget.contestants import Contestant
from diffusers_pisdm.data.device_images import LabelledImages
from diffusers_pisdm.training import CascadeObjective, LossMeter, image_pyramid
from diffusers_pisdm.training.checkpoints import (
    find_checkpoints,
    load_average,
    read_state,
    save_average,
    save_checkpoint,
)
from diffusers_pisdm.training.metrics import append_metrics, forget_later_metrics
from diffusers_pisdm.training.noise import noise_seed
from diffusers_pisdm.training.optimization import learning_rate_factor, make_optimizer, parameter_groups


@dataclass(frozen=True)
class TrainingSettings:
    """
    The same for all contestants.

    Args:
        batch_size (`int`): Images a step.
        learning_rate (`float`):
            AdamW's highest: of 1e-3, 3e-3, 6e-3 and 1.2e-2 the best for DiT in short trials. It rises over the first
            tenth of the steps and falls over the last fifth.
        betas (`tuple[float, float]`), weight_decay (`float`): AdamW's; the defaults are the paper's.
        max_grad_norm (`float`): Gradients are scaled down to this norm.
        ema_decay (`float`): Of the averaged weights, which are what is sampled from.
        logging_steps, checkpointing_steps (`int`): How often.
    """

    batch_size: int = 32
    learning_rate: float = 6e-3
    betas: tuple[float, float] = (0.99, 0.999)
    weight_decay: float = 0.03
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    logging_steps: int = 50
    checkpointing_steps: int = 200


def train_contestant(
    contestant: Contestant,
    data: LabelledImages,
    steps: int,
    seed: int,
    folder: Path,
    settings: TrainingSettings,
) -> CascadeObjective:
    """
    Args:
        contestant ([`Contestant`]): Whom.
        data ([`LabelledImages`]): On what.
        steps (`int`): How long.
        seed (`int`): Initial weights, order of the images, and all noise follow from it.
        folder (`Path`): For `metrics.jsonl` and the checkpoints.
        settings ([`TrainingSettings`]): How.

    Returns:
        [`CascadeObjective`] with the averaged weights, in evaluation mode.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    torch.manual_seed(seed)
    objective = contestant.make_objective(len(data.class_names)).train()
    optimizer = make_optimizer(
        parameter_groups(objective, settings.weight_decay), settings.learning_rate, settings.betas, epsilon=1e-8
    )
    objective, optimizer = accelerator.prepare(objective, optimizer)
    names, parameters = zip(*objective.stages.named_parameters())
    average = EMAModel(parameters, decay=settings.ema_decay)
    sizes = [stage.config.sample_size for stage in objective.stages]

    step, metrics_file = 0, folder / "metrics.jsonl"
    complete, _ = find_checkpoints(folder)
    if complete:
        accelerator.load_state(complete[-1])
        state = read_state(complete[-1])
        step = state["step"]
        load_average(average, names, complete[-1] / "ema.safetensors", state["average_updates"])
    folder.mkdir(parents=True, exist_ok=True)
    forget_later_metrics(metrics_file, step)

    def write(checkpoint: Path) -> None:
        accelerator.save_state(checkpoint)
        save_average(average, names, checkpoint / "ema.safetensors")

    meter = LossMeter(objective)
    progress = tqdm(total=steps, initial=step, desc=f"{contestant.label}, seed {seed}")
    while step < steps:
        for group in optimizer.param_groups:
            factor = learning_rate_factor(step, steps // 10, steps // 5, steps)
            group["lr"] = settings.learning_rate * factor
        rows = torch.from_numpy(batch_rows(step, len(data.images), settings.batch_size, seed))
        pixels = data.images[rows].to(accelerator.device).float() / 127.5 - 1.0  # (B, 3, H, W)
        losses = objective(
            image_pyramid(pixels, sizes), data.labels[rows].to(accelerator.device), noise_seed(seed, step)
        )
        accelerator.backward(losses.total)
        accelerator.clip_grad_norm_(objective.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)
        meter.add(losses)
        step += 1
        progress.update()
        if step % settings.logging_steps == 0 or step == steps:
            values = meter.means("train")
            append_metrics(metrics_file, step, values)
            progress.set_postfix({k.split("/")[1]: f"{v:.3f}" for k, v in values.items() if "_t" not in k})
            meter.reset()
        if step % settings.checkpointing_steps == 0 or step == steps:
            state = {"average_updates": average.optimization_step}
            save_checkpoint(accelerator, folder, step, state, write, total_limit=1)
    progress.close()
    average.copy_to(parameters)
    return objective.eval()


def batch_rows(step: int, num_images: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of one step's batch: each epoch goes through all images in an order of its own."""
    per_epoch = num_images // batch_size
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(num_images)
    return order[position * batch_size : (position + 1) * batch_size]
