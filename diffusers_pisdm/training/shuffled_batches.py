"""Batches of rows that can be read in any order: a new permutation every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import tee
from typing import TYPE_CHECKING

import numpy as np

from .data_errors import DataError
from .parallel_read import read_batches
from .training_batch import TrainingBatch, stack_rows


if TYPE_CHECKING:
    from .image_rows import ImageRows
    from .latent_cache import LatentCache


class ShuffledBatches:
    """
    One process's share of the global batches: of each, every `num_processes`-th row, so that all processes together
    see what one would see with their batches put together. The rows of an epoch that fill no global batch are dropped.

    Args:
        rows ([`ImageRows`] or [`LatentCache`]): What to read.
        batch_size (`int`): Images a process.
        seed (`int`): Of order, crop, flip and latents; not negative.
        num_processes (`int`), process_index (`int`): Which process this is of how many.
        num_workers (`int`): See [`TrainingBatches`].

    Raises:
        DataError: The rows do not fill one global batch.
    """

    def __init__(
        self,
        rows: ImageRows | LatentCache,
        batch_size: int,
        seed: int,
        num_processes: int,
        process_index: int,
        num_workers: int,
    ):
        self.rows = rows
        self.global_batch_size = batch_size * num_processes
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.num_workers = num_workers
        if len(rows) < self.global_batch_size:
            raise DataError(
                f"The data set has {len(rows)} images, less than one batch of {batch_size} for each of {num_processes}"
                " processes: lower --train_batch_size."
            )

    @property
    def identity(self) -> dict[str, int]:
        """What positions depend on."""
        return {"seed": self.seed, "num_rows": len(self.rows)}

    def start(self, epoch: int, rows_done: int) -> Iterator[tuple[TrainingBatch, int, int]]:
        """
        Args:
            epoch (`int`), rows_done (`int`): Where to start: the epoch, and how many of its rows, over all processes,
                have been used.

        Yields:
            `tuple[TrainingBatch, int, int]`: A batch and the position after it.
        """
        ahead, yielded = tee(self._keys(epoch, rows_done))  # the workers are ahead of what is yielded
        read = partial(read_rows, self.rows, self.seed)
        for batch, (_, position) in zip(read_batches(read, (keys for keys, _ in ahead), self.num_workers), yielded):
            yield batch, *position

    def _keys(self, epoch: int, rows_done: int) -> Iterator[tuple[list[tuple[int, int]], tuple[int, int]]]:
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
            while rows_done + self.global_batch_size <= len(order):
                batch = order[rows_done : rows_done + self.global_batch_size]
                rows_done += self.global_batch_size
                own = batch[self.process_index :: self.num_processes]
                yield [(int(row), epoch) for row in own], (epoch, rows_done)
            epoch, rows_done = epoch + 1, 0


def read_rows(rows: ImageRows | LatentCache, seed: int, keys: list[tuple[int, int]]) -> TrainingBatch:
    """Reads rows by their number and epoch."""
    return stack_rows([rows.read(row, epoch, seed) for row, epoch in keys])
