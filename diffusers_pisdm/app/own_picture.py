"""A visitor's own picture, made ready to be enlarged."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from ..data.image_transform import decode_image
from ..utils.names import show_name


MOST_PIXELS = 40_000_000
NOT_READABLE = "The file is not a picture that can be read, or damaged. Choose a PNG, JPEG or WebP."


def read_picture(path: str | Path, sizes: list[int], size: int | None = None) -> Image.Image:
    """
    Reads a picture, crops its middle square and shrinks it to a stage's size.

    Args:
        path (`str` or `Path`): The picture's file.
        sizes (`list[int]`): The stages' sizes in pixels, lowest first.
        size (`int`, *optional*): The stage to shrink it to; by default, the highest that it fills and that is not the
            last.

    Returns:
        `Image.Image`: RGB, on white where it was transparent.

    Raises:
        ValueError: It is not a picture, or is too small or too large.
    """
    try:
        picture = decode_image(Path(path).read_bytes(), MOST_PIXELS)
    except ValueError as error:
        raise ValueError(f"This picture cannot be used: {error}.") from error
    except Exception as error:  # Pillow's, of a damaged file
        raise ValueError(NOT_READABLE) from error
    lower = sizes[:-1]
    if not lower:
        raise ValueError("This model has one stage: there is none that enlarges.")
    shortest = min(picture.size)
    if size is None:
        size = max((s for s in lower if s <= shortest), default=lower[0])
    if size not in lower:
        words = " or ".join(map(str, lower))
        raise ValueError(f"The size to start from has to be {words} pixels but is {show_name(repr(size))}.")
    if shortest < size:
        raise ValueError(
            f"The picture is {picture.width}x{picture.height} pixels, but at least {size}x{size} are needed. Choose a"
            " larger one."
        )
    return ImageOps.fit(picture, (size, size), Image.Resampling.BOX)
