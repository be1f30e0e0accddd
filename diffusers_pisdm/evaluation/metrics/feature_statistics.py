"""Statistics of a set of images: mean and covariance of the features, and some of the features themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from ...data.image_sources import ImageSource
from ..networks.extractor import FeatureExtractor, Features


class Gaussian(NamedTuple):
    """
    Args:
        mean (`torch.Tensor` of shape `(D,)`): float64.
        covariance (`torch.Tensor` of shape `(D, D)`): float64.
    """

    mean: torch.Tensor
    covariance: torch.Tensor


@dataclass
class FeatureStatistics:
    """
    Args:
        extractor (`str`): The name of the network.
        weights_hash (`str` or `None`): SHA-256 of its weights file, if known.
        source (`str`): Where the images come from.
        num_images (`int` or `None`): Images behind mean and covariance; `None` for ADM's files, which do not say.
        image_size (`tuple[int, int]` or `None`): Height and width of the images, if known.
        pooled (`Gaussian` or `None`), spatial (`Gaussian` or `None`):
            Mean and covariance of the pooled and the spatial features.
        features (`torch.Tensor` of shape `(M, D)` or `None`): Pooled features, float32, of all or some images.
        missing (`dict[str, str]`): Why `pooled`, `spatial` or `features` is `None`.
    """

    extractor: str
    weights_hash: str | None
    source: str
    num_images: int | None
    image_size: tuple[int, int] | None
    pooled: Gaussian | None
    spatial: Gaussian | None
    features: torch.Tensor | None
    missing: dict[str, str] = field(default_factory=dict)


class FeatureSums:
    """Running float64 sums of feature vectors, for mean and covariance without keeping the features."""

    def __init__(self, num_features: int, device: torch.device):
        self.count = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)  # (D,)
        self.products = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)  # (D, D)

    def update(self, features: torch.Tensor) -> None:
        features = features.double()  # (B, D)
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.products += features.T @ features

    def gaussian(self) -> Gaussian:
        """Mean and covariance on the CPU; needs at least two vectors."""
        mean = self.sum / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean.cpu(), covariance.cpu())


def collect_statistics(
    source: ImageSource,
    extractor: FeatureExtractor,
    batch_size: int = 50,
    max_features: int | None = None,
    seed: int = 0,
    on_features: Callable[[Features], None] | None = None,
    show_progress: bool = True,
) -> FeatureStatistics:
    """
    Reads a source once. Mean and covariance come from float64 sums, so memory grows only with the pooled features
    kept, at most `max_features`.

    Args:
        source ([`ImageSource`]): The images.
        extractor ([`FeatureExtractor`]): The network.
        batch_size (`int`, defaults to 50): Images per batch.
        max_features (`int`, *optional*):
            Keep the pooled features of this many images, drawn at random. `None` keeps all.
        seed (`int`, defaults to 0): Seeds the choice of those images.
        on_features (`Callable`, *optional*): Called with the features of each batch.
        show_progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Returns:
        [`FeatureStatistics`]: Without `pooled` and `spatial` if there is only one image.

    Raises:
        ImageSourceError: An image cannot be read.
    """
    is_kept = torch.zeros(len(source), dtype=torch.bool)
    is_kept[draw_indices(len(source), max_features, seed)] = True
    kept, start = [], 0
    sums: dict[str, FeatureSums] = {}
    for size, features in iterate_features(source, extractor, batch_size, show_progress=show_progress):
        image_size = size
        for name in ("pooled", "spatial"):
            batch = getattr(features, name)
            if batch is None:
                continue
            batch = batch.cpu() if batch.device.type == "mps" else batch  # MPS has no float64
            if name not in sums:
                sums[name] = FeatureSums(batch.shape[1], batch.device)
            sums[name].update(batch)
        kept.append(features.pooled.cpu()[is_kept[start : start + batch_size]])
        start += batch_size
        if on_features is not None:
            on_features(features)

    gaussians, missing = {"pooled": None, "spatial": None}, {}
    for name in gaussians:
        if name not in sums:
            missing[name] = f"{extractor.title} gives no {name} features"
        elif len(source) < 2:
            missing[name] = f"a covariance needs at least two images, but {source.name} has one"
        else:
            gaussians[name] = sums[name].gaussian()
    return FeatureStatistics(
        extractor=extractor.name,
        weights_hash=extractor.weights_hash(),
        source=source.name,
        num_images=len(source),
        image_size=image_size,
        **gaussians,
        features=torch.cat(kept),
        missing=missing,
    )


def iterate_features(
    source: ImageSource,
    extractor: FeatureExtractor,
    batch_size: int,
    indices: list[int] | None = None,
    show_progress: bool = True,
) -> Iterator[tuple[tuple[int, int], Features]]:
    """Yields each batch's image height and width, and its features; `indices` ascend, `None` means all images."""
    total = len(source) if indices is None else len(indices)
    with tqdm(desc=f"features of {source.name}", total=total, unit="image", disable=not show_progress) as progress:
        for images in source.batches(batch_size, indices):
            with torch.inference_mode():
                features = extractor(images)
            yield tuple(images.shape[2:]), features
            progress.update(len(images))


def draw_indices(count: int, max_count: int | None, seed: int) -> list[int]:
    """At most `max_count` random indices below `count`, ascending; all of them for `None`."""
    if max_count is None or max_count >= count:
        return list(range(count))
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:max_count].sort().values.tolist()
