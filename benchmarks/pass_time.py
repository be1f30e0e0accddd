"""The time of one forward pass, and that of a deeper model from the times of its layers."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.nn as nn

from benchmarks.device_clock import now


MIN_STACK = 4  # layers: the first of each half is a special case and needs one more beside it


@dataclass(frozen=True)
class PassTime:
    """
    Args:
        seconds (`float`): Of the whole pass.
        layers (`tuple[float, ...]`): Seconds from the end of one layer to that of the next, first layer first.
    """

    seconds: float
    layers: tuple[float, ...]


def time_pass(model: nn.Module, inputs: tuple[torch.Tensor, ...], by_layer: bool = False) -> PassTime:
    """
    Runs a model once, without gradients.

    Args:
        model (`nn.Module`): With its layers in `transformer_blocks`.
        inputs (`tuple[torch.Tensor, ...]`): Its arguments, on its device.
        by_layer (`bool`, defaults to `False`): Whether layers are timed, for which a GPU has to wait after each.

    Returns:
        [`PassTime`], its `layers` empty if they were not to be timed.
    """
    device = inputs[0].device

    stamps: list[float] = []
    hooks = []
    if by_layer:
        first, *_ = blocks = list(model.transformer_blocks)
        hooks = [block.register_forward_hook(lambda *_: stamps.append(now(device))) for block in blocks]
        hooks.append(first.register_forward_pre_hook(lambda *_: stamps.append(now(device))))
    try:
        with torch.no_grad():
            start = now(device)
            model(*inputs, return_dict=False)
            seconds = now(device) - start
    finally:
        for hook in hooks:
            hook.remove()
    return PassTime(seconds, tuple(end - begin for begin, end in zip(stamps, stamps[1:])))


def whole_seconds(stack: PassTime, num_layers: int) -> float:
    """
    The time of a model of `num_layers` layers from that of a stack of fewer: each missing layer adds the time of a
    layer of its half. The first layer of a half is no example of these: in PIS-DM, whose halves mirror each other, it
    alone need not reorder the tokens.

    Args:
        stack ([`PassTime`]): Timed by layer; an even number of layers, at least [`MIN_STACK`].
        num_layers (`int`): Of the whole model, at least as many.

    Returns:
        `float`: Seconds.
    """
    half = len(stack.layers) // 2
    first, second = stack.layers[1:half], stack.layers[half + 1 :]
    missing = (num_layers - num_layers // 2 - half, num_layers // 2 - half)
    return stack.seconds + missing[0] * statistics.mean(first) + missing[1] * statistics.mean(second)
