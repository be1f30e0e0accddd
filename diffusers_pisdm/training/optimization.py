"""Which parameters decay, and how the learning rate moves."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch.optim.lr_scheduler import LambdaLR


# Embeddings, tokens, tables of shifts and scales, and the scan's own parameters have no reason to be near zero.
_UNDECAYED = ("class_embedding", "padding_tokens", "scale_shift_table", "A_log")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """
    Splits the trainable parameters into those that decay and those that do not: vectors (biases, `D`, `dt_bias`, norm
    scales), embeddings, padding tokens and `A_log`.

    Args:
        module (`nn.Module`): The model or models.
        weight_decay (`float`): AdamW's decay of the first group.

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


def warmup_cooldown_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, cooldown_steps: int, total_steps: int
) -> LambdaLR:
    """
    A learning rate that rises linearly, stays, and falls linearly to zero over the last `cooldown_steps`: a run can be
    prolonged from any checkpoint before the cooldown, and 0 makes it constant to the end.

    Args:
        optimizer (`torch.optim.Optimizer`): Whose learning rate is scheduled.
        warmup_steps (`int`), cooldown_steps (`int`), total_steps (`int`): In optimizer steps.

    Returns:
        `LambdaLR`.
    """

    def factor(step: int) -> float:
        rise = (step + 1) / warmup_steps if step < warmup_steps else 1.0
        fall = (total_steps - step) / cooldown_steps if step > total_steps - cooldown_steps else 1.0
        return max(0.0, min(rise, fall))

    return LambdaLR(optimizer, factor)
