"""The numbers of a run: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path

from ..utils.files import write_whole


def append_metrics(file: str | Path, step: int, values: dict[str, float]) -> None:
    """
    Adds a line.

    Args:
        file (`str` or `Path`): Usually `metrics.jsonl`; made if missing.
        step (`int`): The optimizer step.
        values (`dict[str, float]`): Numbers by name.
    """
    with Path(file).open("a") as lines:
        lines.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(file: str | Path) -> list[dict[str, float]]:
    """
    Reads the lines that are whole: a killed run may have left half of its last one.

    Args:
        file (`str` or `Path`): May be missing.

    Returns:
        `list[dict[str, float]]`: Each with its `step`.
    """
    rows = []
    for line in Path(file).read_text().splitlines() if Path(file).exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def forget_later_metrics(file: str | Path, step: int) -> None:
    """Removes what was logged after `step`: a run that goes on from there logs it anew."""
    file = Path(file)
    kept = [row for row in read_metrics(file) if row["step"] <= step]
    with write_whole(file) as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))
