import math
import warnings

import pytest
import torch
from torchmetrics.image.inception import InceptionScore

from diffusers_pisdm.evaluation.metrics.inception_score import count_splits, inception_score


def score_of(logits, **options):
    scores = inception_score(logits, **options)
    assert [value.dtype for value in scores] == [torch.float64] * 2
    return tuple(value.item() for value in scores)


def test_sure_and_varied_answers_score_the_number_of_classes():
    logits = 1000 * torch.eye(5).repeat(20, 1)  # (100, 5); the other classes' probabilities underflow
    assert score_of(logits) == pytest.approx((5, 0))
    assert score_of(logits[::5]) == pytest.approx((1, 0))  # one class only
    assert score_of(torch.zeros(30, 5)) == pytest.approx((1, 0))  # no idea


def test_the_score_is_that_of_its_definition():
    """exp of the mutual information of image and class, of two answers with probabilities that are easy."""
    logits = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log().repeat(8, 1)
    information = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert score_of(logits)[0] == pytest.approx(math.exp(information), rel=1e-6)


def test_one_split_is_torchmetrics_score():
    logits = torch.randn(60, 9, generator=torch.Generator().manual_seed(0)) * 3
    other = InceptionScore(feature=torch.nn.Identity(), splits=1)
    other.update(logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its deviation of one split is NaN
        wanted, spread = other.compute()
    assert spread.isnan()
    assert score_of(logits) == (pytest.approx(wanted.item(), rel=1e-5), 0)


@pytest.mark.parametrize(("count", "splits"), [(1, 1), (9, 1), (10, 1), (19, 1), (20, 2), (50, 5), (59, 5)])
def test_splits_are_as_many_as_fit(count, splits):
    assert count_splits(count, 10) == splits
    value, spread = score_of(torch.randn(count, 4, generator=torch.Generator().manual_seed(0)), split_size=10)
    assert value >= 1 and (spread > 0) == (splits > 1)


def test_ordered_classes_are_shuffled_over_the_splits():
    logits = 50 * torch.eye(4).repeat_interleave(50, dim=0)  # (200, 4), sorted by class
    value, _ = score_of(logits, split_size=50)
    assert value > 3.5  # each split would have one class and score 1


def test_the_order_follows_from_the_seed_and_leaves_the_global_generator_alone():
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = score_of(logits, split_size=8, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert score_of(logits, split_size=8, seed=1) == first != score_of(logits, split_size=8, seed=2)


def test_splits_have_at_least_one_image():
    with pytest.raises(ValueError, match="`split_size` has to be at least 1 but is 0"):
        inception_score(torch.zeros(3, 2), split_size=0)
