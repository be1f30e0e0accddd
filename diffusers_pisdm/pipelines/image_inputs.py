"""Images that a call is given: read, checked, and fitted to the stages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor

from ..ops.conditioning_augmentation import downsample
from ..utils.messages import count_of, show_size
from ..utils.pixel_modes import mode_problem, on_white, to_8_bits
from .number_checks import check_number


Size = tuple[int, int]  # height, width

# Pillow's modes by their number of channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class GivenImages:
    """What one stage has of a given image: pixels `(N, C, H, W)` in [-1, 1], N being 1 or the number of labels."""

    lower: torch.Tensor | None = None  # what the stage enlarges; None: the image of the stage before
    start: torch.Tensor | None = None  # what it noises to `strength`, and starts from
    strength: float | None = None
    known: torch.Tensor | None = None  # what it keeps of the image
    mask: torch.Tensor | None = None  # (N, 1, H, W), True where `known` is repainted


@dataclass(frozen=True)
class KnownPart:
    """What a stage that inpaints keeps of its image; tensors are `(B, C, H, W)`, `mask` is `(B, 1, H, W)`."""

    image: torch.Tensor
    latents: torch.Tensor  # what the stage diffuses to get it
    noise: torch.Tensor
    mask: torch.Tensor  # True: repaint

    def renoise(self, latents: torch.Tensor, scheduler: SchedulerMixin, timestep: torch.Tensor) -> torch.Tensor:
        """Puts the known part in a step's latents, noised as they are."""
        noised = scheduler.add_noise(self.latents, self.noise, timestep.expand(len(latents)))
        return torch.where(self.mask, latents, noised)

    def keep(self, image: torch.Tensor) -> torch.Tensor:
        """Puts the known part in a stage's image."""
        return torch.where(self.mask, image, self.image)


def place_image(
    image: PipelineImageInput | None,
    mask_image: PipelineImageInput | None,
    strength: float | None,
    sizes: list[Size],
    num_channels: int,
    num_labels: int,
) -> list[GivenImages | None]:
    """
    Decides what each stage does with a given image.

    Args:
        image, mask_image (`PipelineImageInput`, *optional*), strength (`float`, *optional*): As the call takes them.
        sizes (`list[tuple[int, int]]`): Height and width of each stage's image in pixels.
        num_channels (`int`): Channels of the images.
        num_labels (`int`): The number of classes asked for.

    Returns:
        `list[GivenImages | None]`: One per stage; `None` where a stage does not run.

    Raises:
        TypeError: An image is of another type.
        ValueError: It does not fit the stages, or the number of labels, or `strength` is out of range.
    """
    if strength is not None:
        check_number("strength", strength)
    if image is None:
        for name, value in (("mask_image", mask_image), ("strength", strength)):
            if value is not None:
                raise ValueError(f"`{name}` needs an `image`. Pass one, or leave `{name}` out.")
        return [GivenImages()] * len(sizes)
    pixels = VaeImageProcessor.normalize(read_image("image", image, num_channels, num_labels))  # (N, C, H, W)
    stage = find_stage(tuple(pixels.shape[2:]), sizes)
    rest = [GivenImages()] * (len(sizes) - 1 - stage)
    if mask_image is not None:
        mask = read_mask(mask_image, tuple(pixels.shape[2:]), num_labels)  # (N, 1, H, W)
        return _inpaint(pixels, mask, 1.0 if strength is None else strength, sizes[: stage + 1]) + rest
    if strength:
        lower = downsample(pixels, sizes[stage - 1]) if stage > 0 else None
        start = GivenImages(lower=lower, start=downsample(pixels, sizes[stage]), strength=strength)
        return [None] * stage + [start] + rest
    if not rest:
        raise ValueError(
            f"`image` has the size of this pipeline's images ({_show(sizes[-1])}), so that no stage is left to enlarge"
            " it. Pass a smaller one, or `strength` to change it, or `mask_image` to repaint part of it."
        )
    return [None] * (stage + 1) + [GivenImages(lower=downsample(pixels, sizes[stage]))] + rest[1:]


