"""Times sampling with a whole cascade against one stage at its final resolution."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from benchmarks.measuring.timing import now
from benchmarks.speed.candidates import cast_model
from diffusers_pisdm import PISDM_SIZES, PISDMCascadePipeline, PISDMTransformer2DModel
from diffusers_pisdm.training.recipes import Recipe


NUM_CLASSES = 1000

# Latents of 32, 64, 128 and 256 px.
DEFAULT_RECIPE = Recipe(
    scheduler={"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False},
    stages=[
        {"sample_size": 4, **PISDM_SIZES["S"]},
        {"sample_size": 8, "low_res_channels": 4, **PISDM_SIZES["S"]},
        {"sample_size": 16, "low_res_channels": 4, **PISDM_SIZES["S"]},
        {"sample_size": 32, "low_res_channels": 4, **PISDM_SIZES["S"]},
    ],
)


def split_steps(steps: int, num_stages: int) -> list[int]:
    """Splits `steps` as evenly as whole numbers allow, with the larger parts in the low stages, which cost least."""
    if steps < num_stages:
        raise ValueError(f"{steps} steps are too few for {num_stages} stages: pass --steps {num_stages} or more.")
    return [steps // num_stages + (stage < steps % num_stages) for stage in range(num_stages)]


def make_pipeline(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> PISDMCascadePipeline:
    """The pipeline of a recipe with random weights, without its autoencoder."""
    scheduler = DPMSolverMultistepScheduler.from_config(DDPMScheduler(**recipe.scheduler).config)
    with device:
        stages = [
            cast_model(PISDMTransformer2DModel(num_classes=NUM_CLASSES, **stage), dtype) for stage in recipe.stages
        ]
    pipeline = PISDMCascadePipeline.from_stages(stages, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: PISDMCascadePipeline, steps: list[int], batch_size: int) -> list[float]:
    """Samples latents once, without guidance, and returns the seconds of each stage."""
    seconds = [0.0] * pipeline.num_stages
    device = pipeline.device

    def stamp(pipeline: PISDMCascadePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        nonlocal last
        end = now(device)
        seconds[pipeline.stage - 1] += end - last
        last = end
        return tensors

    last = now(device)
    latents = pipeline(
        class_labels=[index % NUM_CLASSES for index in range(batch_size)],
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=torch.Generator(device).manual_seed(0),
        output_type="latent",
        callback_on_step_end=stamp,
    ).images
    if not torch.isfinite(latents).all():
        raise RuntimeError("The pipeline produced values that are not finite.")
    return seconds


def measure_cascade(
    recipe: Recipe, steps: int, batch_size: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict:
    """
    Times a recipe's cascade with random weights at `steps` of DPM-Solver per stage and at `steps` in total, and its
    last stage alone, without the condition, in turns; `times_one_stage` is the time as a multiple of the latter's.
    """
    cascade = make_pipeline(recipe, device, dtype)
    last = {name: value for name, value in recipe.stages[-1].items() if name != "low_res_channels"}
    single = make_pipeline(Recipe(recipe.scheduler, [last]), device, dtype)
    num_stages = cascade.num_stages
    ways = {
        "one stage": (single, [steps]),
        f"cascade, {steps} steps a stage": (cascade, [steps] * num_stages),
        f"cascade, {steps} steps in all": (cascade, split_steps(steps, num_stages)),
    }
    for pipeline in (single, cascade):
        sample(pipeline, [1] * pipeline.num_stages, batch_size)  # a warm-up
    runs: dict[str, list[list[float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, (pipeline, steps_of_stages) in ways.items():
            runs[way].append(sample(pipeline, steps_of_stages, batch_size))

    rows = []
    for way, (_, steps_of_stages) in ways.items():
        totals = [sum(stages) for stages in runs[way]]
        rows.append(
            {
                "way": way,
                "steps": steps_of_stages,
                "seconds": totals,
                "median_seconds": statistics.median(totals),
                "stage_seconds": [statistics.median(seconds) for seconds in zip(*runs[way])],
            }
        )
    for row in rows:
        row["times_one_stage"] = row["median_seconds"] / rows[0]["median_seconds"]
    stages = [
        {"sample_size": stage.config.sample_size, "parameters": stage.num_parameters()} for stage in cascade.stages
    ]
    return {"steps": steps, "batch_size": batch_size, "repeats": repeats, "stages": stages, "rows": rows}


def describe_cascade(report: dict) -> str:
    """Formats the table of [`measure_cascade`]."""
    sizes = " > ".join(str(stage["sample_size"]) for stage in report["stages"])
    parameters = ", ".join(f"{stage['parameters'] / 1e6:.1f}M" for stage in report["stages"])
    lines = [
        f"Stages of {sizes} latent pixels, {parameters} parameters; 'one stage' is the last alone."
        f" Batch {report['batch_size']}, no guidance, no autoencoder.",
        f"{'':<34}{'x one stage':>12}{'seconds':>10}   seconds per stage (steps)",
    ]
    for row in report["rows"]:
        parts = ", ".join(f"{seconds:.3g} ({steps})" for seconds, steps in zip(row["stage_seconds"], row["steps"]))
        lines.append(f"{row['way']:<34}{row['times_one_stage']:>12.2f}{row['median_seconds']:>10.3g}   {parts}")
    return "\n".join(lines)


def plot_cascade(report: dict, path: Path) -> None:
    """Draws a bar per way with a segment per stage."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 2.8), layout="constrained")
    ways = [row["way"] for row in report["rows"]]
    starts = [0.0] * len(ways)
    for index, stage in enumerate(report["stages"]):
        # One stage alone is at the last stage's resolution.
        offsets = [len(report["stages"]) - len(row["stage_seconds"]) for row in report["rows"]]
        seconds = [
            row["stage_seconds"][index - offset] if index >= offset else 0.0
            for row, offset in zip(report["rows"], offsets)
        ]
        axis.barh(ways, seconds, left=starts, label=f"{stage['sample_size']}x{stage['sample_size']} latents")
        starts = [start + length for start, length in zip(starts, seconds)]
    for row, end in zip(report["rows"], starts):
        axis.annotate(f" {row['times_one_stage']:.2f}x", (end, row["way"]), va="center")
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set(xlabel=f"seconds per batch of {report['batch_size']} (less is better)", title=report["machine"]["device"])
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
