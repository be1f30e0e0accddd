"""What a PIS-DM block's time goes to, by torch's profiler."""

from __future__ import annotations

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.block_pair import BlockPair
from diffusers_pisdm.ops.scan_paths import TokenMove, move_tokens


# Operators whose own time counts for a part; all others are `elsewhere`.
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "scan": ("diffusers_pisdm::selective_scan", "_scan_fwd"),
    "convolution": ("diffusers_pisdm::causal_conv",),
    "norm, modulation, gate": ("aten::native_layer_norm", "aten::addcmul", "aten::add", "aten::mul"),
    "reordering": ("aten::index_select", "aten::gather", "aten::cat", "aten::copy_"),
}
ELSEWHERE = "elsewhere"


def part_of(operator: str) -> str:
    """The part that an operator belongs to."""
    for part, names in PARTS.items():
        # The package's own operators bear their backend's name; torch's are meant exactly.
        if operator in names or any(name in operator for name in names if not name.startswith("aten::")):
            return part
    return ELSEWHERE


def time_shares(pair: BlockPair, repeats: int) -> dict[str, float]:
    """
    Runs the two blocks of a PIS-DM stack, each after a reordering of its tokens.

    Args:
        pair ([`BlockPair`]): PIS-DM's.
        repeats (`int`): Turns that are profiled.

    Returns:
        `dict[str, float]`: The share of every part of [`PARTS`] and of [`ELSEWHERE`], adding up to 1.
    """
    calls = [(block, given) for block, (given, _) in zip(pair.blocks, pair.arguments())]
    length = calls[0][1][0].shape[1]
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0)).to(pair.inputs[0].device)
    move = TokenMove(order, None)

    def run() -> None:
        for block, (tokens, *others) in calls:
            block(move_tokens(tokens, move), *others)

    on_gpu = pair.inputs[0].device.type == "cuda"
    with torch.no_grad():
        run()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as trace:
            for _ in range(repeats):
                run()
    spent = dict.fromkeys((*PARTS, ELSEWHERE), 0.0)
    for event in trace.key_averages():
        if event.device_type != DeviceType.CPU:  # a kernel, counted with the operator that launched it
            continue
        spent[part_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(spent.values())
    return {part: time / total for part, time in spent.items()}
