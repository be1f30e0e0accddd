import psutil
import pytest
import torch

from diffusers_pisdm.evaluation import ImageSource, ListImages, collect_statistics
from diffusers_pisdm.evaluation.metrics.feature_statistics import FeatureSums, draw_indices
from tests.evaluation.pixel_features import PixelFeatures, PooledOnly


@pytest.fixture(scope="module")
def extractor():
    return PixelFeatures().eval()


@pytest.fixture(scope="module")
def pictures(real_images):
    return ((real_images + 1) * 127.5).round().byte()  # (48, 3, 64, 64)


@pytest.mark.parametrize("batch_size", [7, 48])
def test_streamed_statistics_equal_those_of_all_at_once(extractor, pictures, batch_size):
    found = collect_statistics(ListImages(pictures), extractor, batch_size, show_progress=False)
    with torch.no_grad():
        wanted = extractor(pictures)
    assert (found.extractor, found.num_images, found.image_size, found.missing) == ("pixels", 48, (64, 64), {})
    torch.testing.assert_close(found.features, wanted.pooled)
    for gaussian, features in ((found.pooled, wanted.pooled), (found.spatial, wanted.spatial)):
        assert gaussian.mean.dtype == gaussian.covariance.dtype == torch.float64
        torch.testing.assert_close(gaussian.mean, features.double().mean(dim=0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gaussian.covariance, features.double().T.cov(), rtol=1e-5, atol=1e-7)


def test_sums_are_of_double_precision():
    """Far from 0 and of very different spread, as features are; in single precision 4 digits would be left."""
    x = (torch.randn(1000, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 24) + 50).float()
    sums = FeatureSums(24, x.device)
    for chunk in x.split(64):
        sums.update(chunk)
    mean, covariance = sums.gaussian()
    torch.testing.assert_close(mean, x.double().mean(dim=0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(covariance, x.double().T.cov(), rtol=1e-9, atol=1e-9)


def test_some_features_are_kept_but_all_count(extractor, pictures):
    source = ListImages(pictures)
    every = collect_statistics(source, extractor, show_progress=False)
    some = collect_statistics(source, extractor, 7, max_features=10, seed=3, show_progress=False)
    assert torch.equal(some.features, every.features[draw_indices(48, 10, seed=3)])
    torch.testing.assert_close(some.pooled.covariance, every.pooled.covariance, rtol=1e-9, atol=1e-12)


def test_indices_are_drawn_by_the_seed():
    drawn = draw_indices(100, 20, seed=1)
    assert drawn == sorted(set(drawn)) and len(drawn) == 20 and set(drawn) <= set(range(100))
    assert drawn == draw_indices(100, 20, seed=1) != draw_indices(100, 20, seed=2)
    assert draw_indices(5, None, seed=0) == draw_indices(5, 5, seed=0) == [0, 1, 2, 3, 4]


def test_what_is_missing_has_a_reason(pictures):
    found = collect_statistics(ListImages(pictures[:5]), PooledOnly(), show_progress=False)
    assert found.spatial is None and found.missing == {"spatial": "pixels gives no spatial features"}
    one = collect_statistics(ListImages(pictures[:1]), PixelFeatures(), show_progress=False)
    assert one.pooled is None and one.spatial is None and one.features.shape == (1, 48)
    assert "at least two images, but images in memory has one" in one.missing["pooled"]


class NoiseImages(ImageSource):
    """Many images that are nowhere; it notes how much memory the process has while they are read."""

    def __init__(self, count):
        super().__init__("noise")
        self.count = count
        self.resident = []

    def __len__(self):
        return self.count

    def images(self, indices):
        raise NotImplementedError

    def batches(self, batch_size, indices=None):
        generator, process = torch.Generator().manual_seed(0), psutil.Process()
        for _ in range(self.count // batch_size):
            yield torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
            self.resident.append(process.memory_info().rss)


def test_fifty_thousand_images_in_bounded_memory(extractor):
    """Neither the images, 154 MB, are held nor all features, but sums and the 500 features that are kept."""
    source = NoiseImages(50_000)
    found = collect_statistics(source, extractor, 500, max_features=500, show_progress=False)
    assert found.num_images == 50_000 and found.features.shape == (500, 48)
    assert found.pooled.covariance.diagonal().min() > 0
    assert max(source.resident) - max(source.resident[:20]) < 40_000_000  # of 123 MB that came meanwhile
