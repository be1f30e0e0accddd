"""What one stage does with its plan: prepares its latents and condition, and denoises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from typing_extensions import Self

from ..models.latents import encode_moments, vae_scale_factor
from ..ops.conditioning_augmentation import augment_low_res, upsample_low_res
from ..utils.messages import show_size
from .call_checks import check_callback_outputs
from .cuda_graphs import run_model
from .image_inputs import KnownPart, repeat_images
from .stage_plan import StagePlan


class StageDenoisingMixin:
    """The part of [`PISDMCascadePipeline`] that runs a stage. Its state is the pipeline's: guidance and interrupt."""

    def encode_image(self, stage: StagePlan, pixels: torch.Tensor) -> torch.Tensor:
        """Turns given images `(N, C, H, W)` in [-1, 1] into latents `(B, C, h, w)`, each repeated for its images."""
        latents = pixels.to(self._execution_device)
        if self.vae is not None:
            latents = torch.cat([encode_moments(self.vae, batch)[0] for batch in latents.split(stage.batch_size)])
        return repeat_images(latents, stage.shape[0])

    def prepare_low_res(
        self,
        stage: StagePlan,
        latents: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the lower stage's image upsampled to `(B, C, H, W)`, and the same with noise: the condition."""
        upsampled = upsample_low_res(latents, stage.shape[2:], stage.residual_scale)  # (B, C, H, W)
        # Noise is drawn even for level 0, so that only the level differs between levels.
        noise = self._draw_noise(stage, generator)
        level = torch.full((1,), stage.noise_level, dtype=noise.dtype, device=noise.device)
        return upsampled, augment_low_res(upsampled, noise, level)

    def prepare_latents(
        self,
        stage: StagePlan,
        upsampled: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[torch.Tensor, KnownPart | None]:
        """
        Returns what a stage starts from, `(B, C, H, W)`: noise or, in a relay, the noised lower image or a given one;
        and what it keeps of a given image.
        """
        noise = self._draw_noise(stage, generator) if stage.latents is None else stage.latents
        noise = noise.to(self._execution_device, torch.float32)
        known = self._prepare_known(stage, upsampled, noise)
        if stage.relay_strength is None:
            return noise * stage.scheduler.init_noise_sigma, known
        image = upsampled if stage.given.start is None else self.encode_image(stage, stage.given.start)
        timesteps = stage.timesteps[:1].expand(len(noise))
        return stage.scheduler.add_noise(stage.from_image(image, upsampled), noise, timesteps), known

    def _prepare_known(
        self, stage: StagePlan, upsampled: torch.Tensor | None, noise: torch.Tensor
    ) -> KnownPart | None:
        if stage.given.known is None:
            return None
        image = self.encode_image(stage, stage.given.known)  # (B, C, h, w)
        mask = F.adaptive_max_pool2d(stage.given.mask.float(), stage.shape[2:]) > 0  # (N, 1, h, w)
        mask = repeat_images(mask, len(noise)).to(image.device)  # (B, 1, h, w)
        return KnownPart(image, stage.from_image(image, upsampled), noise, mask)

    def _draw_noise(self, stage: StagePlan, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        return randn_tensor(stage.shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    def prepare_condition(
        self, stage: StagePlan, class_labels: torch.Tensor, low_res: torch.Tensor | None, guided: bool
    ) -> dict[str, torch.Tensor]:
        """
        Returns the model's inputs besides latents and timestep: `class_labels` and `noise_level` `(B,)` and `low_res`
        `(B, C, H, W)`, and for mixes of classes, `class_labels` and `class_weights` `(B, K)`; or if guided, twice the
        batch, the unconditional half first; not so if another model guides.
        """
        condition = {"class_labels": class_labels}
        if stage.class_weights is not None:
            condition["class_weights"] = stage.class_weights
        if low_res is not None:
            condition["low_res"] = low_res.to(stage.transformer.dtype)  # (B, C, H, W)
            condition["noise_level"] = torch.full(
                class_labels.shape[:1], stage.noise_level, dtype=torch.float32, device=class_labels.device
            )  # (B,)
        if guided and stage.guide is None:
            null_labels = torch.full_like(class_labels, stage.transformer.config.num_classes)
            unconditional = {**condition, "class_labels": null_labels}
            condition = {name: torch.cat([unconditional[name], condition[name]]) for name in condition}  # (2B, ...)
        return condition

    def predict(
        self,
        stage: StagePlan,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        condition: dict[str, torch.Tensor],
        guided: bool,
    ) -> torch.Tensor:
        """
        Runs the model on `model_input` `(B, C, H, W)`, at most `stage.batch_size` images at once, and returns its
        prediction, same shape, float32: if guided, `uncond + guidance_scale * (cond - uncond)` on all channels, where
        `uncond` may be another model's, with the class.
        """
        size = stage.batch_size
        if size >= len(model_input):
            return self._predict_batch(stage, model_input, timestep, condition, guided)
        halves = {name: value.chunk(2 if guided and stage.guide is None else 1) for name, value in condition.items()}
        predictions = []
        for start in range(0, len(model_input), size):
            batch = slice(start, start + size)
            own = {name: torch.cat([half[batch] for half in halves[name]]) for name in condition}
            predictions.append(self._predict_batch(stage, model_input[batch], timestep, own, guided))
        return torch.cat(predictions)

    def _predict_batch(
        self,
        stage: StagePlan,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        condition: dict[str, torch.Tensor],
        guided: bool,
    ) -> torch.Tensor:
        if guided and stage.guide is not None:
            prediction = self._predict_batch(stage, model_input, timestep, condition, False)  # (B, C, H, W)
            inputs = {"hidden_states": model_input, "timestep": timestep.expand(len(model_input)), **condition}
            half = {
                name: inputs[name].to(stage.guide.dtype) for name in ("hidden_states", "low_res") if name in inputs
            }
            weaker = run_model(stage.guide, {**inputs, **half}).float()  # (B, C, H, W)
            return weaker + self.guidance_scale * (prediction - weaker)
        transformer = stage.transformer
        model_input = model_input.to(transformer.dtype)
        inputs = [(model_input, condition)]
        if guided and self._guidance_slicing:
            halves = zip(*(value.chunk(2) for value in condition.values()))
            inputs = [(model_input, dict(zip(condition, half))) for half in halves]
        elif guided:
            inputs = [(torch.cat([model_input, model_input]), condition)]  # (2B, C, H, W)
        run = run_model if self._cuda_graphs is None else self._cuda_graphs
        outputs = [
            # The timestep is never in half precision: as the scheduler made it.
            run(transformer, {"hidden_states": sample, "timestep": timestep.expand(len(sample)), **kwargs}).float()
            for sample, kwargs in inputs
        ]
        if not guided:
            return outputs[0]
        uncond, cond = outputs if self._guidance_slicing else outputs[0].chunk(2)  # (B, C, H, W) each
        return uncond + self.guidance_scale * (cond - uncond)

    def denoise(
        self,
        stage: StagePlan,
        latents: torch.Tensor,
        upsampled: torch.Tensor | None,
        low_res: torch.Tensor | None,
        known: KnownPart | None,
        class_labels: torch.Tensor,
        callback_on_step_end: Callable[[Self, int, torch.Tensor, dict], dict] | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs a stage's steps; returns its image `(B, C, H, W)` and what callbacks made of `class_labels` `(B,)`."""
        scheduler, num_steps = stage.scheduler, len(stage.timesteps)
        conditions: dict[bool, dict[str, torch.Tensor]] = {}  # by whether the step is guided
        # float32 at most, as not every device has float64
        dtype = torch.float32 if stage.timesteps.is_floating_point() else None
        timesteps = stage.timesteps.to(self._execution_device, dtype)
        if self._cuda_graphs is not None:
            self._cuda_graphs.check(self.stages)
        with self.progress_bar(total=num_steps) as progress_bar:
            self._describe(progress_bar, stage)
            # Nothing in this loop may wait for the device: the next steps are queued while it works.
            for i, (scheduler_t, t) in enumerate(zip(stage.timesteps, timesteps)):
                if self.interrupt:
                    return self._finish(stage, latents, upsampled, known), class_labels
                self._current_timestep = t
                in_interval = stage.guidance_start <= i / num_steps < stage.guidance_stop
                guided = self.do_classifier_free_guidance and in_interval
                if guided not in conditions:
                    conditions[guided] = self.prepare_condition(stage, class_labels, low_res, guided)
                # Second-order schedulers evaluate twice per step, the second time at a level that only they know.
                if known is not None and i % scheduler.order == 0:
                    latents = known.renoise(latents, scheduler, scheduler_t)
                model_input = scheduler.scale_model_input(latents, scheduler_t)  # (B, C, H, W)
                prediction = self.predict(stage, model_input, t, conditions[guided], guided)
                latents = scheduler.step(prediction, scheduler_t, latents, **stage.step_kwargs, return_dict=False)[0]
                if i == num_steps - 1:
                    latents = self._finish(stage, latents, upsampled, known)

                if callback_on_step_end is not None:
                    available = {
                        "latents": latents,
                        "low_res": low_res,
                        "class_labels": class_labels,
                        "stage": stage.number,
                    }
                    callback_kwargs = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    callback_outputs = callback_on_step_end(self, stage.first_step + i, t, callback_kwargs)
                    check_callback_outputs(callback_outputs, available, stage.transformer.config.num_classes)
                    latents = callback_outputs.pop("latents", latents)
                    low_res = callback_outputs.pop("low_res", low_res)
                    class_labels = callback_outputs.pop("class_labels", class_labels)
                    conditions.clear()  # a callback may also change them in place
                    if self._cuda_graphs is not None:
                        self._cuda_graphs.check(self.stages)  # or the adapters

                progress_bar.update()
        return latents, class_labels

    def _describe(self, progress_bar: Any, stage: StagePlan) -> None:
        if "desc" not in self._progress_bar_config:
            height, width = (length * vae_scale_factor(self.vae) for length in stage.shape[2:])
            progress_bar.set_description(f"stage {stage.number}/{self.num_stages} ({show_size(width, height)})")

    def _finish(
        self, stage: StagePlan, latents: torch.Tensor, upsampled: torch.Tensor | None, known: KnownPart | None
    ) -> torch.Tensor:
        image = stage.to_image(latents, upsampled)  # (B, C, H, W)
        return image if known is None else known.keep(image)
