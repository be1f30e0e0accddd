"""Trains a contestant on images in memory; an interrupted run resumes from its last checkpoint with equal results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from benchmarks.equal_budget.contestants import Contestant, measure_residual_scales
from benchmarks.measuring.timing import now
from diffusers_pisdm.data.device_images import LabelledImages
from diffusers_pisdm.training import CascadeObjective
from diffusers_pisdm.training.device_trainer import WARM_UP_STEPS, DeviceSettings, DeviceTrainer


@dataclass(frozen=True)
class TrainingSettings:
    """
    How to train, the same for all contestants. By default, the learning rate stays constant after its rise, so that a
    model in the middle of a run is one that a smaller budget would have bought: its averaged weights draw the samples.

    Args:
        batch_size (`int`): Images per step.
        learning_rate (`float`):
            AdamW's learning rate, by default the best of 1e-3, 3e-3, 6e-3 and 1.2e-2 for the small DiT in short
            trials.
        lr_warmup_steps (`int`): Steps in which the learning rate rises.
        lr_cooldown (`float`): Share of the steps in which it falls, if a run's end is all that counts.
        optimizer (`str`): `"adamw"` or `"muon"`.
        adam_beta1 (`float`): AdamW's; the paper's 0.99 learns more slowly in runs as short as these.
        weight_decay (`float`): AdamW's; the default is the paper's.
        max_grad_norm (`float`): Larger gradients are scaled down to this norm.
        ema_decay (`float`): The decay of the averaged weights.
        mixed_precision (`str`): accelerate's, `"no"` or `"bf16"`.
    """

    batch_size: int = 32
    learning_rate: float = 6e-3
    lr_warmup_steps: int = 50
    lr_cooldown: float = 0.0
    optimizer: str = "adamw"
    adam_beta1: float = 0.9
    weight_decay: float = 0.03
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "no"


class CurveTrainer(DeviceTrainer):
    """Validates after certain steps, the last of which ends the run."""

    points: Sequence[int] = ()

    def is_due(self, what: str) -> bool:
        return self.state.step in self.points if what == "validation" else super().is_due(what)


def make_trainer(
    contestant: Contestant,
    data: LabelledImages,
    points: Sequence[int],
    seed: int,
    folder: Path,
    settings: TrainingSettings,
    on_point: Callable[[CurveTrainer], None] | None = None,
) -> CurveTrainer:
    """
    Args:
        contestant ([`Contestant`]): The contestant.
        data ([`LabelledImages`]): The training images, on the device.
        points (`Sequence[int]`): The steps after which to call `on_point`, rising; the last ends the run.
        seed (`int`): Determines the initial weights, the order of the images, and all noise.
        folder (`Path`): For `metrics.jsonl` and the checkpoints.
        settings ([`TrainingSettings`]): How to train.
        on_point (`Callable[[CurveTrainer], None]`, *optional*): Finds the averaged weights in the trainer's models.

    Returns:
        [`CurveTrainer`] at step 0.
    """
    on_gpu = data.images.device.type == "cuda"
    AcceleratorState._reset_state(reset_partial_state=True)  # each run is a process of its own, as it were
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision=settings.mixed_precision)
    scales = measure_residual_scales(contestant, data.images[:1000]) if contestant.residual else None
    torch.manual_seed(seed)
    objective: CascadeObjective = contestant.make_objective(len(data.class_names), scales)
    device_settings = DeviceSettings(
        seed=seed,
        train_batch_size=settings.batch_size,
        max_train_steps=points[-1],
        learning_rate=settings.learning_rate,
        lr_warmup_steps=settings.lr_warmup_steps,
        lr_cooldown=settings.lr_cooldown,
        optimizer=settings.optimizer,
        adam_beta1=settings.adam_beta1,
        adam_weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        ema_decay=settings.ema_decay,
        logging_steps=50,
        validation_minutes=0.0,
        checkpointing_minutes=2.0,
        random_flip=False,
        random_shift=0,
        record=on_gpu,
    )
    trainer = CurveTrainer(
        accelerator, objective, data, device_settings, folder, on_validation=on_point, title=contestant.label
    )
    trainer.points = points
    return trainer


def measure_step_seconds(
    contestants: Sequence[Contestant], data: LabelledImages, folder: Path, settings: TrainingSettings, turns: int = 5
) -> list[float]:
    """The seconds of a training step of each contestant: the medians of `turns` in which each takes a few steps."""
    trainers = [make_trainer(contestant, data, [10**6], 0, folder, settings) for contestant in contestants]
    steps = 20 if data.images.device.type == "cuda" else 2
    for trainer in trainers:
        trainer.objective.train()
        for _ in range(WARM_UP_STEPS + 1):  # compiles kernels, records the step
            trainer.train_step()
    seconds: list[list[float]] = [[] for _ in trainers]
    for _ in range(turns):
        for trainer, own in zip(trainers, seconds, strict=True):
            start = now(data.images.device)
            for _ in range(steps):
                trainer.train_step()
            own.append((now(data.images.device) - start) / steps)
    return [statistics.median(own) for own in seconds]
