"""The results at equal budget: a table and pictures."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import numpy as np
from PIL import Image

from benchmarks.equal_budget.verdicts import Difference
from diffusers_pisdm.utils.image_grid import make_image_grid
from diffusers_pisdm.utils.messages import show_duration


SHOWN_SAMPLES = 24
AXES = {"tflop": "TFLOP of training", "seconds": "seconds of training"}


def distance_at(result: dict, axis: str, budget: float) -> float:
    """A run's Fréchet distance after `budget` TFLOP or seconds, between its points linear in both logarithms."""
    points = result["points"]
    distances = [point["scores"]["frechet_distance"] for point in points]
    return float(np.exp(np.interp(np.log(budget), np.log([point[axis] for point in points]), np.log(distances))))


def summarize(results: list[dict], baseline: str) -> list[dict]:
    """
    Means over the seeds, a row per contestant, best Fréchet distance at equal FLOPs first: `tflop` and `seconds` are
    the largest budgets that all runs have reached, with the mean `distances`, their `spreads` (standard deviation,
    `None` for one seed) and `ratios` to the baseline's (`None` without one); `scores` are means at the runs' ends.
    """
    budgets = {axis: min(result["points"][-1][axis] for result in results) for axis in AXES}
    rows = []
    for label in sorted({result["contestant"] for result in results}):
        own = [result for result in results if result["contestant"] == label]
        ends = [result["points"][-1]["scores"] for result in own]
        distances = {axis: [distance_at(result, axis, budgets[axis]) for result in own] for axis in AXES}
        rows.append(
            {
                "contestant": label,
                "seeds": [result["seed"] for result in own],
                **{key: own[0][key] for key in ("parameters", "training_flops", "step_seconds", "steps")},
                "budgets": budgets,
                "distances": {axis: mean(values) for axis, values in distances.items()},
                "spreads": {axis: stdev(v) if len(v) > 1 else None for axis, v in distances.items()},
                "scores": {name: mean(end[name] for end in ends) for name in ends[0]},
            }
        )
    found = {row["contestant"]: row["distances"] for row in rows}
    for row in rows:
        own, base = row["distances"], found.get(baseline)
        row["ratios"] = {axis: None if base is None else own[axis] / base[axis] for axis in AXES}
    return sorted(rows, key=lambda row: row["distances"]["tflop"])


def format_table(summary: list[dict], differences: dict[str, Difference] | None = None) -> str:
    """The summary as a Markdown table, ratios first; `differences` from the baseline at the runs' ends, by label."""
    differences = differences or {}
    budgets = summary[0]["budgets"]
    ends = [f"{budgets['tflop']:.3g} TFLOP", show_duration(budgets["seconds"])]
    header = ["", *(f"ratio after {end}" for end in ends), *(f"distance after {end}" for end in ends)]
    header += ["precision", "recall", "parameters", "GFLOP/image", "ms/step", "seeds"]
    header += ["distance at the end, 95% interval"] * bool(differences)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in summary:
        ratios, distances, spreads = (
            [row[name][axis] for axis in AXES] for name in ("ratios", "distances", "spreads")
        )
        cells = [row["contestant"], *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]
        for distance, spread in zip(distances, spreads):
            cells.append(f"{distance:.3g}" + ("" if spread is None else f" ± {spread:.2g}"))
        cells += [
            *(f"{row['scores'][name]:.3g}" for name in ("precision", "recall")),
            f"{row['parameters'] / 1e6:.3f}M",
            f"{row['training_flops'] / 1e9:.2f}",
            f"{1e3 * row['step_seconds']:.3g}",
            str(len(row["seeds"])),
            *([str(differences.get(row["contestant"], ""))] if differences else []),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_quality(results: list[dict], picture: Path) -> None:
    """Draws Fréchet distances over FLOPs and over seconds: a thin line for each run, a thick one for the means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    figure, panels = plt.subplots(1, 2, figsize=(12, 4), sharey=True, constrained_layout=True)
    order = list(dict.fromkeys(result["contestant"] for result in results))
    for panel, (axis, title) in zip(panels, AXES.items(), strict=True):
        for position, label in enumerate(order):
            runs = [result["points"] for result in results if result["contestant"] == label]
            budgets = [point[axis] for point in runs[0]]
            distances = np.array([[point["scores"]["frechet_distance"] for point in points] for points in runs])
            style = {"color": f"C{position}", "marker": "o"}
            if len(runs) > 1:
                panel.plot(budgets, distances.T, **style, linewidth=0.5, markersize=2)
            panel.plot(budgets, distances.mean(0), **style, label=label, markersize=4)
        panel.set(xlabel=title, xscale="log", yscale="log")
        for ruler in (panel.xaxis, panel.yaxis):
            ruler.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            ruler.set_minor_locator(NullLocator())
            ruler.set_major_formatter("{x:g}")
    panels[0].set_ylabel(results[0]["points"][0]["score_names"]["frechet_distance"])
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def plot_samples(output: Path, labels: dict[str, str]) -> None:
    """Draws the first samples of every contestant's first seed, uncurated; images in a row share class and noise."""
    strips = []
    for name, label in labels.items():
        files = sorted((output / name).glob("seed-*/share-1/samples/*/*.png"))[:SHOWN_SAMPLES]
        images = [Image.open(file).convert("RGB") for file in files]
        if images:
            strips.append(make_image_grid(images, None, columns=SHOWN_SAMPLES, title=label))
    picture = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        picture.paste(strip, (0, top))
        top += strip.height
    picture.save(output / "samples.png")
