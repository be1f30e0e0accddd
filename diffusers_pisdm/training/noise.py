"""The random numbers of a training step, which depend on where a run is, not on how it got there."""

from __future__ import annotations

import numpy as np
import torch


class RowNoise:
    """
    Random numbers for one process's rows of a global batch.

    They depend only on the seed and a row's place in the global batch: each process draws for all rows and keeps its
    own (row `i` of process `r` is row `i * num_processes + r`). So several processes together draw what one process
    draws for the whole batch, and a resumed run draws what an uninterrupted one would have drawn.

    Args:
        seed (`int` or `torch.Generator`): The step's seed, or a seeded generator for a recorded CUDA graph.
        device (`torch.device`): Where to draw.
        process_index (`int`, defaults to 0), num_processes (`int`, defaults to 1): Determine this process's rows.
    """

    def __init__(
        self, seed: int | torch.Generator, device: torch.device, process_index: int = 0, num_processes: int = 1
    ):
        is_seeded = isinstance(seed, torch.Generator)
        self.generator = seed if is_seeded else torch.Generator(device).manual_seed(seed)
        self.process_index = process_index
        self.num_processes = num_processes

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers of `shape`, rows first."""
        return self._own(torch.randn(self._all(shape), generator=self.generator, device=self.generator.device))

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform numbers in [0, 1) of `shape`, rows first."""
        return self._own(torch.rand(self._all(shape), generator=self.generator, device=self.generator.device))

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """Integers in `0..high - 1` of `shape`, rows first."""
        return self._own(torch.randint(high, self._all(shape), generator=self.generator, device=self.generator.device))

    def _all(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] * self.num_processes, *shape[1:])

    def _own(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[self.process_index :: self.num_processes]


def noise_seed(*position: int) -> int:
    """
    A seed in `0..2^63 - 1` for the noise of one batch, from the run's seed and the batch's position (process, epoch,
    index): neighbouring positions give unrelated seeds.
    """
    return int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0] >> np.uint64(1))
