import pytest
import torch

from diffusers_pisdm.evaluation import precision_recall
from diffusers_pisdm.evaluation.metrics.precision_recall import squared_distances


def line(*positions):
    return torch.tensor(positions, dtype=torch.float32).view(-1, 1)


def by_definition(reference, samples, k):
    """Kynkaanniemi's definition, with the whole table of distances, each the norm of a difference."""

    def distances(x, y):
        return (x.double()[:, None] - y.double()[None]).norm(dim=2)

    def share_within(points, manifold):
        radii = distances(manifold, manifold).sort(dim=1).values[:, k]  # the nearest is the point itself
        return (distances(points, manifold) <= radii).any(dim=1).double().mean().item()

    return share_within(samples, reference), share_within(reference, samples)


@pytest.mark.parametrize("chunk_size", [3, 7, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_random_points_in_chunks_of_any_size(chunk_size, k):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(40, 3, generator=generator)
    samples = torch.randn(31, 3, generator=generator) + 1.2
    wanted = by_definition(reference, samples, k)
    assert 0.2 < wanted[0] < 1 and 0.2 < wanted[1] < 1
    assert precision_recall(reference, samples, k, chunk_size) == pytest.approx(wanted, abs=1e-12)


def test_a_constructed_manifold():
    """Points at 0, 1, 2, 3 reach 2, 1, 1, 2 with k = 2: the manifold is [-2, 5], closed."""
    reference = line(0, 1, 2, 3)
    samples = line(-2, 5, 5.001, -2.001, 1.5)
    assert precision_recall(reference, samples, num_neighbors=2).precision == 3 / 5


def test_a_part_of_the_reference_is_precise_and_does_not_recall():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(100, 4, generator=generator)
    right = left + 100
    found = precision_recall(torch.cat([left, right]), left)
    assert found.precision == 1 and found.recall == 0.5
    assert precision_recall(left, torch.cat([left, right])) == (0.5, 1)
    assert precision_recall(left, right) == (0, 0)


def test_equal_sets():
    points = torch.rand(50, 600, generator=torch.Generator().manual_seed(0)) + 30  # long vectors, near to each other
    assert precision_recall(points, points.flip(0)) == (1, 1)


def test_repeated_points_have_balls_without_extent():
    """Their own place is in them, nevertheless."""
    point = torch.rand(1, 600, generator=torch.Generator().manual_seed(0)) + 30
    collapsed = point.repeat(10, 1)
    assert precision_recall(collapsed, collapsed) == (1, 1)
    assert precision_recall(collapsed, collapsed + 1e-3) == (0, 0)


def test_distances_of_equal_points_are_zero():
    points = torch.rand(20, 2048, generator=torch.Generator().manual_seed(0)) * 3
    table = squared_distances(points, points)
    assert table.dtype == torch.float64 and (table.diagonal() == 0).all()
    off_diagonal = ~torch.eye(20, dtype=torch.bool)
    wanted = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(table[off_diagonal], wanted[off_diagonal], rtol=1e-12, atol=0)
    assert (squared_distances(points, points * (1 + 1e-4)).diagonal() > 0).all()


def test_too_few_points_or_other_features():
    with pytest.raises(ValueError, match="at least 4 points: `samples` has 3"):
        precision_recall(line(1, 2, 3, 4), line(1, 2, 3))
    with pytest.raises(ValueError, match="have 1 dimensions, the samples' have 2"):
        precision_recall(line(1, 2, 3, 4), torch.zeros(4, 2))
