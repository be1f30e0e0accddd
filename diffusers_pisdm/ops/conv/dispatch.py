"""The public causal convolution, and the choice of its backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..common.backends import check_backend, forced_backend, missing_backend
from .causal_conv1d import KERNEL_SIZES, causal_conv_causal_conv1d
from .numba_operator import causal_conv_numba
from .triton_operator import causal_conv_triton


def causal_conv_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = "silu"
) -> torch.Tensor:
    """Depthwise causal convolution with `torch.nn.functional.conv1d`."""
    weight = weight.to(x.dtype)[:, None]  # (D, 1, K)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv1d(F.pad(x, (weight.shape[2] - 1, 0)), weight, bias, groups=x.shape[1])  # (B, D, L)
    y = y if activation is None else F.silu(y)
    return y.to(x.dtype)  # autocast computes float32 convolutions in half precision


CAUSAL_CONV_BACKENDS = ("torch", "numba", "triton", "causal_conv1d")
_FUNCTIONS = {
    "torch": causal_conv_torch,
    "numba": causal_conv_numba,
    "triton": causal_conv_triton,
    "causal_conv1d": causal_conv_causal_conv1d,
}
# Per device, in order of preference. causal-conv1d comes second: Triton's kernel takes any strides and also works in
# compiled models, and causal-conv1d was never measured to be faster.
_FASTEST = {"cpu": ("numba",), "cuda": ("triton", "causal_conv1d")}
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result  # called, not traced, when a model is compiled: it may import
def choose_backend(device_type: str, dtypes: tuple[torch.dtype, ...], kernel_size: int, compiling: bool) -> str:
    """The device's kernels if usable, else torch. The scan that follows logs what is missing."""
    if any(dtype not in _KERNEL_DTYPES for dtype in dtypes):
        return "torch"
    for backend in _FASTEST.get(device_type, ()):
        fits = backend != "causal_conv1d" or (kernel_size in KERNEL_SIZES and not compiling)
        if fits and missing_backend(backend) is None:
            return backend
    return "torch"


def _check_inputs(x, weight, bias, activation) -> None:
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise ValueError(
            f"`x` must have shape (batch, channels, length), neither of the last two zero, not {tuple(x.shape)}."
        )
    if weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] == 0:
        raise ValueError(
            f"`weight` must have shape ({x.shape[1]}, kernel size) to fit `x` of shape {tuple(x.shape)},"
            f" not {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f"`bias` must have shape ({x.shape[1]},) to fit `x`, not {tuple(bias.shape)}.")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"`{name}` is on {tensor.device} but `x` is on {x.device}: move them to one device.")
        if not tensor.is_floating_point():
            raise TypeError(f"`{name}` must be a real floating point tensor, not {tensor.dtype}.")
    if activation not in (None, "silu"):
        raise ValueError(f"`activation` must be None or 'silu', not {activation!r}.")


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> torch.Tensor:
    """
    Depthwise causal convolution over the last axis: `out[t]` sees `x[t - K + 1]` to `x[t]`, zeros before the start.

    Any strides are accepted.

    Args:
        x (`torch.Tensor` of shape `(batch, channels, length)`): The input sequence.
        weight (`torch.Tensor` of shape `(channels, kernel_size)`): One filter per channel; the last tap meets `x[t]`.
        bias (`torch.Tensor` of shape `(channels,)`, *optional*): Added before the activation.
        activation (`str`, *optional*, defaults to `"silu"`): `"silu"` or `None`.
        backend (`str`, defaults to `"auto"`):
            `"torch"` (any device), `"numba"` (CPU), `"triton"` (CUDA), `"causal_conv1d"` (CUDA, kernel sizes up to 4),
            or `"auto"`: Numba on a CPU, Triton or else causal-conv1d on CUDA, if they can be imported, else torch.

    Returns:
        `torch.Tensor` of shape `(batch, channels, length)`, with the dtype and memory order of `x`.

    Raises:
        ValueError: if shapes or devices do not fit together, or `activation` or `backend` is not one of the above.
        TypeError: if a tensor is not of a real floating point dtype.
        ImportError: if the requested backend cannot be imported.
        NotImplementedError: if the requested backend does not support the device or the dtypes.
    """
    _check_inputs(x, weight, bias, activation)
    if backend == "auto":
        dtypes = tuple(tensor.dtype for tensor in (x, weight, bias) if tensor is not None)
        backend = forced_backend("causal_conv") or choose_backend(
            x.device.type, dtypes, weight.shape[1], torch.compiler.is_compiling()
        )
    else:
        check_backend(backend)
    if backend not in CAUSAL_CONV_BACKENDS:
        raise ValueError(f"`backend` must be 'auto' or one of {CAUSAL_CONV_BACKENDS}, not {backend!r}.")
    out = _FUNCTIONS[backend](x, weight, bias, activation)  # (B, D, L)
    if x.stride(1) < x.stride(2):
        return out.mT.contiguous().mT
    return out.contiguous()
