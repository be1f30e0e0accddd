import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusers_pisdm.evaluation import SampleSettings, sample_classes
from diffusers_pisdm.evaluation.samples.settings import (
    CLASSES,
    NOISE,
    count_classes,
    murmur_finalizer,
    noise_seeds,
    random_words,
    sample_generators,
    split_mix,
)
from tests.pipelines.tiny_cascade import NUM_CLASSES, make_cascade
from tests.pipelines.tiny_dit import make_dit


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_samples": 0}, "`num_samples` has to be from 1 to 2^32 but is 0"),
        ({"num_samples": 2.0}, "`num_samples` has to be an integer but is 2.0"),
        ({"num_samples": True}, "`num_samples` has to be an integer but is True"),
        ({"seed": -1}, "`seed` has to be 0 or more but is -1"),
        ({"classes": "even"}, "'balanced' or 'uniform' or a list of class ids but is 'even'"),
        ({"classes": []}, "`classes` is empty. Pass class ids, or one of balanced, uniform"),
        ({"classes": [1, "cat"]}, "A class id in `classes` has to be an integer but is 'cat'"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError)) as raised:
        SampleSettings(**arguments)
    assert message in str(raised.value)


def test_integers_of_numpy_can_be_written_down():
    settings = SampleSettings(np.int64(3), np.uint8(1), np.array([4, 2]))
    assert json.loads(json.dumps(asdict(settings)))["classes"] == [4, 2]
    assert settings == SampleSettings(3, 1, [4, 2])


def test_what_is_left_out_is_the_pipelines_default():
    settings = SampleSettings(5, guidance_scale=[1.0, 2.0]).resolve(make_cascade())
    assert settings == SampleSettings(
        num_samples=5,
        num_inference_steps=20,
        guidance_scale=[1.0, 2.0],
        guidance_start=0.0,
        guidance_stop=1.0,
        noise_level=0.1,
    )


def test_another_pipeline_need_not_take_every_argument_but_those_that_are_set():
    pipe = make_dit()
    settings = SampleSettings(num_inference_steps=3).resolve(pipe)
    assert (settings.num_inference_steps, settings.guidance_scale, settings.noise_level) == (3, 4.0, None)
    with pytest.raises(ValueError, match="DiTPipeline does not take `guidance_stop`, `noise_level`"):
        SampleSettings(noise_level=0.2, guidance_stop=0.5).resolve(pipe)


def test_a_pipeline_without_classes_is_refused():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(8, block_out_channels=(4,), norm_num_groups=2, attention_head_dim=2, **blocks)
    with pytest.raises(ValueError, match=r"DDPMPipeline does not take `class_labels`.*PISDMCascadePipeline"):
        SampleSettings().resolve(DDPMPipeline(unet, DDPMScheduler()))


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
    with pytest.raises(ValueError, match=r"'uniform' needs .*: list them"):
        classes(4, "uniform", num_classes=None)
    with pytest.raises(ValueError, match=r"`classes` contains -1.*are not negative"):
        classes(4, [-1], num_classes=None)


def test_classes_of_a_pipeline_are_counted_without_the_null_class():
    assert count_classes(make_cascade()) == NUM_CLASSES
    assert count_classes(make_dit()) == 1000


def test_words_are_those_that_other_implementations_give():
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert split_mix(np.uint64(1234567), 4).tolist() == expected
    words = murmur_finalizer(np.array([0, 1, 2**32 - 1], dtype=np.uint32))
    assert words.tolist() == [0, 0x514E28B7, 0x81F16F39]


def test_the_first_words_do_not_depend_on_how_many_follow():
    assert np.array_equal(random_words(5, CLASSES, 3), random_words(5, CLASSES, 100)[:3])


@pytest.mark.parametrize("seeds", [(0, 1), (1, 2**32), (7, 7 + 2**40)])
def test_seeds_and_purposes_are_unrelated(seeds):
    words = [random_words(seed, purpose, 100) for seed in seeds for purpose in (NOISE, CLASSES)]
    assert len(np.unique(np.concatenate(words))) == 400


def test_no_two_of_50000_samples_share_what_torch_keeps_of_a_seed():
    seeds = noise_seeds(0, range(50_000))
    assert len(np.unique(seeds)) == 50_000
    assert [generator.initial_seed() for generator in sample_generators(0, range(3))] == seeds[:3].tolist()
    assert max(seeds) < 2**32


def test_a_sample_has_its_noise_in_any_batch_and_under_its_seed_only():
    def noise(seed, *indices):
        return [torch.randn(8, generator=generator) for generator in sample_generators(seed, indices)]

    first, second = noise(3, 10, 11)
    assert torch.equal(second, noise(3, 11)[0])
    for other in (second, noise(4, 10)[0], noise(3 + 2**32, 10)[0]):
        assert not torch.equal(first, other)
