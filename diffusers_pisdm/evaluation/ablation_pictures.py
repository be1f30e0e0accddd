"""What an ablation found, beside what the paper found, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from PIL import Image

from ..utils.image_grid import BACKGROUND, make_image_grid
from .ablation_rows import AblationRow
from .ablation_table import MISSING
from .samples.files import sample_path


SHOWN_SAMPLES = 16


def plot_ablation(summary: list[dict], distance_name: str, picture: str | Path) -> None:
    """
    Draws how far the rows are from the complete model, ours (each seed a point, then mean and standard deviation)
    beside the paper's, in percent, a line a row.

    Args:
        summary (`list[dict]`): Of [`summarize_ablation`].
        distance_name (`str`): As in [`format_ablation_table`].
        picture (`str` or `Path`): The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 1.5 + 0.4 * len(summary)
    figure, (ours, paper) = plt.subplots(1, 2, figsize=(10, height), sharey=True, constrained_layout=True)
    for position, row in enumerate(summary):
        paper.plot(100 * row["paper_relative_difference"], position, "D", color="C1")
        percents = [100 * difference for difference in row["relative_differences"]]
        if not percents:
            ours.text(0.5, position, MISSING, ha="center", va="center", transform=ours.get_yaxis_transform())
            continue
        ours.plot(percents, [position] * len(percents), "o", color="C0", alpha=0.4)
        spread = stdev(percents) if len(percents) > 1 else None
        ours.errorbar(mean(percents), position, xerr=spread, fmt="D", color="C0", capsize=4)
    names = ((ours, "ours", distance_name), (paper, "the paper", "FID, ImageNet 256 px"))
    for axis, title, name in names:
        axis.set(title=title, xlabel=f"% more {name}", ylim=(len(summary) - 0.5, -0.5))
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.grid(axis="x", alpha=0.3)
    ours.set_yticks(range(len(summary)), [row["label"] for row in summary])
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)


def draw_ablation_samples(rows: Sequence[AblationRow], folders: dict[str, Path], picture: str | Path) -> None:
    """
    Draws the first samples of every row, unpicked. Images below one another share class and noise.

    Args:
        rows (`Sequence[AblationRow]`): Of the table.
        folders (`dict[str, Path]`): Sample sets of one seed, by variant.
        picture (`str` or `Path`): The PNG to write.
    """
    strips = []
    for row in rows:
        files = [sample_path(folders[row.variant], i) for i in range(SHOWN_SAMPLES)] if row.variant in folders else []
        images = [Image.open(file).convert("RGB") for file in files if file.exists()]
        title = row.label if images else f"{row.label}: {MISSING}"
        blanks = [Image.new("RGB", (1, 1), BACKGROUND)] * (SHOWN_SAMPLES - len(images))
        strips.append(make_image_grid(images + blanks, None, columns=SHOWN_SAMPLES, title=title))
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), BACKGROUND)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    sheet.save(picture, format="PNG")
