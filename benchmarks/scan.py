"""
Compares selective scans: this package's backends and, on the CPU, mambapy (`pip install mambapy`) and the loop that
Mamba models fall back to without CUDA kernels.

    python -m benchmarks.scan
    python -m benchmarks.scan --shapes 2x1024x1024 --repeats 15 --threads 2 --output-dir results
    python -m benchmarks.scan --device cuda

Every candidate's outputs and gradients are first checked against float64; one that is off by more than `--tolerance`
of the largest value is not timed. The candidates are then timed in turns, so that disturbances of the machine affect
all equally, and medians are reported with their ratio to mambapy. Prints a table; writes `scan.json` and `scan.png`.

On CUDA, the candidates are the blocked PyTorch scan, Triton and, if it can be imported, mamba_ssm. Times are those of
CUDA graphs between two GPU events, so they exclude launches. mamba_ssm is given sequences as its kernel needs them
(time adjacent), and once more as a block of this package has them, which it copies. Ratios are to mamba_ssm and to the
floor: the time in which the memory's measured bandwidth moves all inputs and outputs once, plus their gradients if
there is a backward. `--dtype` applies to the sequences, i.e. all but A, D and the bias.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks.measuring.report import DTYPES, write_report
from benchmarks.measuring.timing import record_graph
from diffusers_pisdm import keep_freed_memory
from diffusers_pisdm.ops import selective_scan
from diffusers_pisdm.ops.common.backends import missing_backend
from diffusers_pisdm.ops.scan import triton_operator


# Autograd gives every index `x[..., t]` a gradient of x's full size, so the loop's backward is quadratic in the length
# and is skipped above this one.
MAX_LOOP_LENGTH_BACKWARD = 256
MODES = ("forward", "forward + backward")
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}  # of a result's largest value
SEQUENCES = ("u", "delta", "B", "C", "z")
COPYING_MAMBA = "mamba_ssm, copying"
# What the Triton kernels' latest changes are worth: the settings of before, and each change alone undone.
NOT_SHARED = {"SHARED_DELTAS": False, "SHARED_FLOATS_TOKENS": math.inf}
NOT_PIPELINED = {"FORWARD_STAGES": 1, "CHUNK_STAGES": 1}
TRITON_SETTINGS = {
    "triton, before": {**NOT_SHARED, **NOT_PIPELINED, "SHORT_LENGTH": 0},
    "triton, not shared": NOT_SHARED,
    "triton, not pipelined": NOT_PIPELINED,
    "triton, short in chunks": {"SHORT_LENGTH": 0},
}
PEERS = {"cpu": "mambapy", "cuda": "mamba_ssm"}  # the reference of the ratios, by device
COPY_ELEMENTS = 1 << 26  # float32, copied to measure the memory's bandwidth: more than any cache holds


def make_inputs(batch: int, channels: int, length: int, state_size: int) -> dict[str, torch.Tensor]:
    """Leaf tensors as in a Mamba block, time before channels: steps of about 0.01 to 0.3 and rates of -1 to -N."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "u": randn(batch, length, channels),
        "delta": randn(batch, length, channels),
        "A": -torch.arange(1.0, state_size + 1).repeat(channels, 1),
        "B": randn(batch, length, state_size),
        "C": randn(batch, length, state_size),
        "D": randn(channels),
        "z": randn(batch, length, channels),
        "delta_bias": randn(channels) - 3,
    }


def with_adjacent_steps(sequence: torch.Tensor) -> torch.Tensor:
    """The same (B, L, D) with time adjacent in memory: mamba_ssm would copy any other layout within its time."""
    return sequence.mT.contiguous().mT


def package_scan(backend: str) -> Callable[..., torch.Tensor]:
    """This package's scan with one backend, on (B, L, D) tensors."""

    def scan(u, delta, A, B, C, D, z, delta_bias):
        return selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, z.mT, delta_bias, True, backend=backend).mT

    return scan


