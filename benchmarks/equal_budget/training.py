"""Trains a contestant on images in memory; an interrupted run resumes from its last checkpoint with equal results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.equal_budget.contestants import Contestant
from diffusers_pisdm.data.device_images import DeviceBatches, LabelledImages
from diffusers_pisdm.training import CascadeObjective
from diffusers_pisdm.training.recipes import TrainerSettings
from diffusers_pisdm.training.trainer import Trainer


@dataclass(frozen=True)
class TrainingSettings:
    """
    How to train, the same for all contestants.

    Args:
        batch_size (`int`): Images per step.
        learning_rate (`float`):
            AdamW's highest learning rate: the best of 1e-3, 3e-3, 6e-3 and 1.2e-2 for DiT in short trials. It rises
            over the first tenth of the steps and falls over the last fifth.
        betas (`tuple[float, float]`), weight_decay (`float`): AdamW's; the defaults are the paper's.
        max_grad_norm (`float`): Larger gradients are scaled down to this norm.
        ema_decay (`float`): The decay of the averaged weights, which draw the samples.
        logging_steps, checkpointing_steps (`int`): Steps between log lines and between checkpoints.
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
    Trains a contestant, or resumes its training.

    Args:
        contestant ([`Contestant`]): The contestant.
        data ([`LabelledImages`]): The training images.
        steps (`int`): Optimizer steps.
        seed (`int`): Determines the initial weights, the order of the images, and all noise.
        folder (`Path`): For `metrics.jsonl` and the checkpoints.
        settings ([`TrainingSettings`]): How to train.

    Returns:
        [`CascadeObjective`] with the averaged weights, in evaluation mode.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    torch.manual_seed(seed)
    objective = contestant.make_objective(len(data.class_names))
    trainer_settings = TrainerSettings(
        seed=seed,
        train_batch_size=settings.batch_size,
        max_train_steps=steps,
        learning_rate=settings.learning_rate,
        lr_warmup_steps=steps // 10,
        lr_cooldown_steps=steps // 5,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        ema_decay=settings.ema_decay,
        logging_steps=settings.logging_steps,
        validation_steps=0,
        checkpointing_steps=settings.checkpointing_steps,
        checkpoints_total_limit=1,
    )
    batches = DeviceBatches(data, settings.batch_size, seed, batch_rows)
    title = f"{contestant.label}, seed {seed}"
    trainer = Trainer(accelerator, objective, batches, trainer_settings, folder, title=title)
    trainer.resume()
    trainer.train()
    trainer.average.copy_to(trainer.parameters)
    return trainer.objective.eval()


def batch_rows(step: int, num_images: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of one step's batch: each epoch goes through all images in its own order."""
    per_epoch = num_images // batch_size
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(num_images)
    return order[position * batch_size : (position + 1) * batch_size]
