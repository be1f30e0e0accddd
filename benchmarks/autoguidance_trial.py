#!/usr/bin/env python
"""Autoguidance (a weaker model of the same stage as the guide) against classifier-free guidance. Rough."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from benchmarks.equal_budget.contestants import NOISE_SCHEDULE
from benchmarks.field_trials import VARIANTS, Judge, make_objective, train
from benchmarks.quality import load_images
from diffusers_pisdm import PISDMCascadePipeline, PISDMTransformer2DModel


from diffusers_pisdm.models.transformer_pisdm import class_factors_from_names
from diffusers_pisdm.utils.files import write_whole


class Autoguided(PISDMCascadePipeline):
    """`weak + guidance_scale * (strong - weak)`, both with the class."""

    def _predict_batch(self, transformer, model_input, timestep, condition, guided):
        if not guided or not getattr(self, "guides", None):
            return super()._predict_batch(transformer, model_input, timestep, condition, guided)
        condition = {name: value.chunk(2)[1] for name, value in condition.items()}
        guide = self.guides[id(transformer)]
        strong = super()._predict_batch(transformer, model_input, timestep, condition, False)
        if guide.config.low_res_channels is not None:
            condition["low_res"] = condition["low_res"].to(guide.dtype)
        weak = super()._predict_batch(guide, model_input, timestep, condition, False)
        return weak + self.guidance_scale * (strong - weak)


def record(file, key, make):
    found = json.loads(file.read_text()) if file.exists() else {}
    if key in found:
        return
    started = time.monotonic()
    found[key] = {**make(), "seconds": round(time.monotonic() - started)}
    with write_whole(file) as unfinished:
        unfinished.write_text(json.dumps(found, indent=2))
    print(
        file.name,
        key,
        round(found[key]["frechet_distance"], 1),
        found[key]["precision"],
        found[key]["recall"],
        found[key]["seconds"],
        flush=True,
    )


def build(stages, guides, names):
    scheduler = DPMSolverMultistepScheduler.from_config(
        DDPMScheduler(**NOISE_SCHEDULE).config, timestep_spacing="trailing"
    )
    pipe = Autoguided.from_stages(stages, scheduler, id2label=dict(enumerate(names)))
    if guides:
        pipe.guides = {id(stage): guide for stage, guide in zip(stages, guides, strict=True)}
    return pipe


def small_cascade(args, seed):
    """The trials' cascade; needs the variants `base`, `weak` and `weak_small` of the seed."""
    data = load_images(args.data_dir, "train", 16)
    judge = Judge(args, 16)
    models = {}
    for name in ("adamw_b0.9", "b9_weak"):
        torch.manual_seed(seed)
        objective = make_objective(VARIANTS[name], len(data.class_names)).eval()
        objective.stages.load_state_dict(torch.load(args.output / name / f"seed-{seed}" / "average.pt"))
        models[name] = list(objective.stages)
    file = args.output / f"autoguidance_{seed}.json"
    for scale in args.scales:
        for guide in args.guides:
            pipe = build(models["adamw_b0.9"], models.get("b9_" + guide), data.class_names)
            record(file, f"{guide} {scale}", lambda: judge.score(pipe, args.output / f"ag_{seed}", seed, scale))


def first_stage(args, seed):
    """The published checkpoint's first stage, guided by a small model that is trained here."""
    data = load_images(args.data_dir, "train", 16)
    judge = Judge(args, 16)
    factors = class_factors_from_names(data.class_names, "/")
    strong = PISDMTransformer2DModel.from_pretrained(
        "checkpoints/pisdm-emoji128", subfolder="transformer", dtype=torch.bfloat16
    ).eval()
    common = dict(sample_size=16, patch_size=2, in_channels=3, num_layers=7, hidden_size=128, class_factors=factors)
    stage = dict(common, overlapping_patches=True, pixel_head_channels=24)
    options = {"stages": [stage], "lr": 3e-3}
    file = args.output / "weak_first_stage.pt"
    torch.manual_seed(seed)
    objective = make_objective(options, len(data.class_names))
    if file.exists():
        objective.stages.load_state_dict(torch.load(file))
    else:
        objective, loss = train(options, seed, data, args.weak_steps)
        torch.save(objective.stages.state_dict(), file)
        print("weak loss", loss, flush=True)
    weak = objective.stages[0].eval()
    results = args.output / f"autoguidance_first_stage_{seed}.json"
    record(
        results,
        "weak alone",
        lambda: judge.score(build([weak], None, data.class_names), args.output / "ag_first", seed),
    )
    for scale in args.scales:
        for guide in args.guides:
            if guide == "cfg" or scale > 1:
                pipe = build([strong], [weak] if guide != "cfg" else None, data.class_names)
                record(results, f"{guide} {scale}", lambda: judge.score(pipe, args.output / "ag_first", seed, scale))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("what", choices=("small_cascade", "first_stage"))
    add("--data_dir", required=True)
    add("--seeds", type=int, nargs="+", default=[0])
    add("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    add("--guides", nargs="+", default=["cfg", "weak"])
    add("--weak_steps", type=int, default=300)
    add("--num_samples", type=int, default=500)
    add("--num_inference_steps", type=int, default=10)
    add("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in args.seeds:
        {"small_cascade": small_cascade, "first_stage": first_stage}[args.what](args, seed)


if __name__ == "__main__":
    main()
