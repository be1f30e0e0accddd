"""Images to evaluate, read batch by batch from a folder, file, data set or memory."""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from ..utils.folder_scan import read_regular_file, scan_folder, warn_of_left_out
from ..utils.messages import one_line, show_size
from .image_transform import image_endings


# `diffusers_pisdm.data.image_transform` has both: `decode_image`, and a non-random `ImageTransform`. Images should be
# decoded and cropped as in training.
DecodeImage = Callable[[bytes], Image.Image]
CropImage = Callable[[Image.Image], torch.Tensor]


class ImageSourceError(ValueError):
    """There are no images, or one cannot be read; the message says which one."""


class ImageSource(ABC):
    """
    Base class of sources: a known number of images of one size, always in the same order.

    Args:
        name (`str`): Where the images come from, for reports and errors.
        crop (`Callable`, *optional*):
            Turns an RGB image into a uint8 tensor of shape `(3, size, size)`. By default images are not cropped, and
            one that differs in size from the first raises an error.
    """

    def __init__(self, name: str, crop: CropImage | None = None):
        self.name = name
        self.crop = crop

    @abstractmethod
    def __len__(self) -> int:
        """The number of images, at least 1."""

    @abstractmethod
    def images(self, indices: Iterable[int]) -> Iterator[tuple[str, Image.Image]]:
        """The images at ascending `indices`, in mode RGB, each with where it comes from, for errors."""

    def batches(self, batch_size: int, indices: Iterable[int] | None = None) -> Iterator[torch.Tensor]:
        """
        Reads the images once, holding at most one batch in memory.

        Args:
            batch_size (`int`): Images per batch; the last batch may be smaller.
            indices (`Iterable[int]`, *optional*): Which images, in ascending order; all by default.

        Returns:
            `Iterator[torch.Tensor]`: Of shape `(B, 3, H, W)`, uint8.

        Raises:
            ImageSourceError: An image cannot be read, or differs in size.
        """
        batch, first_place, shape = [], "", None
        for place, image in self.images(range(len(self)) if indices is None else indices):
            pixels = _to_tensor(image) if self.crop is None else self.crop(image)  # (3, H, W)
            if shape is None:
                first_place, shape = place, pixels.shape
            if pixels.shape != shape:
                raise ImageSourceError(
                    f"Images differ in size: {place} has {show_size(*pixels.shape[:0:-1])} pixels, {first_place} has"
                    f" {show_size(*shape[:0:-1])}. Pass an image size to resize them to."
                )
            batch.append(pixels)
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)


class FolderImages(ImageSource):
    """
    All images in a folder and its subfolders, sorted by path; links are followed.

    Args:
        folder (`str` or `Path`): The folder. What is left out, such as names that start with a dot, is logged.
        decode (`Callable`):
            Turns a file's content into an image in mode RGB, e.g.
            [`~diffusers_pisdm.data.image_transform.decode_image`].
        crop (`Callable`, *optional*): See [`ImageSource`].

    Raises:
        ImageSourceError: The folder does not exist or holds no images, or an image is a dangling link or a pipe.
    """

    def __init__(self, folder: str | Path, decode: DecodeImage, crop: CropImage | None = None):
        super().__init__(str(folder), crop)
        self.folder = Path(folder)
        self.decode = decode
        if not self.folder.is_dir():
            raise ImageSourceError(f"There is no folder {folder}: check the path.")
        content = scan_folder(self.folder, image_endings())
        if content.unusual:
            unusual = ", ".join(map(one_line, content.unusual[:5]))
            raise ImageSourceError(
                f"{folder} holds dangling links, pipes or the like: {unusual}. Remove or repair them."
            )
        warn_of_left_out(folder, content.left_out)
        self.files = sorted(Path(*parts, name) for parts, names in content.images.items() for name in names)
        if not self.files:
            raise ImageSourceError(f"There are no images in {folder}: pass a folder of, say, PNG or JPEG files.")

    def __len__(self) -> int:
        return len(self.files)

    def images(self, indices: Iterable[int]) -> Iterator[tuple[str, Image.Image]]:
        for index in indices:
            path = self.folder / self.files[index]
            yield str(path), _decode(self.decode, lambda path=path: read_regular_file(path), str(path))


