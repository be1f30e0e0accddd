"""Whether a model memorises its training images, measured by nearest neighbours in pixel space."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class MemorizationReport:
    """
    Args:
        distances (`torch.Tensor` of shape `(N,)`): RMS pixel distance of each sample to its nearest training image.
        indices (`torch.Tensor` of shape `(N,)`, int64): The index of that training image.
        threshold (`float`):
            The report's percentile of nearest-neighbour distances within the training set: how close near-duplicates
            in the training set are to each other.
        share_below (`float`): Share of samples closer to a training image than `threshold`.
    """

    distances: torch.Tensor
    indices: torch.Tensor
    threshold: float
    share_below: float


def nearest_neighbors(
    queries: torch.Tensor, references: torch.Tensor, chunk_size: int = 1024, exclude_self: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds each query's nearest reference, by root-mean-square (RMS) pixel difference.

    Args:
        queries (`torch.Tensor` of shape `(N, C, H, W)`), references (`torch.Tensor` of shape `(M, C, H, W)`):
            Images of the same value range and size.
        chunk_size (`int`, defaults to 1024): Queries compared at a time; memory grows with `chunk_size * M`.
        exclude_self (`bool`, defaults to `False`):
            Set if `queries` and `references` are the same set, so that no image is its own neighbour.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Distances and indices, of shape `(N,)`.

    Raises:
        ValueError: The images differ in shape.
    """
    if queries.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"`queries` of shape {tuple(queries.shape[1:])} cannot be compared with `references` of shape"
            f" {tuple(references.shape[1:])}: resize them to the same size."
        )
    references = references.flatten(1).float()  # (M, P)
    distances, indices = [], []
    for start in range(0, len(queries), chunk_size):
        chunk = queries[start : start + chunk_size].flatten(1).float()  # (n, P)
        table = torch.cdist(chunk, references)  # (n, M)
        if exclude_self:
            rows = torch.arange(len(chunk), device=table.device)
            table[rows, rows + start] = float("inf")
        nearest = table.argmin(dim=1)
        # cdist computes the table from products, which lose the digits of small distances.
        exact = (chunk - references[nearest]).square().mean(dim=1).sqrt()  # (n,)
        distances.append(exact)
        indices.append(nearest)
    return torch.cat(distances), torch.cat(indices)


def memorization_report(
    samples: torch.Tensor, training_images: torch.Tensor, percentile: float = 1.0
) -> MemorizationReport:
    """
    Compares generated images with the training set, relative to the training set's own near-duplicates.

    Args:
        samples (`torch.Tensor` of shape `(N, C, H, W)`): Generated images.
        training_images (`torch.Tensor` of shape `(M, C, H, W)`): The training set, in the same value range and size.
        percentile (`float`, defaults to 1.0): Percentile of the training set's own distances, in [0, 100].

    Returns:
        [`MemorizationReport`].
    """
    own_distances, _ = nearest_neighbors(training_images, training_images, exclude_self=True)
    threshold = torch.quantile(own_distances, percentile / 100).item()
    distances, indices = nearest_neighbors(samples, training_images)
    return MemorizationReport(distances, indices, threshold, (distances < threshold).float().mean().item())
