"""A picture of how the losses fell."""

from __future__ import annotations

import json
from pathlib import Path


def plot_loss_curves(metrics_file: str | Path, picture: str | Path) -> None:
    """
    Draws the losses of a run's `metrics.jsonl`: one panel for the denoising losses (solid in training, dashed on
    held-out images), one for the scale-invariant ones.

    Args:
        metrics_file (`str` or `Path`):
            One JSON object a line, with `step` and losses named `train/...` or `validation/...`.
        picture (`str` or `Path`): The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in Path(metrics_file).read_text().splitlines()]
    names = sorted({name for row in rows for name in row if name.startswith(("train/", "validation/"))})
    figure, panels = plt.subplots(1, 2, figsize=(12, 4), constrained_layout=True)
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        panel = panels[1 if "scale_invariant" in name else 0]
        panel.plot(*zip(*points), "--" if name.startswith("validation/") else "-", label=name, linewidth=1)
    for panel, title in zip(panels, ("denoising (eq. 17)", "scale-invariant (InfoNCE)")):
        panel.set(title=title, xlabel="step", yscale="log")
        if panel.lines:
            panel.legend(fontsize=7)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
