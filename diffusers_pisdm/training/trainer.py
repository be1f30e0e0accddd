"""Trains a cascade: the training step, logging and validation, saving, and exact resuming."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..data.batches import TrainingBatches, validation_batches
from ..data.device_images import DeviceBatches
from ..data.image_pyramid import image_pyramid
from ..data.image_rows import ImageRows
from ..data.latent_cache import LatentCache
from ..data.rows import TrainingBatch
from ..models.latents import encode_latents, vae_scale_factor
from ..utils.machine import DelayedReader, peak_memory_gib
from ..utils.messages import show_duration
from ..utils.stopping import StopSignals
from .cascade_objective import CascadeObjective
from .checkpoints import (
    find_resume_point,
    load_average,
    read_state,
    report_changed_data,
    room_on_disk,
    save_average,
    save_checkpoint,
    settings_changed,
)
from .loss_meter import LossMeter
from .metrics import append_metrics, forget_later_metrics
from .noise import noise_seed
from .optimization import learning_rate_factor, make_optimizer, parameter_groups, skips_steps_on_device
from .recipes import TrainerSettings
from .sample_sheets import forget_later_sheets


STEPS_BEFORE_ESTIMATE = 5  # of the time that a run will take


@dataclass
class RunState:
    """A run's progress, besides its weights, optimizer, averages and position in the data."""

    step: int = 0
    elapsed_seconds: float = 0.0
    skipped_steps: int = 0  # because the loss or gradient was not finite
    bad_images: int = 0  # skipped by this process
    run: int = 0  # counts the runs in a folder that started over, or from an older checkpoint
    changes: list[dict[str, Any]] = field(default_factory=list)  # settings that changed on resuming, with the step

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in asdict(self):
            setattr(self, name, state.get(name, getattr(self, name)))  # early checkpoints lack some


