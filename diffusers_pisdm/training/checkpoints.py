"""Checkpoints of a training run: written whole or not at all, found by their step."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path


_NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "trainer_state.json"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """
    The complete checkpoints of a run, oldest first.

    Args:
        output_dir (`str` or `Path`): The run's folder; may be missing.

    Returns:
        `list[Path]`: Folders named `checkpoint-<step>`.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=_step_of)


def save_checkpoint(
    output_dir: str | Path, step: int, state: dict, write: Callable[[Path], None], total_limit: int | None = None
) -> Path:
    """
    Writes `checkpoint-<step>` under a temporary name and renames it when it is complete, so that a killed run leaves
    either the whole checkpoint or none; then removes the oldest beyond `total_limit`.

    Args:
        output_dir (`str` or `Path`): The run's folder.
        step (`int`): The optimizer step.
        state (`dict`): JSON-serialisable facts, kept in `trainer_state.json`.
        write (`Callable`): Writes everything else into the folder it is given.
        total_limit (`int`, *optional*): Complete checkpoints to keep, at least 1.

    Returns:
        `Path`: The finished checkpoint.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f"partial-{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    (partial / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    if total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    return final


def read_state(checkpoint: str | Path) -> dict:
    """The facts that [`save_checkpoint`] kept in `trainer_state.json`."""
    return json.loads((Path(checkpoint) / STATE_FILE).read_text())


def _step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])
