"""Images that a call is given: read, checked, and fitted to the stages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor

from ..ops.conditioning_augmentation import downsample
from ..utils.transparency import on_white


Size = tuple[int, int]  # height, width

# Pillow's modes by their number of channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class GivenImages:
    """What one stage has of a given image: pixels `(N, C, H, W)` in [-1, 1], N being 1 or the number of labels."""

    lower: torch.Tensor | None = None  # what the stage enlarges; None: the image of the stage before
    start: torch.Tensor | None = None  # what it starts from, noised; None: noise, or the upsampled image in a relay


def place_image(
    image: PipelineImageInput | None, sizes: list[Size], num_channels: int, num_labels: int
) -> list[GivenImages | None]:
    """
    Decides what each stage does with a given image.

    Args:
        image (`PipelineImageInput`, *optional*): As the call takes it.
        sizes (`list[tuple[int, int]]`): Height and width of each stage's image in pixels.
        num_channels (`int`): Channels of the images.
        num_labels (`int`): The number of classes asked for.

    Returns:
        `list[GivenImages | None]`: One per stage; `None` where a stage does not run.

    Raises:
        TypeError: The image is of another type.
        ValueError: It does not fit the stages, or the number of labels.
    """
    if image is None:
        return [GivenImages()] * len(sizes)
    pixels = read_image("image", image, num_channels, num_labels)  # (N, C, H, W) in [0, 1]
    pixels = VaeImageProcessor.normalize(pixels)
    stage = find_stage(tuple(pixels.shape[2:]), sizes)
    if stage == len(sizes) - 1:
        raise ValueError(
            f"`image` is as large as this pipeline's images ({_show(sizes[-1])}): there is no stage left to enlarge"
            f" it. Pass one of at most {_show(sizes[-2]) if len(sizes) > 1 else 'fewer pixels'}."
        )
    lower = downsample(pixels, sizes[stage])
    higher = [GivenImages(lower if i == stage + 1 else None) for i in range(stage + 1, len(sizes))]
    return [None] * (stage + 1) + higher


def read_image(name: str, image: PipelineImageInput, num_channels: int, num_labels: int) -> torch.Tensor:
    """
    Reads the images of an argument as `(N, C, H, W)` in [0, 1], float32; transparent pixels become white where there
    are fewer than four channels. Raises a TypeError or ValueError if they are none, differ or do not fit.
    """
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    wrong = [item for item in images if not isinstance(item, (PIL.Image.Image, np.ndarray, torch.Tensor))]
    if not images or wrong:
        raise TypeError(
            f"`{name}` has to be a PIL image, an array, a tensor or a list of these but"
            f" {f'holds {wrong[0]!r:.100}' if wrong else 'is empty'}."
        )
    mode = _MODES.get(num_channels, "RGB")
    images = [_to_mode(item, mode) if isinstance(item, PIL.Image.Image) else item for item in images]
    kinds = {(type(item), item.size if isinstance(item, PIL.Image.Image) else item.shape) for item in images}
    if len(kinds) > 1:
        raise ValueError(f"`{name}` holds images of several sizes or types. Pass images of one size and type.")
    if not isinstance(images[0], PIL.Image.Image):
        _check_array(name, images)
    processor = VaeImageProcessor(do_resize=False, do_normalize=False, vae_latent_channels=None)
    pixels = processor.preprocess(images if len(images) > 1 else images[0]).float()  # (N, C, H, W)
    if pixels.shape[1] != num_channels:
        raise ValueError(f"`{name}` has {pixels.shape[1]} channels, but this pipeline's images have {num_channels}.")
    if len(pixels) not in (1, num_labels):
        raise ValueError(
            f"`{name}` holds {len(pixels)} images for {num_labels} labels. Pass one image for all, or one per label."
        )
    if not pixels.is_meta and not ((pixels >= 0) & (pixels <= 1)).all():  # false for NaN, too
        raise ValueError(
            f"`{name}` has values from {pixels.min().item():g} to {pixels.max().item():g}, but they have to be in"
            " [0, 1]. Scale them, or pass PIL images."
        )
    return pixels


def find_stage(size: Size, sizes: list[Size]) -> int:
    """
    The index of the stage of a given image's size, or of the nearest smaller one. Raises a ValueError if there is
    none, or if the image is larger than the last stage's or of another shape.
    """
    if any(length > longest for length, longest in zip(size, sizes[-1])):
        raise ValueError(
            f"`image` is {_show(size)} pixels, but this pipeline's images are {_show(sizes[-1])}. Shrink it to at most"
            " that."
        )
    fitting = [i for i, stage in enumerate(sizes) if all(length <= given for length, given in zip(stage, size))]
    if not fitting:
        raise ValueError(
            f"`image` is {_show(size)} pixels, smaller than the first stage's {_show(sizes[0])}. Enlarge it to that."
        )
    height, width = sizes[fitting[-1]]
    if size[0] * width != size[1] * height:
        raise ValueError(
            f"`image` is {_show(size)} pixels, but the stages are of another shape: {', '.join(map(_show, sizes))}."
            " Crop it, or pass the `height` and `width` of a final image of its shape."
        )
    return fitting[-1]


def _show(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _to_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    return (image if mode == "RGBA" else on_white(image)).convert(mode)


def _check_array(name: str, images: list[np.ndarray] | list[torch.Tensor]) -> None:
    first = images[0]
    axes = "channels, height, width" if isinstance(first, torch.Tensor) else "height, width, channels"
    if first.ndim != 3 and (len(images) > 1 or first.ndim != 4):
        raise ValueError(f"`{name}` has shape {tuple(first.shape)}, but each image has to be ({axes}).")
    is_float = torch.is_floating_point(first) if isinstance(first, torch.Tensor) else first.dtype.kind == "f"
    if not is_float:
        raise TypeError(
            f"`{name}` is of {first.dtype}, but arrays and tensors have to be floats in [0, 1]. Divide by their"
            " largest value, or pass PIL images."
        )
