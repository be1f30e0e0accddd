import pytest
import torch

from diffusers_pisdm.evaluation import memorization_report, nearest_neighbors


def test_distance_is_the_root_mean_square_of_the_pixel_difference(real_images):
    queries = real_images[:5] + 0.01
    distances, indices = nearest_neighbors(queries, real_images, chunk_size=2)
    assert indices.tolist() == list(range(5))
    torch.testing.assert_close(distances, torch.full((5,), 0.01), rtol=1e-4, atol=0)


def test_no_image_is_its_own_neighbour(real_images):
    distances, indices = nearest_neighbors(real_images, real_images, chunk_size=7, exclude_self=True)
    assert (indices != torch.arange(len(real_images))).all()
    by_loop = [
        min((a - b).square().mean().sqrt().item() for j, b in enumerate(real_images) if j != i)
        for i, a in enumerate(real_images[:6])
    ]
    assert distances[:6].tolist() == pytest.approx(by_loop, rel=1e-5)


def test_copies_are_counted_and_new_images_are_not(real_images):
    copies, mirrored = real_images[:4], real_images[4:16].flip(-1) * 0.5
    report = memorization_report(torch.cat([copies, mirrored]), real_images)
    assert report.share_below == pytest.approx(4 / 16)
    assert report.indices[:4].tolist() == [0, 1, 2, 3]
    assert report.distances[4:].min() > report.threshold > report.distances[:4].max()


def test_images_of_different_size_are_refused(real_images):
    with pytest.raises(ValueError, match="resize them"):
        nearest_neighbors(real_images[..., ::2], real_images)
