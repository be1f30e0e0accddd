"""The backends that `backend="auto"` stands for when it is not to be left to the device: to act as on another one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


_FORCED: dict[str, str | None] = {"selective_scan": None, "causal_conv": None}


@contextlib.contextmanager
def force_backends(**backends: str) -> Iterator[None]:
    """
    In here, `backend="auto"` is the backend given for the operator, whatever the device, the dtypes and the packages
    installed, in all threads: `with force_backends(selective_scan="numba", causal_conv="torch"):`.

    Not for compiled models: their graphs keep the backend that was chosen when they were compiled.

    Args:
        backends (`str`): The backend of `selective_scan` or `causal_conv`, by the operator's name.

    Raises:
        ValueError: An operator has no backends.
    """
    unknown = backends.keys() - _FORCED.keys()
    if unknown:
        raise ValueError(f"Backends can be forced for {', '.join(_FORCED)}, not for {', '.join(sorted(unknown))}.")
    before = dict(_FORCED)
    _FORCED.update(backends)
    try:
        yield
    finally:
        _FORCED.update(before)


@torch.compiler.assume_constant_result  # called, not traced, when a model is compiled
def forced_backend(operator: str) -> str | None:
    """The backend that an operator was forced to, or `None` if it may choose."""
    return _FORCED[operator]
