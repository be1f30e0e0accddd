"""The results at equal budget: a table and pictures."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from PIL import Image

from diffusers_pisdm.utils.image_grid import make_image_grid


SHOWN_SAMPLES = 24


def summarize(results: list[dict], baseline: str) -> list[dict]:
    """
    Means over the seeds, a row per contestant, best Fréchet distance first: `scores` and `spreads` by name (standard
    deviation, `None` for one seed) and `ratio`, the distance divided by the baseline's (`None` without one).
    """
    rows = []
    for label in sorted({result["contestant"] for result in results}):
        own = [result for result in results if result["contestant"] == label]
        scores = {name: [result["scores"][name] for result in own] for name in own[0]["scores"]}
        rows.append(
            {
                "contestant": label,
                "seeds": [result["seed"] for result in own],
                **{key: own[0][key] for key in ("parameters", "training_flops", "steps")},
                "scores": {name: mean(values) for name, values in scores.items()},
                "spreads": {name: stdev(values) if len(values) > 1 else None for name, values in scores.items()},
            }
        )
    distances = {row["contestant"]: row["scores"]["frechet_distance"] for row in rows}
    for row in rows:
        own = distances[row["contestant"]]
        row["ratio"] = own / distances[baseline] if baseline in distances else None
    return sorted(rows, key=lambda row: row["scores"]["frechet_distance"])


def format_table(summary: list[dict]) -> str:
    """The summary as a Markdown table, ratios first."""
    names = list(summary[0]["scores"])
    header = ["", "ratio", *(name.replace("_", " ") for name in names), "parameters", "GFLOP/image", "steps", "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in summary:
        cells = [row["contestant"], "" if row["ratio"] is None else f"{row['ratio']:.2f}"]
        for name in names:
            spread = row["spreads"][name]
            cells.append(f"{row['scores'][name]:.3g}" + ("" if spread is None else f" ± {spread:.2g}"))
        cells += [
            f"{row['parameters'] / 1e6:.3f}M",
            f"{row['training_flops'] / 1e9:.2f}",
            f"{row['steps']:,}",
            str(len(row["seeds"])),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_quality(results: list[dict], picture: Path) -> None:
    """Draws every run's Fréchet distance as a point, and each contestant's mean as a bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for position, row in enumerate(summarize(results, baseline="")):
        own = [r["scores"]["frechet_distance"] for r in results if r["contestant"] == row["contestant"]]
        axis.bar(position, row["scores"]["frechet_distance"], color=f"C{position}", alpha=0.4, label=row["contestant"])
        axis.plot([position] * len(own), own, "o", color=f"C{position}")
    first = results[0]
    axis.set(
        ylabel=first["score_names"]["frechet_distance"],
        xticks=[],
        title=f"{first['conditions']['training_tflop']:g} TFLOP of training each",
    )
    axis.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def plot_samples(output: Path, labels: dict[str, str]) -> None:
    """Draws the first samples of every contestant's first seed, uncurated; images in a row share class and noise."""
    strips = []
    for name, label in labels.items():
        files = sorted((output / name).glob("seed-*/samples/*/*.png"))[:SHOWN_SAMPLES]
        images = [Image.open(file).convert("RGB") for file in files]
        if images:
            strips.append(make_image_grid(images, None, columns=SHOWN_SAMPLES, title=label))
    picture = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        picture.paste(strip, (0, top))
        top += strip.height
    picture.save(output / "samples.png")
