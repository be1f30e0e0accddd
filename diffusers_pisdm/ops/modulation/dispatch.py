"""What surrounds a layer's mixer: reordering, norm and modulation before it, the gated residual after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..common.backends import check_backend, forced_backend, missing_backend
from ..scan_paths import TokenMove, move_tokens
from .triton_operator import gated_residual_triton, modulated_norm_triton


MODULATION_BACKENDS = ("torch", "triton")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result  # called, not traced, when a model is compiled: it may import
def choose_backend(device_type: str, dtypes: tuple[torch.dtype, ...], compiling: bool) -> str:
    """Triton's kernels on a GPU, unless a compiler is about to fuse the plain operators itself."""
    fits = device_type == "cuda" and not compiling and all(dtype in _KERNEL_DTYPES for dtype in dtypes)
    return "triton" if fits and missing_backend("triton") is None else "torch"


def _backend(requested: str, *tensors: torch.Tensor) -> str:
    if requested not in ("auto", *MODULATION_BACKENDS):
        raise ValueError(f"`backend` must be 'auto' or one of {MODULATION_BACKENDS}, not {requested!r}.")
    if requested != "auto":
        check_backend(requested)
        return requested
    dtypes = tuple(tensor.dtype for tensor in tensors)
    compiling = torch.compiler.is_compiling()
    return forced_backend("modulation") or choose_backend(tensors[0].device.type, dtypes, compiling)


def moves_with_norm(tokens: torch.Tensor, modulation: torch.Tensor) -> bool:
    """Whether `modulated_norm` moves such tokens in the kernel that it runs anyway."""
    return _backend("auto", tokens, modulation) == "triton"


def modulated_norm(
    tokens: torch.Tensor,
    modulation: torch.Tensor,
    table: torch.Tensor,
    move: TokenMove | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Reorders tokens, then normalises and modulates them: `norm(x) * (1 + scale) + shift`.

    Args:
        tokens (`torch.Tensor` of shape `(B, L, D)`): The sequence.
        modulation (`torch.Tensor` of shape `(B, 3, D)`): Each image's shift, scale and gate, shared by all layers.
        table (`torch.Tensor` of shape `(3, D)`): What the layer adds to them.
        move (`TokenMove`, *optional*): See [`move_tokens`]; the tokens stay where they are if not given.
        eps (`float`, defaults to 1e-6): Added to the variance.
        backend (`str`, defaults to `"auto"`):
            `"torch"`, `"triton"` (CUDA, one kernel), or `"auto"`: Triton on CUDA if it can be imported, else torch.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shapes `(B, M, D)`: The moved tokens, and these after norm and
        modulation.
    """
    backend = _backend(backend, tokens, modulation, table)
    if move is not None and (backend == "torch" or move.inverse is None):  # not a permutation
        tokens, move = move_tokens(tokens, move), None  # (B, M, D)
    if backend == "triton":
        return modulated_norm_triton(tokens, modulation, table, None if move is None else move.index, eps)
    shift, scale, _ = (modulation + table.to(modulation.dtype)).chunk(3, dim=1)  # (B, 1, D) each
    return tokens, torch.addcmul(shift, F.layer_norm(tokens, tokens.shape[2:], eps=eps), 1 + scale)


def gated_residual(
    tokens: torch.Tensor,
    update: torch.Tensor,
    modulation: torch.Tensor,
    table: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """
    Adds a layer's update: `tokens + gate * update`.

    Args:
        tokens, update (`torch.Tensor` of shape `(B, L, D)`): The sequence, and what the mixer made of it.
        modulation (`torch.Tensor` of shape `(B, 3, D)`), table (`torch.Tensor` of shape `(3, D)`):
            See [`modulated_norm`].
        backend (`str`, defaults to `"auto"`): See [`modulated_norm`].

    Returns:
        `torch.Tensor` of shape `(B, L, D)`.
    """
    if _backend(backend, tokens, update, modulation, table) == "triton":
        return gated_residual_triton(tokens, update, modulation, table)
    gate = (modulation + table.to(modulation.dtype))[:, 2:]  # (B, 1, D)
    return torch.addcmul(tokens, gate, update)
