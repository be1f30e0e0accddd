"""The Frechet distance of two sets of features, from sums that are kept while the features stream by."""

from __future__ import annotations

import torch
from torch import nn


try:
    from torchmetrics.image.fid import FrechetInceptionDistance
except (ImportError, RuntimeError) as error:  # it imports torchvision, which may not fit torch
    raise ImportError(
        "The metrics need torchmetrics, and where there is a torchvision, one that fits torch: pip install"
        f" 'diffusers-pisdm[evaluate]'. ({error})"
    ) from error


class FrechetDistance(FrechetInceptionDistance):
    """
    torchmetrics' `FrechetInceptionDistance` of features that are extracted already, instead of images. It keeps sums
    in float64, not features; two metrics are added by `merge_state`.

    Args:
        num_features (`int`): D, the length of a feature vector.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017, equation 6.
    """

    def __init__(self, num_features: int):
        super().__init__(feature=_FeaturesAsTheyAre(num_features))
        self.num_features = num_features
        self._reference: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, features: torch.Tensor, real: bool) -> None:
        """
        Args:
            features (`torch.Tensor` of shape `(B, D)`): Of some images.
            real (`bool`): Whether these are of the reference, not of the samples.

        Raises:
            ValueError: The features have another shape.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"Features must be of shape (B, {self.num_features}) but are of shape {tuple(features.shape)}."
            )
        super().update(features, real)

    def set_reference(self, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        """
        Compares with these statistics, of a file say, instead of features of the reference.

        Args:
            mean (`torch.Tensor` of shape `(D,)`), covariance (`torch.Tensor` of shape `(D, D)`): Of the reference.

        Raises:
            ValueError: They have other shapes.
        """
        shapes = tuple(mean.shape), tuple(covariance.shape)
        if shapes != ((self.num_features,), (self.num_features, self.num_features)):
            raise ValueError(f"Mean and covariance of {self.num_features} features cannot be of shapes {shapes}.")
        self._reference = mean.double(), covariance.double()

    def statistics(self, real: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            real (`bool`): Whether those of the reference, not of the samples.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: mean of shape `(D,)` and covariance of shape `(D, D)`, float64.

        Raises:
            ValueError: There are fewer than two feature vectors.
        """
        if real and self._reference is not None:
            return self._reference
        kind = "real" if real else "fake"
        count = getattr(self, f"{kind}_features_num_samples")
        if count < 2:
            raise ValueError(f"A covariance needs two images or more: there are {count.item()}.")
        mean = getattr(self, f"{kind}_features_sum") / count
        squares = getattr(self, f"{kind}_features_cov_sum")
        return mean, (squares - count * torch.outer(mean, mean)) / (count - 1)

    def compute(self) -> torch.Tensor:
        """The distance as a scalar, float64; see [`frechet_distance`]."""
        mean, covariance = (x.to(self.fake_features_sum.device) for x in self.statistics(real=True))
        return frechet_distance(mean, covariance, *self.statistics(real=False))


class _FeaturesAsTheyAre(nn.Identity):
    """What torchmetrics takes for the network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def frechet_distance(
    mean_1: torch.Tensor, covariance_1: torch.Tensor, mean_2: torch.Tensor, covariance_2: torch.Tensor
) -> torch.Tensor:
    """
    |m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Wasserstein distance of two Gaussians.

    With C = F F^T, the trace of the root is the sum of the singular values of F1^T F2. torchmetrics and others take
    roots of the eigenvalues of C1 C2, where an error of 1e-16 becomes one of 1e-8, a thousand times: with fewer images
    than features, their distance of a set to itself is not 0 but -2e-5. Here it is 0 to 12 digits of the traces.

    Args:
        mean_1, mean_2 (`torch.Tensor` of shape `(D,)`): float64.
        covariance_1, covariance_2 (`torch.Tensor` of shape `(D, D)`): float64, symmetric; may be singular.

    Returns:
        `torch.Tensor`: A scalar, float64, not negative.
    """
    root_trace = torch.linalg.svdvals(_factor(covariance_1).T @ _factor(covariance_2)).sum()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * root_trace
    return distance.clamp_min(0)


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """F of shape (D, rank) with F F^T = C."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    noise = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1]
    kept = eigenvalues > noise
    return vectors[:, kept] * eigenvalues[kept].sqrt()
