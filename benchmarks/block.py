"""
Time and memory of a PIS-DM block compared with blocks of DiT and U-ViT, by number of tokens.

    python -m benchmarks.block
    python -m benchmarks.block --width 384 --image-sizes 128 256 512
    python -m benchmarks.block --dtype bfloat16
    python -m benchmarks.block --training

All candidates are first checked against float64. A block here is one layer from each half of the model, including the
reordering of its tokens and the long skip; blocks are timed in turns, and medians reported. Blocks differ in size, so
ratios are of seconds per parameter: how many times as fast PIS-DM is for equally many parameters. Each of DiT's blocks
computes a modulation once per image with a third of its parameters; the second ratio excludes these. `products` is the
share of matrix products in PIS-DM's time, and `growth` is by how much time grows with four times as many tokens.

`--training` times forward and backward of one block, without and with gradient checkpointing, against the same block
on the slow path of transformers' Mamba, and reports what is kept for the backward.

Prints a table and writes `block.json` and `.png`, or `block_training.json`.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path

import torch

from benchmarks.measuring.report import DTYPES, describe_conditions, parse_positive, print_conditions, write_report
from benchmarks.speed.block_parts import PARTS, BlockPair, median_seconds, time_shares
from benchmarks.speed.block_training import check_training, describe_training, measure_training
from benchmarks.speed.candidates import PISDM, check_candidates, make_candidates, num_tokens, parse_image_size


PRODUCTS = next(iter(PARTS))
PEERS_BY_BLOCK = ("U-ViT", "DiT")  # DiM's block is PIS-DM's with another norm, and its skips are apart
DEPTH = 40  # layers of the models whose blocks are timed; any even depth will do


def measure_times(pairs: dict[str, BlockPair], image_size: int, args: argparse.Namespace) -> list[dict]:
    """Measures all blocks for images of one size: a row each, PIS-DM's first."""
    seconds = median_seconds(pairs, args.repeats)
    rows = [
        {
            "model": name,
            "tokens": num_tokens(image_size),
            "image_size": image_size,
            "median_seconds": seconds[name],
            "parameters": pair.parameters,
            "token_parameters": pair.token_parameters,
            "memory_bytes": None,  # not yet
        }
        for name, pair in pairs.items()
    ]
    own = rows[0]
    for row in rows:
        for name in ("parameters", "token_parameters"):
            pace = own["median_seconds"] / own[name]
            row[f"times_as_fast_by_{name}"] = row["median_seconds"] / row[name] / pace
    own["shares"] = time_shares(pairs[PISDM], args.repeats)
    return rows


def add_growth(rows: list[dict]) -> None:
    """Adds to each row the ratio of its time to that for a quarter of the tokens, if measured."""
    seconds = {(row["model"], row["tokens"]): row["median_seconds"] for row in rows}
    for row in rows:
        quarter = seconds.get((row["model"], row["tokens"] / 4))
        row["growth"] = None if quarter is None else row["median_seconds"] / quarter


