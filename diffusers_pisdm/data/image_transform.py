"""From an image file to a training image of fixed size."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from ..utils.messages import show_size
from ..utils.pixel_modes import mode_problem, on_white, to_8_bits


# Formats of pictures, TGA last, as nothing marks its files. Others start programs (EPS), hold measurements (FITS) or
# pictures whose sizes are not known before they are decoded (ICO).
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "AVIF",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "JPEG2000",
    "PPM",
    "QOI",
    "SGI",
    "PCX",
    "TGA",
)
MAX_PIXELS = 2**26  # as much as 1 GB of memory with transparency
MAX_ASPECT_RATIO = 32  # a longer strip, scaled to the training size, would fill the memory
MIN_CROP_FRACTION = 0.8  # of the shorter side, as in ADM


def image_endings() -> frozenset[str]:
    """The endings of the image files that we read, in lower case with the dot."""
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in _formats())


def decode_image(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    Decodes an image file to RGB, rotated according to its EXIF data, with transparency on white.

    Args:
        encoded (`bytes`): The whole file, in one of `IMAGE_FORMATS`; for an animation, the first frame is used.
        max_pixels (`int`, defaults to 67,108,864): Larger images are refused before they are decoded.

    Returns:
        `PIL.Image.Image` in mode RGB.

    Raises:
        ValueError: The file is empty or of another format, or the image is absurdly large or long, or its values have
            no defined range.
        Exception: Whatever Pillow raises for a damaged file.
    """
    if not encoded:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(encoded), formats=_formats())
    except UnidentifiedImageError:
        raise ValueError(
            f"the file is no image, or damaged, or of another format than {', '.join(_formats())}"
        ) from None
    if image.width * image.height > max_pixels:
        raise ValueError(f"{show_size(*image.size)} pixels are more than {max_pixels:,}: scale the image down")
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(f"{show_size(*image.size)} pixels exceed an aspect ratio of {MAX_ASPECT_RATIO}:1")
    _check_values(image)
    _scale_transparent_colour(image)
    ImageOps.exif_transpose(image, in_place=True)
    return on_white(to_8_bits(image)).convert("RGB")


def _formats() -> tuple[str, ...]:
    Image.init()  # registers Pillow's formats: which there are depends on its version
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _check_values(image: Image.Image) -> None:
    """Refuses (ValueError) an image whose values Pillow would not turn into the right colours."""
    problem = mode_problem(image)
    is_sound_tiff = problem is None and image.format == "TIFF"
    if is_sound_tiff and {*image.tag_v2.get(SAMPLEFORMAT, ())} - {1, 4}:  # neither unsigned nor unsaid
        problem = "signed integers of unknown range"
    elif image.mode.startswith("I;16") and image.format == "TIFF":
        tags = image.tag_v2
        if (tags.get(BITSPERSAMPLE), tags.get(PHOTOMETRIC_INTERPRETATION)) != ((16,), 1):
            problem = "12-bit or inverted 16-bit integers"
    elif image.mode == "RGB" and "transparency" in image.info and _raw_mode(image) == "RGB;16B":
        problem = "16-bit colours of which one is transparent"
    if problem is not None:
        raise ValueError(f"pixels are {problem}; save the image as 8-bit RGB")


def _scale_transparent_colour(image: Image.Image) -> None:
    """Pillow scales a PNG's 2 and 4 bits to 8, but not the one that is transparent."""
    bits = {"L;2": 2, "L;4": 4}.get(_raw_mode(image))
    if bits is not None and "transparency" in image.info:
        most = 2**bits - 1
        image.info["transparency"] = (image.info["transparency"] & most) * 255 // most


def _raw_mode(image: Image.Image) -> str | None:
    """How the values are stored in a PNG file that is not decoded yet."""
    return image.tile[0][3] if image.format == "PNG" and image.tile else None


@dataclass(frozen=True)
class ImageTransform:
    """
    Scales the shorter side to `size`, crops a square and optionally mirrors it.

    As in ADM and DiT, the image is first box-averaged to less than twice the size, then filtered.

    Args:
        size (`int`): Height and width of the result in pixels.
        random_crop (`bool`, defaults to `False`):
            Crop at random, at a random scale of up to 1 / 0.8; `False` crops the centre.
        random_flip (`bool`, defaults to `False`): Mirror images left to right with probability 0.5.
    """

    size: int
    random_crop: bool = False
    random_flip: bool = False

    def __call__(self, image: Image.Image, random: np.random.Generator, may_flip: bool = True) -> torch.Tensor:
        """
        Args:
            image (`PIL.Image.Image`): In mode RGB, of any size.
            random (`np.random.Generator`): Draws crop and flip.
            may_flip (`bool`, defaults to `True`): Whether this image may be mirrored; `False` for letters, say.

        Returns:
            `torch.Tensor` of shape `(3, size, size)`, uint8.
        """
        return self.flip(self.crop(image, random), random, may_flip)

    def crop(self, image: Image.Image, random: np.random.Generator) -> torch.Tensor:
        """The first half of a call; draws nothing without `random_crop`."""
        short_side = self.size
        if self.random_crop:
            short_side = int(random.integers(self.size, math.ceil(self.size / MIN_CROP_FRACTION) + 1))
        image = _scale_short_side(image, short_side)
        free = image.width - self.size, image.height - self.size
        left, top = (int(random.integers(n + 1)) if self.random_crop else n // 2 for n in free)
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(self.size, self.size, 3).permute(2, 0, 1).contiguous()  # (3, H, W)

    def flip(self, pixels: torch.Tensor, random: np.random.Generator, may_flip: bool = True) -> torch.Tensor:
        """The second half of a call: the pixels (3, H, W), mirrored or not."""
        return pixels.flip(-1) if self.random_flip and random.random() < 0.5 and may_flip else pixels


def _scale_short_side(image: Image.Image, side: int) -> Image.Image:
    factor = 1
    while min(image.size) // (2 * factor) >= side:
        factor *= 2
    image = image.reduce(factor)
    scale = side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
