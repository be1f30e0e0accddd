"""Reading in other processes and threads, ahead of the training loop and in order."""

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
    """Turns a batch of keys into what `read` makes of it; an error of the data travels as a value."""

    def __init__(self, read: Callable[[list], Item]):
        self.read = read

    def __getitems__(self, keys: list) -> Item | DataError:
        try:
            return self.read(keys)
        except DataError as error:  # a DataLoader would bury its message in a traceback of the worker
            return error


def _as_it_is(item: Item) -> Item:
    return item


def read_batches(read: Callable[[list], Item], keys: Iterable[list], num_workers: int) -> Iterator[Item]:
    """
    Calls `read`, which is picklable, on each batch of keys, in worker processes that run a few batches ahead if there
    are any, and yields the results in order: tensors in pinned memory if there is a GPU.
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
    Iterates in a thread, up to `depth` items ahead of whoever takes them; errors are raised here. The thread starts
    with the first item asked for, and ends when the iterator is closed or forgotten.
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
