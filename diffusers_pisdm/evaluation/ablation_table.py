"""What an ablation found, beside what the paper found, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from .ablation_rows import FULL, AblationRow


MISSING = "missing"


def summarize_ablation(rows: Sequence[AblationRow], results: list[dict]) -> list[dict]:
    """
    Means over the seeds, and differences to the complete model, ours and the paper's.

    Runs of one seed see the same batches and noise in every row, so that ours are the differences of each seed: what
    seeds have in common, and rows of unlike seeds, drop out.

    Args:
        rows (`Sequence[AblationRow]`): Of the table, in its order.
        results (`list[dict]`):
            One a run: `variant`, `seed`, `parameters`, `training_flops` (an image), `scores` with a
            `frechet_distance`. Those of other variants are ignored.

    Returns:
        `list[dict]`: One a row: `name`, `label`, `marks`, `seeds`, `distances` (one a seed), `mean`, `spread`
        (standard deviation over the seeds, `None` of one seed), `differences` to the complete model of each seed that
        both have and `relative_differences`, their means `difference` and `relative_difference` and the standard
        deviation `difference_spread`, `paper_fid`, `paper_difference` and `paper_relative_difference`, `parameters`
        and `training_flops`. What a row without runs does not have is `None`.
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
    """
    Args:
        summary (`list[dict]`): Of [`summarize_ablation`].
        distance_name (`str`): What our distance may be called; FID is that of ADM's Inception alone.

    Returns:
        `str`: A Markdown table; a row without runs says so.
    """
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
