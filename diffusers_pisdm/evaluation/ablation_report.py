"""What an ablation leaves to be read: a table, a plot and samples, in its folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .ablation_folder import AblationFolder
from .ablation_pictures import draw_ablation_samples, plot_ablation
from .ablation_rows import TABLES, table_notes
from .ablation_table import format_ablation_table, summarize_ablation


def write_ablation_report(folder: AblationFolder, table: int) -> str:
    """
    Writes `table_N.json`, `table_N.md`, `table_N.png` and, if any run is done, `samples_N.png`.

    Args:
        folder ([`AblationFolder`]): Its runs need not all be done.
        table (`int`): The paper's, 1 or 2.

    Returns:
        `str`: What is in `table_N.md`: the table and its notes.

    Raises:
        AblationError: The folder is not an ablation's, or holds a run that does not belong to it.
    """
    rows, conditions = TABLES[table], folder.conditions()
    results = folder.results(rows)
    summary = summarize_ablation(rows, results)
    distance, notes = "Frechet distance", table_notes(table)
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
        f" {Path(conditions['train_data_dir']).name}. GFLOP/image are those of training, without the heads of the"
        " scale-invariant loss.",
        f"{distance} of {result['num_samples']:,} samples a run ({conditions['num_inference_steps']} denoising steps"
        f" in each stage, guidance {conditions['guidance_scale']:g}) to {result['num_reference']:,} held-out images; ±"
        " is the standard deviation over the seeds. Differences are those of each seed, whose batches and noise are"
        " the same in every row.",
    ]
