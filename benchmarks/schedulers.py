"""
Which of diffusers' schedulers sample the published checkpoint right: every class that `swap_scheduler` takes draws the
same images, from the same noise, in a few numbers of steps.

    python -m benchmarks.schedulers --output docs/results/schedulers.json

The yardstick is DDIM with many steps: a deterministic scheduler should come closer to its images the more steps it
takes; a stochastic one should draw images of the same brightness, contrast and roughness (the mean difference of
neighbouring pixels, which noise multiplies). Stages whose prediction a scheduler cannot sample are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import diffusers
import torch

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.schedulers import SETTINGS, swap_scheduler
from diffusers_pisdm.utils.arguments import COUNT
from diffusers_pisdm.utils.files import write_whole
from diffusers_pisdm.utils.machine import describe_machine


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="checkpoints/pisdm-emoji128")
    add("--num_stages", type=COUNT, default=2, help="Stages from the first; more take longer.")
    add("--schedulers", nargs="+", help="Default: all that diffusers has.")
    add("--steps", type=COUNT, nargs="+", default=[10, 20, 50])
    add("--reference_steps", type=COUNT, default=100)
    add("--classes", type=int, nargs="+", default=[3, 60], help="The class of each image.")
    add("--output", type=Path, required=True)
    return parser.parse_args(argv)


def load_stages(model: str, num_stages: int) -> PISDMCascadePipeline:
    """The first stages of a cascade."""
    shorter = {f"transformer_{num_stages + 1}": None} if num_stages < 4 else {}
    pipe = PISDMCascadePipeline.from_pretrained(model, **shorter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_stages(pipe: PISDMCascadePipeline, classes: list[int], num_inference_steps: int) -> list[torch.Tensor]:
    """Each stage's images, `(B, C, H, W)` in [-1, 1], always from the same noise."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(classes))]
    arguments = {"generator": generators, "output_type": "latent", "output_stages": True}
    return pipe(classes, num_inference_steps=num_inference_steps, **arguments).stage_images


def describe_images(images: torch.Tensor) -> dict[str, float]:
    """Mean, standard deviation and mean difference of neighbouring pixels."""
    rows, columns = images.diff(dim=-2).abs().mean(), images.diff(dim=-1).abs().mean()
    return {
        "brightness": images.mean().item(),
        "contrast": images.std().item(),
        "roughness": ((rows + columns) / 2).item(),
    }


def compare(
    model: str, num_stages: int, name: str, steps: list[int], classes: list[int], reference: list[torch.Tensor]
) -> dict:
    """One scheduler's row of the report: its images in each number of steps, or why there are none."""
    reasons = []
    for count in range(num_stages, 0, -1):
        pipe = load_stages(model, count)
        try:
            swap_scheduler(pipe, name)
            break
        except (ImportError, ValueError) as error:
            reasons.append(" ".join(str(error).split()))
    else:
        return {"scheduler": name, "refused": reasons[-1]}
    row = {"scheduler": name, "settings": SETTINGS.get(name, {}), "num_stages": count, "runs": []}
    for number in steps:
        try:
            stages = draw_stages(pipe, classes, number)
        except ValueError as error:
            row["runs"].append({"steps": number, "refused": str(error)})
            continue
        described = [
            {"distance": (images - wanted).square().mean().sqrt().item(), **describe_images(images)}
            for images, wanted in zip(stages, reference)
        ]
        row["runs"].append({"steps": number, "stages": described})
    return row


def format_table(report: dict) -> str:
    """A line per scheduler and number of steps: the last stage's numbers."""
    lines = [f"{'scheduler':34s} steps  stage  distance  brightness  contrast  roughness"]
    wanted = report["reference"][-1]
    lines.append(
        f"{'the reference':34s} {'':5s}  {'':5s}  {'':8s}" + "".join(f"  {value:9.3f}" for value in wanted.values())
    )
    for row in report["rows"]:
        if "refused" in row:
            lines.append(f"{row['scheduler']:34s} refused: {row['refused'][:80]}")
            continue
        for run in row["runs"]:
            start = f"{row['scheduler']:34s} {run['steps']:5d}  {row['num_stages']:5d}"
            if "refused" in run:
                lines.append(f"{start}  refused: {run['refused'][:70]}")
            else:
                lines.append(start + "".join(f"  {value:9.3f}" for value in run["stages"][-1].values()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    names = args.schedulers or sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
    pipe = load_stages(args.model, args.num_stages)
    swap_scheduler(pipe, "DDIMScheduler")
    reference = draw_stages(pipe, args.classes, args.reference_steps)
    rows = []
    for name in names:
        rows.append(compare(args.model, args.num_stages, name, args.steps, args.classes, reference))
        print(f"{name}: {'refused' if 'refused' in rows[-1] else 'drawn'}", flush=True)
    report = {
        "model": args.model,
        "classes": args.classes,
        "reference_steps": args.reference_steps,
        "machine": describe_machine(torch.device("cpu")),
        "versions": {"diffusers": diffusers.__version__, "torch": torch.__version__},
        "reference": [describe_images(images) for images in reference],
        "rows": rows,
    }
    with write_whole(args.output) as file:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(format_table(report))
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
