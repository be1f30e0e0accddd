"""A picture of how the losses fell."""

from __future__ import annotations

from pathlib import Path

from .metrics_file import read_metrics


def plot_loss_curves(metrics_file: str | Path, picture: str | Path) -> None:
    """
    Draws the losses of a run's `metrics.jsonl`: one panel for the denoising losses (solid in training, dashed on
    held-out images), one for those of training by noise level, one for the scale-invariant ones.

    Args:
        metrics_file (`str` or `Path`):
            One JSON object a line, with `step` and losses named `train/...` or `validation/...`.
        picture (`str` or `Path`): The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(metrics_file)
    names = sorted({name for row in rows for name in row if name.startswith(("train/", "validation/"))})
    figure, panels = plt.subplots(1, 3, figsize=(18, 4), constrained_layout=True)
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        panel = panels[2 if "scale_invariant" in name else 1 if "_t" in name else 0]
        if panel is panels[1] and name.startswith("validation/"):
            continue  # too many curves for one panel
        panel.plot(*zip(*points), "--" if name.startswith("validation/") else "-", label=name, linewidth=1)
    titles = ("denoising (eq. 17)", "denoising, by timesteps", "scale-invariant (InfoNCE)")
    for panel, title in zip(panels, titles):
        panel.set(title=title, xlabel="step", yscale="log")
        if panel.lines:
            panel.legend(fontsize=6, ncols=2)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
