"""Compiles a kernel to a C function, with Numba's disk cache made safe.

Numba's cache only watches the kernel's own file, not the modules whose functions it inlines, and it writes its index
before the code: an edit or a killed process can leave old code under a new name. Here the file name carries a digest
of all kernel sources, so code is only ever loaded for the sources it was compiled from. Numba also runs whatever bytes
it finds there, and one flipped bit can end the process. Here each file ends with a digest of its content; a damaged
file is compiled anew and replaced. If the cache cannot be written or read, the kernel is compiled for this process
only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc


_SIGNATURE = ((types.int64,), types.void)  # arguments, result
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


class _CheckedFiles(IndexDataCacheFile):
    """Numba's files of one kernel, each with a digest at its end, which unpickling does not reach."""

    @contextlib.contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        with super()._open_for_write(filepath) as file:
            yield content
            file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())

    def _load_index(self) -> dict:
        return super()._load_index() if self._is_intact(self._index_path) else {}

    def _load_data(self, name: str) -> Any:
        if not self._is_intact(self._data_path(name)):
            raise OSError(f"{name} is damaged")  # as if it were missing
        return super()._load_data(name)

    def _is_intact(self, path: str) -> bool:
        try:
            content = Path(path).read_bytes()
        except OSError:
            return False
        size = hashlib.sha256().digest_size
        return hashlib.sha256(content[:-size]).digest() == content[-size:]


class _CheckedCache(FunctionCache):
    def __init__(self, kernel: Callable[[int], None]):
        super().__init__(kernel)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _CheckedFiles(self.cache_path, self._impl.filename_base, stamp)


class _Kernel(CFunc):
    def enable_caching(self) -> None:
        self._cache = _CheckedCache(self._pyfunc)


def _compile(kernel: Callable[[int], None]) -> CFunc:
    options = {"error_model": "numpy"}
    try:
        kernel.__qualname__ = f"{kernel.__name__}_{_DIGEST}"
        compiled = _Kernel(kernel, _SIGNATURE, {}, options)
        compiled.enable_caching()
        compiled.compile()
    except Exception:  # no folder that can be written, say; the kernel's own errors recur below
        compiled = _Kernel(kernel, _SIGNATURE, {}, options)
        compiled.compile()
    return compiled


def kernel_address(kernel: Callable[[int], None]) -> int:
    """Address of `kernel` as a C function `void kernel(int64_t parameters)`; the first call compiles or loads it."""
    with _lock:
        if kernel not in _compiled:
            _compiled[kernel] = _compile(kernel)
        return _compiled[kernel].address
