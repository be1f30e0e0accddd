"""The operators' backends: which ones work here, and how to force one instead of the device's default."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterable, Iterator

import torch


# The import that proves a backend works, and the command that installs it.
_PACKAGES = {
    "numba": ("numba", "pip install numba"),
    "triton": ("diffusers_pisdm.ops.scan.triton_kernels", "pip install triton"),  # rejects versions that are too old
    "mamba_ssm": ("mamba_ssm.ops.selective_scan_interface", "pip install mamba-ssm"),
}


@functools.cache
def missing_backend(backend: str) -> str | None:
    """
    Why a backend is unusable and what to install, or `None` if it works.

    Actually imports it, as an installed package may still fail: Numba with a newer NumPy and mamba_ssm built for
    another torch raise ImportError, Triton without a GPU driver RuntimeError.
    """
    if backend not in _PACKAGES:
        return None
    module, command = _PACKAGES[backend]
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"the {backend!r} backend cannot be imported ({error}); to install it: {command}"
    return None


@torch.compiler.assume_constant_result  # called, not traced, when a model is compiled
def check_backend(backend: str) -> None:
    """Raises ImportError with the install command if a requested backend cannot be used."""
    reason = missing_backend(backend)
    if reason is not None:
        raise ImportError(f"{reason[0].upper()}{reason[1:]}.")


def refuse_float64(backend: str, tensors: Iterable[torch.Tensor | None]) -> None:
    """Raises NotImplementedError for float64 tensors: the compiled kernels compute in float32."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        raise NotImplementedError(f"The {backend!r} backend computes in float32: use backend='torch' for float64.")


_FORCED: dict[str, str | None] = {"selective_scan": None, "causal_conv": None}


@contextlib.contextmanager
def force_backends(**backends: str) -> Iterator[None]:
    """
    Inside this context, `backend="auto"` means the given backend, in all threads: `with
    force_backends(selective_scan="numba", causal_conv="torch"):`. Compiled models keep the backend they were compiled
    with.
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
    """The backend forced on an operator, or `None` if it may choose."""
    return _FORCED[operator]
