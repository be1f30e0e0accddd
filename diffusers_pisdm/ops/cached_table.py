"""Tables of constants (scan orders, positions) that depend only on sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import TypeVar

import torch


Table = TypeVar("Table")

_COLLECTED: ContextVar[list | None] = ContextVar("tables that are used here", default=None)


@contextmanager
def collect_tables() -> Iterator[list]:
    """Collects the tables used inside this context: a CUDA graph reads them even after the cache drops them."""
    tables = []
    token = _COLLECTED.set(tables)
    try:
        yield tables
    finally:
        _COLLECTED.reset(token)


def cached_table(maxsize: int) -> Callable[[Callable[..., Table]], Callable[..., Table]]:
    """
    Caches the constant tensor that a function of hashable arguments and `device` returns, for eager calls, by these
    and the default dtype. Compiled and exported graphs build their own, as sizes may be symbolic, and so do calls
    under a mode that makes other tensors (fake ones, say).
    """

    def decorate(build: Callable[..., Table]) -> Callable[..., Table]:
        @lru_cache(maxsize=maxsize)
        def build_once(default_dtype: torch.dtype, *args, **kwargs) -> Table:
            # A tensor made inside `torch.inference_mode()` could never be used for training later.
            with torch.inference_mode(False):
                return build(*args, **kwargs)

        @wraps(build)
        def table(*args, device: torch.device | str | None = None, **kwargs) -> Table:
            if torch.compiler.is_compiling():
                return build(*args, device=device, **kwargs)
            # The actual type and device of a tensor made here: `device` may be None, or "cuda" without an index.
            probe = torch.empty(0, device=device)
            if type(probe) is not torch.Tensor:
                return build(*args, device=device, **kwargs)
            result = build_once(probe.dtype, *args, device=probe.device, **kwargs)
            if (collected := _COLLECTED.get()) is not None:
                collected.append(result)
            return result

        return table

    return decorate
