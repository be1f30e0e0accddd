"""
The cost of training: images per second and memory of the sizes S, L and H, each as a single stage on latents of 64 and
256 pixel images, or of all stages of a recipe. Runs a few training steps of each. `stage_cost.py` and `stage_speed.py`
in `diffusers_pisdm/training/cost/` explain what is counted and what is measured; the text below a recipe's table says
what is extrapolated.

    python -m benchmarks.training_cost
    python -m benchmarks.training_cost --recipe examples/recipes/imagenet256.json --num-processes 8 \\
        --device cuda --fused-scan --count-only

`--count-only` needs neither the device nor the memory. Prints a table and writes `training_cost.json`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from benchmarks.measuring.report import is_loaded
from diffusers_pisdm import PISDM_SIZES
from diffusers_pisdm.training.cost.report import cost_report, format_cost_report
from diffusers_pisdm.training.cost.stage_cost import AUTOCAST_DTYPES, CostSettings, estimate_cascade_cost
from diffusers_pisdm.training.cost.stage_speed import StageSpeed, measure_stage_speed
from diffusers_pisdm.training.recipes import read_recipe
from diffusers_pisdm.utils.machine import describe_machine


VAE_FACTOR = 8  # pixels per latent pixel of Stable Diffusion's VAE


def describe_load(args: argparse.Namespace) -> str:
    """The machine, and whether something else is running on it."""
    machine = f"{describe_machine(torch.device(args.device))}, torch {torch.__version__}"
    load, cores = os.getloadavg()[0], os.cpu_count()
    if is_loaded(load, cores):
        machine += f"; loaded machine (load average {load:.1f} on {cores} cores): times are pessimistic"
    return machine


def make_settings(args: argparse.Namespace, gradient_checkpointing: bool, mixed_precision: str) -> CostSettings:
    return CostSettings(
        gradient_checkpointing=gradient_checkpointing,
        mixed_precision=mixed_precision,
        num_processes=args.num_processes,
        device_type=torch.device(args.device).type,
        fused_scan=args.fused_scan or None,
    )


def report_stages(
    stages: list[dict],
    batch_size: int,
    max_train_steps: int,
    settings: CostSettings,
    args: argparse.Namespace,
    batch_shares: list[float] | None = None,
) -> dict:
    """The cost report of stages trained together."""
    costs = estimate_cascade_cost(stages, args.num_classes, batch_size, settings, batch_shares)
    speeds: list[StageSpeed | None] | None = None
    if not args.count_only:
        speeds = [
            measure_stage_speed(stage, args.num_classes, cost.batch_size, settings, args.device, args.seconds)
            for stage, cost in zip(stages, costs)
        ]
    return cost_report(costs, settings, batch_size, max_train_steps, speeds)


def report_recipe(args: argparse.Namespace) -> dict:
    recipe = read_recipe(args.recipe)
    training = recipe.training
    settings = make_settings(
        args, training.get("gradient_checkpointing", False), training.get("mixed_precision", "no")
    )
    return report_stages(
        recipe.stages,
        args.batch_size or training["train_batch_size"],
        training.get("max_train_steps", 500_000),  # the training script's default
        settings,
        args,
        training.get("batch_shares"),
    )


def report_sizes(args: argparse.Namespace) -> list[dict]:
    """One row per model size and image size."""
    settings = make_settings(args, args.gradient_checkpointing, args.mixed_precision)
    rows = []
    for size in args.sizes:
        for pixels in args.pixels:
            stage = {"sample_size": pixels // VAE_FACTOR, **PISDM_SIZES[size]}
            report = report_stages([stage], args.batch_size or 16, 1, settings, args)
            rows.append({"size": size, "pixels": pixels, **report})
            print(format_row(rows[-1]), flush=True)
    return rows


HEADER = (
    f"{'size':<6}{'pixels':>6}{'parameters':>12}{'GFLOP/image':>13}{'GiB':>8}{'of it saved':>13}{'images/s':>10}"
    "  measured on"
)


def format_row(row: dict) -> str:
    stage, total = row["stages"][0], row["total"]
    speed, rate = stage["speed"], "-"
    measured_on = "does not fit" if row["measured"] else "not measured"
    if speed is not None:
        rate = f"{total['images_per_second']:.3g}"
        measured_on = f"{speed['num_layers']} of {stage['num_layers']} layers, {speed['batch_size']} images"
    return (
        f"{row['size']:<6}{row['pixels']:>6}{stage['parameters'] / 1e6:>11.1f}M{stage['training_flops'] / 1e9:>13.1f}"
        f"{total['total_bytes'] / 2**30:>8.2f}{stage['saved_bytes'] / 2**30:>13.2f}{rate:>10}  {measured_on}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=PISDM_SIZES, default=list(PISDM_SIZES))
    parser.add_argument("--pixels", type=int, nargs="+", default=[64, 256], help="multiples of 16")
    parser.add_argument("--recipe", type=Path, help="its stages and training arguments instead of the sizes")
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, help="images per process; default: 16, or the recipe's")
    parser.add_argument("--mixed-precision", choices=AUTOCAST_DTYPES, default="no", help="for the sizes")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for the sizes")
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fused-scan", action="store_true", help="count as if mamba_ssm or Triton were available")
    parser.add_argument("--count-only", action="store_true", help="do not measure times")
    parser.add_argument("--seconds", type=float, default=30.0, help="approximate time to measure a stage")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args(arguments)

    report = {"num_processes": args.num_processes}
    if not args.count_only:
        report["machine"] = describe_load(args)
        print(f"Training cost on {report['machine']}")
    if args.recipe is None:
        print(HEADER)
        report["rows"] = report_sizes(args)
    else:
        report["recipe"] = args.recipe.name
        report |= report_recipe(args)
        print(format_cost_report(report))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "training_cost.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"Wrote {file}.")


if __name__ == "__main__":
    main()
