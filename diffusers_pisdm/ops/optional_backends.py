"""Whether the packages behind the optional backends can be used here, found out at the first need of one."""

from __future__ import annotations

import functools
import importlib

import torch


# What to import to be sure that a backend works, and how to come by it.
_PACKAGES = {
    "numba": ("numba", "pip install numba"),
    "triton": (f"{__package__}.selective_scan_triton_kernels", "pip install triton"),  # which may find it too old
    "mamba_ssm": ("mamba_ssm.ops.selective_scan_interface", "pip install diffusers_pisdm[cuda]"),
}


@functools.cache
def missing_backend(backend: str) -> str | None:
    """
    Why a backend cannot be used and what to install, or `None` if it can be.

    The import is tried, not only looked up: an installed package may still fail (Numba beside a newer NumPy and
    mamba_ssm built for another torch raise ImportError, Triton without a GPU driver RuntimeError).
    """
    if backend not in _PACKAGES:
        return None
    module, command = _PACKAGES[backend]
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"the {backend!r} backend does not import ({error}); to install it: {command}"
    return None


@torch.compiler.assume_constant_result  # called, not traced, when a model is compiled
def check_backend(backend: str) -> None:
    """Raises ImportError, with what to install, if a backend that was asked for cannot be used."""
    reason = missing_backend(backend)
    if reason is not None:
        raise ImportError(f"{reason[0].upper()}{reason[1:]}.")