class Trainer:
    """
    Trains the stages of a cascade on the paper's eq. 17. An interrupted run resumes bit for bit: batches and noise
    depend only on the seed and the step, everything else is in the checkpoint. SIGTERM, SIGHUP and Ctrl-C end it with
    a checkpoint after the current step; `stopped_by` is then the signal's number.

    Args:
        accelerator (`Accelerator`): The run's accelerator.
        objective ([`CascadeObjective`]): The objective, not yet prepared.
        batches ([`TrainingBatches`] or [`DeviceBatches`]): The training data and the run's position in it.
        settings ([`TrainerSettings`]): How to train.
        output_dir (`str` or `Path`): For metrics, checkpoints and samples.
        vae ([`AutoencoderKL`], [`AutoencoderTiny`] or [`AutoencoderDC`], *optional*): Encodes the images.
        held_out_rows ([`ImageRows`] or [`LatentCache`], *optional*): Images whose loss is measured.
        on_validation (`Callable[[Trainer], None]`, *optional*):
            Called in all processes while the models hold the averaged weights, e.g. to draw samples and save the
            pipeline.
        title (`str`, *optional*): Title of the progress bar.
        class_names (`Sequence[str]`, *optional*): A run can only be resumed with the same classes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: CascadeObjective,
        batches: TrainingBatches | DeviceBatches,
        settings: TrainerSettings,
        output_dir: str | Path,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None = None,
        held_out_rows: ImageRows | LatentCache | None = None,
        on_validation: Callable[[Trainer], None] | None = None,
        title: str | None = None,
        class_names: Sequence[str] = (),
    ):
        self.accelerator, self.settings, self.output_dir = accelerator, settings, Path(output_dir)
        self.batches, self.held_out_rows, self.vae, self.on_validation = batches, held_out_rows, vae, on_validation
        if accelerator.distributed_type == DistributedType.DEEPSPEED:  # otherwise it takes it from a data loader
            accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.train_batch_size
        is_sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if is_sharded and settings.optimizer == "muon":
            raise ValueError(
                "Muon needs whole matrices, which FSDP and DeepSpeed split: train with --optimizer adamw."
            )
        self.model, self.optimizer = accelerator.prepare(objective, self.make_optimizer(objective))
        self.objective = accelerator.unwrap_model(self.model)
        named = [(name, p) for name, p in self.objective.stages.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.skips_on_device = skips_steps_on_device(self.optimizer) and not is_sharded
        # Its decay rises to this over the first steps. On a CPU, `foreach` would only change the rounding.
        foreach = accelerator.device.type == "cuda" and not is_sharded
        self.average = EMAModel(self.parameters, decay=settings.ema_decay, foreach=foreach)
        self.sizes = [stage.config.sample_size for stage in self.objective.stages]
        self.meter = LossMeter(self.objective)
        self.total_steps: int | None = settings.max_train_steps
        self.state, self.failures, self.started = RunState(), 0, time.monotonic()
        self.images_seen, self.logged_at = 0, time.monotonic()
        self.metrics_file = self.output_dir / "metrics.jsonl"
        self.title, self.progress, self.class_names = title, tqdm(disable=True), list(class_names)
        self.signals, self.stop_wanted, self.stopped_by = StopSignals(), False, None
        self.outcomes = DelayedReader()
        self.checkpoint: Path | None = None  # the last one written or resumed from
        self.failed: set[str] = set()  # what has been reported to fail
        self.told: set[str] = set()  # bad images that have been named: they come again in each epoch

    def make_optimizer(self, objective: CascadeObjective, capturable: bool = False) -> torch.optim.Optimizer:
        s = self.settings
        groups, betas = parameter_groups(objective, s.adam_weight_decay, s.optimizer), (s.adam_beta1, s.adam_beta2)
        return make_optimizer(groups, s.learning_rate, betas, s.adam_epsilon, s.use_8bit_adam, capturable)

    def train(self) -> None:
        """Trains from the current step to the last, or until a signal asks to stop."""
        self.objective.train()
        self.started, self.logged_at = time.monotonic() - self.state.elapsed_seconds, time.monotonic()
        hidden, first_step, settled = not self.accelerator.is_local_main_process, self.state.step, self.started
        progress = tqdm(desc=self.title, total=self.total_steps, initial=self.state.step, disable=hidden)
        with self.signals, progress as self.progress:
            if self.owes_validation:
                self.validate()
            while not self.is_done:
                self.train_step()
                self.progress.update()
                if self.state.step == first_step + 1:  # it may have compiled kernels
                    settled = time.monotonic()
                elif self.state.step == first_step + STEPS_BEFORE_ESTIMATE and not hidden and not self.is_done:
                    self.tell_time((time.monotonic() - settled) / (STEPS_BEFORE_ESTIMATE - 1))
                if self.is_due("logging"):
                    self.log_losses()
                # A checkpoint comes first: what follows may fail, or take long.
                if self.is_due("checkpointing") or self.stop_wanted:
                    self.save()
                if self.stop_wanted and not self.is_done:
                    break
                if self.is_due("validation"):
                    self.validate()
        if not self.is_done:
            self.stopped_by = self.signals.received or 0
            self.accelerator.print(f"Stopped after step {self.state.step}. Rerun the same command to resume.")

    def tell_time(self, seconds_per_step: float) -> None:
        """Prints how long the run will take, if the number of its steps is known."""
        if self.total_steps is not None:
            left = show_duration(seconds_per_step * (self.total_steps - self.state.step))
            tqdm.write(f"Time: {show_duration(seconds_per_step)} a step, about {left} to go; sample grids come on top")

    @property
    def is_done(self) -> bool:
        return self.total_steps is not None and self.state.step >= self.total_steps

    def is_due(self, what: str) -> bool:
        """Whether it is time for `"logging"`, `"validation"` or `"checkpointing"`; always true at the end."""
        steps = getattr(self.settings, f"{what}_steps")
        return self.is_done or (steps > 0 and self.state.step % steps == 0)

    @property
    def owes_validation(self) -> bool:
        """Whether an earlier run ended between its last checkpoint and the validation at the same step."""
        owed = self.checkpoint is not None and not _validated(self.checkpoint).exists()
        return owed and self.is_due("validation")

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        s = self.settings
        factor = learning_rate_factor(self.state.step, s.lr_warmup_steps, s.lr_cooldown_steps, self.total_steps)
        return s.learning_rate * factor

    def train_step(self) -> None:
        """
        Takes one optimizer step, or skips it if a loss or gradient is not finite. On a GPU, nothing here waits for the
        device: what came of a step is counted after the next one.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.objective.set_step(self.state.step)
        device = self.accelerator.device
        finite = torch.ones((), dtype=torch.bool, device=device)
        for micro_step in range(self.settings.gradient_accumulation_steps):
            batch = next(self.batches)
            self.report_bad_images(batch.bad_images)
            with self.accelerator.accumulate(self.model):
                finite = finite & self.forward_backward(batch, micro_step)
                if self.accelerator.sync_gradients:
                    finite = finite & self.update(finite)
                    self.optimizer.zero_grad()
            self.images_seen += len(batch.labels) * self.accelerator.num_processes
        self.state.step += 1
        self.average.step(self.parameters)  # also after a skipped step, which leaves the weights as they were
        # All processes stop together: one alone would wait for the others forever.
        stop = torch.full((), float(self.signals.received is not None), device=device)
        outcome = torch.stack([finite.float(), stop])
        self.count_outcomes(self.outcomes.send(self.accelerator.reduce(outcome, "mean")))

    def count_outcomes(self, outcomes: list[list[float]]) -> None:
        """Counts steps by the shares of the processes in which they were finite, and which were asked to stop."""
        for finite, stop in outcomes:
            self.state.skipped_steps += finite < 1
            self.failures = 0 if finite == 1 else self.failures + 1
            self.stop_wanted = self.stop_wanted or stop > 0
        self.check_failures()

    def count_last_outcome(self) -> None:
        """Waits for the device."""
        self.count_outcomes(self.outcomes.flush())

    def check_failures(self) -> None:
        """Stops a run that has diverged."""
        if self.failures > self.settings.max_skipped_steps:
            raise FloatingPointError(
                f"The loss or its gradient was not finite for {self.failures} steps in a row, up to step"
                f" {self.state.step}. Resume from the last checkpoint with a lower --learning_rate, more"
                " --lr_warmup_steps or --mixed_precision bf16."
            )

    def forward_backward(self, batch: TrainingBatch, micro_step: int) -> torch.Tensor:
        """Accumulates a batch's gradient; returns whether its loss is finite, a bool on the device."""
        seed = noise_seed(self.settings.seed, self.state.step, micro_step)
        labels = batch.labels.to(self.accelerator.device, non_blocking=True)
        losses = self.model(self.make_pyramid(batch, seed), labels, seed)
        finite = losses.total.isfinite()
        self.meter.add(losses, finite)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:  # its backward pass takes the step, too
            finite = self.accelerator.reduce(finite.float(), "mean") == 1
            if not finite.item():
                return finite
        # A loss that is not finite makes the gradient NaN, in all processes.
        self.accelerator.backward(losses.total * torch.where(finite, 1.0, torch.nan))
        return finite

    def update(self, finite: torch.Tensor) -> torch.Tensor:
        """Takes the optimizer step, if `finite` and the gradient is; returns whether it was, a bool on the device."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        if norm is not None:  # DeepSpeed may not return it
            norm = norm if self.skips_on_device else float(norm)
            finite = finite & torch.as_tensor(norm, device=finite.device).isfinite()
        if self.skips_on_device:
            self.optimizer.optimizer.found_inf = finite.logical_not().float()
            self.optimizer.step()
        elif self.accelerator.scaler is not None or finite.item():  # fp16's scaler skips the step, and learns from it
            self.optimizer.step()
        return finite

    def make_pyramid(self, batch: TrainingBatch, seed: int) -> list[torch.Tensor]:
        """Each stage's training images: pixels in [-1, 1], or latents, either encoded here or cached."""
        device = self.accelerator.device
        if isinstance(batch.images, list):
            return [latents.to(device, non_blocking=True) for latents in batch.images]
        pixels = batch.images.to(device, non_blocking=True).float() / 127.5 - 1.0  # (B, 3, H, W)
        pyramid = image_pyramid(pixels, [size * vae_scale_factor(self.vae) for size in self.sizes])
        if self.vae is None:
            return pyramid
        # An image's latents depend on its place in the global batch, not on how that is spread over processes.
        num_processes, process_index = self.accelerator.num_processes, self.accelerator.process_index
        places = [row * num_processes + process_index for row in range(len(pixels))]
        generators = [torch.Generator().manual_seed(noise_seed(seed, place)) for place in places]
        with torch.no_grad():
            return [encode_latents(self.vae, stage, generators) for stage in pyramid]

    def report_bad_images(self, bad_images: list[str]) -> None:
        new = [bad for bad in dict.fromkeys(bad_images) if bad not in self.told]
        if new:
            self.told.update(new)
            file = self.output_dir / "bad_images.txt"
            with room_on_disk(file), file.open("a", encoding="utf-8") as lines:
                lines.writelines(f"{bad}\n" for bad in new)
            tqdm.write("\n".join(f"Skipped: {bad}" for bad in new))
        self.state.bad_images += len(bad_images)

    def log(self, values: dict[str, float]) -> None:
        self.attempt("logging to the tracker", self.accelerator.log, values, step=self.state.step)
        if self.accelerator.is_main_process:
            with room_on_disk(self.metrics_file):
                append_metrics(self.metrics_file, self.state.step, values)

    def attempt(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls what a run can do without: a failure is reported, the first time, and training goes on."""
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if what not in self.failed:
                self.failed.add(what)
                tqdm.write(f"Warning: {what} failed, and training goes on without it: {type(error).__name__}: {error}")

    def log_losses(self) -> None:
        """Logs the losses and the speed since the last call."""
        values = self.meter.means("train", lambda tensor: self.accelerator.reduce(tensor, "sum"))
        now = time.monotonic()
        values["images_per_second"] = self.images_seen / max(now - self.logged_at, 1e-9)
        values["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        values["peak_memory_gib"] = peak_memory_gib(self.accelerator.device)
        values |= self.counts()
        self.log(values)
        shown = {name.split("/")[-1]: f"{v:.3g}" for name, v in values.items() if "_t" not in name}
        self.progress.set_postfix(shown)
        self.meter.reset()
        self.images_seen, self.logged_at = 0, time.monotonic()

    def counts(self) -> dict[str, float]:
        """Totals over the whole run."""
        self.count_last_outcome()
        bad_images = torch.tensor(float(self.state.bad_images), device=self.accelerator.device)
        return {
            "skipped_steps": self.state.skipped_steps,
            "bad_images": self.accelerator.reduce(bad_images, "sum").item(),
        }

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside this context, the models hold the averaged weights and are in evaluation mode."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        self.objective.eval()
        try:
            yield
        finally:
            self.average.restore(self.parameters)
            self.objective.train()

    def validate(self) -> None:
        """Measures the held-out loss and calls `on_validation`, with averaged weights, in all processes."""
        with self.averaged_weights():
            self.check_weights()
            if self.held_out_rows is not None:
                self.log(self.held_out_losses())
            if self.on_validation is not None:
                with room_on_disk(self.output_dir):
                    self.on_validation(self)
        if self.accelerator.is_main_process and self.checkpoint is not None:
            if self.checkpoint.name == f"checkpoint-{self.state.step}":
                self.attempt("marking a checkpoint as validated", _validated(self.checkpoint).touch)

    def check_weights(self) -> None:
        """Raises FloatingPointError if a weight is not finite: it must neither be resumed from nor published."""
        finite = torch.stack([parameter.isfinite().all() for parameter in self.parameters]).all().float()
        if self.accelerator.reduce(finite, "mean").item() < 1:
            raise FloatingPointError(
                f"A weight is not finite after step {self.state.step}, so nothing was saved at this step. Resume from"
                " the last checkpoint with a lower --learning_rate or more --lr_warmup_steps."
            )

    @torch.no_grad()
    def held_out_losses(self) -> dict[str, float]:
        """Mean losses on held-out images, with the same noise in every call."""
        meter = LossMeter(self.objective)
        for place, batch in self.held_out_batches():
            seed = noise_seed(self.settings.seed, place)
            meter.add(self.objective(self.make_pyramid(batch, seed), batch.labels.to(self.accelerator.device), seed))
        return meter.means("validation", lambda tensor: self.accelerator.reduce(tensor, "sum"))

    def held_out_batches(self) -> Iterator[tuple[int, TrainingBatch]]:
        """Numbered batches; the number determines a batch's noise."""
        is_sharded = self.accelerator.distributed_type == DistributedType.FSDP  # all processes run each batch together
        place = (1, 0) if is_sharded else (self.accelerator.num_processes, self.accelerator.process_index)
        s = self.settings
        yield from enumerate(
            validation_batches(self.held_out_rows, s.train_batch_size, *place, s.dataloader_num_workers)
        )

    @cached_property
    def data_fingerprint(self) -> dict[str, str]:
        return self.batches.fingerprint()

    def save(self) -> None:
        """Writes a checkpoint."""
        self.count_last_outcome()
        self.check_weights()
        self.state.elapsed_seconds = time.monotonic() - self.started
        state = self.state.state_dict()
        place = {"data": self.batches.state_dict(), "bad_images": state.pop("bad_images")}
        state |= {"average_updates": self.average.optimization_step, "processes": gather_object([place])}
        state |= {"identity": self.identity(), "settings": asdict(self.settings), "data": self.data_fingerprint}

        def write(folder: Path) -> None:
            self.accelerator.save_state(folder)
            is_main_process = self.accelerator.is_main_process
            save_average(self.average, self.names, folder / "ema.safetensors", is_main_process)

        limit = self.settings.checkpoints_total_limit
        self.checkpoint = save_checkpoint(self.accelerator, self.output_dir, self.state.step, state, write, limit)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes from it must have in common, by a name for messages."""
        found = {f"class {i}": name for i, name in enumerate(self.class_names)}
        stages = zip(self.objective.stages, self.objective.schedulers, strict=True)
        for number, (stage, scheduler) in enumerate(stages, start=1):
            configs = {"": stage.config, "noise schedule's ": scheduler.config}
            found |= {
                f"stage {number}: {prefix}{name}": value
                for prefix, config in configs.items()
                for name, value in config.items()
                if not name.startswith("_") and name != "class_factors"  # a long list that follows from the classes
            }
        found["trained weights"] = sum(parameter.numel() for parameter in self.parameters)
        found["use_8bit_adam"] = self.settings.use_8bit_adam
        if self.settings.optimizer != "adamw":  # as of the runs before there was a choice
            found["optimizer"] = self.settings.optimizer
        return found

    def resume(self) -> None:
        """
        Resumes where an earlier run stopped, if there is one, and deletes what it logged after its checkpoint.
        Settings that may change are applied and reported.

        Raises:
            CheckpointError: The checkpoint is of a run with another [`~Trainer.identity`], or none is intact.
        """
        report, optimizer = self.accelerator.print, self.optimizer
        self.checkpoint, run = find_resume_point(self.output_dir, self.settings.resume_from_checkpoint, report)
        if self.checkpoint is not None:
            state, process_index = read_state(self.checkpoint), self.accelerator.process_index
            settings = asdict(self.settings)
            changed = settings_changed(self.checkpoint, state, self.identity(), settings, report)
            if self.accelerator.is_main_process:
                report_changed_data(state, self.data_fingerprint, report)
            wanted = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups]
            self.accelerator.load_state(self.checkpoint)
            for group, options in zip(optimizer.param_groups, wanted, strict=True):
                group |= options  # the checkpoint's would silently win
            load_average(self.average, self.names, self.checkpoint / "ema.safetensors", state["average_updates"])
            places = state["processes"]
            place = places[min(process_index, len(places) - 1)]  # the same for all sources but streams, which check it
            self.batches.load_state_dict(place["data"])
            state["bad_images"] = place["bad_images"] if process_index < len(places) else 0
            self.state.load_state_dict(state)
            if changed:
                self.state.changes.append({"step": self.state.step, **changed})
        self.state.run = run
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            forget_later_metrics(self.metrics_file, self.state.step)
            self.attempt("removing old samples", forget_later_sheets, self.output_dir / "samples", self.state.step)


def _validated(checkpoint: Path) -> Path:
    return checkpoint / "validated"
