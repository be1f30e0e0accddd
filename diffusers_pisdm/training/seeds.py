"""Random numbers that depend on where a run is, not on how it got there."""

from __future__ import annotations

import numpy as np


def noise_seed(*position: int) -> int:
    """
    A seed for the noise of one batch, from the run's seed and the batch's place (process, epoch, position in it):
    neighbouring places give unrelated seeds.

    Args:
        position (`int`): Non-negative integers that name the place.

    Returns:
        `int`: In `0..2^63 - 1`.
    """
    return int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0] >> np.uint64(1))
