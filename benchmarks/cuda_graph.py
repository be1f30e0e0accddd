"""Calls as CUDA graphs: the GPU's own time, without the launches that it would wait for at small sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch


WARM_UPS = 3  # calls before the recorded one, as PyTorch advises; the first may compile kernels


def record_graph(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """
    Records a call's kernels, to be launched all at once.

    Args:
        call (`Callable`): Launches the same kernels on the same memory each time, and never waits for the GPU.
        device (`torch.device`): The GPU.

    Returns:
        `Callable`: Replays the kernels. It keeps the call, and so whatever that computes with.
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
    """A graph has the addresses of its call's tensors only: were the call gone, so might they be."""
    graph.replay()