class NpzImages(ImageSource):
    """
    The images of an `.npz` file in the format of ADM's suite: `arr_0`, uint8 of shape `(N, H, W, 3)`.

    They are read one at a time, whether or not the file is compressed: it is never loaded into memory whole.

    Args:
        file (`str` or `Path`): The `.npz` file.
        crop (`Callable`, *optional*): See [`ImageSource`].

    Raises:
        ImageSourceError: The file does not exist, or its `arr_0` is not an array of images.
    """

    ENTRY = "arr_0.npy"

    def __init__(self, file: str | Path, crop: CropImage | None = None):
        super().__init__(str(file), crop)
        self.file = file
        try:
            with zipfile.ZipFile(file) as archive, archive.open(self.ENTRY) as array:
                shape, is_fortran, dtype = _read_array_header(array)
        except KeyError:
            raise ImageSourceError(f"{file} has no image array `arr_0`.") from None
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ImageSourceError(f"{file} cannot be read as an .npz file: {error}") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or is_fortran or 0 in shape:
            raise ImageSourceError(
                f"`arr_0` of {file} must be uint8 of shape (N, H, W, 3) in C order, with N of at least 1, but is"
                f" {dtype} of shape {shape}{' in Fortran order' if is_fortran else ''}."
            )
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def images(self, indices: Iterable[int]) -> Iterator[tuple[str, Image.Image]]:
        size = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.file) as archive, archive.open(self.ENTRY) as array:
            _read_array_header(array)
            start = array.tell()
            for index in indices:
                place = f"image {index} of {self.file}"
                try:
                    array.seek(start + index * size)
                    pixels = array.read(size)
                except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
                    raise ImageSourceError(f"Cannot read {place}: {error}. The file is damaged.") from error
                if len(pixels) < size:
                    raise ImageSourceError(f"Cannot read {place}: the file is cut off.")
                yield place, Image.fromarray(np.frombuffer(pixels, dtype=np.uint8).reshape(self.shape[1:]))


class EncodedRows(Protocol):
    """What [`DatasetImages`] reads, e.g. an [`~diffusers_pisdm.data.image_data.ImageData`]."""

    dataset: Sequence[dict]

    def encoded_image(self, row: dict) -> bytes:
        """The image file of a row."""

    def place(self, row: dict, position: int) -> str:
        """Where the row comes from, for messages."""


class DatasetImages(ImageSource):
    """
    The images of a data set loaded by [`~diffusers_pisdm.data.image_data.load_image_data`].

    Args:
        name (`str`): The data set's name.
        data ([`EncodedRows`]): Its rows; not a stream.
        decode, crop (`Callable`): See [`FolderImages`].

    Raises:
        ImageSourceError: The data set is empty.
    """

    def __init__(self, name: str, data: EncodedRows, decode: DecodeImage, crop: CropImage | None = None):
        super().__init__(name, crop)
        self.data = data
        self.decode = decode
        if len(data.dataset) == 0:
            raise ImageSourceError(f"{name} is empty: pass another split or data set.")

    def __len__(self) -> int:
        return len(self.data.dataset)

    def images(self, indices: Iterable[int]) -> Iterator[tuple[str, Image.Image]]:
        for position in indices:
            row = self.data.dataset[position]
            place = f"{self.data.place(row, position)} of {self.name}"
            yield place, _decode(self.decode, lambda row=row: self.data.encoded_image(row), place)


class ListImages(ImageSource):
    """
    Images in memory.

    Args:
        images (`list[PIL.Image.Image]` or `torch.Tensor` of shape `(N, 3, H, W)`, uint8):
            At least one image, e.g. from a pipeline. Pillow images must be in mode RGB.
        crop (`Callable`, *optional*): See [`ImageSource`].
        name (`str`, defaults to `"images in memory"`): For reports.

    Raises:
        ImageSourceError: There are no images, or they have another type, shape or mode.
    """

    def __init__(
        self,
        images: Sequence[Image.Image] | torch.Tensor,
        crop: CropImage | None = None,
        name: str = "images in memory",
    ):
        super().__init__(name, crop)
        if len(images) == 0:
            raise ImageSourceError(f"There are no {name}: at least one is needed.")
        if isinstance(images, torch.Tensor):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
                raise ImageSourceError(
                    f"Images must be uint8 of shape (N, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}."
                )
        else:
            modes = {image.mode for image in images} - {"RGB"}
            if modes:
                raise ImageSourceError(f"Images must be in mode RGB, got {', '.join(sorted(modes))}: convert them.")
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def images(self, indices: Iterable[int]) -> Iterator[tuple[str, Image.Image]]:
        for index in indices:
            image = self._images[index]
            if isinstance(image, torch.Tensor):
                image = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
            yield f"image {index}", image


def _decode(decode: DecodeImage, read: Callable[[], bytes], place: str) -> Image.Image:
    try:
        return decode(read())
    except Exception as error:  # Pillow can raise nearly anything for a damaged file
        reason = str(error) or type(error).__name__
        raise ImageSourceError(one_line(f"Cannot read the image of {place}: {reason}")) from error


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, H, W)


def _read_array_header(array: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype; leaves `array` at the first number."""
    version = np.lib.format.read_magic(array)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(array)
    return np.lib.format.read_array_header_2_0(array)
