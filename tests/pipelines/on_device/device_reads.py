"""
Finds where code waits for its device, without one: on the device `meta`, whose tensors have no values, whatever reads
one fails. What crosses from one device to another is counted, as the host waits for such copies, too.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
CONSTRUCTORS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)  # their copies are hidden from dispatch


@contextmanager
def count_copies() -> Iterator[Counter[str]]:
    """Counts the copies between devices by the name of the Python file that asks for them."""
    files: Counter[str] = Counter()

    def count() -> None:
        frame = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        files[frame.f_code.co_filename.rsplit("/", 1)[-1]] += 1

    class CountCopies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in COPIES and len({leaf.device for leaf in tree_leaves((args, out)) if is_tensor(leaf)}) > 1:
                count()
            return out

    class CountConstructors(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in CONSTRUCTORS and out.device.type != "cpu" and not is_tensor(args[-1]):
                count()
            return out

    with CountConstructors(), CountCopies():
        yield files


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
