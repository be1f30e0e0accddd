"""
`make test-inception` runs these in an environment of its own: torch-fidelity needs a torchvision that fits torch.
Random weights stand in for the published ones.
"""

import sys

import numpy as np
import pytest
import torch

from diffusers_pisdm.evaluation import InceptionV3, ListImages, evaluate_images, load_feature_extractor


@pytest.mark.parametrize("fault", ["ImportError('no torchvision')", "RuntimeError('no operator torchvision::nms')"])
def test_a_missing_or_broken_package_says_what_to_install(monkeypatch, tmp_path, fault):
    (tmp_path / "torch_fidelity.py").write_text(f"raise {fault}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"pip install torch-fidelity torchvision"):
        load_feature_extractor("inception_v3")


@pytest.fixture(scope="module")
def torch_fidelity():
    """The package, where it can be imported: a torchvision that does not fit torch makes it raise a RuntimeError."""
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    return torch_fidelity


@pytest.fixture(scope="module")
def weights_file(torch_fidelity, tmp_path_factory):
    """Random weights of the right names and shapes, with activations that neither die out nor explode."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # its constructor loads weights: here it keeps those it has drawn
        patch.setattr(module.torch, "load", lambda *args, **kwargs: None)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        network = module.FeatureExtractorInceptionV3("drawn", ["2048"], feature_extractor_weights_path="none")
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def extractor(weights_file):
    return load_feature_extractor("inception_v3", weights_file)


@pytest.fixture(scope="module")
def images(real_images):
    return ((real_images[::6] + 1) * 127.5).round().byte()  # (8, 3, 64, 64)


@pytest.fixture(scope="module")
def features(extractor, images):
    return extractor(images)


def test_features_are_torch_fidelitys(torch_fidelity, weights_file, images, features):
    from torch_fidelity.utils import create_feature_extractor

    names = ["2048", "logits_unbiased", "logits"]
    theirs = create_feature_extractor(
        "inception-v3-compat", names, cuda=False, feature_extractor_weights_path=str(weights_file)
    )
    with torch.no_grad():
        pooled, logits, biased = theirs(images)
    torch.testing.assert_close(features.pooled, pooled)
    torch.testing.assert_close(features.logits, logits)
    assert features.pooled.shape == (8, 2048) and features.logits.shape == (8, 1008)
    assert not torch.allclose(features.logits, biased)


def test_spatial_features_are_adms(extractor, images, features):
    """The first 7 channels of the 1x1 branch of Mixed_6d after its ReLU, flattened as TensorFlow's NHWC."""
    kept = {}
    hook = extractor.network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: kept.update(map=args[2]))
    try:
        extractor(images)
    finally:
        hook.remove()
    assert kept["map"].shape == (8, 192, 17, 17) and kept["map"].min() == 0
    nhwc = kept["map"].permute(0, 2, 3, 1).numpy()
    assert features.spatial.shape == (8, 2023)
    np.testing.assert_array_equal(features.spatial.numpy(), nhwc[..., :7].reshape(8, -1))


def test_the_batch_does_not_matter_and_nothing_is_left_behind(extractor, images, features):
    alone = extractor(images[3:4])
    for one, together in zip(alone, features):
        torch.testing.assert_close(one[0], together[3], rtol=1e-3, atol=1e-4)
    assert extractor._spatial is None


def test_metrics_are_torch_fidelitys(torch_fidelity, extractor, images, features):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    shifted = images.flip(0) // 2 + 60
    result = evaluate_images(ListImages(shifted), ListImages(images), extractor, batch_size=8, show_progress=False)
    assert [score.name for score in result.scores.values()] == ["FID", "sFID", "IS", "precision", "recall"]
    found = {name: score.value for name, score in result.scores.items()}
    ours = extractor(shifted)
    for name, key in (("frechet_distance", "pooled"), ("spatial_frechet_distance", "spatial")):
        statistics = [fid_features_to_statistics(getattr(x, key).double()) for x in (ours, features)]
        wanted = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        assert found[name] == pytest.approx(wanted, rel=1e-4)
    wanted = isc_features_to_metric(ours.logits, splits=1)
    assert found["inception_score"] == pytest.approx(wanted["inception_score_mean"], rel=1e-5)
    wanted = prc_features_to_metric(ours.pooled, features.pooled, verbose=False)
    assert (found["precision"], found["recall"]) == (wanted["precision"], wanted["recall"])


def test_precision_and_recall_are_torch_fidelitys(torch_fidelity):
    from torch_fidelity.metric_prc import prc_features_to_metric

    from diffusers_pisdm.evaluation import precision_recall

    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(300, 8, generator=generator)
    samples = torch.randn(200, 8, generator=generator) * 0.8 + 0.4
    wanted = prc_features_to_metric(samples, reference, verbose=False)
    found = precision_recall(reference, samples, chunk_size=64)
    assert 0.1 < found.recall < found.precision < 1
    assert found == (pytest.approx(wanted["precision"]), pytest.approx(wanted["recall"]))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_weights_file_that_would_run_something_is_refused(torch_fidelity, tmp_path):
    torch.save({"weight": Payload(tmp_path / "victim")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="cannot be read as a state dict of tensors"):
        load_feature_extractor("inception_v3", tmp_path / "weights.pth")
    assert not (tmp_path / "victim").exists()


def test_other_weights_are_refused(torch_fidelity, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="not hold torch-fidelity's Inception v3"):
        load_feature_extractor("inception_v3", tmp_path / "weights.pth")


def test_its_name(extractor):
    assert isinstance(extractor, InceptionV3)
    assert (extractor.name, extractor.distance_name) == ("inception_v3", "FID")
    assert len(extractor.weights_hash()) == 64
