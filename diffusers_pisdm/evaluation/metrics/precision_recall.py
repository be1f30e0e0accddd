"""What share of the samples looks real (precision), and what share of the reference they cover (recall)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tqdm.auto import tqdm


# Squared distances below this share of the vectors' squared lengths count as 0: float32 features are no more precise.
SAME_POINT = 1e-12


class PrecisionRecall(NamedTuple):
    """
    Args:
        precision (`float`): Share of the samples within the reference's manifold.
        recall (`float`): Share of the reference within the samples' manifold.
    """

    precision: float
    recall: float


def precision_recall(
    reference: torch.Tensor,
    samples: torch.Tensor,
    num_neighbors: int = 3,
    chunk_size: int = 2048,
    show_progress: bool = False,
) -> PrecisionRecall:
    """
    Precision and recall of samples, as in ADM's evaluation suite. A set's manifold is the union of closed balls around
    its points, where each ball extends to the point's k-th nearest neighbour in the set.

    Distances are computed in float64, in tables of `chunk_size` by `chunk_size`, so memory does not grow quadratically
    with the set size.

    Args:
        reference (`torch.Tensor` of shape `(N, D)`), samples (`torch.Tensor` of shape `(M, D)`):
            Features, on the same device, which must support float64.
        num_neighbors (`int`, defaults to 3): k.
        chunk_size (`int`, defaults to 2048): Points of each set compared at a time.
        show_progress (`bool`, defaults to `False`): Whether to show a progress bar.

    Returns:
        [`PrecisionRecall`].

    Raises:
        ValueError: A set has fewer than k + 1 points, or the features differ in length.

    Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019.
    """
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"The reference's features have {reference.shape[1]} dimensions, the samples' have {samples.shape[1]}."
        )
    for name, points in (("reference", reference), ("samples", samples)):
        if len(points) < num_neighbors + 1:
            raise ValueError(
                f"{num_neighbors} neighbours need at least {num_neighbors + 1} points: `{name}` has {len(points)}."
            )
    chunks = -(-len(reference) // chunk_size), -(-len(samples) // chunk_size)
    tables = chunks[0] ** 2 + chunks[1] ** 2 + chunks[0] * chunks[1]
    with tqdm(total=tables, desc="precision and recall", unit="table", disable=not show_progress) as progress:
        reference_radii = _ball_radii(reference, num_neighbors, chunk_size, progress)
        sample_radii = _ball_radii(samples, num_neighbors, chunk_size, progress)
        sample_is_real = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
        reference_is_covered = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
        for i in range(0, len(reference), chunk_size):
            rows = slice(i, i + chunk_size)
            for j in range(0, len(samples), chunk_size):
                columns = slice(j, j + chunk_size)
                table = squared_distances(reference[rows], samples[columns])  # (n, m)
                sample_is_real[columns] |= (table <= reference_radii[rows, None]).any(dim=0)
                reference_is_covered[rows] |= (table <= sample_radii[None, columns]).any(dim=1)
                progress.update()
    return PrecisionRecall(sample_is_real.double().mean().item(), reference_is_covered.double().mean().item())


def _ball_radii(points: torch.Tensor, num_neighbors: int, chunk_size: int, progress: tqdm) -> torch.Tensor:
    """Squared distance (N,) of each point to its k-th nearest neighbour other than itself."""
    radii = []
    for i in range(0, len(points), chunk_size):
        rows = points[i : i + chunk_size]
        nearest = torch.full((len(rows), num_neighbors), float("inf"), dtype=torch.float64, device=points.device)
        for j in range(0, len(points), chunk_size):
            table = squared_distances(rows, points[j : j + chunk_size])  # (n, m)
            if i == j:
                table.fill_diagonal_(float("inf"))
            near = table.topk(min(num_neighbors, table.shape[1]), dim=1, largest=False).values
            candidates = torch.cat([nearest, near], dim=1)
            nearest = candidates.topk(num_neighbors, dim=1, largest=False).values  # (n, k), ascending
            progress.update()
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared distances (N, M) between points (N, D) and (M, D), float64, exactly 0 for equal points."""
    x, y = x.double(), y.double()
    lengths = x.square().sum(dim=1, keepdim=True) + y.square().sum(dim=1)  # (N, M)
    table = torch.addmm(lengths, x, y.T, alpha=-2)
    return table.masked_fill_(table < SAME_POINT * lengths, 0)
