"""Files that are there as a whole or not at all."""

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
    Lets the caller write a file beside `path`, then moves it there, unless there was an error. Processes that may
    write one file at a time need different suffixes.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + unfinished_suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(
            f"Cannot write {path}: {error}. Make room or name another place, and run it again: what is written"
            " already is kept."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def save_in_place(write: Callable[[Path], None], folder: str | Path) -> None:
    """
    Lets `write` fill a folder beside `folder`, then moves each of its files to its place: at any moment every file in
    `folder` is whole. Other files there stay.
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
