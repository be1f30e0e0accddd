"""Time and memory of a block's forward and backward, against the same block on transformers' slow path."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from benchmarks.peers.slow_mixer import SlowMixer
from diffusers_pisdm.models.transformer_pisdm import PISDMBlock
from diffusers_pisdm.ops.common.backends import force_backends
from diffusers_pisdm.training.cost.flops import StepTrace


STATE_SIZE, CONV_KERNEL, EXPAND = 16, 3, 2  # the model's defaults
OURS, CHECKPOINTED, SLOW = "PIS-DM's kernels", "the same, checkpointed", "transformers' slow path"
SMALL = {"width": 32, "tokens": 33}  # of the check
TOLERANCE = 1e-4  # of the largest value


def make_block(width: int, dtype: torch.dtype = torch.float32) -> PISDMBlock:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PISDMBlock(width, STATE_SIZE, CONV_KERNEL, EXPAND, -(-width // 16)).to(dtype)


def make_tensors(width: int, tokens: int, batch_size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Tokens, a modulation, and an output gradient."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch_size, tokens, width), (batch_size, 3, width), (batch_size, tokens, width))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def slow_copy(block: PISDMBlock) -> PISDMBlock:
    """The same block with transformers' mixer."""
    copy = make_block(block.scale_shift_table.shape[1], block.scale_shift_table.dtype)
    copy.load_state_dict(block.state_dict())
    copy.mixer = SlowMixer(copy.mixer)
    return copy


def run_step(call: Callable, block: nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Runs forward and backward; returns the output and the gradient of the tokens."""
    tokens, modulation, grad = tensors
    tokens = tokens.detach().requires_grad_()
    block.zero_grad()
    out = call(tokens, modulation.detach().requires_grad_())  # (B, L, D)
    out.backward(grad)
    return [out.detach(), tokens.grad]


def check_training() -> float:
    """
    Compares a small block, with our kernels and on the slow path, to the textbook loop in float64: the largest errors
    as a share of the largest value. Raises RuntimeError above `TOLERANCE`.
    """
    exact = make_block(SMALL["width"], torch.float64)
    with force_backends(selective_scan="reference", causal_conv="torch"):
        wanted = run_step(exact, exact, make_tensors(**SMALL, batch_size=2, dtype=torch.float64))
    block = make_block(SMALL["width"])
    error = 0.0
    for candidate in (block, slow_copy(block)):
        found = run_step(candidate, candidate, make_tensors(**SMALL, batch_size=2))
        errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted)]
        if not max(errors) <= TOLERANCE:
            raise RuntimeError(f"A block differs from float64 by {errors} of the largest value, so nothing is timed.")
        error = max(error, *errors)
    return error


def trace_memory(call: Callable, tensors: list[torch.Tensor]) -> tuple[int, int]:
    """The bytes that forward keeps for backward, including its output, and the operations of both."""
    tokens, modulation, grad = (tensor.detach().requires_grad_() for tensor in tensors)
    with StepTrace() as trace:
        out = call(tokens, modulation)  # (B, L, D)
        saved = trace.live_bytes
        out.backward(grad)
    return saved, trace.flops


def measure_training(width: int, tokens: int, batch_size: int, repeats: int, slow_repeats: int) -> list[dict]:
    """
    Times a block of one width: ours, ours with gradient checkpointing (`repeats` turns each), and the slow path
    (`slow_repeats`; it takes minutes). Rows have `seconds`, `median_seconds`, `saved_bytes`, `flops`, `times_ours`.
    """
    block = make_block(width)
    tensors = make_tensors(width, tokens, batch_size)
    slow = slow_copy(block)
    ways = {
        OURS: (block, block, repeats),
        CHECKPOINTED: (lambda *given: checkpoint(block, *given, use_reentrant=False), block, repeats),
        SLOW: (slow, slow, slow_repeats),
    }
    rows = []
    for name, (call, _, _) in ways.items():
        saved, flops = trace_memory(call, tensors)  # also warms up
        rows.append({"way": name, "saved_bytes": saved, "flops": flops, "seconds": []})
    for turn in range(max(repeats, slow_repeats)):
        for row in rows:
            call, module, turns = ways[row["way"]]
            if turn < turns:
                start = time.perf_counter()
                run_step(call, module, tensors)
                row["seconds"].append(time.perf_counter() - start)
    for row in rows:
        row["median_seconds"] = statistics.median(row["seconds"])
        row["times_ours"] = row["median_seconds"] / rows[0]["median_seconds"]
        row |= {"width": width, "tokens": tokens, "batch_size": batch_size}
    return rows


def describe_training(rows: list[dict]) -> str:
    """A table of the rows of [`measure_training`]."""
    first = rows[0]
    size = f"width {first['width']}, {first['tokens']} tokens, batch {first['batch_size']}"
    lines = [
        f"Forward and backward of a block, {size}",
        f"{'':<26}{'x ours':>9}{'seconds':>10}{'MiB kept':>10}{'GFLOP':>8}",
    ]
    for row in rows:
        lines.append(
            f"{row['way']:<26}{row['times_ours']:>9.2f}{row['median_seconds']:>10.3g}"
            f"{row['saved_bytes'] / 2**20:>10.1f}{row['flops'] / 1e9:>8.1f}"
        )
    return "\n".join(lines)
