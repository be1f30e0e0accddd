#!/usr/bin/env python
"""Trials of what the field has since found: one small cascade, equal but for one option. Rough; see `VARIANTS`."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.configuration_utils import register_to_config
from diffusers.training_utils import EMAModel

import diffusers_pisdm.pipelines.stage_fit as stage_fit
from benchmarks.equal_budget.contestants import NOISE_SCHEDULE
from benchmarks.equal_budget.reference_images import reference_statistics
from benchmarks.equal_budget.training import batch_rows
from benchmarks.quality import load_images
from benchmarks.training_variants import held_out_losses
from diffusers_pisdm import PISDMCascadePipeline, PISDMTransformer2DModel
from diffusers_pisdm.data.device_images import DeviceBatches
from diffusers_pisdm.data.image_transform import decode_image
from diffusers_pisdm.evaluation import (
    FolderImages,
    SampleSettings,
    evaluate_images,
    load_feature_extractor,
    write_sample_set,
)
from diffusers_pisdm.models.transformer_pisdm import NUM_PREFIX_TOKENS
from diffusers_pisdm.ops.conditioning_augmentation import augment_low_res, upsample_low_res
from diffusers_pisdm.ops.scan_paths import move_tokens, scan_transitions
from diffusers_pisdm.training import CascadeObjective, image_pyramid
from diffusers_pisdm.training.noise import noise_seed
from diffusers_pisdm.training.optimization import learning_rate_factor, make_optimizer, parameter_groups
from diffusers_pisdm.utils.files import write_whole


stage_fit.check_scheduler = lambda name, scheduler: None  # trials of what it refuses

SHAPE = {"in_channels": 3, "num_layers": 5, "hidden_size": 64}
CASCADE = [
    {"sample_size": 8, "patch_size": 2, **SHAPE},
    {"sample_size": 16, "patch_size": 2, "low_res_channels": 3, **SHAPE},
]
SMALL = [{**stage, "num_layers": 3, "hidden_size": 32} for stage in CASCADE]


def one(patch_size):
    return [{"sample_size": 32, "patch_size": patch_size, **SHAPE}]


VARIANTS = {
    "base": {},
    "flow_uniform": {"flow": "uniform"},
    "flow_logit": {"flow": "logit_normal"},
    "sigmoid_-1": {"sigmoid": -1.0},
    "sigmoid_-2": {"sigmoid": -2.0},
    "sigmoid_-3": {"sigmoid": -3.0},
    "sigmoid_0": {"sigmoid": 0.0},
    "sigmoid_1": {"sigmoid": 1.0},
    "sigmoid_2": {"sigmoid": 2.0},
    "min_snr": {"weighting": "min_snr"},
    "adamw_1.5e-3": {"lr": 1.5e-3},
    "adamw_6e-3": {"lr": 6e-3},
    "adamw_1.2e-2": {"lr": 1.2e-2},
    "adamw_b0.9": {"beta1": 0.9},
    "adamw_6e-3_b0.9": {"beta1": 0.9, "lr": 6e-3},
    "adamw_1.2e-2_b0.9": {"beta1": 0.9, "lr": 1.2e-2},
    "muon_1e-3": {"muon": 1e-3},
    "muon_3e-3": {"muon": 3e-3},
    "muon_1e-2": {"muon": 1e-2},
    "muon_3e-2": {"muon": 3e-2},
    "muon_1e-2_b0.9": {"muon": 1e-2, "beta1": 0.9},
    "muon_6e-3_shared": {"muon": 6e-3, "lr": 6e-3},
    "muon_1e-2_shared": {"muon": 1e-2, "lr": 1e-2},
    "muon_2e-2_shared": {"muon": 2e-2, "lr": 2e-2},
    "weak": {"steps": 0.25},
    "weak_small": {"steps": 0.25, "stages": SMALL},
    "tread": {"tread": 0.5},
    "tread_equal": {"tread": 0.5, "steps": 1.35},
    "b9_flow_uniform": {"flow": "uniform", "beta1": 0.9},
    "b9_flow_logit": {"flow": "logit_normal", "beta1": 0.9},
    "b9_sigmoid_-1": {"sigmoid": -1.0, "beta1": 0.9},
    "b9_sigmoid_0": {"sigmoid": 0.0, "beta1": 0.9},
    "b9_sigmoid_1": {"sigmoid": 1.0, "beta1": 0.9},
    "b9_x0": {"prediction": "sample", "beta1": 0.9},
    "b9_sigmoid_3": {"sigmoid": 3.0, "beta1": 0.9},
    "b9_muon_sigmoid_2": {"muon": 1e-2, "lr": 1e-2, "beta1": 0.9, "sigmoid": 2.0},
    "b9_sigmoid_2": {"sigmoid": 2.0, "beta1": 0.9},
    "b9_muon_1e-2": {"muon": 1e-2, "beta1": 0.9},
    "b9_muon_6e-3_shared": {"muon": 6e-3, "lr": 6e-3, "beta1": 0.9},
    "b9_muon_1e-2_shared": {"muon": 1e-2, "lr": 1e-2, "beta1": 0.9},
    "b9_muon_2e-2_shared": {"muon": 2e-2, "lr": 2e-2, "beta1": 0.9},
    "b9_tread_equal": {"tread": 0.5, "steps": 1.35, "beta1": 0.9},
    "b9_weak": {"steps": 0.25, "beta1": 0.9},
    "b9_weak_small": {"steps": 0.25, "stages": SMALL, "beta1": 0.9},
    **{
        f"b9_p{patch}_{name}": {"stages": one(patch), "beta1": 0.9, **options}
        for patch in (2, 4, 8)
        for name, options in {
            "v": {},
            "x0": {"prediction": "sample"},
            "x0_snr": {"prediction": "sample", "weighting": "min_snr"},
        }.items()
    },
    **{
        f"p{patch}_{name}": {"stages": one(patch), **options}
        for patch in (2, 4, 8)
        for name, options in {
            "v": {},
            "x0": {"prediction": "sample"},
            "x0_snr": {"prediction": "sample", "weighting": "min_snr"},
        }.items()
    },
}


class FlowEuler(FlowMatchEulerDiscreteScheduler):
    """With what the pipeline asks of a scheduler."""

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0):
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift)

    def set_timesteps(self, num_inference_steps=None, device=None, **kwargs):
        super().set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps), device=device)

    def scale_model_input(self, sample, timestep):
        return sample


class FlowObjective(CascadeObjective):
    """Flow matching: x_s = (1 - s) x_0 + s e, target e - x_0, time 1000 s."""

    density = "uniform"

    def _draw_conditions(self, class_labels, noise):
        _, labels, given = super()._draw_conditions(class_labels, noise)
        if self.density == "uniform" or not self.training:
            shares = noise.uniform(len(class_labels))
        else:
            shares = noise.normal(len(class_labels)).sigmoid()
        return shares * 1000, labels, given

    def _stage_errors(self, index, clean, low_res, timesteps, labels, random):
        noise = random.normal(*clean.shape)
        noise_level = None
        if low_res is not None:
            noise_level = random.uniform(len(clean)) * self.max_noise_level
            upsampled = upsample_low_res(low_res, clean.shape[-2:])
            low_res = augment_low_res(upsampled, random.normal(*upsampled.shape), noise_level)
        share = (timesteps / 1000)[:, None, None, None]
        prediction, features = self.stages[index](
            (1 - share) * clean + share * noise,
            timesteps,
            labels,
            low_res=low_res,
            noise_level=noise_level,
            return_dict=False,
        )
        return (prediction - (noise - clean)).square().mean(dim=(1, 2, 3)), features


def sigmoid_weights(scheduler, bias):
    """(-dlogSNR/dt) sigmoid(bias - logSNR) for the noise's error, as a weight of the velocity's, mean 1."""
    abar = scheduler.alphas_cumprod.double()
    log_snr = (abar / (1 - abar).clamp(min=1e-12)).log().clamp(-20, 20)
    density = -torch.gradient(log_snr)[0]
    weights = density * torch.sigmoid(bias - log_snr) * abar
    return (weights / weights.mean()).float()


def route_tokens(model, share):
    """TREAD: in training, a random `share` of the image tokens bypasses the middle layers."""
    grid = model.config.sample_size // model.config.patch_size
    pads = model.config.num_padding_tokens
    moves = scan_transitions(
        grid,
        grid,
        model.layer_directions,
        snake=model.config.snake,
        num_padding_tokens=pads,
        num_prefix_tokens=NUM_PREFIX_TOKENS,
    )
    ids, orders = torch.arange(NUM_PREFIX_TOKENS + grid**2 + pads).float()[None, :, None], []
    for move in moves[:-1]:
        ids = ids if move is None else move_tokens(ids, move)
        orders.append(ids[0, :, 0].long())
    state = {"keep": None}

    def draw(*_):
        state["keep"] = None
        if model.training:
            state["keep"] = torch.ones(NUM_PREFIX_TOKENS + grid**2 + pads, dtype=torch.bool)
            state["keep"][NUM_PREFIX_TOKENS + torch.randperm(grid**2)[: round(share * grid**2)]] = False

    def routed(forward, order, hidden_states, modulation, skip=None):
        rest = (hidden_states, modulation) if skip is None else (hidden_states, modulation, skip)
        if state["keep"] is None:
            return forward(*rest)
        rows = state["keep"][order].nonzero().flatten()
        part = forward(*(tensor[:, rows] if tensor is not modulation else tensor for tensor in rest))
        return hidden_states.index_copy(1, rows, part)

    model.register_forward_pre_hook(draw)
    for block, order in list(zip(model.transformer_blocks, orders))[1:-1]:
        block.forward = partial(routed, block.forward, order)


class Optimizers:
    def __init__(self, optimizers):
        self.optimizers = optimizers
        self.highest = [group["lr"] for o in optimizers for group in o.param_groups]

    def step(self, factor):
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group, highest in zip(groups, self.highest, strict=True):
            group["lr"] = highest * factor
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def make_optimizers(objective, options):
    rate, betas = options.get("lr", 3e-3), (options.get("beta1", 0.99), 0.999)
    groups = parameter_groups(objective, 0.03)
    if options.get("muon") == rate:  # the same steps as below, but batched
        return Optimizers([make_optimizer(parameter_groups(objective, 0.03, "muon"), rate, betas, 1e-8)])
    if "muon" not in options:
        return Optimizers([torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)])
    matrices = [
        p
        for name, p in objective.stages.named_parameters()
        if "transformer_blocks" in name and p.ndim == 2 and not name.endswith(("scale_shift_table", "A_log"))
    ]
    taken = {id(p) for p in matrices}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in taken]
    muon = torch.optim.Muon(matrices, lr=options["muon"], weight_decay=0.03, adjust_lr_fn="match_rms_adamw")
    return Optimizers([torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True), muon])


def make_objective(options, num_classes):
    stages = options.get("stages", CASCADE)
    models = [PISDMTransformer2DModel(num_classes=num_classes, **stage) for stage in stages]
    schedule = {**NOISE_SCHEDULE, "prediction_type": options.get("prediction", "v_prediction")}
    schedulers = [DDPMScheduler(**schedule)] * len(stages)
    kind = FlowObjective if "flow" in options else CascadeObjective
    objective = kind(models, schedulers, sil_weight=0.0, loss_weighting=options.get("weighting", "uniform"))
    objective.density = options.get("flow")
    if "tread" in options:
        for model in models:
            route_tokens(model, options["tread"])
    if "sigmoid" in options:
        for index in range(len(stages)):
            objective.get_buffer(f"loss_weights_{index}").copy_(sigmoid_weights(schedulers[0], options["sigmoid"]))
    return objective


def train(options, seed, data, steps):
    torch.manual_seed(seed)
    objective = make_objective(options, len(data.class_names)).train()
    sizes = [stage.config.sample_size for stage in objective.stages]
    parameters = list(objective.parameters())
    optimizers = make_optimizers(objective, options)
    average = EMAModel(parameters, decay=0.999)
    batches = DeviceBatches(data, 32, seed, batch_rows)
    losses = []
    for step in range(steps):
        batch = next(batches)
        pyramid = image_pyramid(batch.images.float() / 127.5 - 1, sizes)
        total = objective(pyramid, batch.labels, noise_seed(seed, step, 0)).total
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers.step(learning_rate_factor(step, steps // 10, steps // 5, steps))
        average.step(parameters)
        losses.append(total.item())
    average.copy_to(parameters)
    return objective.eval(), float(np.mean(losses[-50:]))


def samplers(objective, options):
    if "flow" in options:
        dpm = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, num_train_timesteps=1000
        )
        return {"euler": FlowEuler(), "dpm": dpm}
    config = objective.schedulers[0].config
    found = {"dpm": DPMSolverMultistepScheduler.from_config(config)}
    if not options:
        found["ddim"] = DDIMScheduler.from_config(config, timestep_spacing="trailing")
    return found


class Judge:
    def __init__(self, args, size):
        self.args, self.extractor = args, load_feature_extractor("efficientnet_lite0")
        folder = args.output / f"reference{size}"
        folder.mkdir(parents=True, exist_ok=True)
        self.reference = reference_statistics(args.data_dir, "validation", size, self.extractor, folder)

    def score(self, pipe, folder, seed, guidance_scale=1.0, num_inference_steps=None):
        settings = SampleSettings(
            num_samples=self.args.num_samples,
            seed=seed,
            num_inference_steps=num_inference_steps or self.args.num_inference_steps,
            guidance_scale=guidance_scale,
        )
        shutil.rmtree(folder, ignore_errors=True)
        write_sample_set(pipe, folder, settings, batch_size=100)
        scores = evaluate_images(
            FolderImages(folder, decode_image), self.reference, self.extractor, show_progress=False
        ).scores
        return {name: s.value for name, s in scores.items()}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data_dir", required=True)
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--steps", type=int, default=400)
    add("--num_samples", type=int, default=500)
    add("--num_inference_steps", type=int, default=10)
    add("--output", type=Path, required=True)
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(1)
    images, judges = {}, {}
    for seed in args.seeds:
        for name in args.variants:
            options, folder = VARIANTS[name], args.output / name / f"seed-{seed}"
            if (folder / "result.json").exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            size = options.get("stages", CASCADE)[-1]["sample_size"]
            if size not in images:
                images[size] = [load_images(args.data_dir, split, size) for split in ("train", "validation")]
                judges[size] = Judge(args, size)
            data, held_out = images[size]
            started = time.monotonic()
            objective, loss = train(options, seed, data, round(args.steps * options.get("steps", 1)))
            seconds = time.monotonic() - started
            torch.save(objective.stages.state_dict(), folder / "average.pt")
            for index in range(len(objective.stages)):
                objective.get_buffer(f"loss_weights_{index}").fill_(1)
            held = held_out_losses(objective, held_out).mean(axis=(1, 2)).tolist()
            scores = {}
            for kind, sampler in samplers(objective, options).items():
                pipe = PISDMCascadePipeline.from_stages(
                    objective.stages, sampler, id2label=dict(enumerate(data.class_names))
                )
                scores[kind] = judges[size].score(pipe, folder / f"samples_{kind}", seed)
            result = {"held_out": held, "train_loss": loss, "seconds": seconds, "scores": scores}
            with write_whole(folder / "result.json") as file:
                file.write_text(json.dumps(result, indent=2))
            print(
                name,
                seed,
                [round(h, 4) for h in held],
                {k: round(s["frechet_distance"], 1) for k, s in scores.items()},
                round(seconds),
                round(time.monotonic() - started),
                flush=True,
            )


if __name__ == "__main__":
    main()
