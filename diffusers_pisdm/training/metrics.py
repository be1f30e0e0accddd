"""The metrics of a run, one JSON object per line, and a plot of its losses."""

from __future__ import annotations

import json
from pathlib import Path

from ..utils.files import write_whole
from ..utils.metrics_file import parse_row, read_lines, read_metrics


def append_metrics(file: str | Path, step: int, values: dict[str, float]) -> None:
    """Appends a line of named numbers to `metrics.jsonl`, creating the file if necessary."""
    with Path(file).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"step": step, **values}) + "\n")


def forget_later_metrics(file: str | Path, step: int) -> None:
    """
    Removes what was logged after `step`: a run that resumes there logs it again. Also removes half a last line, which
    an interrupted run may have left; other lines stay as they are.
    """
    file = Path(file)
    lines = read_lines(file)
    if lines and parse_row(lines[-1]) is None:
        lines.pop()
    kept = [line for line in lines if (parse_row(line) or {"step": 0})["step"] <= step]
    with write_whole(file) as unfinished:
        unfinished.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8", errors="surrogateescape")


PANELS = {
    "denoising": "denoising (eq. 17)",
    "by_timesteps": "denoising in training, by timesteps",
    "scale_invariant": "scale-invariant (InfoNCE)",
}


def plot_loss_curves(metrics_file: str | Path, picture: str | Path) -> None:
    """
    Plots the losses in a run's `metrics.jsonl`: a panel for the denoising losses (solid in training, dashed on
    held-out images), one for the training losses by noise level, one for the scale-invariant losses.
    """
    from matplotlib.figure import Figure  # pyplot would load the notebook's or desktop's backend
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    rows = read_metrics(metrics_file)
    names = sorted({name for row in rows for name in row if name.startswith(("train/", "validation/"))})
    curves = {panel: [name for name in names if _panel_of(name) == panel] for panel in PANELS}
    shown = [panel for panel in PANELS if curves[panel]] or ["denoising"]
    width, height = 6 * len(shown), 4
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, len(shown), squeeze=False)
    # A layout engine and LaTeX-like labels would take longer than a small model's step.
    figure.subplots_adjust(0.65 / width, 0.5 / height, 1 - 0.1 / width, 1 - 0.35 / height, wspace=0.13)
    for panel, axis in zip(shown, axes[0]):
        for name in curves[panel]:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points), "--" if name.startswith("validation/") else "-", label=name, linewidth=1)
        axis.set(title=PANELS[panel], xlabel="step", yscale="log")
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        if axis.lines:
            axis.legend(fontsize=6, ncols=2)
    figure.savefig(picture, dpi=120)


def _panel_of(name: str) -> str | None:
    if "scale_invariant" in name:
        return "scale_invariant"
    if "_t" not in name:
        return "denoising"
    return "by_timesteps" if name.startswith("train/") else None  # with held-out ones, the panel would be too full
