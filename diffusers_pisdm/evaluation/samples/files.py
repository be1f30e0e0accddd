"""The images of a sample set on disk: `000/000000.png` and so on, a thousand per folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from ...utils.messages import count_of, show_size


IMAGES_PER_FOLDER = 1000  # file systems and people get slow with more
SHOWN = 3  # wrong files listed in an error


def sample_path(folder: str | Path, index: int) -> Path:
    """The path of a sample in its set's folder."""
    return Path(folder, f"{index // IMAGES_PER_FOLDER:03d}", f"{index:06d}.png")


def check_no_foreign_images(folder: str | Path, num_samples: int) -> None:
    """
    Raises ValueError if the folder or its subfolders hold PNG files that are not among a set's `num_samples` samples:
    tools that read every image in a folder would mistake them for samples.
    """
    own = {str(sample_path(folder, index)) for index in range(num_samples)}
    foreign = sorted(path for path in find_images(folder) if path not in own)
    if foreign:
        more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        raise ValueError(
            f"{folder} holds images that are not among its {count_of(num_samples, 'sample')}:"
            f" {', '.join(foreign[:SHOWN])}{more}. Move them elsewhere."
        )


def find_images(folder: str | Path) -> list[str]:
    """The paths of all PNG files in a folder and its subfolders."""
    return [
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(".png")
    ]


def find_damaged(folder: str | Path, indices: Iterable[int]) -> tuple[list[int], tuple[int, int] | None]:
    """
    Reads samples in full, including their checksums. Returns the indices of those that are missing, truncated or
    damaged, and the width and height of the others, if any. Raises ValueError if the others differ in size.
    """
    damaged, first = [], None
    for index in indices:
        path = sample_path(folder, index)
        size = _size_of_whole(path)
        if size is None:
            damaged.append(index)
        elif first is None:
            first = (path, size)
        elif size != first[1]:
            raise ValueError(
                f"The images of {folder} differ in size: {first[0]} has {show_size(*first[1])} pixels, {path} has"
                f" {show_size(*size)}. Remove the foreign ones and rerun the sampling."
            )
    return damaged, first[1] if first else None


def _size_of_whole(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
            return image.size
    except PermissionError:
        raise
    except Exception:  # Pillow can raise nearly anything for a damaged file
        return None