def print_table(rows: list[dict]) -> None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    peers = [name for name in models if name != PISDM]
    by_tokens: dict[int, dict[str, dict]] = {}
    for row in rows:
        by_tokens.setdefault(row["tokens"], {})[row["model"]] = row
    heads = ["tokens", *(f"x {name}" for name in peers), "x DiT, tokens'", "products", "growth"]
    heads += [f"{name} ms" for name in models] + [f"{name} GiB" for name in models]
    print("".join(f"{head:>15}" for head in heads))
    for tokens, of_tokens in by_tokens.items():
        own = of_tokens[PISDM]
        cells = [f"{tokens}", *(f"{of_tokens[name]['times_as_fast_by_parameters']:.2f}" for name in peers)]
        cells += [f"{of_tokens['DiT']['times_as_fast_by_token_parameters']:.2f}", f"{own['shares'][PRODUCTS]:.0%}"]
        cells.append("-" if own["growth"] is None else f"{own['growth']:.2f}")
        cells += [f"{1000 * of_tokens[name]['median_seconds']:.4g}" for name in models]
        memory = [of_tokens[name]["memory_bytes"] for name in models]
        cells += ["-" if size is None else f"{size / 2**30:.2f}" for size in memory]
        print("".join(f"{cell:>15}" for cell in cells))


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Plots seconds per parameter, memory, and the parts of PIS-DM's time over the number of tokens."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        tokens = [row["tokens"] for row in own]
        pace = [1e9 * row["median_seconds"] / row["parameters"] for row in own]
        axes[0].plot(tokens, pace, "o-", label=f"{name} ({own[0]['parameters'] / 1e6:.1f}M)")
        known = [(row["tokens"], row["memory_bytes"] / 2**30) for row in own if row["memory_bytes"] is not None]
        if known:
            axes[1].plot(*zip(*known), "o-", label=name)
    shown = [row for row in rows if row["model"] == PISDM]
    bottom = [0.0] * len(shown)
    for part in shown[0]["shares"]:
        heights = [row["shares"][part] for row in shown]
        axes[2].bar(range(len(shown)), heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights)]
    axes[2].set_xticks(range(len(shown)), [f"{row['tokens']}" for row in shown])
    axes[2].set(title="parts of PIS-DM's time", ylim=(0, 1))
    for axis, name in zip(axes, ("ms per million parameters", "GiB beside the weights")):
        axis.set(xscale="log", yscale="log", title=name)
        axis.set_xticks([row["tokens"] for row in shown], [f"{row['tokens']}" for row in shown])
        axis.minorticks_off()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        if axis.has_data():
            axis.legend(fontsize=7)
    figure.supxlabel("tokens", fontsize=10)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run_blocks(args: argparse.Namespace, conditions: dict) -> None:
    candidates = make_candidates({"num_layers": DEPTH, "hidden_size": args.width}, PEERS_BY_BLOCK)
    report = {
        "machine": conditions,
        "width": args.width,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "errors": check_candidates(candidates, torch.device(args.device)),
        "rows": [],
    }
    title = f"Width {args.width}, batch {args.batch_size}, {args.dtype}, {conditions['device']}"
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    for image_size in sorted(set(args.image_sizes)):
        pairs = {
            candidate.name: BlockPair.build(candidate, image_size, args.batch_size, device, dtype)
            for candidate in candidates
        }
        rows = measure_times(pairs, image_size, args)
        report["rows"] += rows
        for row in rows:
            row["load_average"] = os.getloadavg()[0]
        add_growth(report["rows"])
        # Memory takes separate passes, minutes with many tokens; an interruption should not lose the times.
        write_report(args.output_dir, "block", report)
        for row in rows:
            row["memory_bytes"] = pairs[row["model"]].peak_bytes()
        del pairs
        gc.collect()
        write_report(args.output_dir, "block", report, lambda path: plot(report["rows"], title, path))
    print_table(report["rows"])
    print(f"Wrote {args.output_dir / 'block.json'} and {args.output_dir / 'block.png'}.")


def run_training(args: argparse.Namespace, conditions: dict) -> None:
    report = {"machine": conditions, "error": check_training(), "rows": []}
    for image_size in sorted(set(args.image_sizes)):
        tokens = num_tokens(image_size)
        rows = measure_training(args.width, tokens, args.batch_size, args.repeats, slow_repeats=1)
        report["rows"] += rows
        print(describe_training(rows), flush=True)
    write_report(args.output_dir, "block_training", report)
    print(f"Wrote {args.output_dir / 'block_training.json'}.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=parse_positive, help="a multiple of 64; default: 1536 (H), in training 384")
    parser.add_argument(
        "--image-sizes",
        type=parse_image_size,
        nargs="+",
        metavar="PIXELS",
        help="16 pixels are a token's side; default: 128 256 512 1024 2048, in training 512",
    )
    parser.add_argument("--training", action="store_true", help="time forward and backward instead")
    parser.add_argument("--batch-size", type=parse_positive, default=1)
    parser.add_argument("--repeats", type=parse_positive, default=3, help="timed turns of each, after a warm-up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=parse_positive, default=torch.get_num_threads())
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args(arguments)
    args.width = args.width or (384 if args.training else 1536)
    args.image_sizes = args.image_sizes or ([512] if args.training else [128, 256, 512, 1024, 2048])
    if args.training and (args.device != "cpu" or args.dtype != "float32"):
        parser.error("--training compares float32 on the CPU, where transformers has only its slow path")

    torch.set_num_threads(args.threads)
    conditions = describe_conditions(args.device, args.dtype)
    print_conditions(conditions)
    (run_training if args.training else run_blocks)(args, conditions)


if __name__ == "__main__":
    main()
