import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from diffusers_pisdm.evaluation.metrics.frechet_distance import frechet_distance


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_rotation(size, seed):
    return torch.linalg.qr(randn(size, size, seed=seed)).Q


def covariance(features):
    return features.T.cov()


def distance_of_few(x, y):
    """
    The distance of two sets with fewer vectors than dimensions, exact to rounding: with C = F F^T for the centred
    vectors F^T / sqrt(n - 1), the trace of the root is the sum of the singular values of a small matrix.
    """
    a, b = ((z - z.mean(dim=0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    distance = (x.mean(dim=0) - y.mean(dim=0)).square().sum() + a.square().sum() + b.square().sum()
    return distance - 2 * torch.linalg.svdvals(a @ b.T).sum()


def test_gaussians_whose_covariances_commute():
    """There the trace of the root is the sum of the products of the standard deviations."""
    rotation = random_rotation(20, seed=1)
    std_1, std_2 = randn(20, seed=2).abs(), randn(20, seed=3).abs()
    mean_1, mean_2 = randn(20, seed=4), randn(20, seed=5)
    wanted = (mean_1 - mean_2).square().sum() + (std_1 - std_2).square().sum()
    covariances = [rotation @ std.square().diag() @ rotation.T for std in (std_1, std_2)]
    found = frechet_distance(mean_1, covariances[0], mean_2, covariances[1])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_gaussians_in_one_and_two_dimensions():
    one = torch.tensor([3.0], dtype=torch.float64), torch.tensor([[4.0]], dtype=torch.float64)
    two = torch.tensor([1.0], dtype=torch.float64), torch.tensor([[25.0]], dtype=torch.float64)
    assert frechet_distance(*one, *two).item() == pytest.approx((3 - 1) ** 2 + (2 - 5) ** 2, rel=1e-14)

    # In two dimensions the trace of the root of M is sqrt(trace M + 2 sqrt(det M)), also where C1 C2 is not C2 C1.
    a, b = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([[1.0, -0.3], [-0.3, 3.0]]).double()
    product = a @ b
    wanted = a.trace() + b.trace() - 2 * (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(frechet_distance(zero, a, zero, b), wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("num_1", "num_2"), [(12, 15), (12, 500)])
def test_fewer_vectors_than_dimensions(num_1, num_2):
    """Covariances are singular; roots of eigenvalues, as torchmetrics takes them, are then good to few digits."""
    scale = torch.arange(1, 97, dtype=torch.float64).pow(-1)
    x, y = randn(num_1, 96, seed=1) * scale + 2, randn(num_2, 96, seed=2) * scale * 1.2 + 2
    wanted = distance_of_few(x, y)
    statistics = x.mean(dim=0), covariance(x), y.mean(dim=0), covariance(y)
    assert abs(frechet_distance(*statistics) - wanted) < 1e-10
    assert abs(_compute_fid(*statistics) - wanted) > 1e-9


def test_a_set_has_no_distance_to_itself():
    for count in (10, 200):
        x = randn(count, 64, seed=count) + 1
        statistics = x.mean(dim=0), covariance(x)
        assert 0 <= frechet_distance(*statistics, *statistics) < 1e-11
    zero = torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    assert frechet_distance(*zero, *zero) == 0  # constant features


def test_it_is_symmetric_and_does_not_know_directions():
    x, y, rotation = randn(40, 16, seed=1), randn(50, 16, seed=2) * 2 + 1, random_rotation(16, seed=3)
    statistics = [(z.mean(dim=0), covariance(z)) for z in (x, y, x @ rotation, y @ rotation)]
    there, back = frechet_distance(*statistics[0], *statistics[1]), frechet_distance(*statistics[1], *statistics[0])
    torch.testing.assert_close(there, back, rtol=1e-12, atol=0)
    torch.testing.assert_close(there, frechet_distance(*statistics[2], *statistics[3]), rtol=1e-12, atol=0)
