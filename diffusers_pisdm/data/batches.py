"""
The images of a training run, in an order that depends on the seed alone and can be entered anywhere.

The order is our own because what a run has seen must not depend on its workers and processes, and a resumed run must
see what an uninterrupted one would. torch's DataLoader has no position, and seeds random crops and flips per worker;
torchdata's StatefulDataLoader resumes only with as many workers; datasets refills a stream's shuffle buffer when it
resumes. The workers are still those of torch's DataLoader (`parallel_read.py`), a stream's shards those of datasets.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import tee
from typing import TYPE_CHECKING

import numpy as np

from .parallel_read import read_batches
from .rows import DataError, TrainingBatch, stack_rows


if TYPE_CHECKING:
    from .image_rows import ImageRows
    from .latent_cache import LatentCache


class TrainingBatches:
    """
    An endless iterator over one process's batches.

    The batches depend on the data, the batch size and the seed, not on the number of workers; and, but for streams,
    not on the number of processes: two processes with half the batch size see together what one sees.

    Args:
        rows ([`ImageRows`] or [`LatentCache`]): What to read.
        batch_size (`int`): Images a process and batch.
        seed (`int`, defaults to 0): Of the order, of crop, flip and latents; not negative.
        num_processes (`int`, defaults to 1), process_index (`int`, defaults to 0): Which process this is of how many.
        num_workers (`int`, defaults to 0): Processes that decode; 0 decodes when a batch is asked for.
        shuffle_buffer (`int`, defaults to 1000): Rows among which a stream is shuffled; others are shuffled whole.

    Raises:
        DataError: The rows do not fill one batch of all processes. When iterating: see [`ImageRows`].
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
            from .stream_batches import StreamBatches  # needs datasets, which a cache of latents does without

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

    def state_dict(self) -> dict[str, int]:
        """
        The position after the last batch that was handed out. It is the same in all processes, except for streams,
        where each process has its own.

        Returns:
            `dict[str, int]`: JSON-serialisable.
        """
        return {"epoch": self.epoch, "rows_done": self.rows_done, **self._source.identity}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """
        Goes to the position of a [`~TrainingBatches.state_dict`]: the next batch is the one that followed it.

        Args:
            state (`dict[str, int]`): From the same data.

        Raises:
            ValueError: The state is of other data, another seed or, for streams, another number of processes.
        """
        identity = self._source.identity
        changed = [
            f"{name} was {state.get(name)}, is {value}" for name, value in identity.items() if state.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"The data's position does not fit: {'; '.join(changed)}. Resume with what the run was started with,"
                " or start anew with --resume_from_checkpoint none."
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
    Goes once through held-out rows, in order, every `num_processes`-th in each process; the last batch may be smaller.
    Refuses (ValueError) rows that are cropped or flipped at random.
    """
    if rows.is_random:
        raise ValueError("Held-out images must be the same every time: `random_crop` and `random_flip` must be False.")
    if rows.is_stream:
        from .stream_batches import stream_once

        return stream_once(rows, batch_size, num_processes, process_index, num_workers)
    own = range(process_index, len(rows), num_processes)
    keys = ([(row, 0) for row in own[start : start + batch_size]] for start in range(0, len(own), batch_size))
    return read_batches(partial(read_rows, rows, 0), keys, num_workers)


class ShuffledBatches:
    """
    One process's share of the global batches: of each, every `num_processes`-th row, so that all processes together
    see what one would see with their batches put together. The rows of an epoch that fill no global batch are dropped.
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
        Yields batches and the position after each, from an epoch of whose rows `rows_done`, over all processes, are
        used.
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
