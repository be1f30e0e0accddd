"""The reference for samples: statistics of a data set's images at the models' size, computed once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffusers_pisdm.data.image_data import load_image_data
from diffusers_pisdm.data.image_transform import ImageTransform, decode_image
from diffusers_pisdm.evaluation import (
    DatasetImages,
    FeatureExtractor,
    FeatureStatistics,
)
from diffusers_pisdm.evaluation.metrics.statistics_file import cached_statistics


def feature_file(folder: Path, kind: str, extractor: FeatureExtractor, suffix: str) -> Path:
    """Where a folder keeps what a network, after which the file is named, says of some images."""
    return folder / f"{kind}_{extractor.name.replace('/', '-').replace(':', '-')}{suffix}"


def reference_statistics(
    data_dir: str, split: str, size: int, extractor: FeatureExtractor, folder: Path
) -> FeatureStatistics:
    """The statistics of a data set's split at `size` pixels, cached in a file in `folder` named after the network."""
    file = feature_file(folder, "reference", extractor, ".npz")

    def open_images() -> DatasetImages:
        crop = partial(ImageTransform(size), random=None)
        return DatasetImages(f"{data_dir}, {split}", load_image_data(data_dir, split), decode_image, crop)

    return cached_statistics(file, open_images, extractor)
