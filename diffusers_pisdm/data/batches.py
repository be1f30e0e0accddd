"""
The images of a training run, in an order that depends only on the seed and can be resumed at any point.

We do our own ordering because what a run sees must not depend on its number of workers or processes, and a resumed run
must see what an uninterrupted one would. torch's DataLoader has no position and seeds random crops and flips per
worker; torchdata's StatefulDataLoader resumes only with the same number of workers; datasets refills a stream's
shuffle buffer on resuming. We still use torch's DataLoader workers (`parallel_read.py`) and datasets' stream sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import tee
from typing import TYPE_CHECKING

import numpy as np

from ..utils.messages import count_of
from .parallel_read import read_batches
from .rows import DataError, TrainingBatch, stack_rows


if TYPE_CHECKING:
    from .image_rows import ImageRows
    from .latent_cache import LatentCache


class TrainingBatches:
    """
    An endless iterator over one process's batches.

    The batches depend on the data, the batch size and the seed, but not on the number of workers. Except for streams,
    they do not depend on the number of processes either: two processes with half the batch size together see what one
    process would.

    Args:
        rows ([`ImageRows`] or [`LatentCache`]): What to read.
        batch_size (`int`): Images per process and batch.
        seed (`int`, defaults to 0): Seeds the order, crops, flips and latents; not negative.
        num_processes (`int`, defaults to 1), process_index (`int`, defaults to 0):
            How many processes there are, and which one this is.
        num_workers (`int`, defaults to 0): Decoding processes; with 0, a batch is decoded when it is requested.
        shuffle_buffer (`int`, defaults to 1000): Rows in a stream's shuffle buffer; other data is fully shuffled.

    Raises:
        DataError: There are too few rows for one batch per process. When iterating: see [`ImageRows`].
    """

    def __init__(
        self,
        rows: ImageRows | LatentCache,
        batch_size: int,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        num_workers: int = 0,
        shuffle_buffer: int = 1000,
    ):
        if rows.is_stream:
            from .stream_batches import StreamBatches  # needs datasets, which a latent cache does not

            self._source = StreamBatches(
                rows, batch_size, seed, num_processes, process_index, num_workers, shuffle_buffer
            )
        else:
            self._source = ShuffledBatches(rows, batch_size, seed, num_processes, process_index, num_workers)
        self.epoch = 0
        self.rows_done = 0
        self._batches: Iterator[tuple[TrainingBatch, int, int]] | None = None

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> TrainingBatch:
        if self._batches is None:
            self._batches = self._source.start(self.epoch, self.rows_done)
        batch, self.epoch, self.rows_done = next(self._batches)
        return batch

    def fingerprint(self) -> dict[str, str]:
        """What tells the data from others, by class or file, as far as that is cheap to find out."""
        return self._source.rows.fingerprint()

    def state_dict(self) -> dict[str, int]:
        """
        The position after the last batch returned: the same in all processes, except for streams, where each process
        has its own.

        Returns:
            `dict[str, int]`: JSON-serialisable.
        """
        return {"epoch": self.epoch, "rows_done": self.rows_done, **self._source.identity}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """
        Restores the position saved by [`~TrainingBatches.state_dict`]: the next batch is the one that followed it.

        Args:
            state (`dict[str, int]`): Saved with the same data.

        Raises:
            ValueError: The state is for other data, another seed or, for streams, another number of processes.
        """
        identity = self._source.identity
        changed = [
            f"{name} was {state.get(name)}, is {value}" for name, value in identity.items() if state.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"The data's position does not fit: {'; '.join(changed)}. Resume with the settings the run started"
                " with, or start over with --resume_from_checkpoint none."
            )
        self.epoch, self.rows_done = state["epoch"], state["rows_done"]
        self._batches = None


def validation_batches(
    rows: ImageRows | LatentCache,
    batch_size: int,
    num_processes: int = 1,
    process_index: int = 0,
    num_workers: int = 0,
) -> Iterator[TrainingBatch]:
    """
    Iterates once over held-out rows in order, each process taking every `num_processes`-th; the last batch may be
    smaller. Raises ValueError if rows are randomly cropped or flipped.
    """
    if rows.is_random:
        raise ValueError(
            "Held-out images must not change between passes: `random_crop` and `random_flip` must be False."
        )
    if rows.is_stream:
        from .stream_batches import stream_once

        return stream_once(rows, batch_size, num_processes, process_index, num_workers)
    own = range(process_index, len(rows), num_processes)
    keys = ([(row, 0) for row in own[start : start + batch_size]] for start in range(0, len(own), batch_size))
    return read_batches(partial(read_rows, rows, 0), keys, num_workers)


class ShuffledBatches:
    """
    One process's share of the global batches: every `num_processes`-th row of each, so all processes together see what
    a single one would with the global batch size. An epoch's last, incomplete global batch is dropped.
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
                f"The data set has {count_of(len(rows), 'image')}, too few for one batch of {batch_size} on each of"
                f" {count_of(num_processes, 'process')}: lower --train_batch_size."
            )

    @property
    def identity(self) -> dict[str, int]:
        """The settings a position depends on."""
        return {"seed": self.seed, "num_rows": len(self.rows)}

    def start(self, epoch: int, rows_done: int) -> Iterator[tuple[TrainingBatch, int, int]]:
        """
        Yields batches and the position after each, starting in an epoch of which all processes together have used
        `rows_done` rows.
        """
        ahead, yielded = tee(self._keys(epoch, rows_done))  # the workers read ahead of what we yield
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
    """Reads the rows with the given indices and epochs."""
    return stack_rows([rows.read(row, epoch, seed) for row, epoch in keys])
