"""Files of reference statistics: ADM's `.npz` files, and our own in the same format."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from ...data.image_sources import CropImage, NpzImages
from ...utils.files import write_whole
from ..networks.extractor import FeatureExtractor
from .feature_statistics import FeatureStatistics, Gaussian, collect_statistics, draw_indices, iterate_features


FORMAT = "diffusers-pisdm feature statistics, version 1"
# The arrays we read; ADM's sample files also hold the classes, as `arr_1`.
KEYS = ("mu", "sigma", "mu_s", "sigma_s", "features", "metadata", "arr_0")
GAUSSIANS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class ReferenceFileError(ValueError):
    """A statistics file is damaged or from another network; the message says which."""


def write_reference_file(file: str | Path, statistics: FeatureStatistics) -> None:
    """
    Writes `mu`, `sigma`, `mu_s` and `sigma_s` as in ADM's files, `features` (the pooled features that were kept) and
    `metadata` (a JSON string). The file is written atomically.

    Args:
        file (`str` or `Path`): The file to write, ending in `.npz`.
        statistics ([`FeatureStatistics`]): The reference's statistics.

    Raises:
        OSError: The file cannot be written.
        ValueError: The file name does not end in `.npz`.
    """
    if Path(file).suffix != ".npz":
        raise ValueError(f"Statistics are written as .npz, but {file} does not end in .npz.")
    metadata = {
        "format": FORMAT,
        "extractor": statistics.extractor,
        "weights_sha256": statistics.weights_hash,
        "source": statistics.source,
        "num_images": statistics.num_images,
        "image_size": statistics.image_size,
    }
    arrays = {"metadata": np.array(json.dumps(metadata))}
    for name, (mu, sigma) in GAUSSIANS.items():
        gaussian = getattr(statistics, name)
        if gaussian is not None:
            arrays[mu], arrays[sigma] = gaussian.mean.numpy(), gaussian.covariance.numpy()
    if statistics.features is not None:
        arrays["features"] = statistics.features.numpy()
    with write_whole(file) as unfinished, open(unfinished, "wb") as stream:
        np.savez(stream, **arrays)


def read_reference_file(
    file: str | Path,
    extractor: FeatureExtractor,
    crop: CropImage | None = None,
    batch_size: int = 50,
    max_features: int | None = 10_000,
    seed: int = 0,
    show_progress: bool = True,
) -> FeatureStatistics:
    """
    Reads a reference's statistics from an `.npz` file:

    - `mu`, `sigma`, `mu_s`, `sigma_s`: computed with the network named in `metadata`, or with Inception v3 if there is
      no `metadata`, as in ADM's files;
    - `features`: pooled features, for precision and recall;
    - `arr_0`: images. If `features` is missing, features are extracted from them; if the file holds only images, all
      statistics are.

    Args:
        file (`str` or `Path`): The file.
        extractor ([`FeatureExtractor`]): The network the samples are evaluated with.
        crop (`Callable`, *optional*): Crops the images, see [`ImageSource`].
        batch_size (`int`, defaults to 50): Images per batch.
        max_features (`int`, *optional*, defaults to 10,000): Keep the features of this many images; `None` keeps all.
        seed (`int`, defaults to 0): Seeds the choice of those images.
        show_progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Returns:
        [`FeatureStatistics`]: Anything absent from the file is `None`, with the reason in `missing`.

    Raises:
        ReferenceFileError: The file is damaged, or its statistics are from another network.
        ImageSourceError: Its images cannot be read.
    """
    arrays = _read_arrays(file)
    if not arrays:
        raise ReferenceFileError(f"{file} has neither statistics (mu, sigma, ...) nor images (arr_0).")
    if arrays.keys() == {"arr_0"}:
        images = NpzImages(file, crop)
        return collect_statistics(images, extractor, batch_size, max_features, seed, show_progress=show_progress)
    metadata = _check_extractor(file, arrays.get("metadata"), extractor)
    gaussians, missing = {}, {}
    for name, keys in GAUSSIANS.items():
        gaussians[name] = _read_gaussian(file, arrays, *keys)
        if gaussians[name] is None:
            missing[name] = f"{file} has no {keys[0]} and {keys[1]}"

    features = arrays.get("features")
    if features is not None:
        if features.ndim != 2 or features.dtype != np.float32:
            raise ReferenceFileError(f"`features` of {file} must be float32 of shape (M, D): the file is damaged.")
        features = torch.from_numpy(features)
        features = features[draw_indices(len(features), max_features, seed)]
    elif "arr_0" in arrays:
        images = NpzImages(file, crop)
        drawn = draw_indices(len(images), max_features, seed)
        batches = iterate_features(images, extractor, batch_size, drawn, show_progress)
        features = torch.cat([batch.pooled.cpu() for _, batch in batches])
    else:
        missing["features"] = f"{file} has neither features nor images (arr_0)"
    image_size = metadata.get("image_size")
    return FeatureStatistics(
        extractor=extractor.name,
        weights_hash=extractor.weights_hash(),
        source=str(file),
        num_images=metadata.get("num_images"),
        image_size=None if image_size is None else tuple(image_size),
        **gaussians,
        features=features,
        missing=missing,
    )


def _read_arrays(file: str | Path) -> dict[str, np.ndarray | None]:
    """The arrays in the file; `arr_0`, which may not fit in memory, is None if present."""
    try:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("it is an .npy file")
        with archive:
            return {key: None if key == "arr_0" else archive[key] for key in KEYS if key in archive.files}
    except FileNotFoundError:
        raise ReferenceFileError(f"There is no file {file}: check the path.") from None
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ReferenceFileError(f"{file} cannot be read as an .npz file of numbers: {error}") from error


def _check_extractor(file: str | Path, metadata: np.ndarray | None, extractor: FeatureExtractor) -> dict:
    if metadata is None:
        if not extractor.is_adm_inception:
            raise ReferenceFileError(
                f"The statistics in {file} name no network, as in ADM's files, which use Inception v3; but the samples"
                f" are evaluated with {extractor.name}. Use inception_v3, or pass the reference images."
            )
        return {}
    try:
        content = json.loads(str(metadata))
        name, weights, format = (content[key] for key in ("extractor", "weights_sha256", "format"))
    except (ValueError, TypeError, KeyError):
        format = None
    if format != FORMAT:
        raise ReferenceFileError(
            f"`metadata` of {file} was not written by write_reference_file: the file is damaged, or from a later"
            " version. Recreate it."
        )
    if name != extractor.name:
        raise ReferenceFileError(
            f"The statistics in {file} are from {name}, but the samples are evaluated with {extractor.name}: use"
            f" {name}, or recompute the statistics with {extractor.name}."
        )
    if weights != extractor.weights_hash():
        raise ReferenceFileError(
            f"The statistics in {file} are from {name} with other weights (SHA-256 {weights} instead of"
            f" {extractor.weights_hash()}): use those weights, or recompute the statistics."
        )
    return content


def _read_gaussian(file: str | Path, arrays: dict[str, np.ndarray | None], mu: str, sigma: str) -> Gaussian | None:
    if mu not in arrays and sigma not in arrays:
        return None
    mean, covariance = arrays.get(mu), arrays.get(sigma)
    if mean is None or covariance is None or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ReferenceFileError(f"{file} must have {mu} of shape (D,) and {sigma} of shape (D, D), or neither.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ReferenceFileError(f"{mu} or {sigma} of {file} holds infinities or NaN: the file is damaged.")
    return Gaussian(torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64)))
