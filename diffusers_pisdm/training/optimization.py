"""Weight decay per parameter, and the learning rate schedule."""

from __future__ import annotations

import torch
import torch.nn as nn


# Embeddings, tokens, tables of shifts and scales, and the scan's own parameters should not be drawn to zero.
_UNDECAYED = ("class_embedding", "padding_tokens", "scale_shift_table", "A_log")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """
    Splits the trainable parameters into those that decay and those that do not: vectors (biases, `D`, `dt_bias`, norm
    scales), embeddings, padding tokens and `A_log`.

    Args:
        module (`nn.Module`): The model or models.
        weight_decay (`float`): AdamW's weight decay of the first group.

    Returns:
        `list[dict]`: Two parameter groups for a torch optimizer.
    """
    decayed, undecayed = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        keep = parameter.ndim < 2 or any(part in name.split(".") for part in _UNDECAYED)
        (undecayed if keep else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


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


def make_optimizer(
    parameters: list[dict],
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    use_8bit: bool = False,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """
    Makes an AdamW optimizer for [`parameter_groups`].

    Args:
        parameters (`list[dict]`): Parameter groups with their weight decay.
        learning_rate (`float`), betas (`tuple[float, float]`), epsilon (`float`): AdamW's.
        use_8bit (`bool`, defaults to `False`): Whether to keep both moments in 8 bits, using bitsandbytes.
        capturable (`bool`, defaults to `False`):
            Whether a CUDA graph may record its steps; the learning rate is then a tensor on the parameters' device.

    Returns:
        `torch.optim.Optimizer`.

    Raises:
        ImportError: `use_8bit` without bitsandbytes.
    """
    if use_8bit:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ImportError("8-bit Adam needs bitsandbytes. Run `pip install bitsandbytes`.") from error
        return AdamW8bit(parameters, lr=learning_rate, betas=betas, eps=epsilon)
    if capturable:
        learning_rate = torch.tensor(learning_rate, device=parameters[0]["params"][0].device)
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, eps=epsilon, fused=True, capturable=capturable)


def skips_steps_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """
    Whether an optimizer, prepared by accelerate or not, skips a step where its attribute `found_inf`, a float32 scalar
    on the device, is 1: so the host need not wait for the gradient to know whether it is finite. PyTorch's fused ones
    do, for `GradScaler`.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])
