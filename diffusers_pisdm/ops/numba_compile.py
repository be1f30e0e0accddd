"""Compiling a kernel to a C function, from Numba's disk cache where that can be trusted."""

from __future__ import annotations

import threading
from collections.abc import Callable

from numba import cfunc, types


_lock = threading.Lock()
_compiled: dict[Callable, object] = {}


def kernel_address(kernel: Callable[[int], None]) -> int:
    """Address of `kernel` compiled as `void kernel(int64_t parameters)`; compiled at the first call."""
    with _lock:
        if kernel not in _compiled:
            _compiled[kernel] = cfunc(types.void(types.int64), error_model="numpy")(kernel)
        return _compiled[kernel].address