def loop_scan(u, delta, A, B, C, D, z, delta_bias):
    """Mamba implementations' fallback: all decays and inputs at once, then a loop over time."""
    u, delta, z = u.mT, F.softplus(delta.mT + delta_bias[:, None]), z.mT  # (B, D, L)
    decays = torch.exp(A[None, :, None] * delta[..., None])  # (B, D, L, N)
    inputs = delta[..., None] * B[:, None] * u[..., None]  # (B, D, L, N)
    state = torch.zeros_like(inputs[:, :, 0])  # (B, D, N)
    outputs = []
    for step in range(u.shape[2]):
        state = decays[:, :, step] * state + inputs[:, :, step]
        outputs.append(torch.matmul(state, C[:, step, :, None].to(state))[..., 0])  # (B, D)
    y = torch.stack(outputs, dim=-1) + u * D[:, None]  # (B, D, L)
    return (y * F.silu(z)).mT.to(u)


def mambapy_scan(u, delta, A, B, C, D, z, delta_bias):
    """mambapy's parallel scan, which needs the decays and inputs of all steps."""
    from mambapy.pscan import pscan

    delta = F.softplus(delta + delta_bias)  # (B, L, D)
    decays = torch.exp(delta[..., None] * A)  # (B, L, D, N)
    inputs = delta[..., None] * B[:, :, None] * u[..., None]  # (B, L, D, N)
    y = torch.matmul(pscan(decays, inputs), C[..., None].to(decays))[..., 0] + u * D  # (B, L, D)
    return (y * F.silu(z)).to(u)


def in_settings(candidate: str, function: Callable, *arguments: Any) -> Any:
    """Calls a function, forward and backward included, in the candidate's settings of the Triton kernels."""
    with ExitStack() as stack:
        for name, value in TRITON_SETTINGS.get(candidate, {}).items():
            stack.enter_context(patch.object(triton_operator, name, value))
        return function(*arguments)


def make_candidates(device_type: str = "cpu") -> dict[str, Callable[..., torch.Tensor]]:
    """All scans that can run here; on the CPU, mambapy comes first."""
    if device_type != "cpu":
        candidates = {"torch": package_scan("torch")}
        for name in ("triton", "mamba_ssm"):
            reason = missing_backend(name)
            if reason is None:
                candidates[name] = package_scan(name)
            else:
                print(f"Skipping {name}: {reason}")
        if "mamba_ssm" in candidates:
            candidates[COPYING_MAMBA] = candidates["mamba_ssm"]
        return candidates
    candidates = {"mambapy": mambapy_scan, "Mamba's loop": loop_scan, "torch": package_scan("torch")}
    reason = missing_backend("numba")
    if reason is None:
        candidates["numba"] = package_scan("numba")
    else:
        print(f"Skipping numba: {reason}")
    try:
        import mambapy.pscan  # noqa: F401
    except ImportError:
        print("Skipping mambapy, and thus all ratios: pip install mambapy")
        del candidates["mambapy"]
    return candidates


