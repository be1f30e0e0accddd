"""Saving over files that somebody may be reading, or that a killed process must not leave half written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def save_in_place(write: Callable[[Path], None], folder: str | Path) -> None:
    """
    Lets `write` fill a folder beside `folder`, then moves each of its files to its place: at any moment every file in
    `folder` is whole. Other files there stay.

    Args:
        write (`Callable`): Writes files into the folder it is given.
        folder (`str` or `Path`): Where they are to be.
    """
    folder = Path(folder)
    partial = folder / "partial-save"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        for source in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = folder / source.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
