"""Does a model repeat its training images? Nearest neighbours in pixel space."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class MemorizationReport:
    """
    Args:
        distances (`torch.Tensor` of shape `(N,)`): RMS pixel distance of each sample to its nearest training image.
        indices (`torch.Tensor` of shape `(N,)`, int64): That training image.
        threshold (`float`):
            The training set's own nearest-neighbour distance at the report's percentile: as near as near-duplicates
            within the training set are to each other.
        share_below (`float`): Share of samples nearer to a training image than `threshold`.
    """

    distances: torch.Tensor
    indices: torch.Tensor
    threshold: float
    share_below: float


def nearest_neighbors(
    queries: torch.Tensor, references: torch.Tensor, chunk_size: int = 1024, exclude_self: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The nearest reference of each query, by root mean square difference of the pixels.

    Args:
        queries (`torch.Tensor` of shape `(N, C, H, W)`), references (`torch.Tensor` of shape `(M, C, H, W)`):
            Images in one range, at one size.
        chunk_size (`int`, defaults to 1024): Queries compared at a time; memory grows with `chunk_size * M`.
        exclude_self (`bool`, defaults to `False`):
            Whether `queries` and `references` are the same set, of which no image is its own neighbour.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: distances and indices of shape `(N,)`.

    Raises:
        ValueError: The images differ in shape.
    """
    if queries.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"`queries` of shape {tuple(queries.shape[1:])} cannot be compared with `references` of shape"
            f" {tuple(references.shape[1:])}: bring them to one size."
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
        # The table is made of products, which lose the digits of a small distance.
        exact = (chunk - references[nearest]).square().mean(dim=1).sqrt()  # (n,)
        distances.append(exact)
        indices.append(nearest)
    return torch.cat(distances), torch.cat(indices)


def memorization_report(
    samples: torch.Tensor, training_images: torch.Tensor, percentile: float = 1.0
) -> MemorizationReport:
    """
    Compares generated images with the training set, on the scale of the training set's own near-duplicates.

    Args:
        samples (`torch.Tensor` of shape `(N, C, H, W)`): Generated images.
        training_images (`torch.Tensor` of shape `(M, C, H, W)`): The training set, in the same range and size.
        percentile (`float`, defaults to 1.0): In [0, 100]: where in the training set's own distances the threshold is.

    Returns:
        [`MemorizationReport`].
    """
    own_distances, _ = nearest_neighbors(training_images, training_images, exclude_self=True)
    threshold = torch.quantile(own_distances, percentile / 100).item()
    distances, indices = nearest_neighbors(samples, training_images)
    return MemorizationReport(distances, indices, threshold, (distances < threshold).float().mean().item())