def _inpaint(pixels: torch.Tensor, mask: torch.Tensor, strength: float, sizes: list[Size]) -> list[GivenImages]:
    if strength == 0:
        raise ValueError("`strength` is 0, which would repaint nothing. Pass one in (0, 1].")
    given = []
    for size in sizes:
        known = downsample(pixels, size)
        # A pixel that covers any part to be repainted holds some of it.
        given.append(GivenImages(known=known, mask=F.adaptive_max_pool2d(mask.float(), size) > 0))
    if strength < 1:
        given[0] = replace(given[0], start=given[0].known, strength=strength)
    return given


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
    images = [
        _to_channels(_to_8_bits(name, item), num_channels) if isinstance(item, PIL.Image.Image) else item
        for item in images
    ]
    kinds = {(type(item), item.size if isinstance(item, PIL.Image.Image) else item.shape) for item in images}
    if len(kinds) > 1:
        raise ValueError(f"`{name}` holds images of several sizes or types. Pass images of one size and type.")
    images = [_bool_to_float(item) for item in images]
    if not isinstance(images[0], PIL.Image.Image):
        _check_array(name, images)
    processor = VaeImageProcessor(do_resize=False, do_normalize=False, vae_latent_channels=None)
    pixels = processor.preprocess(images if len(images) > 1 else images[0]).float()  # (N, C, H, W)
    if pixels.shape[1] != num_channels:
        raise ValueError(
            f"`{name}` has {count_of(pixels.shape[1], 'channel')}, but"
            f" {'a mask' if name == 'mask_image' else 'an image of this pipeline'} has {num_channels}."
        )
    if len(pixels) not in (1, num_labels):
        raise ValueError(
            f"`{name}` holds {count_of(len(pixels), 'image')} for {count_of(num_labels, 'label')}. Pass one image"
            " for all, or one per label."
        )
    if not pixels.is_meta and not ((pixels >= 0) & (pixels <= 1)).all():  # false for NaN, too
        raise ValueError(
            f"`{name}` has values from {pixels.min().item():g} to {pixels.max().item():g}, but they have to be in"
            " [0, 1]. Scale them, or pass PIL images."
        )
    return pixels


def read_mask(mask_image: PipelineImageInput, size: Size, num_labels: int) -> torch.Tensor:
    """
    Reads masks as `(N, 1, H, W)`, True where they are nearer to white: what is repainted. Raises a TypeError or
    ValueError if they are none, or of another size than the image.
    """
    masks = mask_image if isinstance(mask_image, (list, tuple)) else [mask_image]
    # As in diffusers, only the grey values count: transparent strokes on black would all be white by `read_image`.
    masks = [
        _to_8_bits("mask_image", mask).convert("L") if isinstance(mask, PIL.Image.Image) else _with_channel(mask)
        for mask in masks
    ]
    mask = read_image("mask_image", masks, 1, num_labels)  # (N, 1, H, W) in [0, 1]
    if tuple(mask.shape[2:]) != size:
        raise ValueError(
            f"`mask_image` is {_show(tuple(mask.shape[2:]))} pixels, but `image` is {_show(size)}. Pass a mask of the"
            " image's size."
        )
    return mask >= 0.5


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


def repeat_images(images: torch.Tensor, num_images: int) -> torch.Tensor:
    """Repeats each of `(N, C, H, W)` for the images of its label: `(num_images, C, H, W)`."""
    return images.repeat_interleave(num_images // len(images), dim=0)


def _show(size: Size) -> str:
    return show_size(width=size[1], height=size[0])


def _to_8_bits(name: str, image: PIL.Image.Image) -> PIL.Image.Image:
    problem = mode_problem(image)
    if problem is not None:
        raise ValueError(f"The pixels of `{name}` are {problem}. Convert it to 8-bit RGB.")
    return to_8_bits(image)


def _with_channel(mask: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """A mask of shape `(H, W)` as an array `(H, W, 1)` or a tensor `(1, H, W)`."""
    if getattr(mask, "ndim", None) != 2:
        return mask
    return mask[None] if isinstance(mask, torch.Tensor) else mask[..., None]


def _to_channels(image: PIL.Image.Image, num_channels: int) -> PIL.Image.Image:
    return (image if num_channels == 4 else on_white(image)).convert(_MODES.get(num_channels, "RGB"))


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


def _bool_to_float(image: PIL.Image.Image | np.ndarray | torch.Tensor) -> PIL.Image.Image | np.ndarray | torch.Tensor:
    """What compares give, such as `mask > 0`, means 0 and 1 without a doubt."""
    if isinstance(image, np.ndarray) and image.dtype == bool:
        return image.astype(np.float32)
    return image.float() if isinstance(image, torch.Tensor) and image.dtype == torch.bool else image
