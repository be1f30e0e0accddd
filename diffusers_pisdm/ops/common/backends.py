"""The operators' backends: which ones work here, and how to force one instead of the device's default."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator

import torch


# The import that proves a backend works, and the command that installs it.
_PACKAGES = {
    "numba": ("numba", "pip install numba"),
    "triton": ("diffusers_pisdm.ops.scan.triton_kernels", "pip install triton"),  # rejects versions that are too old
    "mamba_ssm": ("mamba_ssm.ops.selective_scan_interface", "pip install mamba-ssm"),
    "causal_conv1d": ("causal_conv1d", "pip install causal-conv1d"),
}
# What is called of these packages.
_FUNCTIONS = {"mamba_ssm": "selective_scan_fn", "causal_conv1d": "causal_conv1d_fn"}
# The same, compiled for many versions of PyTorch and CUDA, on the Hub: repository, version, and where the function is.
_HUB_KERNELS = {
    "mamba_ssm": ("kernels-community/mamba-ssm", 4, "ops.selective_scan_interface.selective_scan_fn"),
    "causal_conv1d": ("kernels-community/causal-conv1d", 1, "causal_conv1d_fn"),
}
_from_hub: dict[str, Callable] = {}


@functools.cache
def missing_backend(backend: str) -> str | None:
    """
    Why a backend is unusable and what to install, or `None` if it works.

    Actually imports it, as an installed package may still fail: Numba with a newer NumPy and mamba_ssm built for
    another torch raise ImportError, Triton without a GPU driver RuntimeError.
    """
    if backend not in _PACKAGES or backend in _from_hub:
        return None
    module, command = _PACKAGES[backend]
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"the {backend!r} backend cannot be imported ({error}); to install it: {command}"
    return None


def use_hub_kernels(*backends: str) -> None:
    """
    Downloads precompiled CUDA kernels from the Hub with the `kernels` package (`pip install kernels`), and makes them
    the backends `"mamba_ssm"` and `"causal_conv1d"`, instead of packages that compile on install and need nvcc. It
    lasts until the process ends. They are native code of the Hub's `kernels-community`, which `kernels` trusts.

    Args:
        backends (`str`): `"mamba_ssm"`, `"causal_conv1d"`; both if none is given.

    Raises:
        ValueError: A backend has no kernel there.
        ImportError: `kernels` is missing, or has none that fits this PyTorch, CUDA version and GPU.
    """
    backends = backends or tuple(_HUB_KERNELS)
    unknown = [backend for backend in backends if backend not in _HUB_KERNELS]
    if unknown:
        raise ValueError(f"The Hub has kernels for {', '.join(_HUB_KERNELS)}, not for {', '.join(unknown)}.")
    try:
        from kernels import get_kernel
    except ImportError as error:
        raise ImportError(f"Kernels from the Hub need `pip install kernels` ({error}).") from error
    for backend in backends:
        repo_id, version, path = _HUB_KERNELS[backend]
        try:
            found = functools.reduce(getattr, path.split("."), get_kernel(repo_id, version=version))
        except Exception as error:  # no build for this machine, no network, a damaged or changed kernel
            raise ImportError(
                f"{repo_id} cannot be used on this machine ({error}). You do not need it: our own kernels run without."
            ) from error
        _from_hub[backend] = found
    missing_backend.cache_clear()


def package_function(backend: str) -> Callable:
    """A package's function, from the Hub if [`use_hub_kernels`] was called."""
    if backend in _from_hub:
        return _from_hub[backend]
    return getattr(importlib.import_module(_PACKAGES[backend][0]), _FUNCTIONS[backend])


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


_FORCED: dict[str, str | None] = {"selective_scan": None, "causal_conv": None, "modulation": None}


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
