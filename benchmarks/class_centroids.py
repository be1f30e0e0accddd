"""Whether pictures look like their class: by the nearest mean of the training images' features."""

from __future__ import annotations

import torch


def class_centroids(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes that occur, (K,), and the mean feature of each, (K, D), of features (N, D) with labels (N,)."""
    classes, places = labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), features.shape[1], dtype=torch.float64).index_add(0, places, features.double())
    return classes, sums / torch.bincount(places)[:, None]


def nearest_class(features: torch.Tensor, classes: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The class whose centroid is nearest to each of the features (N, D): (N,)."""
    return classes[torch.cdist(features.double(), centroids).argmin(dim=1)]
