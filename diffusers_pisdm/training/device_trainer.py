"""Trains on images that are already on the device, in steps that never wait for it: on a GPU, one CUDA graph each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from ..data.device_images import DeviceBatches, LabelledImages
from ..data.image_pyramid import image_pyramid
from ..data.rows import TrainingBatch
from .cascade_objective import CascadeObjective
from .loss_meter import LossMeter
from .noise import RowNoise, noise_seed
from .optimization import learning_rate_factor
from .recipes import TrainerSettings
from .trainer import RunState, Trainer


WARM_UP_STEPS = 3  # steps before recording, which compile kernels and build tables
PROBE_SECONDS = 4  # of training, whose speed determines the number of steps
HELD_OUT_BATCH_SIZE = 64


class DeviceStep:
    """
    An entire training step on images on the device: batch, augmentation, loss, gradient, optimizer and averages. The
    host only provides the rows, the seed and the learning rate.

    Running a model of a few million parameters takes a GPU less time than the host needs to launch its kernels one by
    one. So on a GPU the step is recorded once as a CUDA graph and then launched all at once. Noise depends only on
    each step's seed, recorded or not.

    A step whose gradient is not finite changes no weights; `skipped_steps` counts it.

    Args:
        accelerator (`Accelerator`): For a single process; its mixed precision applies.
        objective ([`CascadeObjective`]): Prepared by `accelerator`, on the device.
        optimizer (`torch.optim.AdamW`):
            Or [`~training.optimization.Muon`]: fused, prepared by `accelerator`; on a GPU `capturable`, with a tensor
            as its learning rate.
        average (`EMAModel`): The averages of the stages' trainable parameters.
        data ([`LabelledImages`]): The images, on the device.
        batch_size (`int`): Images per step.
        max_grad_norm (`float`): Larger gradients are scaled down to this norm.
        random_flip (`bool`): Whether to mirror images that allow it half of the time.
        max_shift (`int`): Largest shift of an image in pixels.
        record (`bool`, defaults to `False`): Whether to record a CUDA graph; needs a GPU.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: CascadeObjective,
        optimizer: torch.optim.Optimizer,
        average: EMAModel,
        data: LabelledImages,
        batch_size: int,
        max_grad_norm: float,
        random_flip: bool = False,
        max_shift: int = 0,
        record: bool = False,
    ):
        device = data.images.device
        self.accelerator = accelerator
        self.objective = objective
        self.optimizer = optimizer
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.averaged = [p for p in objective.stages.parameters() if p.requires_grad]
        self.average = average
        self.data = data
        self.max_grad_norm = max_grad_norm
        self.random_flip = random_flip
        self.max_shift = max_shift
        self.sizes = [stage.config.sample_size for stage in objective.stages]
        self.meter = LossMeter(objective)
        self.record = record
        self.graph, self.steps = None, 0
        # Warm-up and recording share a non-default stream, as gradients accumulate on the stream that first ran.
        self.stream = torch.cuda.Stream(device) if record else None

        # The tensors that a recorded step reads and writes.
        self.generator = torch.Generator(device)
        self.rows = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.average_weight = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros((), device=device)
        self.failures = torch.zeros((), device=device)  # skipped steps in a row

    def __call__(self, rows: np.ndarray, seed: int, learning_rate: float) -> None:
        """
        Trains on a batch.

        Args:
            rows (`np.ndarray` of shape `(batch_size,)`): The images' rows in the data.
            seed (`int`): Determines all noise.
            learning_rate (`float`): The optimizer's learning rate.
        """
        self.rows.copy_(torch.from_numpy(rows), non_blocking=True)
        self.generator.manual_seed(seed)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"] = group["lr"].to(self.rows.device)  # a checkpoint's is on another device
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        self.average.optimization_step += 1
        self.average_weight.fill_(1 - self.average.get_decay(self.average.optimization_step))

        if self.graph is None and self.record and self.steps >= WARM_UP_STEPS:
            self._record()
        if self.graph is not None:
            self.graph.replay()
        elif self.record:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._run()
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            self._run()
        self.steps += 1

    def _record(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # so the recorded step overwrites gradients
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._run()

    def _run(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        images, labels = self.data.images[self.rows], self.data.labels[self.rows]  # (B, 3, H, W), (B,)
        may_flip = self.data.may_flip[self.rows] if self.random_flip else None
        images = augment_images(images, RowNoise(self.generator, images.device), may_flip, self.max_shift)
        losses = self.objective(image_pyramid(images.float() / 127.5 - 1.0, self.sizes), labels, self.generator)
        self.accelerator.backward(losses.total)
        norm = clip_grad_norm_(self.parameters, self.max_grad_norm)
        # GradScaler's way to make fused optimizers skip a step; reading the norm would wait for the device.
        is_bad = norm.isfinite().logical_not().float()
        self.optimizer.optimizer.found_inf = is_bad
        self.optimizer.step()
        self.skipped_steps += is_bad
        self.failures.add_(is_bad).mul_(is_bad)
        differences = torch._foreach_sub(self.averaged, self.average.shadow_params)
        torch._foreach_mul_(differences, self.average_weight)
        torch._foreach_add_(self.average.shadow_params, differences)
        self.meter.add(losses, norm.isfinite())


@dataclass(kw_only=True)
class DeviceSettings(TrainerSettings):
    """How a [`DeviceTrainer`] trains; see the arguments of examples/train_on_device.py."""

    max_train_steps: int | None = None
    minutes: float | None = None  # training time, instead of `max_train_steps`
    lr_cooldown: float  # share of the steps
    validation_minutes: float
    checkpointing_minutes: float
    checkpoints_total_limit: int = 1
    random_flip: bool
    random_shift: int
    record: bool  # a CUDA graph


@dataclass
class DeviceRunState(RunState):
    total_steps: int | None = None


class DeviceTrainer(Trainer):
    """
    Trains on images on the device, for a number of steps or for a given time, which is converted to steps once the
    speed is known.

    Args:
        accelerator (`Accelerator`): For a single process.
        objective ([`CascadeObjective`]): The objective, not yet prepared.
        data ([`LabelledImages`]): The images, on the device.
        settings ([`DeviceSettings`]): How to train.
        output_dir (`str` or `Path`): For metrics and checkpoints.
        held_out ([`LabelledImages`], *optional*): Images, on the device, whose loss is measured.
        on_validation (`Callable[[Trainer], None]`, *optional*): See [`Trainer`].
        title (`str`, *optional*): Title of the progress bar; by default, the number of the first stage trained.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: CascadeObjective,
        data: LabelledImages,
        settings: DeviceSettings,
        output_dir: str | Path,
        held_out: LabelledImages | None = None,
        on_validation: Callable[[Trainer], None] | None = None,
        title: str | None = None,
    ):
        self.stage, self.on_gpu = objective.stages_trained[0] + 1, accelerator.device.type == "cuda"
        batches = DeviceBatches(data, settings.train_batch_size, settings.seed + self.stage)
        title = title or f"stage {self.stage}"
        watch = {"on_validation": on_validation, "title": title, "class_names": data.class_names}
        super().__init__(accelerator, objective, batches, settings, output_dir, held_out_rows=held_out, **watch)
        self.state = DeviceRunState()
        self.device_step = DeviceStep(
            accelerator,
            self.model,
            self.optimizer,
            self.average,
            data,
            settings.train_batch_size,
            settings.max_grad_norm,
            random_flip=settings.random_flip,
            max_shift=settings.random_shift,
            record=settings.record,
        )
        self.meter = self.device_step.meter
        self.last = {"validation": time.monotonic(), "checkpointing": time.monotonic()}
        self.first_step, self.probed_at, self.probed_step = 0, None, 0

    def make_optimizer(self, objective: CascadeObjective) -> torch.optim.Optimizer:
        return super().make_optimizer(objective, capturable=self.on_gpu)

    def train(self) -> None:
        self.first_step = self.state.step
        self.last = dict.fromkeys(self.last, time.monotonic())
        super().train()

    def train_step(self) -> None:
        self.objective.set_step(self.state.step)
        seed = noise_seed(self.settings.seed, self.stage, self.state.step)
        self.device_step(self.batches.next_rows(), seed, self.learning_rate())
        self.state.step += 1
        self.images_seen += self.settings.train_batch_size
        self.stop_wanted = self.signals.received is not None
        if self.total_steps is None and self.state.step - self.first_step > WARM_UP_STEPS + 1:
            self.find_total_steps()

    def learning_rate(self) -> float:
        """The learning rate of the next step; the cooldown cannot start before the number of steps is known."""
        s, step, total = self.settings, self.state.step, self.total_steps
        cooldown = 0 if total is None else max(1, round(s.lr_cooldown * total))
        total = step + 1 if total is None else total
        return s.learning_rate * learning_rate_factor(step, s.lr_warmup_steps, cooldown, total)

    def find_total_steps(self) -> None:
        """Converts the remaining time to steps, at the speed of the first seconds."""
        if self.on_gpu:
            torch.cuda.synchronize()
        now, step = time.monotonic(), self.state.step
        if self.probed_at is None:
            self.probed_at, self.probed_step = now, step
        elif now - self.probed_at > PROBE_SECONDS:
            rate = (step - self.probed_step) / (now - self.probed_at)
            seconds = self.settings.minutes * 60 - (now - self.started)
            self.total_steps = self.progress.total = step + max(1, int(seconds * rate))
            size = self.settings.train_batch_size
            tqdm.write(f"{self.title}: {rate * size:.0f} images/s, {self.total_steps} steps of {size} images")

    def is_due(self, what: str) -> bool:
        if what not in self.last:
            return super().is_due(what)
        minutes = getattr(self.settings, f"{what}_minutes")
        return self.is_done or time.monotonic() - self.last[what] > minutes * 60

    def count_last_outcome(self) -> None:
        self.state.skipped_steps = int(self.device_step.skipped_steps.item())
        self.failures = int(self.device_step.failures.item())

    def counts(self) -> dict[str, float]:
        self.count_last_outcome()
        return {"skipped_steps": self.state.skipped_steps, "seconds": time.monotonic() - self.started}

    def log_losses(self) -> None:
        super().log_losses()
        self.check_failures()

    def validate(self) -> None:
        super().validate()
        self.last["validation"] = time.monotonic()

    def held_out_batches(self) -> Iterator[tuple[int, TrainingBatch]]:
        held_out = self.held_out_rows
        for first in range(0, len(held_out.images), HELD_OUT_BATCH_SIZE):
            batch = slice(first, first + HELD_OUT_BATCH_SIZE)
            yield first, TrainingBatch(held_out.images[batch], held_out.labels[batch], [])

    def save(self) -> None:
        self.state.total_steps = self.total_steps
        super().save()
        self.last["checkpointing"] = time.monotonic()

    def identity(self) -> dict[str, Any]:
        """The time and the batch size determine the number of steps, which a resumed run keeps."""
        s = self.settings
        return super().identity() | {"minutes": s.minutes, "train_batch_size": s.train_batch_size}

    def resume(self) -> None:
        super().resume()
        if self.settings.max_train_steps is None:
            self.total_steps = self.state.total_steps
        self.device_step.skipped_steps.fill_(self.state.skipped_steps)


def augment_images(
    images: torch.Tensor, noise: RowNoise, may_flip: torch.Tensor | None = None, max_shift: int = 0
) -> torch.Tensor:
    """
    Mirrors images that allow it with probability 1/2, and shifts all by up to `max_shift` pixels, repeating their
    borders.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`, uint8): The images.
        noise ([`RowNoise`]): The source of randomness.
        may_flip (`torch.Tensor` of shape `(B,)`, bool, *optional*): Which images may be mirrored; none if not given.
        max_shift (`int`, defaults to 0): The largest shift in each direction, in pixels.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`, uint8.
    """
    batch_size, _, height, width = images.shape
    if may_flip is not None:
        flip = (noise.uniform(batch_size) < 0.5) & may_flip  # (B,)
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if max_shift > 0:
        down, right = noise.integers(2 * max_shift + 1, batch_size, 2).sub(max_shift).unbind(1)  # (B,) each
        rows = (torch.arange(height, device=images.device) + down[:, None]).clamp(0, height - 1)  # (B, H)
        columns = (torch.arange(width, device=images.device) + right[:, None]).clamp(0, width - 1)  # (B, W)
        images = images.gather(2, rows[:, None, :, None].expand_as(images))
        images = images.gather(3, columns[:, None, None, :].expand_as(images))
    return images
