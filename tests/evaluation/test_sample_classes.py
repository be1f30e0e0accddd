from collections import Counter

import numpy as np
import pytest

from diffusers_pisdm.evaluation import SampleSettings, sample_classes
from diffusers_pisdm.evaluation.sample_classes import count_classes
from tests.pipelines.tiny_cascade import NUM_CLASSES, make_cascade
from tests.pipelines.tiny_dit import make_dit


def classes(num_samples, rule="balanced", num_classes=10, seed=0):
    return sample_classes(SampleSettings(num_samples, seed, rule), num_classes)


def test_any_first_part_of_balanced_classes_is_balanced():
    drawn = classes(1005, num_classes=100)
    for length in (1, 99, 100, 101, 250, 1005):
        counts = [drawn[:length].count(class_id) for class_id in range(100)]
        assert max(counts) - min(counts) <= 1


def test_balanced_classes_come_in_another_order_each_round_and_seed():
    rounds = [tuple(classes(300, num_classes=100)[start : start + 100]) for start in (0, 100, 200)]
    rounds += [tuple(range(100)), tuple(classes(100, num_classes=100, seed=1))]
    assert len(set(rounds)) == 5


def test_every_class_is_as_often_at_any_place_of_a_round():
    places = np.array(classes(40_000)).reshape(-1, 10)
    counts = np.stack([np.bincount(column, minlength=10) for column in places.T])
    assert abs(counts - 400).max() < 5 * 400**0.5  # five standard deviations


@pytest.mark.parametrize("rule", ["balanced", "uniform", [3, 1, 4]])
def test_a_sample_keeps_its_class_in_a_larger_set(rule):
    assert classes(1000, rule)[:7] == classes(7, rule)


def test_uniform_classes_are_drawn_independently():
    drawn = np.array(classes(40_000, "uniform"))
    counts = np.bincount(drawn, minlength=10)
    assert 0 < abs(counts - 4000).max() < 5 * 4000**0.5
    pairs = np.bincount(drawn[:-1] * 10 + drawn[1:], minlength=100)
    assert abs(pairs - 400).max() < 5 * 400**0.5


def test_listed_classes_are_balanced_with_their_multiplicity():
    assert Counter(classes(40, [7, 2, 7, 9])) == {7: 20, 2: 10, 9: 10}
    assert classes(3, [5]) == [5, 5, 5]


def test_classes_stay_what_they_are():
    """The images of published figures depend on these."""
    assert classes(12) == [0, 6, 1, 7, 4, 2, 3, 5, 8, 9, 5, 4]
    assert classes(6, "uniform", 1000, seed=9) == [407, 526, 357, 19, 269, 492]


@pytest.mark.parametrize("wrong", [-1, 10])
def test_ids_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"`classes` contains {wrong}, but this model's classes are 0 to 9"):
        classes(4, [0, 9, wrong])


def test_a_model_that_does_not_say_how_many_classes_it_has_needs_a_list():
    assert set(classes(4, [1, 12], num_classes=None)) == {1, 12}
    with pytest.raises(ValueError, match="'uniform' needs: list them"):
        classes(4, "uniform", num_classes=None)
    with pytest.raises(ValueError, match=r"`classes` contains -1.*are not negative"):
        classes(4, [-1], num_classes=None)


def test_classes_of_a_pipeline_are_counted_without_the_null_class():
    assert count_classes(make_cascade()) == NUM_CLASSES
    assert count_classes(make_dit()) == 1000
