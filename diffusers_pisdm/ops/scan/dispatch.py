"""The public selective scan, and the choice of its backend."""

from __future__ import annotations

import functools
import logging

import torch

from ..common.backends import check_backend, forced_backend, missing_backend
from .blocked import selective_scan_torch
from .mamba_ssm import selective_scan_mamba_ssm
from .numba_operator import selective_scan_numba
from .reference import selective_scan_reference
from .triton_operator import rates_triton, selective_scan_triton


logger = logging.getLogger(__name__)

SELECTIVE_SCAN_BACKENDS = ("reference", "torch", "numba", "triton", "mamba_ssm")
_FUNCTIONS = {
    "reference": selective_scan_reference,
    "torch": selective_scan_torch,
    "numba": selective_scan_numba,
    "triton": selective_scan_triton,
    "mamba_ssm": selective_scan_mamba_ssm,
}
_FASTEST = {"cpu": ("numba",), "cuda": ("triton", "mamba_ssm")}  # per device, in order of preference
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _log_slow_choice(backend: str, device_type: str, reason: str) -> None:
    logger.warning(f"selective_scan uses the slower {backend!r} backend on {device_type}: {reason}.")


@torch.compiler.assume_constant_result  # called, not traced, when a model is compiled: it may import and log
def choose_backend(device_type: str, dtypes: tuple[torch.dtype, ...], compiling: bool) -> str:
    """The fastest usable backend for a device and a call's dtypes; `torch` if there is none."""
    if device_type not in _FASTEST or any(dtype not in _KERNEL_DTYPES for dtype in dtypes):
        return "torch"
    chosen, reasons = "torch", []
    for backend in _FASTEST[device_type]:
        reason = missing_backend(backend)
        if reason is None and backend == "mamba_ssm" and compiling:
            reason = "mamba_ssm's kernel cannot be part of a compiled graph"
        if reason is None:
            chosen = backend
            break
        reasons.append(reason)
    if reasons:
        _log_slow_choice(chosen, device_type, "; ".join(reasons))
    return chosen


def _check_inputs(u, delta, A, B, C, D, z, delta_bias) -> None:
    if u.ndim != 3 or 0 in u.shape[1:]:
        raise ValueError(
            f"`u` must have shape (batch, channels, length), neither of the last two zero, not {tuple(u.shape)}."
        )
    if A.ndim != 2:
        raise ValueError(f"`A` must have shape (channels, state_size), not {tuple(A.shape)}.")
    batch, channels, length = u.shape
    state_size = A.shape[1]
    wanted = {
        "delta": (delta, (batch, channels, length)),
        "A": (A, (channels, state_size)),
        "B": (B, (batch, state_size, length)),
        "C": (C, (batch, state_size, length)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels, length)),
        "delta_bias": (delta_bias, (channels,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"`{name}` must have shape {shape} to fit `u` of shape {tuple(u.shape)} and a state size of"
                f" {state_size}, not {tuple(tensor.shape)}."
            )
        if tensor.device != u.device:
            raise ValueError(f"`{name}` is on {tensor.device} but `u` is on {u.device}: move them to one device.")
    for name, (tensor, _) in {"u": (u, None), **wanted}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"`{name}` must be a real floating point tensor, not {tensor.dtype}.")


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
    A_is_log: bool = False,
) -> torch.Tensor:
    """
    Selective state space scan (Mamba, arXiv 2312.00752, algorithm 2), differentiable in every tensor.

    With `Delta_t` the step after bias and softplus, for each batch row and channel:

        h_t = exp(Delta_t * A) * h_{t-1} + Delta_t * B_t * u_t        h in R^N, h_0 = 0
        y_t = <C_t, h_t> + D * u_t
        out_t = y_t * silu(z_t)

    Any strides are accepted. States are float32 for half-precision inputs.

    Args:
        u (`torch.Tensor` of shape `(batch, channels, length)`): The input sequence.
        delta (`torch.Tensor` of shape `(batch, channels, length)`): The step sizes, before bias and softplus.
        A (`torch.Tensor` of shape `(channels, state_size)`): The state's rates, negative in a stable system.
        B (`torch.Tensor` of shape `(batch, state_size, length)`): The input matrix.
        C (`torch.Tensor` of shape `(batch, state_size, length)`): The output matrix.
        D (`torch.Tensor` of shape `(channels,)`, *optional*): The skip's weight; no skip if not given.
        z (`torch.Tensor` of shape `(batch, channels, length)`, *optional*): The gate; no gate if not given.
        delta_bias (`torch.Tensor` of shape `(channels,)`, *optional*): Added to `delta`.
        delta_softplus (`bool`, defaults to `False`): Whether softplus is applied to `delta` after the bias.
        backend (`str`, defaults to `"auto"`):
            `"reference"` (a loop over time), `"torch"` (blocked, any device), `"numba"` (CPU), `"triton"` (CUDA),
            `"mamba_ssm"` (CUDA), or `"auto"`: Numba on a CPU, Triton or else mamba_ssm on CUDA, if they can be
            imported and support the dtypes, else torch.
        A_is_log (`bool`, defaults to `False`): Whether `A` holds log(-A), as Mamba's parameter `A_log` does.

    Returns:
        `torch.Tensor` of shape `(batch, channels, length)`, with the dtype and memory order of `u`: if `u` is a
        transposed `(batch, length, channels)` tensor, so is the result.

    Raises:
        ValueError: if shapes or devices do not fit together, or `backend` is not one of the above.
        TypeError: if a tensor is not of a real floating point dtype.
        ImportError: if the requested backend cannot be imported.
        NotImplementedError: if the requested backend does not support the device or the dtypes.
    """
    _check_inputs(u, delta, A, B, C, D, z, delta_bias)
    if backend == "auto":
        tensors = (u, delta, A, B, C, D, z, delta_bias)
        dtypes = tuple(tensor.dtype for tensor in tensors if tensor is not None)
        compiling = torch.compiler.is_compiling()
        backend = forced_backend("selective_scan") or choose_backend(u.device.type, dtypes, compiling)
    else:
        check_backend(backend)
    if backend not in SELECTIVE_SCAN_BACKENDS:
        raise ValueError(f"`backend` must be 'auto' or one of {SELECTIVE_SCAN_BACKENDS}, not {backend!r}.")
    if A_is_log:
        # A compiler makes one kernel of it, too.
        in_one_kernel = backend == "triton" and not torch.compiler.is_compiling()
        A = rates_triton(A) if in_one_kernel else -torch.exp(A)  # (D, N)
    out = _FUNCTIONS[backend](u, delta, A, B, C, D, z, delta_bias, delta_softplus)  # (B, D, L)
    if u.stride(1) < u.stride(2):
        return out.mT.contiguous().mT
    return out.contiguous()
