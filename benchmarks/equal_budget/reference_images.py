"""The reference for samples: statistics of a data set's images at the models' size, computed once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from diffusers_pisdm.data.image_data import load_image_data
from diffusers_pisdm.data.image_transform import ImageTransform, decode_image
from diffusers_pisdm.evaluation import (
    DatasetImages,
    FeatureExtractor,
    FeatureStatistics,
    collect_statistics,
    read_reference_file,
    write_reference_file,
)


def reference_statistics(
    data_dir: str, split: str, size: int, extractor: FeatureExtractor, folder: Path
) -> FeatureStatistics:
    """The statistics of a data set's split at `size` pixels, cached in a file in `folder` named after the network."""
    file = folder / f"reference_{extractor.name.replace('/', '-').replace(':', '-')}.npz"
    if not file.exists():
        crop = partial(ImageTransform(size), random=np.random.default_rng(0))  # uses no randomness
        source = DatasetImages(f"{data_dir}, {split}", load_image_data(data_dir, split), decode_image, crop)
        write_reference_file(file, collect_statistics(source, extractor))
    return read_reference_file(file, extractor)
