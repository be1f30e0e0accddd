#!/usr/bin/env python
"""
Where the time of `make demo` goes: the shares of sampling spent in the transformers' forwards, the schedulers' steps
and the rest, by stage; and the effect of guidance slicing on time and memory.

    python -m benchmarks.demo_profile
    python -m benchmarks.demo_profile --steps 50 20 20 20 --repeats 5 --threads 1 --output-dir results

`pisdm generate` runs up to its call of the pipeline. After a warm-up, that call is repeated with guidance in one
forward and in two, in turns, and the run with the median time is reported. Writing the pictures is not included.
Memory is the peak of a call beyond the weights. Prints tables and writes `demo_profile.json` and `demo_profile.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from benchmarks.measuring.memory import measure_peak_growth
from benchmarks.measuring.report import write_report
from benchmarks.measuring.timing import now
from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.commands import generate
from diffusers_pisdm.utils.machine import describe_machine


WAYS = {"one forward": False, "two forwards": True}  # how a guided step runs, and whether that takes guidance slicing
PARTS = ("forwards", "scheduler", "rest")
OUTSIDE = "outside"  # of the stages' loops over their steps


class _CallReached(Exception):
    pass


def demo_call(arguments: list[str]) -> tuple[PISDMCascadePipeline, dict]:
    """The pipeline that `pisdm generate` builds from its arguments, and the arguments of its call."""

    def stop(pipe: PISDMCascadePipeline, **call_arguments) -> None:
        raise _CallReached(pipe, call_arguments)

    with mock.patch.object(PISDMCascadePipeline, "__call__", stop):
        try:
            generate.main(arguments)
        except _CallReached as reached:
            return reached.args
    raise RuntimeError("`pisdm generate` did not call its pipeline.")


def repeat_call(pipe: PISDMCascadePipeline, call_arguments: dict) -> None:
    """Calls the pipeline as the first time, with the generators in their initial state."""
    pipe(**{**call_arguments, "generator": [generator.clone_state() for generator in call_arguments["generator"]]})


@contextmanager
def watch_stages(pipe: PISDMCascadePipeline) -> Iterator[list[dict]]:
    """
    Yields a list that receives, for each stage that runs inside, the `seconds` in its loop over the steps, those spent
    in `forwards` and in the `scheduler`, the `rest`, and `num_forwards`.
    """
    device = pipe.device
    stages: list[dict] = []

    def timed(function: Callable, part: str) -> Callable:
        @functools.wraps(function)  # the pipeline reads the signature of a scheduler's step
        def call(*args, **kwargs):
            start = now(device)
            out = function(*args, **kwargs)
            stages[-1][part] += now(device) - start
            return out

        return call

    def timed_forward(function: Callable) -> Callable:
        call = timed(function, "forwards")

        @functools.wraps(function)
        def forward(*args, **kwargs):
            stages[-1]["num_forwards"] += 1
            return call(*args, **kwargs)

        return forward

    def timed_schedulers() -> list:
        schedulers = get_stage_schedulers()
        for scheduler in schedulers:
            for name in ("scale_model_input", "step"):
                changes.enter_context(mock.patch.object(scheduler, name, timed(getattr(scheduler, name), "scheduler")))
        return schedulers

    @contextmanager
    def timed_loop(**kwargs) -> Iterator:  # a stage's loop runs inside its progress bar
        stages.append({"forwards": 0.0, "scheduler": 0.0, "num_forwards": 0})
        start = now(device)
        with progress_bar(**kwargs) as bar:
            yield bar
        stage = stages[-1]
        stage["seconds"] = now(device) - start
        stage["rest"] = stage["seconds"] - stage["forwards"] - stage["scheduler"]

    get_stage_schedulers, progress_bar = pipe.get_stage_schedulers, pipe.progress_bar
    with contextlib.ExitStack() as changes:
        changes.enter_context(mock.patch.object(pipe, "get_stage_schedulers", timed_schedulers))
        changes.enter_context(mock.patch.object(pipe, "progress_bar", timed_loop))
        for transformer in pipe.stages:
            changes.enter_context(mock.patch.object(transformer, "forward", timed_forward(transformer.forward)))
        yield stages


def profile_call(pipe: PISDMCascadePipeline, call_arguments: dict) -> dict:
    """
    Calls the pipeline once: total `seconds`, `stages` as in `watch_stages`, seconds `outside` them (noise, upsampling,
    images), and `forward_share`, the forwards' share of all seconds.
    """
    with watch_stages(pipe) as stages:
        start = time.perf_counter()
        repeat_call(pipe, call_arguments)
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "stages": stages,
        OUTSIDE: seconds - sum(stage["seconds"] for stage in stages),
        "forward_share": sum(stage["forwards"] for stage in stages) / seconds,
    }


def measure_ways(pipe: PISDMCascadePipeline, call_arguments: dict, repeats: int) -> list[dict]:
    """For each way of guidance, the run with the median time, all runs' times and shares, and its memory in bytes."""
    pipe.set_progress_bar_config(disable=True)
    repeat_call(pipe, call_arguments)
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    peaks = {}
    for repeat in range(repeats + 1):
        for way, slicing in WAYS.items():
            pipe.enable_guidance_slicing() if slicing else pipe.disable_guidance_slicing()
            if repeat < repeats:
                runs[way].append(profile_call(pipe, call_arguments))
            else:
                peaks[way] = measure_peak_growth(lambda: repeat_call(pipe, call_arguments), pipe.device)
    pipe.disable_guidance_slicing()
    rows = []
    for way in WAYS:
        by_time = sorted(runs[way], key=lambda run: run["seconds"])
        rows.append(
            {
                "way": way,
                **by_time[(repeats - 1) // 2],
                "all_seconds": [run["seconds"] for run in runs[way]],
                "all_forward_shares": [run["forward_share"] for run in runs[way]],
                "peak_bytes": peaks[way],
            }
        )
    return rows


def format_tables(rows: list[dict], sizes: list[int]) -> str:
    """A Markdown table of the stages, with guidance in one forward, and one of the ways."""
    first = rows[0]
    lines = ["| stage | seconds | forwards | in forwards | in the scheduler | rest |", "|" + "---|" * 6]
    for size, stage in zip(sizes, first["stages"]):
        shares = " | ".join(f"{stage[part] / stage['seconds']:.1%}" for part in PARTS)
        lines.append(f"| {size} px | {stage['seconds']:.2f} | {stage['num_forwards']} | {shares} |")
    totals = [sum(stage[part] for stage in first["stages"]) for part in PARTS]
    totals[-1] += first[OUTSIDE]
    calls = sum(stage["num_forwards"] for stage in first["stages"])
    lines.append(f"| noise, images | {first[OUTSIDE]:.2f} | 0 | | | 100.0% |")
    shares = " | ".join(f"{total / first['seconds']:.1%}" for total in totals)
    lines.append(f"| all | {first['seconds']:.2f} | {calls} | {shares} |")
    lines += ["", "| a guided step | seconds | in forwards | memory |", "|" + "---|" * 4]
    for row in rows:
        peak = "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"
        lines.append(f"| {row['way']} | {row['seconds']:.2f} | {row['forward_share']:.1%} | {peak} |")
    return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
    """Draws a bar per stage with a segment per part."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
    row = report["rows"][0]
    names = [f"stage {index + 1} ({size} px)" for index, size in enumerate(report["sizes"])] + ["noise, images"]
    starts = [0.0] * len(names)
    for part in PARTS:
        seconds = [stage[part] for stage in row["stages"]] + [row[OUTSIDE] if part == "rest" else 0.0]
        axis.barh(names, seconds, left=starts, label=part)
        starts = [start + length for start, length in zip(starts, seconds)]
    axis.invert_yaxis()
    axis.set(xlabel="seconds", title=f"{row['forward_share']:.1%} of the sampling is in forwards")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/pisdm-emoji128")
    parser.add_argument("--steps", nargs="+", default=[], help="one number, or one per stage; default: the model's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for torch and the kernels")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args(arguments)

    torch.set_num_threads(args.threads)
    steps = ["--steps", *args.steps] if args.steps else []
    pipe, call_arguments = demo_call(["--model", args.model, "--device", args.device, *steps])
    report = {
        "machine": describe_machine(pipe.device),
        "torch": torch.__version__,
        "model": args.model,
        "images": len(call_arguments["class_labels"]),
        "steps": call_arguments.get("num_inference_steps", pipe.config.default_num_inference_steps),
        "repeats": args.repeats,
        "sizes": [height for height, _ in pipe.get_stage_sizes()],
        "rows": measure_ways(pipe, call_arguments, args.repeats),
    }
    print(f"{report['images']} images, steps {report['steps']}; {report['machine']}")
    print(format_tables(report["rows"], report["sizes"]))
    write_report(args.output_dir, "demo_profile", report, lambda path: draw(report, path))
    print(f"Wrote {args.output_dir / 'demo_profile.json'} and {args.output_dir / 'demo_profile.png'}.")


if __name__ == "__main__":
    main()
