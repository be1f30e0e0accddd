"""Compiles a kernel to a C function, with Numba's disk cache made safe.

Numba's cache only watches the kernel's own file, not the modules whose functions it inlines, and it writes its index
before the code: an edit or a killed process can leave old code under a new name. Here the file name carries a digest
of all kernel sources, so code is only ever loaded for the sources it was compiled from. If the cache cannot be written
or read, the kernel is compiled for this process only.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import llvmlite
from numba import cfunc, types


_SIGNATURE = types.void(types.int64)
_lock = threading.Lock()
_compiled: dict[Callable, object] = {}


def _digest_sources() -> str:
    """Digest of all sources in `ops/` that a kernel may use, and of LLVM's version."""
    digest = hashlib.sha256(llvmlite.__version__.encode())
    for path in sorted(Path(__file__).parents[1].rglob("*numba*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# Computed when the sources are imported, not when a kernel is compiled: they may be edited in between.
_DIGEST = _digest_sources()


def _compile(kernel: Callable[[int], None]):
    try:
        kernel.__qualname__ = f"{kernel.__name__}_{_DIGEST}"
        return cfunc(_SIGNATURE, cache=True, error_model="numpy")(kernel)
    except Exception:  # damaged pickles can raise anything; the kernel's own errors recur below
        return cfunc(_SIGNATURE, error_model="numpy")(kernel)


def kernel_address(kernel: Callable[[int], None]) -> int:
    """Address of `kernel` as a C function `void kernel(int64_t parameters)`; the first call compiles or loads it."""
    with _lock:
        if kernel not in _compiled:
            _compiled[kernel] = _compile(kernel)
        return _compiled[kernel].address
