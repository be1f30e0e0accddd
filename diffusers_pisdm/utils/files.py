"""Atomic file writes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: str | Path, unfinished_suffix: str = ".unfinished") -> Iterator[Path]:
    """
    Lets the caller write a temporary file next to `path`, then moves it to `path` unless there was an error. Processes
    that may write the same file at the same time need different suffixes.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + unfinished_suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(
            f"Cannot write {path}: {error}. Free up space or choose another location, then rerun: files already"
            " written are kept."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def save_in_place(write: Callable[[Path], None], folder: str | Path) -> None:
    """
    Lets `write` fill a temporary folder inside `folder`, then moves each file into place, so every file in `folder` is
    complete at all times. Other files there stay.
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
