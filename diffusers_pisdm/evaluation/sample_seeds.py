"""Random numbers of a sample set that follow from its seed and the samples' indices, with any version of NumPy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch


# What numbers are for: those of one purpose have nothing to do with those of another.
NOISE, CLASSES = 1, 2
MAX_SAMPLES = 2**32


def random_words(seed: int, purpose: int, count: int) -> np.ndarray:
    """
    Random numbers; the first of them are the same for any `count`.

    Args:
        seed (`int`): Not negative.
        purpose (`int`): Positive.
        count (`int`): How many.

    Returns:
        `np.ndarray` of shape `(count,)`, uint64.
    """
    # NumPy promises that `SeedSequence` stays as it is, unlike its generators.
    return split_mix(np.random.SeedSequence((seed, purpose)).generate_state(1, np.uint64)[0], count)


def noise_seeds(seed: int, indices: Iterable[int]) -> np.ndarray:
    """
    A seed of 32 bits for each sample's noise, no two the same: torch's CPU generator does not look at the other bits
    of a seed, and of 50,000 random ones two or more would be the same in a quarter of all sample sets.

    Args:
        seed (`int`): The sample set's, not negative.
        indices (`Iterable[int]`): Samples, in `0..2^32 - 1`.

    Returns:
        `np.ndarray` of shape `(B,)`, uint32.
    """
    start = np.random.SeedSequence((seed, NOISE)).generate_state(1, np.uint32)  # (1,)
    return murmur_finalizer(start + np.fromiter(indices, dtype=np.uint32))


def sample_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """The generators that all noise of the samples comes from; on the CPU, for it to be the same on every device."""
    return [torch.Generator().manual_seed(word) for word in noise_seeds(seed, indices).tolist()]


def split_mix(start: np.uint64, count: int) -> np.ndarray:
    """The first `count` numbers, uint64, of SplitMix64 (Steele, Lea and Flood, 2014) from a state."""
    words = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def murmur_finalizer(words: np.ndarray) -> np.ndarray:
    """Scrambles 32-bit integers one to one: the last step of MurmurHash3 (Appleby, 2011)."""
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))
