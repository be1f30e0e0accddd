"""
What sampling time buys: the Fréchet distance of a cascade's samples against the seconds per image, for schedulers x
steps and for guidance scales x guidance intervals. The pipeline's defaults are based on it.

    python examples/datasets/emoji.py --edition 2 --output_dir data/emoji128
    python -m benchmarks.sampling_efficiency --data_dir data/emoji128 --output outputs/sampling_efficiency

Samples with the same classes and noise are drawn with every setting and evaluated; then the settings are timed in
turn, `--repeats` times, and medians reported. If interrupted, rerun the same command to resume. Several processes can
share the sampling: `--part 0 2` and `--part 1 2` each draw every second setting; the command without `--part` then
evaluates and times them all. Prints a table and writes `sampling_efficiency.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.equal_budget.reference_images import reference_statistics
from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.data.image_transform import decode_image
from diffusers_pisdm.evaluation import (
    FolderImages,
    SampleSettings,
    evaluate_images,
    load_feature_extractor,
    write_sample_set,
)
from diffusers_pisdm.schedulers import swap_scheduler
from diffusers_pisdm.utils.files import write_whole
from diffusers_pisdm.utils.machine import describe_machine


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="checkpoints/pisdm-emoji128")
    add("--data_dir", required=True, help="The reference: a folder that `datasets` reads, or a data set on the Hub.")
    add("--split", default="train")
    add(
        "--schedulers",
        nargs="+",
        default=["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"],
    )
    add("--steps", type=int, nargs="+", default=[20, 5, 10, 40])
    add("--guidance_scales", type=float, nargs="+", default=[2.0, 1.0, 1.5, 3.0, 4.0])
    add(
        "--intervals", nargs="+", default=["0:1", "0.2:0.8"], help="start:stop, shares of the steps from the noisy end"
    )
    add("--num_samples", type=int, default=576)
    add("--seed", type=int, default=0)
    add("--features", default="efficientnet_lite0", help="See `pisdm evaluate`.")
    add("--features_weights")
    add("--part", type=int, nargs=2, metavar=("I", "N"), help="Only draw every N-th setting, from the I-th.")
    add("--timed_images", type=int, default=8, help="Images per timed call.")
    add("--repeats", type=int, default=3)
    add("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        args.intervals = [tuple(map(float, interval.split(":"))) for interval in args.intervals]
        if not all(len(interval) == 2 for interval in args.intervals):
            raise ValueError
    except ValueError:
        parser.error(f"--intervals takes start:stop, such as 0.2:0.8, got {' '.join(map(str, args.intervals))}")
    return args


def time_samplers(
    pipe: PISDMCascadePipeline, grid: list[SamplerSettings], num_images: int, repeats: int
) -> dict[SamplerSettings, list[float]]:
    """Seconds per image of every setting, `repeats` times, in turn, after a warm-up."""
    pipe.set_progress_bar_config(disable=True)
    seconds = {settings: [] for settings in grid}
    classes = [index % pipe.transformer.config.num_classes for index in range(num_images)]
    for repeat in tqdm(range(-1, repeats), desc="timing", unit="turn"):
        for settings in grid if repeat >= 0 else grid[:1]:
            swap_scheduler(pipe, settings.scheduler)
            start = time.perf_counter()
            pipe(class_labels=classes, output_type="np", **settings.call_arguments())
            if repeat >= 0:
                seconds[settings].append((time.perf_counter() - start) / num_images)
    return seconds


def format_table(rows: list[dict]) -> str:
    """The ways as a Markdown table, best Fréchet distance first."""
    lines = ["| scheduler | steps | guidance | Fréchet distance | precision | recall | s/image |", "|" + "---|" * 7]
    for row in sorted(rows, key=lambda row: row["frechet_distance"]):
        settings = SamplerSettings(**row["settings"])
        lines.append(
            f"| {settings.scheduler.removesuffix('Scheduler')} | {settings.steps} | {settings.guidance_label} |"
            f" {row['frechet_distance']:.1f} | {row['precision']:.2f} | {row['recall']:.2f} |"
            f" {row['seconds_per_image']:.3f} |"
        )
    return "\n".join(lines)


def plot_rows(rows: list[dict], distance_name: str, picture: Path) -> None:
    """Plots schedulers by steps on the left, guidance on the right, both over seconds per image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = SamplerSettings(**rows[0]["settings"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, constrained_layout=True)
    points = [(SamplerSettings(**row["settings"]), row["seconds_per_image"], row["frechet_distance"]) for row in rows]
    for scheduler in dict.fromkeys(settings.scheduler for settings, *_ in points):
        curve = sorted(
            (seconds, distance, settings.steps)
            for settings, seconds, distance in points
            if settings.scheduler == scheduler and settings.guidance_label == first.guidance_label
        )
        left.plot(*zip(*((seconds, distance) for seconds, distance, _ in curve)), "o-", label=scheduler)
        for seconds, distance, steps in curve:
            left.annotate(str(steps), (seconds, distance), textcoords="offset points", xytext=(4, 4), fontsize=7)
    for settings, seconds, distance in points:
        if (settings.scheduler, settings.steps) == (first.scheduler, first.steps):
            right.plot(seconds, distance, "o")
            right.annotate(
                settings.guidance_label, (seconds, distance), textcoords="offset points", xytext=(4, 4), fontsize=7
            )
    left.set(title=f"steps per stage, {first.guidance_label}", xlabel="seconds per image", xscale="log")
    left.set_ylabel(distance_name)
    right.set(title=f"guidance, {first.steps} steps of {first.scheduler}", xlabel="seconds per image")
    left.legend(fontsize=8)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pipe = PISDMCascadePipeline.from_pretrained(args.model)
    grid = sampler_grid(args.schedulers, args.steps, args.guidance_scales, args.intervals)
    index, count = args.part or (0, 1)
    for settings in grid[index::count]:
        folder = args.output / settings.name
        print(folder.name)
        write_sample_set(pipe, folder, settings.sample_settings(args.num_samples, args.seed))
    if args.part is not None:
        return

    extractor = load_feature_extractor(args.features, args.features_weights)
    size = pipe.stages[-1].config.sample_size
    reference = reference_statistics(args.data_dir, args.split, size, extractor, args.output)
    results = {}
    for settings in grid:
        file = args.output / settings.name / "result.json"
        if not file.exists():
            images = FolderImages(args.output / settings.name, decode_image)
            result = evaluate_images(images, reference, extractor)
            with write_whole(file) as unfinished:
                unfinished.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
        results[settings] = json.loads(file.read_text())
    seconds = time_samplers(pipe, grid, args.timed_images, args.repeats)

    rows = [
        {
            "settings": asdict(settings),
            **{name: score["value"] for name, score in results[settings]["scores"].items()},
            "seconds_per_image": statistics.median(seconds[settings]),
            "all_seconds_per_image": seconds[settings],
        }
        for settings in grid
    ]
    report = {
        "model": args.model,
        "reference": reference.source,
        "num_reference": reference.num_images,
        "num_samples": args.num_samples,
        "seed": args.seed,
        "features": args.features,
        "machine": describe_machine(torch.device("cpu")),
        "timed_images": args.timed_images,
        "rows": rows,
    }
    with write_whole(args.output / "sampling_efficiency.json") as file:
        file.write_text(json.dumps(report, indent=2) + "\n")
    plot_rows(rows, extractor.distance_name, args.output / "sampling_efficiency.png")
    print(format_table(rows))
    print(f"Wrote {args.output}/sampling_efficiency.json and .png")


if __name__ == "__main__":
    main()


@dataclass(frozen=True)
class SamplerSettings:
    """How a sample set is drawn."""

    scheduler: str = "DPMSolverMultistepScheduler"  # a diffusers scheduler class
    steps: int = 20  # per stage
    guidance_scale: float = 2.0  # w of classifier-free guidance; 1 means none
    guidance_start: float = 0.0  # guidance begins here, a share of the steps from the noisy end,
    guidance_stop: float = 1.0  # and ends here

    @property
    def name(self) -> str:
        """The name for folders."""
        parts = (self.scheduler.removesuffix("Scheduler"), self.steps, self.guidance_scale)
        return "-".join(map(str, (*parts, self.guidance_start, self.guidance_stop)))

    @property
    def guidance_label(self) -> str:
        """The label in plots and tables."""
        if self.guidance_scale <= 1 or (self.guidance_start, self.guidance_stop) == (0.0, 1.0):
            return f"w = {self.guidance_scale:g}"
        return f"w = {self.guidance_scale:g} in {self.guidance_start:g} to {self.guidance_stop:g}"

    def call_arguments(self) -> dict[str, float]:
        """The arguments of the pipeline's call; the scheduler is a component instead."""
        arguments = asdict(self)
        del arguments["scheduler"]
        return {"num_inference_steps": arguments.pop("steps"), **arguments}

    def sample_settings(self, num_samples: int, seed: int) -> SampleSettings:
        """The settings of a sample set drawn this way."""
        return SampleSettings(num_samples, seed, scheduler=self.scheduler, **self.call_arguments())


def sampler_grid(
    schedulers: list[str], steps: list[int], guidance_scales: list[float], intervals: list[tuple[float, float]]
) -> list[SamplerSettings]:
    """
    Schedulers x steps at the first guidance scale and interval, and guidance scales x intervals at the first scheduler
    and number of steps: a product of all four would take days and show little more.
    """
    grid = [SamplerSettings(name, count, guidance_scales[0], *intervals[0]) for name in schedulers for count in steps]
    for scale in guidance_scales:
        for interval in intervals if scale > 1 else [(0.0, 1.0)]:
            grid.append(SamplerSettings(schedulers[0], steps[0], scale, *interval))
    return list(dict.fromkeys(grid))
