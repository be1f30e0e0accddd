"""Whether pictures look like their class, judged by the nearest class mean of the training images' features."""

from __future__ import annotations

import torch


def class_centroids(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes present (K,) and the mean feature of each (K, D), for features (N, D) with labels (N,)."""
    classes, places = labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), features.shape[1], dtype=torch.float64).index_add(0, places, features.double())
    return classes, sums / torch.bincount(places)[:, None]


def nearest_class(features: torch.Tensor, classes: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The class (N,) whose centroid is nearest, for features (N, D)."""
    return classes[torch.cdist(features.double(), centroids).argmin(dim=1)]
