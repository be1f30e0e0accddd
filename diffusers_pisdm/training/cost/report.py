"""Reports what a training run will cost per stage and in total, as JSON and as a table."""

from __future__ import annotations

from dataclasses import asdict

from ...utils.messages import count_of, show_duration
from .stage_cost import CostSettings, StageCost
from .stage_speed import StageSpeed, seconds_per_step


def cost_report(
    costs: list[StageCost],
    settings: CostSettings,
    batch_size: int,
    max_train_steps: int,
    speeds: list[StageSpeed | None] | None = None,
) -> dict:
    """
    Combines counted and measured costs.

    Args:
        costs (`list[StageCost]`): The cost of each trained stage.
        settings ([`CostSettings`]): The settings they were counted with.
        batch_size (`int`): Images per process and forward pass.
        max_train_steps (`int`): Optimizer steps of the run.
        speeds (`list[StageSpeed]`, *optional*): The speed of each stage, `None` if it did not fit.

    Returns:
        `dict`: JSON-serialisable: `settings`, `stages` and `total`. Bytes and FLOPs are plain numbers. Times are
        included if all stages were measured.
    """
    accumulation = settings.gradient_accumulation_steps
    stages = []
    for cost, speed in zip(costs, speeds or [None] * len(costs), strict=True):
        stage = asdict(cost) | {
            "state_bytes": cost.state_bytes,
            "total_bytes": cost.total_bytes,
            "speed": None,
            "seconds_per_step": None,
        }
        if speed is not None:
            stage["speed"] = asdict(speed)
            stage["seconds_per_step"] = seconds_per_step(cost, speed, accumulation)
        stages.append(stage)

    images = batch_size * accumulation * settings.num_processes
    times = [stage["seconds_per_step"] for stage in stages]
    seconds = None if None in times else sum(times)
    total = {
        "parameters": sum(cost.parameters for cost in costs),
        "flops_per_step": accumulation * sum(cost.batch_size * cost.training_flops for cost in costs),
        "state_bytes": sum(cost.state_bytes for cost in costs),
        "saved_bytes": sum(cost.saved_bytes for cost in costs),  # all forward passes precede the first backward one
        # An upper bound: autocast keeps half-precision copies of the weights until the forward of all stages is done.
        "working_bytes": sum(cost.working_bytes for cost in costs),
        "images_per_step": images,
        "max_train_steps": max_train_steps,
        "seconds_per_step": seconds,
        "images_per_second": None if seconds is None else images / seconds,
        "days": None if seconds is None else seconds * max_train_steps / 86400,
    }
    total["total_bytes"] = total["state_bytes"] + total["saved_bytes"] + total["working_bytes"]
    return {"settings": asdict(settings), "measured": speeds is not None, "stages": stages, "total": total}


def format_cost_report(report: dict) -> str:
    """
    Formats the report of [`cost_report`] as plain text: a table with a line per stage, the total, and explanations.

    Args:
        report (`dict`): From [`cost_report`], or read back from JSON.

    Returns:
        `str`: The text, several lines.
    """
    total, settings = report["total"], report["settings"]
    header = (
        *("stage", "size", "layers", "parameters", "images", "forward", "training"),
        *("state", "saved", "working", "s/step", "TFLOP/s", "measured on"),
    )
    units = (*("", "", "", "M", "a pass", "GFLOP/im.", "GFLOP/im."), *("GiB", "GiB", "GiB", "", "", ""))
    rows = [header, units]
    for index, stage in enumerate(report["stages"], start=1):
        speed = stage["speed"]
        if speed is not None:
            timing = (f"{stage['seconds_per_step']:.3g}", f"{speed['flops_per_second'] / 1e12:.3g}")
            layers = "all" if speed["num_layers"] == stage["num_layers"] else f"{speed['num_layers']}"
            timing = (*timing, f"{layers} layers, {speed['batch_size']} im.")
        else:
            timing = ("-", "-", "does not fit" if report["measured"] else "-")
        rows.append(
            (
                *(str(index), str(stage["sample_size"]), str(stage["num_layers"])),
                *(f"{stage['parameters'] / 1e6:.1f}", str(stage["batch_size"])),
                *(f"{stage['forward_flops'] / 1e9:.4g}", f"{stage['training_flops'] / 1e9:.4g}"),
                *(_gibibytes(stage[name]) for name in ("state_bytes", "saved_bytes", "working_bytes")),
                *timing,
            )
        )
    sums = [_gibibytes(total[name]) for name in ("state_bytes", "saved_bytes", "working_bytes")]
    seconds = "-" if total["seconds_per_step"] is None else f"{total['seconds_per_step']:.3g}"
    rows.append(("total", "", "", f"{total['parameters'] / 1e6:.1f}", "", "", "", *sums, seconds, "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]

    checkpointing = "gradient checkpointing" if settings["gradient_checkpointing"] else "no gradient checkpointing"
    lines += [
        "",
        f"Memory: {_gibibytes(total['total_bytes'])} GiB per process (mixed precision {settings['mixed_precision']},"
        f" {checkpointing}). Counted: float32 weights,",
        "gradients, Adam's moments and averaged weights (state), what the forward pass keeps for the backward pass",
        "(saved), and the peak beyond these (working).",
        f"Work: {total['flops_per_step'] / 1e12:.4g} TFLOP per process and step, counted.",
    ]
    if total["seconds_per_step"] is not None:
        lines += [
            f"Time: {total['images_per_second']:.3g} images/s with {count_of(settings['num_processes'], 'process')},"
            f" {show_duration(total['seconds_per_step'] * total['max_train_steps'])} for"
            f" {count_of(total['max_train_steps'], 'step')} of {count_of(total['images_per_step'], 'image')}.",
            "TFLOP/s is measured on what the last column shows. Times are extrapolated from it: to all layers and",
            "images by FLOPs, for the optimizer by parameters. They exclude data loading, VAE and communication.",
        ]
    elif report["measured"]:
        lines.append("Time: unknown, as a stage does not fit into the free memory.")
    else:
        lines.append("Time: not measured.")
    return "\n".join(lines)


def _gibibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g}"