def run_forward(scan: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return scan(**inputs)


def run_backward(
    scan: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor], grad: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = scan(**leaves)
    return out, torch.autograd.grad(out, list(leaves.values()), grad)


def relative_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference as a share of the largest value; NaN if either contains a NaN."""
    return ((value.double() - wanted).abs().max() / wanted.abs().max()).item()


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that one call takes, until its last kernel has finished."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure_bandwidth(device: torch.device, elements: int = COPY_ELEMENTS, repeats: int = 10) -> float:
    """Bytes per millisecond that a copy reads and writes, at best."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(time_call(lambda: target.copy_(source), device) for _ in range(repeats))


def make_timed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call itself or, on a GPU, its CUDA graph."""
    return record_graph(call, device) if device.type == "cuda" else call


def bytes_moved(inputs: dict[str, torch.Tensor], mode: str) -> int:
    """Bytes of all inputs and the output once; with a backward, also of all their gradients."""
    once = sum(tensor.nbytes for tensor in inputs.values()) + inputs["u"].nbytes
    # The backward reads the inputs again and the output's gradient, and writes the inputs' gradients.
    return once if mode == MODES[0] else once + once + sum(tensor.nbytes for tensor in inputs.values())


def check_oracle(inputs: dict[str, torch.Tensor]) -> None:
    """Checks the blocked float64 scan, which fits in memory at any length, against the textbook loop on 64 steps."""
    short = {
        name: (tensor[:, :64] if tensor.ndim == 3 else tensor).double() for name, tensor in inputs.items()
    }  # (B, 64, ...)
    grad = torch.ones_like(short["u"])
    out, gradients = run_backward(package_scan("torch"), short, grad)
    wanted, wanted_gradients = run_backward(package_scan("reference"), short, grad)
    for value, reference in zip((out, *gradients), (wanted, *wanted_gradients)):
        if not relative_error(value, reference) < 1e-12:
            raise RuntimeError("The float64 oracle differs from the textbook loop, so it cannot serve as a reference.")


def measure_shape(shape: tuple[int, int, int], args: argparse.Namespace) -> list[dict]:
    """Errors and times of all candidates at one (batch, channels, length): a row per candidate and mode."""
    dtype = DTYPES[args.dtype]
    inputs = {
        name: tensor.to(args.device, dtype if name in SEQUENCES else torch.float32)
        for name, tensor in make_inputs(*shape, args.state_size).items()
    }
    grad = torch.randn(inputs["u"].shape, generator=torch.Generator().manual_seed(1)).to(args.device, dtype)
    check_oracle(inputs)
    wanted, wanted_gradients = run_backward(
        package_scan("torch"), {name: tensor.double() for name, tensor in inputs.items()}, grad.double()
    )
    own = {name: with_adjacent_steps(tensor) if name in SEQUENCES else tensor for name, tensor in inputs.items()}
    given = {"mamba_ssm": (own, with_adjacent_steps(grad))}

    runs, rows = {}, []
    candidates = make_candidates(args.device.type)
    if args.triton_settings:
        candidates |= dict.fromkeys(TRITON_SETTINGS, package_scan("triton"))
    for name, scan in candidates.items():
        inputs_, grad_ = given.get(name, (inputs, grad))
        row = {"shape": list(shape), "candidate": name, "mode": MODES[0], "gradient_error": None}
        row["output_error"] = relative_error(in_settings(name, run_forward, scan, inputs_), wanted)
        rows.append(row)
        runs[name, MODES[0]] = (row, partial(in_settings, name, run_forward, scan, inputs_))

        row = row | {"mode": MODES[1], "skipped": None}
        if name == "Mamba's loop" and shape[2] > MAX_LOOP_LENGTH_BACKWARD:
            row["skipped"] = "quadratic"
            rows.append(row)
            continue
        out, gradients = in_settings(name, run_backward, scan, inputs_, grad_)
        row["output_error"] = relative_error(out, wanted)
        row["gradient_error"] = max(relative_error(*pair) for pair in zip(gradients, wanted_gradients))
        del out, gradients
        rows.append(row)
        runs[name, MODES[1]] = (row, partial(in_settings, name, run_backward, scan, inputs_, grad_))
    del wanted, wanted_gradients

    timed = []
    for row, call in runs.values():
        errors = [error for error in (row["output_error"], row["gradient_error"]) if error is not None]
        # Written so that NaN also fails.
        row["skipped"] = None if all(error <= args.tolerance for error in errors) else "wrong"
        row["milliseconds"] = []
        if row["skipped"] is None:
            timed.append((row, make_timed(call, args.device)))
    for _ in range(args.repeats):
        for row, call in timed:
            row["milliseconds"].append(time_call(call, args.device))
    for row in rows:
        row["median"] = statistics.median(row["milliseconds"]) if row.get("milliseconds") else None
    peer = PEERS[args.device.type]
    baseline = {row["mode"]: row["median"] for row in rows if row["candidate"] == peer}
    for row in rows:
        known = row["median"] is not None and baseline.get(row["mode"]) is not None
        row[f"times_{peer}"] = baseline[row["mode"]] / row["median"] if known else None
    if args.device.type == "cuda":
        bandwidth = measure_bandwidth(args.device)
        for row in rows:
            row["floor_milliseconds"] = bytes_moved(inputs, row["mode"]) / bandwidth
            row["times_floor"] = None if row["median"] is None else row["median"] / row["floor_milliseconds"]
    return rows


def print_table(rows: list[dict]) -> None:
    on_cpu = "times_floor" not in rows[0]
    columns = (
        {"x mambapy": "times_mambapy"} if on_cpu else {"x mamba_ssm": "times_mamba_ssm", "x floor": "times_floor"}
    )
    title = f"{'(batch, channels, length)':<26}{'mode':<20}{'candidate':<20}"
    heads = "".join(f"{head:>12}" for head in columns)
    print(f"{title}{heads}{'ms':>10}{'output err':>12}{'grad err':>10}")
    for row in sorted(rows, key=lambda row: (row["shape"], MODES.index(row["mode"]))):
        ratios = "".join(
            f"{'' if row[key] is None else f'{row[key]:.{1 if on_cpu else 2}f}':>12}" for key in columns.values()
        )
        median = row["skipped"] or f"{row['median']:.{1 if on_cpu else 3}f}"
        gradient_error = "" if row["gradient_error"] is None else f"{row['gradient_error']:.0e}"
        print(
            f"{tuple(row['shape'])!s:<26}{row['mode']:<20}{row['candidate']:<20}{ratios}{median:>10}"
            f"{row['output_error']:>12.0e}{gradient_error:>10}"
        )


def draw(rows: list[dict], path: Path) -> None:
    """One panel per shape and mode with a bar per candidate, on a logarithmic axis of milliseconds."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    figure, axes = plt.subplots(
        len(shapes), len(MODES), figsize=(10, 0.8 + 2 * len(shapes)), squeeze=False, layout="constrained"
    )
    for line, shape in zip(axes, shapes):
        for axis, mode in zip(line, MODES):
            timed = [r for r in rows if tuple(r["shape"]) == shape and r["mode"] == mode and r["median"] is not None]
            bars = axis.barh([row["candidate"] for row in timed], [row["median"] for row in timed])
            axis.bar_label(
                bars, [f"{row['median']:,.{2 if 'times_floor' in row else 0}f} ms" for row in timed], padding=3
            )
            axis.set_xscale("log")
            axis.invert_yaxis()
            axis.margins(x=0.3)
            axis.set_title(f"{mode}, {shape[0]} x {shape[1]:,} x {shape[2]:,}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("median milliseconds (less is better), batch x channels x steps", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_shape(text: str) -> tuple[int, int, int]:
    try:
        batch, channels, length = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxCHANNELSxLENGTH, as in 2x1024x1024") from None
    if min(batch, channels, length) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a size below 1")
    return batch, channels, length


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", type=parse_shape, nargs="+", default=[(2, 1024, 1024), (1, 3072, 4096)], help="BxDxL"
    )
    parser.add_argument("--state-size", type=int, default=16)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns of each candidate, after the check")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for torch and the kernels")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the sequences")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest relative error to be timed; default: 1e-4, more in half precision",
    )
    parser.add_argument(
        "--keep-freed-memory", action="store_true", help="on Linux: do not return large tensors to the system at once"
    )
    parser.add_argument(
        "--triton-settings", action="store_true", help="on CUDA: also time the Triton kernels in earlier settings"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args(arguments)

    if args.keep_freed_memory and not keep_freed_memory():
        parser.error("--keep-freed-memory: this system's C library has no such option")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    if args.triton_settings and args.device.type != "cuda":
        parser.error("--triton-settings needs --device cuda")
    args.tolerance = args.tolerance or TOLERANCES[args.dtype]
    torch.set_num_threads(args.threads)
    rows = [row for shape in args.shapes for row in measure_shape(shape, args)]
    machine = {"cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__}
    machine["freed_memory_kept"] = args.keep_freed_memory
    if args.device.type == "cuda":
        machine = {"gpu": torch.cuda.get_device_name(args.device), "torch": torch.__version__}
        machine["bandwidth"] = f"{measure_bandwidth(args.device) / 1e9:.2f} TB/s"
    machine["dtype"] = args.dtype
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print_table(rows)
    report = {"machine": machine, "state_size": args.state_size, "repeats": args.repeats, "rows": rows}
    write_report(args.output_dir, "scan", report, lambda path: draw(rows, path))
    print(f"Wrote {args.output_dir / 'scan.json'} and {args.output_dir / 'scan.png'}.")
    return rows


def cpu_name() -> str:
    """The CPU's name from Linux, else from Python."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
