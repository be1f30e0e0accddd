"""The textbook selective scan: one Python step per token. Slow, but every other backend is tested against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def selective_scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> torch.Tensor:
    """
    Selective scan as a loop over time (Mamba, arXiv 2312.00752, section 3.2 and algorithm 2), differentiated by
    autograd. The state is float64 for float64 inputs, else float32.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    state = x.new_zeros(*x.shape[:2], A.shape[1])  # (B, D, N)
    outputs = []
    # unbind instead of x[..., t]: an index's gradient is a full-size tensor, which makes the backward quadratic.
    for x_t, delta_t, B_t, C_t in zip(x.unbind(-1), delta.unbind(-1), B.unbind(-1), C.unbind(-1)):
        decay = torch.exp(delta_t[..., None] * A)  # (B, D, N)
        state = decay * state + (delta_t * x_t)[..., None] * B_t[:, None]  # (B, D, N)
        outputs.append((state * C_t[:, None]).sum(-1))  # (B, D)
    y = torch.stack(outputs, dim=-1)  # (B, D, L)

    if D is not None:
        y = y + x * D.to(dtype)[:, None]
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)
