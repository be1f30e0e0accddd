"""Rows of an image data set as training images, and what happens to those that cannot be read."""

from __future__ import annotations

import numpy as np
import torch

from .image_data import ImageData
from .image_transform import ImageTransform, decode_image
from .rows import BadImageError, TrainingRow


ON_BAD_IMAGE = ("stop", "skip")
MAX_BAD_IN_A_ROW = 1000  # so many say that something is wrong with all of them


class ImageRows:
    """
    The images of a data set at training size. A row's pixels follow from the seed, the epoch and the row alone.

    Args:
        data ([`ImageData`]): The encoded images and their labels.
        transform ([`ImageTransform`]): Size, crop and flip.
        on_bad_image (`str`, defaults to `"stop"`):
            What to do about a file that is no image, is damaged, empty, a decompression bomb or an absurd strip:
            `"stop"` raises an error; `"skip"` puts the next good row in its place, and reports it.

    Raises:
        ValueError: `on_bad_image` is neither.
    """

    def __init__(self, data: ImageData, transform: ImageTransform, on_bad_image: str = "stop"):
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"`on_bad_image` must be one of {', '.join(ON_BAD_IMAGE)}, got {on_bad_image}.")
        self.data = data
        self.transform = transform
        self.on_bad_image = on_bad_image

    @property
    def is_stream(self) -> bool:
        return self.data.is_stream

    @property
    def is_random(self) -> bool:
        """Whether a row has other pixels in another epoch."""
        return self.transform.random_crop or self.transform.random_flip

    def __len__(self) -> int:
        return len(self.data.dataset)

    def read(self, row: int, epoch: int, seed: int) -> TrainingRow:
        """
        Reads a row of a data set that is no stream.

        Args:
            row (`int`): In `0..len(self) - 1`.
            epoch, seed (`int`): Not negative; crop and flip follow from them and the row.

        Returns:
            [`TrainingRow`]: The row's, or with `on_bad_image="skip"` that of the next row that can be read, the first
            following the last.

        Raises:
            BadImageError: The image cannot be read; or, with `"skip"`, no other can either.
            DataError: The label is unknown.
        """
        bad_images = []
        for step in range(min(len(self), MAX_BAD_IN_A_ROW)):
            position = (row + step) % len(self)
            try:
                images, label = self.decode(self.data.dataset[position], position, epoch, seed)
            except BadImageError as error:
                if self.on_bad_image == "stop":
                    raise
                bad_images.append(str(error))
            else:
                return TrainingRow(images, label, bad_images)
        raise all_bad(len(bad_images), bad_images[-1])

    def decode(self, fields: dict, position: int, epoch: int, seed: int) -> tuple[torch.Tensor, int]:
        """
        Decodes one row.

        Args:
            fields (`dict`): The row as `data.dataset` gives it.
            position (`int`): Its number, or its place in the stream.
            epoch, seed (`int`): See [`~ImageRows.read`].

        Returns:
            `tuple[torch.Tensor, int]`: Pixels of shape `(3, size, size)`, uint8, and the class.

        Raises:
            BadImageError: The image cannot be read.
            DataError: The label is unknown.
        """
        label = self.data.class_id(fields, position)
        try:
            image = decode_image(self.data.encoded_image(fields))
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            message = f"Cannot read the image of {self.data.place(fields, position)}: {error or type(error).__name__}"
            if self.on_bad_image == "stop":
                message += ". Mend or remove it, or pass --on_bad_image skip."
            raise BadImageError(message) from error
        random = np.random.default_rng((seed, epoch, position))
        return self.transform(image, random, self.data.may_flip(fields)), label


def all_bad(count: int, last: str) -> BadImageError:
    """The error to raise when skipping has found nothing but bad images."""
    return BadImageError(f"None of {count} images in a row can be read: check the data set. The last one: {last}")
