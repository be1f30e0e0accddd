"""What an ablation leaves to be read: a table, a plot and samples, in its folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from PIL import Image

from diffusers_pisdm.evaluation.samples.files import sample_path
from diffusers_pisdm.utils.image_grid import BACKGROUND, make_image_grid

from .folder import AblationFolder
from .rows import FULL, TABLES, AblationRow, table_notes


def write_ablation_report(folder: AblationFolder, table: int) -> str:
    """
    Writes `table_N.json`, `table_N.md`, `table_N.png` and, if any run is done, `samples_N.png`; returns the Markdown.
    """
    rows, conditions = TABLES[table], folder.conditions()
    results = folder.results(rows)
    summary = summarize_ablation(rows, results)
    distance, notes = "Fréchet distance", table_notes(table)
    if results:
        distance = results[0]["score_names"]["frechet_distance"]
        notes += _common_settings(conditions, results[0], distance)
    text = format_ablation_table(summary, distance) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"

    content = {"table": table, "summary": summary, "notes": notes, "conditions": conditions, "runs": results}
    folder.write_json(f"table_{table}.json", content)
    with folder.write(f"table_{table}.md") as file:
        file.write_text(text)
    with folder.write(f"table_{table}.png") as file:
        plot_ablation(summary, distance, file)
    if results:
        # The seed that most rows have. What they draw from it has the same classes and noise.
        counts = Counter(result["seed"] for result in results)
        seed = max(sorted(counts), key=counts.__getitem__)
        done = [result["variant"] for result in results if result["seed"] == seed]
        with folder.write(f"samples_{table}.png") as file:
            draw_ablation_samples(rows, {variant: folder.run(variant, seed) / "samples" for variant in done}, file)
    return text


def _common_settings(conditions: dict, result: dict, distance: str) -> list[str]:
    """What is the same in all rows."""
    return [
        f"Trained for {result['steps']:,} steps of {result['images_per_step']} images on"
        f" {Path(conditions['train_data_dir']).name}. GFLOP/image count training, without the heads of the"
        " scale-invariant loss.",
        f"{distance} of {result['num_samples']:,} samples per run ({conditions['num_inference_steps']} denoising"
        f" steps per stage, guidance {conditions['guidance_scale']:g}) to {result['num_reference']:,} held-out images;"
        " ± is the standard deviation over seeds. Differences are taken per seed: all rows of a seed share batches"
        " and noise.",
    ]


MISSING = "missing"


def summarize_ablation(rows: Sequence[AblationRow], results: list[dict]) -> list[dict]:
    """
    Means over the seeds, and differences to the complete model, ours and the paper's; `None` where a row has no runs.

    Runs of one seed see the same batches and noise in every row, so that ours are the differences of each seed: what
    seeds have in common, and rows of unlike seeds, drop out. Spreads are standard deviations over the seeds.
    """
    own = {row.variant: [result for result in results if result["variant"] == row.variant] for row in rows}
    complete = {result["seed"]: result["scores"]["frechet_distance"] for result in own.get(FULL, [])}
    paper = {row.variant: row.paper_fid for row in rows}
    summary = []
    for row in rows:
        runs = sorted(own[row.variant], key=lambda result: result["seed"])
        distances = [result["scores"]["frechet_distance"] for result in runs]
        pairs = [
            (result["scores"]["frechet_distance"], complete[result["seed"]])
            for result in runs
            if result["seed"] in complete
        ]
        differences = [distance - of_complete for distance, of_complete in pairs]
        relative = [distance / of_complete - 1 for distance, of_complete in pairs]
        paper_difference = row.paper_fid - paper[FULL]
        summary.append(
            {
                "name": row.name,
                "label": row.label,
                "marks": row.marks,
                "seeds": [result["seed"] for result in runs],
                "distances": distances,
                "mean": mean(distances) if distances else None,
                "spread": stdev(distances) if len(distances) > 1 else None,
                "differences": differences,
                "relative_differences": relative,
                "difference": mean(differences) if differences else None,
                "difference_spread": stdev(differences) if len(differences) > 1 else None,
                "relative_difference": mean(relative) if relative else None,
                "paper_fid": row.paper_fid,
                "paper_difference": paper_difference,
                "paper_relative_difference": paper_difference / paper[FULL],
                "parameters": runs[0]["parameters"] if runs else None,
                "training_flops": runs[0]["training_flops"] if runs else None,
            }
        )
    return summary


def format_ablation_table(summary: list[dict], distance_name: str) -> str:
    """A Markdown table. `distance_name` is what our distance may be called: FID is that of ADM's Inception alone."""
    marks = list(summary[0]["marks"])
    header = ["", *marks, distance_name, "difference", "paper: FID", "paper: difference"]
    header += ["parameters", "GFLOP/image", "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in summary:
        ours = [MISSING, "", "", "", ""]
        if row["seeds"]:
            spread = "" if row["spread"] is None else f" ± {row['spread']:.2g}"
            ours = [
                f"{row['mean']:.4g}{spread}",
                _format_difference(row["difference"], row["relative_difference"], row["difference_spread"]),
                f"{row['parameters'] / 1e6:.3f}M",
                f"{row['training_flops'] / 1e9:.3g}",
                ", ".join(map(str, row["seeds"])),
            ]
        paper = [
            f"{row['paper_fid']:.2f}",
            _format_difference(row["paper_difference"], row["paper_relative_difference"]),
        ]
        cells = [row["label"], *(row["marks"][mark] for mark in marks), *ours[:2], *paper, *ours[2:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _format_difference(difference: float | None, relative: float | None, spread: float | None = None) -> str:
    if not difference:  # nothing for the complete model either
        return ""
    return f"{difference:+.3g}{'' if spread is None else f' ± {spread:.2g}'} ({relative:+.0%})"


SHOWN_SAMPLES = 16


def plot_ablation(summary: list[dict], distance_name: str, picture: str | Path) -> None:
    """
    Draws how far each row is from the complete model in percent, ours (each seed a point, then mean and standard
    deviation) beside the paper's.
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
    Draws the first samples of every row, unpicked, from `folders` by variant. Images below one another share class and
    noise.
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
