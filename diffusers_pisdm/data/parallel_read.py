"""Ordered reading in other processes and threads, ahead of the training loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Full, Queue
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .rows import DataError


Item = TypeVar("Item")
_END = object()


class _Reader(Dataset):
    """Calls `read` on a batch of keys; returns a DataError instead of raising it."""

    def __init__(self, read: Callable[[list], Item]):
        self.read = read

    def __getitems__(self, keys: list) -> Item | DataError:
        try:
            return self.read(keys)
        except DataError as error:  # a DataLoader would bury its message in the worker's traceback
            return error


def _as_it_is(item: Item) -> Item:
    return item


def read_batches(read: Callable[[list], Item], keys: Iterable[list], num_workers: int) -> Iterator[Item]:
    """
    Calls `read` (picklable) on each batch of keys and yields the results in order, with tensors in pinned memory if
    there is a GPU. With `num_workers`, worker processes run a few batches ahead.
    """
    loader = DataLoader(
        _Reader(read),
        batch_sampler=keys,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    for item in loader:
        if isinstance(item, DataError):
            raise item
        yield item


def read_ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """
    Iterates in a thread, up to `depth` items ahead of the consumer, and re-raises its errors. The thread starts when
    the first item is requested, and ends when the iterator is closed or garbage-collected.
    """
    queue, closed = Queue(depth), threading.Event()

    def put(item: Item | object, error: BaseException | None = None) -> bool:
        while not closed.is_set():
            try:
                queue.put((item, error), timeout=0.1)
                return True
            except Full:
                pass
        return False

    def run() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:
            put(_END, error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            item, error = queue.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        closed.set()
