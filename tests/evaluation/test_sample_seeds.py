import numpy as np
import pytest
import torch

from diffusers_pisdm.evaluation.sample_seeds import (
    CLASSES,
    NOISE,
    murmur_finalizer,
    noise_seeds,
    random_words,
    sample_generators,
    split_mix,
)


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
