"""Whether one run's pictures are better than another's: Fréchet distances with intervals from a bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.equal_budget.reference_images import feature_file
from diffusers_pisdm.data.image_transform import decode_image
from diffusers_pisdm.evaluation import FeatureExtractor, FolderImages, Gaussian, collect_statistics
from diffusers_pisdm.utils.files import write_whole


IMAGE_RESAMPLES = 200  # of each run's images
RESAMPLES = 10_000  # of the seeds, each with one of the former
NEGLIGIBLE = 0.5  # percent


@dataclass(frozen=True)
class Difference:
    """A mean difference to the baseline in percent over some seeds, and its 95% interval."""

    percent: float
    low: float
    high: float
    seeds: int

    @property
    def verdict(self) -> str:
        """
        Smaller is better, if the interval is on one side of zero and not next to it. One seed cannot show how much
        seeds differ.
        """
        if self.seeds < 2:
            return "one seed"
        if self.low <= 0 <= self.high:
            return "cannot be told"
        if abs(self.percent) < NEGLIGIBLE:
            return "as good"
        return "better" if self.high < 0 else "worse"

    def __str__(self) -> str:
        return f"{self.percent:+.1f}% ({self.low:+.1f} to {self.high:+.1f}): {self.verdict}"


class ResampledDistance:
    """
    The Fréchet distance of some of N images to a reference, again and again: a problem of size N, not of the number of
    features.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): The images' features.
        reference ([`Gaussian`]): Mean and covariance of the reference's.
    """

    def __init__(self, features: torch.Tensor, reference: Gaussian) -> None:
        self.features = features.double() - reference.mean  # (N, D)
        self.covariance_trace = reference.covariance.trace()
        self.products = self.features @ reference.covariance @ self.features.T  # (N, N)

    def __call__(self, rows: np.ndarray) -> float:
        """The distance of the images with these indices, which may repeat."""
        rows = torch.as_tensor(rows)
        features = self.features[rows]  # (N, D)
        mean, count = features.mean(0), len(rows)
        trace = (features - mean).square().sum() / (count - 1)
        products = self.products[rows][:, rows]
        products = products - products.mean(0) - products.mean(1, keepdim=True) + products.mean()  # of centred rows
        # C1 = X^T X / (N - 1), so that C1 C2 has the eigenvalues of X C2 X^T / (N - 1).
        root_trace = torch.linalg.eigvalsh(products / (count - 1)).clamp_min(0).sqrt().sum()
        return (mean.square().sum() + trace + self.covariance_trace - 2 * root_trace).item()


def run_features(folder: Path, samples: Path, extractor: FeatureExtractor) -> torch.Tensor:
    """The features (N, D) of a run's samples, kept in `folder`."""
    file = feature_file(folder, "features", extractor, ".npy")
    if not file.exists():
        found = collect_statistics(FolderImages(samples, decode_image), extractor, show_progress=False).features
        with write_whole(file) as whole, open(whole, "wb") as content:
            np.save(content, found.numpy())
    return torch.from_numpy(np.load(file))


def resampled_distances(features: torch.Tensor, reference: Gaussian, seed: int) -> np.ndarray:
    """
    The Fréchet distances (1 + IMAGE_RESAMPLES,) of a run's images (N, D): first as they are, then drawn with
    replacement. Runs with equal seeds draw the same images, as these share class and noise.
    """
    random, distance, count = np.random.default_rng(seed), ResampledDistance(features, reference), len(features)
    draws = [np.arange(count), *(random.integers(count, size=count) for _ in range(IMAGE_RESAMPLES))]
    return np.array([distance(rows) for rows in draws])


def compare_distances(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Difference:
    """
    How much larger the Fréchet distances of a model's runs are than a baseline's: a bootstrap over seeds and images,
    of which both get the same. Distances of resampled images are too large, for both models, so that the interval is
    moved to the difference of the images as they are.

    Args:
        ours (`Sequence[np.ndarray]`), theirs (`Sequence[np.ndarray]`):
            [`resampled_distances`] of each seed's images, in the same order.
    """
    distances = np.stack([ours, theirs], axis=-1)  # (seeds, 1 + IMAGE_RESAMPLES, 2)

    def percent(chosen: np.ndarray) -> np.ndarray:
        """(..., seeds, 2) to (...)."""
        ratio = chosen[..., 0].mean(-1) / chosen[..., 1].mean(-1)
        return 100 * (ratio - 1)

    random, shape = np.random.default_rng(0), (RESAMPLES, len(ours))
    seeds, images = random.integers(len(ours), size=shape), random.integers(1, 1 + IMAGE_RESAMPLES, size=shape)
    found, drawn = percent(distances[:, 0]), percent(distances[seeds, images])  # (), (RESAMPLES,)
    low, high = np.quantile(drawn - drawn.mean() + found, [0.025, 0.975])
    return Difference(float(found), float(low), float(high), len(ours))
