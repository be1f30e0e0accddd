"""Atomic file writes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError


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
        mode = _usual_mode(unfinished)
        yield unfinished
        unfinished.chmod(mode)
        flush(unfinished)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
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
    complete at all times. Other files there stay. Raises an OSError if that fails, and leaves no new folder then.
    """
    folder = Path(folder)
    partial = folder / "partial-save"
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        mode = _usual_mode(partial / "mode")
        write(partial)
        sources = sorted(path for path in partial.rglob("*") if path.is_file())
        for source in sources:
            source.chmod(mode)
            flush(source)
        for source in sources:
            target = folder / source.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"Cannot write {folder}: {error}. Free up space or choose another location.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # of one with files in it
            for place in new:
                place.rmdir()


def _usual_mode(unused: Path) -> int:
    """The mode of a new file: safetensors' files are closed to all but their owner."""
    unused.touch()
    mode = unused.stat().st_mode
    unused.unlink()
    return mode


def flush(path: Path) -> None:
    """Waits until a file's contents or a folder's entries are on disk, so that a power cut cannot undo a rename."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: Path, is_folder: bool) -> None:
    """Raises OSError if a file or folder cannot be written, before hours of drawing; makes nothing."""
    if path.exists() and path.is_dir() != is_folder:
        raise OSError(f"{path} is a {'file' if is_folder else 'folder'}: choose another name.")
    folder = path.absolute() if is_folder else path.absolute().parent
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OSError(f"Cannot write {path}: {nearest} is not a folder that you may write to.")


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Keeps a folder for one process as long as the context lasts; a second one gets an OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OSError(
            f"Another process is writing to {folder}. Wait for it to end, or choose another --output_dir."
        ) from None
    try:
        yield
    finally:
        lock.release()
