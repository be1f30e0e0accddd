"""From an image file to a training image of fixed size."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps


MAX_ASPECT_RATIO = 32  # a longer strip, scaled to the training size, would fill the memory
MIN_CROP_FRACTION = 0.8  # of the shorter side, as in ADM


def decode_image(encoded: bytes) -> Image.Image:
    """
    Decodes an image file to RGB, rotated according to its EXIF data, with transparency on white.

    Args:
        encoded (`bytes`): The whole file, in any format Pillow reads; for an animation, the first frame is used.

    Returns:
        `PIL.Image.Image` in mode RGB.

    Raises:
        ValueError: The file is empty, or the image is absurdly long or has no defined value range.
        Exception: Whatever Pillow raises for a damaged file.
    """
    if not encoded:
        raise ValueError("the file is empty")
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(f"{image.width}x{image.height} pixels exceed an aspect ratio of {MAX_ASPECT_RATIO}:1")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        return canvas.convert("RGB")
    if image.mode.startswith("I"):  # 16-bit, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pixels are floats of unknown range; save the image as 8-bit")
    return image.convert("RGB")


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
        short_side = self.size
        if self.random_crop:
            short_side = int(random.integers(self.size, math.ceil(self.size / MIN_CROP_FRACTION) + 1))
        image = _scale_short_side(image, short_side)
        free = image.width - self.size, image.height - self.size
        left, top = (int(random.integers(n + 1)) if self.random_crop else n // 2 for n in free)
        image = image.crop((left, top, left + self.size, top + self.size))
        if self.random_flip and random.random() < 0.5 and may_flip:
            image = ImageOps.mirror(image)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(self.size, self.size, 3).permute(2, 0, 1).contiguous()  # (3, H, W)


def _scale_short_side(image: Image.Image, side: int) -> Image.Image:
    factor = 1
    while min(image.size) // (2 * factor) >= side:
        factor *= 2
    image = image.reduce(factor)
    scale = side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
