"""Rows of an image data set as training images, and how unreadable ones are handled."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..utils.messages import one_line
from .image_data import ImageData
from .image_transform import ImageTransform, decode_image
from .rows import BadImageError, TrainingRow


ON_BAD_IMAGE = ("stop", "skip")
ROWS_INSPECTED_AT_ONCE = 256  # whose files are in memory together
MAX_BAD_IN_A_ROW = 1000  # this many in a row mean that something is wrong with the whole data set


class ImageRows:
    """
    The images of a data set at training size. A row's pixels depend only on the seed, the epoch and the row.

    Args:
        data ([`ImageData`]): The encoded images and their labels.
        transform ([`ImageTransform`]): Resizes, crops and flips.
        on_bad_image (`str`, defaults to `"stop"`):
            What to do about a file that is not an image, or is damaged, empty, a decompression bomb or absurdly long:
            `"stop"` raises an error; `"skip"` replaces it with the next good row and reports it.
        keep_gib (`float`, defaults to 0.0):
            Images stay in memory once they are decoded, if all of them take no more GiB than this. They are as large
            as `transform` makes them; those that it crops at random are not kept, nor those of a stream.

    Raises:
        ValueError: `on_bad_image` is neither.
    """

    def __init__(self, data: ImageData, transform: ImageTransform, on_bad_image: str = "stop", keep_gib: float = 0.0):
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"`on_bad_image` must be one of {', '.join(ON_BAD_IMAGE)}, got {on_bad_image}.")
        self.data = data
        self.transform = transform
        self.on_bad_image = on_bad_image
        self.kept: _KeptImages | None = None
        if not self.is_stream and not transform.random_crop:
            if 0 < len(self) * 3 * transform.size**2 <= keep_gib * 2**30:
                self.kept = _KeptImages(len(self), transform.size)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"kept": None}  # processes that are not forked do not share memory

    @property
    def is_stream(self) -> bool:
        return self.data.is_stream

    @property
    def is_random(self) -> bool:
        """Whether a row's pixels change between epochs."""
        return self.transform.random_crop or self.transform.random_flip

    def __len__(self) -> int:
        return len(self.data.dataset)

    def fingerprint(self) -> dict[str, str]:
        return self.data.fingerprint()

    def read(self, row: int, epoch: int, seed: int) -> TrainingRow:
        """
        Reads a row of a data set that is not a stream.

        Args:
            row (`int`): In `0..len(self) - 1`.
            epoch, seed (`int`): Not negative; with the row, they determine crop and flip.

        Returns:
            [`TrainingRow`]: The row, or with `on_bad_image="skip"` the next readable one, wrapping around at the end.

        Raises:
            BadImageError: The image cannot be read; with `"skip"`, neither can the rows after it.
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
            fields (`dict`): The row as returned by `data.dataset`.
            position (`int`): Its index, or its position in the stream.
            epoch, seed (`int`): See [`~ImageRows.read`].

        Returns:
            `tuple[torch.Tensor, int]`: Pixels of shape `(3, size, size)`, uint8, and the class.

        Raises:
            BadImageError: The image cannot be read.
            DataError: The label is unknown.
        """
        label = self.data.class_id(fields, position)
        random = np.random.default_rng((seed, epoch, position))
        pixels = None if self.kept is None else self.kept.get(position)
        if pixels is None:
            try:
                image = read_image(self.data, fields, position)
            except BadImageError as error:
                if self.on_bad_image == "stop":
                    raise BadImageError(
                        f"{error}. Fix or remove it (`pisdm check-data` lists all such images), or pass --on_bad_image"
                        " skip."
                    ) from error
                raise
            pixels = self.transform.crop(image, random)
            if self.kept is not None:
                self.kept.put(position, pixels)
        return self.transform.flip(pixels, random, self.data.may_flip(fields)), label


class _KeptImages:
    """Decoded images, in memory that forked decoding processes share. It is taken up as it is written."""

    def __init__(self, count: int, size: int):
        shape = (count, 3, size, size)
        num_bytes = count * 3 * size**2
        memory = np.frombuffer(mmap.mmap(-1, num_bytes + count), dtype=np.uint8)
        self.images = memory[:num_bytes].reshape(shape)
        self.are_kept = memory[num_bytes:]  # (count,), written last

    def get(self, row: int) -> torch.Tensor | None:
        return torch.from_numpy(self.images[row].copy()) if self.are_kept[row] else None

    def put(self, row: int, image: torch.Tensor) -> None:
        self.images[row] = image.numpy()
        self.are_kept[row] = 1


def read_image(data: ImageData, fields: dict, position: int) -> Image.Image:
    """Decodes the image of a row, as [`decode_image`] does; raises BadImageError with where it is."""
    try:
        return decode_image(data.encoded_image(fields))
    except Exception as error:  # Pillow can raise nearly anything for a damaged file
        reason = str(error) or type(error).__name__
        raise BadImageError(one_line(f"Cannot read the image of {data.place(fields, position)}: {reason}")) from error


class ImageReport(NamedTuple):
    """
    What [`inspect_images`] found.

    Args:
        position (`int`): The row's index.
        place (`str`): Where it comes from.
        size (`tuple[int, int]` or `None`): Width and height; `None` if the image cannot be read.
        digest (`str` or `None`): The same for images with the same size and pixels.
        fault (`str` or `None`): Why the image cannot be read, and where it is.
    """

    position: int
    place: str
    size: tuple[int, int] | None = None
    digest: str | None = None
    fault: str | None = None


def inspect_images(data: ImageData, process_index: int = 0, num_processes: int = 1) -> Iterator[ImageReport]:
    """Decodes each image once, in order, and says what is in it; of several processes, each takes its own share."""

    def inspect(row: tuple[int, dict]) -> ImageReport:
        position, fields = row
        place = data.place(fields, position)
        try:
            image = read_image(data, fields, position)
        except BadImageError as error:
            return ImageReport(position, place, fault=str(error))
        return ImageReport(position, place, image.size, hashlib.sha256(image.tobytes()).hexdigest() + str(image.size))

    rows = islice(enumerate(data.dataset), process_index, None, num_processes)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        while chunk := list(islice(rows, ROWS_INSPECTED_AT_ONCE)):
            yield from threads.map(inspect, chunk)


def all_bad(count: int, last: str) -> BadImageError:
    """The error to raise when skipping finds only bad images."""
    return BadImageError(f"None of {count} images in a row can be read: check the data set. Last error: {last}")
