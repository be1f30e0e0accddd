"""Times a forward pass, and extrapolates that of a deeper model from the times of its layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn


MIN_STACK = 4  # layers: the first of each half is a special case and needs another next to it


@dataclass(frozen=True)
class PassTime:
    """The time of one pass through a model, in seconds."""

    seconds: float
    layers: tuple[float, ...]  # from the end of one layer to that of the next; empty if not timed


def time_pass(model: nn.Module, inputs: tuple[torch.Tensor, ...], by_layer: bool = False) -> PassTime:
    """Runs a model once, without gradients. Timing `transformer_blocks` by layer makes a GPU wait after each."""
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
    The seconds of a model of `num_layers` layers, extrapolated from those of a smaller stack with an even number of
    layers, at least `MIN_STACK`.

    Each missing layer adds the time of a layer of its half, but not of the first one: in PIS-DM, whose halves mirror
    each other, the first layer of a half is the only one that need not reorder the tokens.
    """
    half = len(stack.layers) // 2
    first, second = stack.layers[1:half], stack.layers[half + 1 :]
    missing = (num_layers - num_layers // 2 - half, num_layers // 2 - half)
    return stack.seconds + missing[0] * statistics.mean(first) + missing[1] * statistics.mean(second)


def now(device: torch.device) -> float:
    """The time in seconds, once the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


WARM_UPS = 3  # calls before the recorded one, as PyTorch advises; the first may compile kernels


def record_graph(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """
    Records a call's kernels and returns a function that launches them all at once. The call must use the same memory
    each time and never wait for the GPU; the function keeps it alive.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, call: Callable[[], object]) -> None:
    """A graph only has the addresses of its call's tensors, which might be freed with the call."""
    graph.replay()
