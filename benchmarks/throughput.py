"""
Throughput and memory of PIS-DM against U-ViT, DiT and DiM at equal width and parameters, by image size (the paper's
table 5). Models are class-conditional on 8x latents in 2x2 patches, so 256 px are 256 tokens and 2048 px are 16,384.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --size H --layers 4
    python -m benchmarks.throughput --size H --device cuda --dtype bfloat16
    python -m benchmarks.throughput --size H --device cuda --dtype bfloat16 --cuda-graph
    python -m benchmarks.throughput --cascade
    python -m benchmarks.throughput --cascade examples/recipes/imagenet256.json --steps 10

The peers are in `benchmarks/peers/`. All models are first checked against float64, then timed in turns, so that
disturbances of the machine affect all equally; medians are reported, ratios first. `--layers` times a stack of that
many layers, layer by layer, and extrapolates to whole models, for sizes that a machine cannot run whole in a
reasonable time. `--cuda-graph` records each model's pass once and replays it, so that a GPU does not wait for the
launches of many small kernels, as it otherwise does with few tokens. Memory is what a pass needs beyond the weights.

`--cascade` instead times sampling with a whole cascade (by default four stages of size S on 256 px latents) against
one stage at its final resolution.

Prints tables and writes `throughput.json` after every image size and `throughput.png`, or `cascade_throughput.json`
and `.png`.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from benchmarks.measuring.memory import measure_peak_growth
from benchmarks.measuring.report import DTYPES, describe_conditions, parse_positive, print_conditions, write_report
from benchmarks.measuring.timing import MIN_STACK, now, record_graph, time_pass, whole_seconds
from benchmarks.peers import PEERS
from benchmarks.speed.candidates import (
    PISDM,
    Candidate,
    check_candidates,
    make_candidates,
    make_inputs,
    num_tokens,
    parse_image_size,
)
from benchmarks.speed.cascade_sampling import DEFAULT_RECIPE, describe_cascade, measure_cascade, plot_cascade
from benchmarks.speed.crossover import find_crossover
from diffusers_pisdm import PISDM_SIZES
from diffusers_pisdm.training.recipes import read_recipe


# The paper's table 5 (images per second at 50 steps on an A100, 0.9B parameters), by image size.
PAPER_IMAGES_PER_SECOND = {
    PISDM: {256: 1.4, 512: 1.3, 1024: 1.1, 1280: 0.9, 1536: 0.7, 2048: 0.6},
    "U-ViT": {256: 1.9, 512: 1.7, 1024: 1.2, 1280: 0.9, 1536: 0.6, 2048: 0.2},
}


def paper_ratio(image_size: int) -> float | None:
    """How many times as fast as U-ViT PIS-DM is in the paper, for the paper's sizes."""
    if image_size not in PAPER_IMAGES_PER_SECOND[PISDM]:
        return None
    return PAPER_IMAGES_PER_SECOND[PISDM][image_size] / PAPER_IMAGES_PER_SECOND["U-ViT"][image_size]


def measure_first_pass(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, int | None]:
    """Runs a model once; returns its output and the memory needed."""
    outputs = []

    def call() -> None:
        with torch.no_grad():
            outputs.append(model(*inputs, return_dict=False)[0])

    memory = measure_peak_growth(call, inputs[0].device)
    return outputs[0], memory


def make_timer(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], num_layers: int, args: argparse.Namespace
) -> Callable[[], float]:
    """A function that times a pass through a model of `num_layers` layers; `model` may have fewer."""
    device = inputs[0].device
    if args.cuda_graph:

        def call() -> None:
            with torch.no_grad():
                model(*inputs, return_dict=False)

        replay = record_graph(call, device)

        def time_replay() -> float:
            start = now(device)
            replay()
            return now(device) - start

        return time_replay
    if len(model.transformer_blocks) == num_layers:
        return lambda: time_pass(model, inputs).seconds
    return lambda: whole_seconds(time_pass(model, inputs, by_layer=True), num_layers)


