"""Batches of rows from a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from .image_rows import MAX_BAD_IN_A_ROW, ImageRows, all_bad
from .parallel_read import read_ahead, read_batches
from .rows import BadImageError, DataError, TrainingBatch


# datasets mixes the rows of several files, but its buffer must stay below 2 GiB (an Arrow column's limit), which
# 10,000 images can exceed. So it gets a small buffer, and our own buffer mixes its output.
ROWS_MIXED_BY_DATASETS = 100


class StreamBatches:
    """
    Batches of one process's share of a stream, shuffled in a buffer. A batch may hold rows of two epochs.

    One thread reads the encoded rows and the workers decode them, so the order does not depend on the number of
    workers.
    """

    def __init__(
        self,
        rows: ImageRows,
        batch_size: int,
        seed: int,
        num_processes: int,
        process_index: int,
        num_workers: int,
        shuffle_buffer: int,
    ):
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.num_workers = num_workers
        self.shuffle_buffer = shuffle_buffer

    @property
    def identity(self) -> dict[str, int]:
        """The settings a position depends on."""
        names = ("seed", "num_processes", "process_index", "shuffle_buffer")
        return {name: getattr(self, name) for name in names}

    def start(self, epoch: int, rows_done: int) -> Iterator[tuple[TrainingBatch, int, int]]:
        """
        Yields batches and the position after each, starting in an epoch of which this process has used `rows_done`
        rows, including bad ones. Those are read again but not decoded.
        """
        stream = own_stream(self.rows, self.num_processes, self.process_index)
        stream = stream.shuffle(seed=self.seed, buffer_size=min(self.shuffle_buffer, ROWS_MIXED_BY_DATASETS))
        keys = _chunks(self._keys(stream, epoch, rows_done), self.batch_size)
        for rows in decoded_batches(self.rows, keys, self.batch_size, self.seed, self.num_workers):
            yield rows.batch(), *rows.ends[-1]

    def _keys(self, stream: IterableDataset, epoch: int, rows_done: int) -> Iterator[tuple[dict, int, int]]:
        while True:
            stream.set_epoch(epoch)
            position = -1
            random = np.random.default_rng((self.seed, epoch, self.process_index))
            for position, fields in enumerate(_mix(stream, self.shuffle_buffer, random)):
                if position >= rows_done:
                    yield fields, epoch, position
            if position < 0:
                raise DataError(f"Process {self.process_index}'s share of the stream has no rows: check the split.")
            epoch, rows_done = epoch + 1, 0


def stream_once(
    rows: ImageRows, batch_size: int, num_processes: int, process_index: int, num_workers: int
) -> Iterator[TrainingBatch]:
    """Iterates once over one process's share of a stream, in order; the last batch may be smaller."""
    stream = own_stream(rows, num_processes, process_index)
    keys = _chunks(((fields, 0, position) for position, fields in enumerate(stream)), batch_size)
    for decoded in decoded_batches(rows, keys, batch_size, 0, num_workers):
        yield decoded.batch()


def own_stream(rows: ImageRows, num_processes: int, process_index: int) -> IterableDataset:
    """One process's share of a stream."""
    return split_dataset_by_node(rows.data.dataset, rank=process_index, world_size=num_processes)


class DecodedRows(NamedTuple):
    """Decoded rows of a stream."""

    images: torch.Tensor  # (B, 3, H, W), uint8: the readable ones
    labels: torch.Tensor  # (B,), int64
    ends: list[tuple[int, int]]  # the position after each: the epoch, and its rows done
    bad_images: list[tuple[int, str]]  # the unreadable ones: number of good ones before it, and the error

    def batch(self) -> TrainingBatch:
        return TrainingBatch(self.images, self.labels, [message for _, message in self.bad_images])

    def split(self, count: int) -> tuple[DecodedRows, DecodedRows]:
        """Splits off the first `count` good rows, with the bad ones before the last of them."""
        first, rest = ([x[part] for x in self[:3]] for part in (slice(count), slice(count, None)))
        bad = [(before, message) for before, message in self.bad_images if before < count]
        later = [(before - count, message) for before, message in self.bad_images[len(bad) :]]
        return DecodedRows(*first, bad), DecodedRows(*rest, later)

    def followed_by(self, rows: DecodedRows) -> DecodedRows:
        """Concatenates two sets of rows."""
        return DecodedRows(
            torch.cat([self.images, rows.images]),
            torch.cat([self.labels, rows.labels]),
            self.ends + rows.ends,
            self.bad_images + [(len(self.labels) + before, message) for before, message in rows.bad_images],
        )


def decoded_batches(
    rows: ImageRows, keys: Iterable[list[tuple[dict, int, int]]], batch_size: int, seed: int, num_workers: int
) -> Iterator[DecodedRows]:
    """
    Decodes rows given with their epochs and positions, and groups them into batches, where the next good row replaces
    a bad one. The last batch may be smaller.
    """
    if num_workers > 0:
        keys = read_ahead(keys, depth=num_workers)
    waiting = None
    for decoded in read_batches(partial(_decode, rows, seed), keys, num_workers):
        waiting = decoded if waiting is None else waiting.followed_by(decoded)
        while len(waiting.labels) >= batch_size:
            full, waiting = waiting.split(batch_size)
            yield full
        if len(waiting.labels) == 0 and len(waiting.bad_images) >= MAX_BAD_IN_A_ROW:
            raise all_bad(len(waiting.bad_images), waiting.bad_images[-1][1])
        if len(waiting.labels) == 0 and not waiting.bad_images:
            waiting = None  # nothing left to concatenate, so whole batches stay in pinned memory
    if waiting is not None and len(waiting.labels):
        yield waiting


def _mix(rows: Iterable[dict], size: int, random: np.random.Generator) -> Iterator[dict]:
    """Yields a random row of a buffer and puts the next one in its place."""
    buffer = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
        else:
            place = int(random.integers(size))
            yield buffer[place]
            buffer[place] = row
    random.shuffle(buffer)
    yield from buffer


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def _decode(rows: ImageRows, seed: int, keys: list[tuple[dict, int, int]]) -> DecodedRows:
    images, labels, ends, bad_images = [], [], [], []
    for fields, epoch, position in keys:
        try:
            pixels, label = rows.decode(fields, position, epoch, seed)
        except BadImageError as error:
            if rows.on_bad_image == "stop":
                raise
            bad_images.append((len(labels), str(error)))
        else:
            images.append(pixels)
            labels.append(label)
            ends.append((epoch, position + 1))
    size = rows.transform.size
    stacked = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
    return DecodedRows(stacked, torch.tensor(labels, dtype=torch.int64), ends, bad_images)
