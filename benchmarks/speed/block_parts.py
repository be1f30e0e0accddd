"""One layer from each half of a model, as the model runs it: what deep models consist of."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring.memory import measure_peak_growth
from benchmarks.measuring.timing import MIN_STACK, time_pass
from benchmarks.speed.candidates import Candidate, make_inputs
from diffusers_pisdm.ops.scan_paths import TokenMove, move_tokens


SECOND, LAST = 1, 3  # of four layers: the first of each half is a special case (see measuring/timing.py)


@dataclass
class BlockPair:
    """Two blocks of a stack of four layers, neither the first of its half."""

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]

    @classmethod
    def build(
        cls, candidate: Candidate, image_size: int, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> BlockPair:
        """A candidate's pair with random weights, for images of `image_size` pixels."""
        with device:
            model = candidate.build(image_size, MIN_STACK, dtype)
        return cls(model, make_inputs(batch_size, image_size, device, dtype))

    @property
    def blocks(self) -> tuple[nn.Module, nn.Module]:
        return self.model.transformer_blocks[SECOND], self.model.transformer_blocks[LAST]

    @property
    def parameters(self) -> int:
        """Parameters of both blocks, without the embeddings that diffusers' DiT keeps inside its blocks."""
        return self._count(excluded=(".emb.",))

    @property
    def token_parameters(self) -> int:
        """
        Those of the parameters that apply to every token. Each of DiT's blocks computes a modulation from timestep and
        class only once per image: a third of its parameters costs almost nothing.
        """
        return self._count(excluded=(".emb.", "norm1.linear."))

    def _count(self, excluded: tuple[str, ...]) -> int:
        named = [item for block in self.blocks for item in block.named_parameters()]
        return sum(parameter.numel() for name, parameter in named if not any(part in name for part in excluded))

    def seconds(self) -> float:
        """One pass through both blocks, reordering tokens before each."""
        layers = time_pass(self.model, self.inputs, by_layer=True).layers
        return layers[SECOND] + layers[LAST]

    def arguments(self) -> list[tuple[tuple, dict]]:
        """The positional and keyword arguments of each of the two blocks in a pass."""
        caught: list[tuple[tuple, dict]] = []

        def catch(block: nn.Module, given: tuple, named: dict) -> None:
            caught.append((given, named))

        hooks = [block.register_forward_pre_hook(catch, with_kwargs=True) for block in self.blocks]
        try:
            with torch.no_grad():
                self.model(*self.inputs, return_dict=False)
        finally:
            for hook in hooks:
                hook.remove()
        return caught

    def peak_bytes(self) -> int | None:
        """
        The larger of the two blocks' memory beyond the weights, including the input. Both have run before, so lasting
        workspaces do not count.
        """
        needed = []
        for block, (given, named) in zip(self.blocks, self.arguments()):

            def call(block: nn.Module = block, given: tuple = given, named: dict = named) -> None:
                with torch.no_grad():
                    block(*given, **named)

            growth = measure_peak_growth(call, self.inputs[0].device)
            if growth is None:
                return None
            needed.append(growth + sum(tensor.nbytes for tensor in given))
        return max(needed)


def median_seconds(pairs: dict[str, BlockPair], repeats: int) -> dict[str, float]:
    """The medians of `repeats` turns of each pair, after a warm-up turn."""
    seconds: dict[str, list[float]] = {name: [] for name in pairs}
    for repeat in range(-1, repeats):
        for name, pair in pairs.items():
            elapsed = pair.seconds()
            if repeat >= 0:
                seconds[name].append(elapsed)
    return {name: statistics.median(own) for name, own in seconds.items()}


# Operators whose own time counts towards a part; all others count as `elsewhere`.
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "scan": ("diffusers_pisdm::selective_scan", "_scan_fwd"),
    "convolution": ("diffusers_pisdm::causal_conv",),
    "norm, modulation, gate": (
        *("aten::native_layer_norm", "aten::addcmul", "aten::add", "aten::mul"),
        *("diffusers_pisdm::modulated_norm", "diffusers_pisdm::gated_residual"),  # the former reorders, too
    ),
    "reordering": ("aten::index_select", "aten::gather", "aten::cat", "aten::copy_"),
}
ELSEWHERE = "elsewhere"


def part_of(operator: str) -> str:
    """The part that an operator belongs to."""
    for part, names in PARTS.items():
        # The names of this package's operators include their backend; torch's must match exactly.
        if operator in names or any(name in operator for name in names if not name.startswith("aten::")):
            return part
    return ELSEWHERE


def time_shares(pair: BlockPair, repeats: int) -> dict[str, float]:
    """
    The share of every part in `PARTS`, and of `ELSEWHERE`, in the time of PIS-DM's two blocks, including the
    reordering of tokens before each; profiled over `repeats` turns.
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
