"""`metrics.jsonl`: a run's metrics, one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path


def read_metrics(file: str | Path) -> list[dict[str, float]]:
    """The rows, each with its `step`. The file may be missing; lines that are no rows are ignored."""
    rows = [parse_row(line) for line in read_lines(Path(file))]
    return [row for row in rows if row is not None]


def read_lines(file: Path) -> list[str]:
    """The lines, rows or not; none if there is no file."""
    if not file.is_file():
        return []
    return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()


def parse_row(line: str) -> dict[str, float] | None:
    """The row in a line, or `None`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # a number of thousands of digits is a ValueError
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
