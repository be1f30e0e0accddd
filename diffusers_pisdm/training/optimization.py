"""AdamW and Muon, weight decay per parameter, and the learning rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn as nn

from ..utils.machine import multiplies_fast


# Embeddings, tokens, tables of shifts and scales, and the scan's own parameters should not be drawn to zero.
_UNDECAYED = ("class_embedding", "padding_tokens", "scale_shift_table", "A_log")
_HIDDEN = ("transformer_blocks", "skip_projections")

OPTIMIZERS = ("adamw", "muon")
MUON_MOMENTUM = 0.95
MUON_ITERATIONS = 5  # these and the coefficients are of Jordan et al. (2024), and PyTorch's
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MUON_SCALE = 0.2  # the root mean square of AdamW's steps (Liu et al., 2025), so that one learning rate suits both


def parameter_groups(module: nn.Module, weight_decay: float, optimizer: str = "adamw") -> list[dict]:
    """
    Splits the trainable parameters into those that decay and those that do not: vectors (biases, `D`, `dt_bias`, norm
    scales), embeddings, padding tokens and `A_log`.

    Args:
        module (`nn.Module`): The model or models.
        weight_decay (`float`): The weight decay of the first group.
        optimizer (`str`, defaults to `"adamw"`):
            `"muon"` puts the matrices of the layers, which decay too, in a third group, for [`Muon`].

    Returns:
        `list[dict]`: Two or three parameter groups for [`make_optimizer`].
    """
    decayed, undecayed, matrices = [], [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        if parameter.ndim < 2 or any(part in parts for part in _UNDECAYED):
            undecayed.append(parameter)
        elif optimizer == "muon" and parameter.ndim == 2 and any(part in parts for part in _HIDDEN):
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    if optimizer == "muon":
        groups.append({"params": matrices, "weight_decay": weight_decay, "momentum": MUON_MOMENTUM})
    return groups


def learning_rate_factor(step: int, warmup_steps: int, cooldown_steps: int, total_steps: int) -> float:
    """
    A learning rate that rises linearly, stays constant, and falls linearly to zero over the last `cooldown_steps` (0:
    never). A run can be extended from any checkpoint before the cooldown.

    Args:
        step (`int`): Optimizer steps taken so far.
        warmup_steps (`int`), cooldown_steps (`int`), total_steps (`int`): In optimizer steps.

    Returns:
        `float`: The learning rate of the next step as a share in [0, 1] of the highest.
    """
    rise = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    fall = (total_steps - step) / cooldown_steps if step > total_steps - cooldown_steps else 1.0
    return max(0.0, min(rise, fall))


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """
    The nearest matrices with orthonormal rows or columns, roughly: Newton-Schulz iterations, after which singular
    values are between about 0.7 and 1.2.

    Args:
        matrices (`torch.Tensor` of shape `(K, R, C)`): Matrices of equal size.

    Returns:
        `torch.Tensor` of shape `(K, R, C)`, bfloat16, or float32 on a CPU that would be slower in bfloat16.
    """
    a, b, c = MUON_COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.to(torch.bfloat16 if multiplies_fast(torch.bfloat16, matrices.device) else torch.float32)
    wide = wide.mT if is_tall else wide  # (K, m, n) with m <= n
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(MUON_ITERATIONS):
        gram = wide @ wide.mT  # (K, m, m)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # (K, m, m)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)  # (K, m, n)
    return wide.mT if is_tall else wide


class Muon(torch.optim.AdamW):
    """
    Muon (Jordan et al., 2024) for groups with a `momentum`, and AdamW for the others: a matrix moves along its mean
    gradient made orthogonal, so that all directions learn at the same rate.

    It takes the steps of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but those of matrices of equal size
    together; it can be recorded in a CUDA graph; and like fused AdamW, it skips a step where `found_inf` is 1.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict) -> None:
        skip, rate = getattr(self, "found_inf", None), group["lr"]
        by_shape = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for shape, parameters in by_shape.items():
            for parameter in parameters:
                if not self.state[parameter]:
                    # AdamW counts steps, and would miss the number when it loads a state.
                    self.state[parameter] = {"step": torch.zeros(()), "mean": torch.zeros_like(parameter)}
            means = [self.state[parameter]["mean"] for parameter in parameters]
            grads = [parameter.grad for parameter in parameters]
            if skip is not None:
                grads = [torch.where(skip > 0, mean, grad) for mean, grad in zip(means, grads, strict=True)]
                rate = group["lr"] * (1 - skip)
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, means, group["momentum"])  # Nesterov's
            steps = orthogonalize(torch.stack(ahead)).float() * (
                rate * MUON_SCALE * math.sqrt(max(shape))
            )  # (K, R, C)
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            torch._foreach_sub_(parameters, steps.unbind())


def make_optimizer(
    parameters: list[dict],
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    use_8bit: bool = False,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """
    Makes an optimizer for [`parameter_groups`]: [`Muon`] if one has a `momentum`, else AdamW.

    Args:
        parameters (`list[dict]`): Parameter groups with their weight decay.
        learning_rate (`float`): Of all groups.
        betas (`tuple[float, float]`), epsilon (`float`): AdamW's.
        use_8bit (`bool`, defaults to `False`): Whether to keep both moments in 8 bits, using bitsandbytes.
        capturable (`bool`, defaults to `False`):
            Whether a CUDA graph may record its steps; the learning rate is then a tensor on the parameters' device.

    Returns:
        `torch.optim.Optimizer`.

    Raises:
        ImportError: `use_8bit` without bitsandbytes.
        ValueError: `use_8bit` for Muon.
    """
    uses_muon = any("momentum" in group for group in parameters)
    if use_8bit:
        if uses_muon:
            raise ValueError("8-bit AdamW does not go with Muon. Train with one of the two.")
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ImportError("8-bit Adam needs bitsandbytes. Run `pip install bitsandbytes`.") from error
        return AdamW8bit(parameters, lr=learning_rate, betas=betas, eps=epsilon)
    if capturable:
        learning_rate = torch.tensor(learning_rate, device=parameters[0]["params"][0].device)
    optimizer_class = Muon if uses_muon else torch.optim.AdamW
    return optimizer_class(parameters, lr=learning_rate, betas=betas, eps=epsilon, fused=True, capturable=capturable)


def skips_steps_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """
    Whether an optimizer, prepared by accelerate or not, skips a step where its attribute `found_inf`, a float32 scalar
    on the device, is 1: so the host need not wait for the gradient to know whether it is finite. PyTorch's fused ones
    do, for `GradScaler`.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])