def measure_image_size(candidates: list[Candidate], image_size: int, args: argparse.Namespace) -> list[dict]:
    """Times and memory of all candidates for images of one size, a row each."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    inputs = make_inputs(args.batch_size, image_size, device, dtype)
    tokens = num_tokens(image_size)
    timers, rows = {}, {}
    for candidate in candidates:
        timed_layers = min(args.layers or candidate.num_layers, candidate.num_layers)
        with device:
            model = candidate.build(image_size, timed_layers, dtype)
        output, memory = measure_first_pass(model, inputs)
        if not torch.isfinite(output).all():
            raise RuntimeError(f"{candidate.name} produces values that are not finite at {image_size} px.")
        if memory is not None:
            memory += candidate.missing_skip_bytes(timed_layers, args.batch_size, image_size, dtype)
        timers[candidate.name] = make_timer(model, inputs, candidate.num_layers, args)
        rows[candidate.name] = {
            "image_size": image_size,
            "tokens": tokens,
            "model": candidate.name,
            "num_layers": candidate.num_layers,
            "timed_layers": timed_layers,
            "parameters": candidate.parameters,
            "weight_bytes": candidate.parameters * dtype.itemsize,
            "memory_bytes": memory,
            "seconds": [],
        }

    for _ in range(args.repeats):
        for candidate in candidates:
            rows[candidate.name]["seconds"].append(timers[candidate.name]())

    own = rows[PISDM]["median_seconds"] = statistics.median(rows[PISDM]["seconds"])
    for row in rows.values():
        row["median_seconds"] = statistics.median(row["seconds"])
        row["times_as_fast"] = row["median_seconds"] / own  # PIS-DM compared with this model
        row["evaluations_per_second"] = args.batch_size / row["median_seconds"]  # one pass over one image
        row["images_per_second"] = row["evaluations_per_second"] / args.steps
    return list(rows.values())


def find_crossovers(rows: list[dict]) -> dict[str, dict]:
    """The number of tokens from which PIS-DM is faster, by peer."""

    def seconds(name: str) -> list[float]:
        return [row["median_seconds"] for row in rows if row["model"] == name]

    tokens = [row["tokens"] for row in rows if row["model"] == PISDM]
    crossovers = {peer: find_crossover(tokens, seconds(PISDM), seconds(peer)) for peer in PEERS}
    return {
        peer: {"faster": found.faster, "tokens": found.tokens, "image_size": found.image_size, "text": str(found)}
        for peer, found in crossovers.items()
    }


def print_table(rows: list[dict], steps: int) -> None:
    by_size: dict[int, dict[str, dict]] = {}
    for row in rows:
        by_size.setdefault(row["image_size"], {})[row["model"]] = row
    names = [PISDM, *PEERS]

    def columns(title: str, models: list[str], cell: Callable[[dict], str], paper: dict[str, Callable]) -> None:
        print(f"\n{title}")
        print("".join(f"{head:>9}" for head in ("pixels", "tokens", *models)), end="")
        print("".join(f"{f'paper: {name}':>16}" for name in paper))
        for size, of_size in by_size.items():
            print(
                f"{size:>9}{of_size[PISDM]['tokens']:>9}" + "".join(f"{cell(of_size[m]):>9}" for m in models), end=""
            )
            print(
                "".join(
                    f"{'-' if of_paper(size) is None else f'{of_paper(size):.2g}':>16}" for of_paper in paper.values()
                )
            )

    def gibibytes(row: dict) -> str:
        return "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**30:.2f}"

    title = "How many times as fast PIS-DM is as a peer"
    columns(title, list(PEERS), lambda row: f"{row['times_as_fast']:.2f}", {"U-ViT": paper_ratio})
    columns("Seconds per pass", names, lambda row: f"{row['median_seconds']:.3g}", {})
    in_paper = {name: of_sizes.get for name, of_sizes in PAPER_IMAGES_PER_SECOND.items()}
    columns(f"Images per second at {steps} steps", names, lambda row: f"{row['images_per_second']:.3g}", in_paper)
    columns("GiB beyond the weights", names, gibibytes, {})


def plot(rows: list[dict], crossovers: dict[str, dict], title: str, path: Path) -> None:
    """Plots seconds per pass, PIS-DM's speed-up, and memory over the number of tokens."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for name in (PISDM, *PEERS):
        own = [row for row in rows if row["model"] == name]
        tokens = [row["tokens"] for row in own]
        label = f"{name} ({own[0]['parameters'] / 1e6:.0f}M, {own[0]['num_layers']} layers)"
        (line,) = axes[0].plot(tokens, [row["median_seconds"] for row in own], "o-", label=label)
        if name != PISDM:
            label = f"{name}: PIS-DM {crossovers[name]['text']}"
            axes[1].plot(tokens, [row["times_as_fast"] for row in own], "o-", color=line.get_color(), label=label)
        if own[0]["memory_bytes"] is not None:
            memory = [row["memory_bytes"] / 2**30 for row in own]
            axes[2].plot(tokens, memory, "o-", color=line.get_color(), label=name)
    sizes = [row["image_size"] for row in rows if row["model"] == PISDM]
    in_paper = [(num_tokens(size), paper_ratio(size)) for size in sizes if paper_ratio(size) is not None]
    if in_paper:
        axes[1].plot(*zip(*in_paper), "k:", label="U-ViT in the paper (A100)")
    axes[1].axhline(1, color="grey", linewidth=0.8)
    titles = ("seconds per pass", "how many times as fast PIS-DM is", "GiB beyond the weights")
    for axis, name in zip(axes, titles):
        axis.set(xscale="log", yscale="log", title=name)
        labels = [f"{num_tokens(size)}\n{size} px" for size in sizes]
        axis.set_xticks([num_tokens(size) for size in sizes], labels, fontsize=6.5)  # 4,096 and 6,400 are close
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.supxlabel("tokens", fontsize=10)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run_table(args: argparse.Namespace, conditions: dict) -> None:
    candidates = make_candidates(PISDM_SIZES[args.size])
    for candidate in candidates:
        timed = min(args.layers or candidate.num_layers, candidate.num_layers)
        stack = "timed whole" if timed == candidate.num_layers else f"extrapolated in depth from {timed} layers"
        difference = candidate.parameters / candidates[0].parameters - 1
        print(
            f"{candidate.name}: {candidate.num_layers} layers of width {candidate.config['hidden_size']},"
            f" {candidate.parameters / 1e6:.1f}M parameters ({difference:+.1%}), {stack}"
        )
    report = {
        "machine": conditions,
        "size": args.size,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "steps": args.steps,
        "cuda_graph": args.cuda_graph,
        "models": {
            candidate.name: {"config": candidate.config, "parameters": candidate.parameters}
            for candidate in candidates
        },
        "errors": check_candidates(candidates, torch.device(args.device)),
        "paper_images_per_second": PAPER_IMAGES_PER_SECOND,
        "rows": [],
    }
    for image_size in sorted(set(args.image_sizes)):
        rows = measure_image_size(candidates, image_size, args)
        gc.collect()
        report["rows"] += [{**row, "load_average": os.getloadavg()[0]} for row in rows]
        seconds = ", ".join(f"{row['model']} {row['median_seconds']:.3g} s" for row in rows)
        print(f"{image_size} px: {seconds} per pass", flush=True)
        write_report(args.output_dir, "throughput", report)  # the results so far, in case of interruption

    report["crossovers"] = find_crossovers(report["rows"])
    print_table(report["rows"], args.steps)
    print()
    for peer, found in report["crossovers"].items():
        print(f"PIS-DM and {peer}: PIS-DM is {found['text']}" + " (paper: 1280 px)" * (peer == "U-ViT"))
    title = f"Size {args.size}, batch {args.batch_size}, {args.dtype}, {conditions['device']}"
    if args.layers is not None:
        title += f"; extrapolated in depth from {args.layers} layers"
    if args.cuda_graph:
        title += "; CUDA graphs"
    write_report(
        args.output_dir,
        "throughput",
        report,
        lambda path: plot(report["rows"], report["crossovers"], title, path),
    )
    print(f"Wrote {args.output_dir / 'throughput.json'} and {args.output_dir / 'throughput.png'}.")


