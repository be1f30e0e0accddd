import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.equal_budget.verdicts import (
    Difference,
    ResampledDistance,
    compare_distances,
    resampled_distances,
    run_features,
)
from diffusers_pisdm.evaluation import Gaussian
from diffusers_pisdm.evaluation.metrics.frechet_distance import frechet_distance
from tests.evaluation.pixel_features import PixelFeatures


def draw(seed, count=60, shift=0.0):
    random = torch.Generator().manual_seed(seed)
    return shift + torch.randn(count, 8, generator=random, dtype=torch.float64)


REFERENCE = Gaussian(torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("count", [5, 60])  # fewer than features, and more
def test_the_distance_of_some_images_is_that_of_their_mean_and_covariance(count):
    mixing = draw(0, 8)
    reference = Gaussian(draw(1, 1)[0], mixing @ mixing.T)
    features, rows = draw(2, count, shift=0.5), np.array([0, 3, 3, 4, 1, 0, 2])
    chosen = features[torch.from_numpy(rows)]
    expected = frechet_distance(*reference, chosen.mean(0), chosen.T.cov())
    assert ResampledDistance(features, reference)(rows) == pytest.approx(expected.item(), rel=1e-7)


def compare(*models, reference=REFERENCE):
    return compare_distances(
        *([resampled_distances(images, reference, seed) for seed, images in enumerate(runs)] for runs in models)
    )


def test_a_model_is_better_or_worse_if_its_seeds_and_images_agree():
    near, far = ([draw(seed, shift=shift) for seed in (0, 1, 2)] for shift in (0.2, 0.5))
    better, worse = compare(near, far), compare(far, near)
    assert better.verdict == "better" and better.low < better.percent < better.high < 0
    assert worse.verdict == "worse" and 0 < worse.low < worse.percent < worse.high
    whole = [np.mean([ResampledDistance(x, REFERENCE)(np.arange(60)) for x in runs]) for runs in (near, far)]
    assert better.percent == pytest.approx(100 * (whole[0] / whole[1] - 1))


def test_other_images_of_the_same_model_cannot_be_told_apart():
    found = compare(*([draw(seed, shift=0.3) for seed in seeds] for seeds in ((0, 1, 2), (3, 4, 5))))
    assert found.verdict == "cannot be told" and found.low < 0 < found.high


def test_seeds_that_disagree_cannot_tell():
    theirs = [draw(seed, shift=0.4) for seed in (0, 1)]
    assert compare([draw(0, shift=0.2), draw(1, shift=0.55)], theirs).verdict == "cannot be told"


def test_pairs_draw_the_same_images():
    """Both models' images of a class and noise have the same features but for a scale: nothing is left to chance."""
    theirs = [draw(seed) for seed in (0, 1)]
    nothing = Gaussian(torch.zeros(8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64))
    found = compare([2 * features for features in theirs], theirs, reference=nothing)
    assert found == Difference(*[pytest.approx(300)] * 3, seeds=2)
    first, second = (resampled_distances(theirs[0], nothing, seed) for seed in (0, 1))
    assert first[0] == second[0] and not np.isclose(first[1:], second[1:]).any()  # other seeds draw others


def test_features_are_those_of_the_images_and_kept(tmp_path):
    folder = tmp_path / "samples"
    for index, colour in enumerate(("red", "blue")):
        (folder / "000").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(folder / "000" / f"{index}.png")
    found = run_features(tmp_path, folder, PixelFeatures())
    assert len(found) == 2 and not torch.equal(found[0], found[1])
    (folder / "000" / "0.png").unlink()
    assert torch.equal(run_features(tmp_path, folder, PixelFeatures()), found)


@pytest.mark.parametrize(
    "percent, low, high, seeds, printed",
    [
        (-5.04, -8, -2, 2, "-5.0% (-8.0 to -2.0): better"),
        (5, -8, 12, 2, "+5.0% (-8.0 to +12.0): cannot be told"),
        (5, 1, 12, 3, "+5.0% (+1.0 to +12.0): worse"),
        (-0.4, -0.6, -0.2, 3, "-0.4% (-0.6 to -0.2): as good"),
        (0.4, 0.2, 0.6, 3, "+0.4% (+0.2 to +0.6): as good"),
        (0.4, -0.2, 0.9, 3, "+0.4% (-0.2 to +0.9): cannot be told"),
        (0.6, 0.2, 0.9, 3, "+0.6% (+0.2 to +0.9): worse"),
        (-20, -25, -15, 1, "-20.0% (-25.0 to -15.0): one seed"),
    ],
)
def test_a_verdict_needs_seeds_and_a_difference_that_matters(percent, low, high, seeds, printed):
    assert str(Difference(percent, low, high, seeds)) == printed
