"""The images of a sample set on disk: `000/000000.png` and so on, a thousand a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


IMAGES_PER_FOLDER = 1000  # file systems and people get slow with more
SHOWN = 3  # wrong files that an error names


def sample_path(folder: str | Path, index: int) -> Path:
    """Where a sample lies in the folder of its set."""
    return Path(folder, f"{index // IMAGES_PER_FOLDER:03d}", f"{index:06d}.png")


def check_no_foreign_images(folder: str | Path, num_samples: int) -> None:
    """
    Raises ValueError if there are PNG files in the folder, or below, other than a set of `num_samples` has: what takes
    all images of a folder would take them for samples.
    """
    own = {str(sample_path(folder, index)) for index in range(num_samples)}
    foreign = sorted(path for path in find_images(folder) if path not in own)
    if foreign:
        more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        raise ValueError(
            f"{folder} holds images that are none of its {num_samples} samples: {', '.join(foreign[:SHOWN])}{more}."
            " Move them elsewhere."
        )


def find_images(folder: str | Path) -> list[str]:
    """The paths of all PNG files in a folder and below."""
    return [
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(".png")
    ]


def find_damaged(folder: str | Path, indices: Iterable[int]) -> tuple[list[int], tuple[int, int] | None]:
    """
    Reads samples through, up to their checksums: which are absent, cut off or damaged, and the width and height of the
    others, if any. Raises ValueError if these differ in size.
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
                f"The images of {folder} differ in size: {first[0]} has {first[1][0]}x{first[1][1]} pixels, {path} has"
                f" {size[0]}x{size[1]}. Remove those that somebody put there and run the sampling again."
            )
    return damaged, first[1] if first else None


def _size_of_whole(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
            return image.size
    except PermissionError:
        raise
    except Exception:  # a damaged file makes Pillow raise nearly anything
        return None