def run_cascade(args: argparse.Namespace, conditions: dict) -> None:
    recipe = DEFAULT_RECIPE if args.cascade == "" else read_recipe(args.cascade)
    result = measure_cascade(
        recipe, args.steps, args.batch_size, args.repeats, torch.device(args.device), DTYPES[args.dtype]
    )
    report = {"machine": conditions, "recipe": args.cascade or "four stages of size S", **result}
    print(describe_cascade(report))
    write_report(args.output_dir, "cascade_throughput", report, lambda path: plot_cascade(report, path))
    print(f"Wrote {args.output_dir / 'cascade_throughput.json'} and {args.output_dir / 'cascade_throughput.png'}.")


def parse_layers(text: str) -> int:
    layers = parse_positive(text)
    if layers < MIN_STACK or layers % 2 != 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an even number of at least {MIN_STACK} layers")
    return layers


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", choices=PISDM_SIZES, default="S", help="size of PIS-DM and its peers; H is the paper's"
    )
    parser.add_argument("--layers", type=parse_layers, help="time this many and extrapolate; default: whole models")
    parser.add_argument(
        "--image-sizes", type=parse_image_size, nargs="+", default=[256, 512, 1024, 1280, 1536, 2048], metavar="PIXELS"
    )
    parser.add_argument("--cascade", nargs="?", const="", metavar="RECIPE", help="time a cascade's sampling instead")
    parser.add_argument("--steps", type=parse_positive, default=50, help="denoising steps per image")
    parser.add_argument("--batch-size", type=parse_positive, default=1)
    parser.add_argument("--repeats", type=parse_positive, default=5, help="timed turns of each model, after a warm-up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--cuda-graph", action="store_true", help="replay each pass as one CUDA graph")
    parser.add_argument("--threads", type=parse_positive, default=torch.get_num_threads())
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args(arguments)
    if args.cuda_graph and (torch.device(args.device).type != "cuda" or args.layers or args.cascade is not None):
        parser.error("--cuda-graph replays whole models on CUDA: omit --layers and --cascade")

    torch.set_num_threads(args.threads)
    conditions = describe_conditions(args.device, args.dtype)
    print_conditions(conditions)
    if args.cascade is None:
        run_table(args, conditions)
    else:
        run_cascade(args, conditions)


if __name__ == "__main__":
    main()
