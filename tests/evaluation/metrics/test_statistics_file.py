import json
import re

import numpy as np
import pytest
import torch

from diffusers_pisdm.evaluation import (
    ListImages,
    ReferenceFileError,
    collect_statistics,
    read_reference_file,
    write_reference_file,
)
from tests.evaluation.pixel_features import InceptionStandIn, PixelFeatures


@pytest.fixture(scope="module")
def pictures(real_images):
    return ((real_images[:20] + 1) * 127.5).round().byte()  # (20, 3, 64, 64)


@pytest.fixture(scope="module")
def inception():
    return InceptionStandIn(name="inception_v3").eval()


@pytest.fixture(scope="module")
def pixels():
    return PixelFeatures().eval()


@pytest.fixture
def arrays(pictures, inception):
    """What ADM's files hold: statistics of the whole set, and images of a part."""
    with torch.no_grad():
        features = inception(pictures)
    pooled, spatial = features.pooled.double().numpy(), features.spatial.double().numpy()
    return {
        "mu": pooled.mean(axis=0),
        "sigma": np.cov(pooled, rowvar=False),
        "mu_s": spatial.mean(axis=0),
        "sigma_s": np.cov(spatial, rowvar=False),
        "arr_0": pictures[:12].permute(0, 2, 3, 1).numpy(),
    }


def save(path, arrays):
    np.savez(path, **arrays)
    return path


def read(path, extractor, **options):
    return read_reference_file(path, extractor, show_progress=False, **options)


def test_adms_files(tmp_path, arrays, pictures, inception):
    found = read(save(tmp_path / "adm.npz", arrays), inception)
    whole = collect_statistics(ListImages(pictures), inception, show_progress=False)
    assert found.num_images is None and found.missing == {}
    torch.testing.assert_close(found.features, whole.features[:12])
    for name in ("pooled", "spatial"):
        for ours, theirs in zip(getattr(found, name), getattr(whole, name)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_adms_files_in_single_precision_and_with_fewer_images(tmp_path, arrays, inception):
    single = {name: value if name == "arr_0" else value.astype(np.float32) for name, value in arrays.items()}
    found = read(save(tmp_path / "adm.npz", single), inception, max_features=5, seed=1)
    assert found.pooled.covariance.dtype == torch.float64
    every = read(tmp_path / "adm.npz", inception).features
    assert found.features.shape == (5, 48)
    assert all(any(torch.allclose(row, other) for other in every) for row in found.features)


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        (("arr_0",), {"features": "neither features nor images"}),
        (("mu_s", "sigma_s"), {"spatial": "has no mu_s and sigma_s"}),
        (("mu", "sigma", "arr_0"), {"pooled": "has no mu and sigma", "features": "neither"}),
    ],
)
def test_files_with_some_of_it(tmp_path, arrays, inception, left_out, missing):
    some = {name: value for name, value in arrays.items() if name not in left_out}
    found = read(save(tmp_path / "some.npz", some), inception)
    assert found.missing.keys() == missing.keys()
    for name, reason in missing.items():
        assert getattr(found, name) is None and reason in found.missing[name]


def test_a_file_of_images_alone_is_for_any_network(tmp_path, arrays, pictures, pixels):
    samples = {"arr_0": arrays["arr_0"], "arr_1": np.arange(12)}  # with their classes, as ADM writes samples
    found = read(save(tmp_path / "images.npz", samples), pixels)
    wanted = collect_statistics(ListImages(pictures[:12]), pixels, show_progress=False)
    assert (found.num_images, found.image_size) == (12, (64, 64))
    assert torch.equal(found.pooled.covariance, wanted.pooled.covariance)


def test_our_own_files_come_back_as_they_were(tmp_path, pictures, pixels):
    written = collect_statistics(ListImages(pictures), pixels, max_features=15, show_progress=False)
    write_reference_file(tmp_path / "stats.npz", written)
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]
    found = read(tmp_path / "stats.npz", pixels)
    assert (found.num_images, found.image_size, found.missing) == (20, (64, 64), {})
    assert torch.equal(found.features, written.features)
    for name in ("pooled", "spatial"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(found, name), getattr(written, name)))
    assert read(tmp_path / "stats.npz", pixels, max_features=4).features.shape == (4, 48)
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as file:
        assert set(file.files) == {"mu", "sigma", "mu_s", "sigma_s", "features", "metadata"}
        metadata = json.loads(str(file["metadata"]))
    assert (metadata["extractor"], metadata["num_images"]) == ("pixels", 20)


def test_statistics_of_another_network_are_refused(tmp_path, arrays, pictures, inception, pixels):
    with pytest.raises(ReferenceFileError, match=r"Inception v3; but .* with pixels\. Use inc"):
        read(save(tmp_path / "adm.npz", arrays), pixels)
    write_reference_file(tmp_path / "ours.npz", collect_statistics(ListImages(pictures), pixels, show_progress=False))
    with pytest.raises(ReferenceFileError, match=r"ours\.npz are from pixels, but .* with inception_v3: use"):
        read(tmp_path / "ours.npz", inception)
    (tmp_path / "weights").write_bytes(b"others")
    with pytest.raises(ReferenceFileError, match="from pixels with other weights"):
        read(tmp_path / "ours.npz", PixelFeatures(tmp_path / "weights"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": np.zeros((3, 3))}, "must have mu of shape (D,) and sigma of shape (D, D)"),
        ({"mu_s": np.full(12, np.nan)}, "mu_s or sigma_s of"),
        ({"metadata": np.array("{}")}, "not written by write_reference_file"),
        ({"metadata": np.array("no json")}, "not written by write_reference_file"),
        ({"metadata": np.array("[1]")}, "not written by write_reference_file"),
        ({"features": np.zeros(4)}, "`features` of"),
        ({"mu": np.array([{"a": 1}], dtype=object)}, "cannot be read as an .npz file of numbers"),
    ],
)
def test_damaged_files(tmp_path, arrays, inception, changes, message):
    with pytest.raises(ReferenceFileError, match=re.escape(message)):
        read(save(tmp_path / "damaged.npz", {**arrays, **changes}), inception)


def test_files_that_are_no_npz(tmp_path, pictures, pixels):
    with pytest.raises(ReferenceFileError, match="There is no file"):
        read(tmp_path / "missing.npz", pixels)
    (tmp_path / "a.npz").write_bytes(b"some text")
    with pytest.raises(ReferenceFileError, match=r"a.npz cannot be read"):
        read(tmp_path / "a.npz", pixels)
    with open(tmp_path / "b.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ReferenceFileError, match=r"b.npz cannot be read .*: it is an .npy file"):
        read(tmp_path / "b.npz", pixels)
    with pytest.raises(ReferenceFileError, match=r"c\.npz has neither statistics .* nor images"):
        read(save(tmp_path / "c.npz", {"labels": np.zeros(3)}), pixels)
    statistics = collect_statistics(ListImages(pictures), pixels, show_progress=False)
    with pytest.raises(ValueError, match=r"stats\.json does not end in \.npz"):
        write_reference_file(tmp_path / "stats.json", statistics)
