"""A visitor's own picture, made ready to be enlarged."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from ..data.image_transform import decode_image


MOST_PIXELS = 40_000_000


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
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("The file is not a picture that can be read. Pass a PNG, JPEG or WebP.") from error
    lower = sizes[:-1]
    if not lower:
        raise ValueError("This model has one stage: there is none that enlarges.")
    shortest = min(picture.size)
    if size is None:
        size = max((s for s in lower if s <= shortest), default=lower[0])
    if size not in lower:
        raise ValueError(f"A picture of {size} pixels cannot be enlarged: the stages take {_list(lower)}.")
    if shortest < size:
        raise ValueError(f"The picture is {shortest} pixels wide, but {size} are needed. Choose a larger one.")
    return ImageOps.fit(picture, (size, size), Image.Resampling.BOX)


def _list(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes))
