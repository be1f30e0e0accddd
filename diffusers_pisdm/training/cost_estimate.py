"""What a training run will cost, known before it is started: parameters, arithmetic, memory and time of each stage.

Arithmetic and memory come from one training step on fake tensors, which have shapes but no data: they are counted, not
guessed, for models of any size. Time comes from a few real steps; where these would take too long, of two layers.

Not counted: the scale-invariant loss's heads, the VAE, the loading of data, communication between processes, and what
an operator needs while it runs (a CUDA context, workspaces, the CPU kernels' float32 copies of half-precision inputs).
"""

from __future__ import annotations

import contextlib
import importlib
import math
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from unittest import mock

import psutil
import torch
from diffusers.training_utils import EMAModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

from ..models.transformer_pisdm import PISDMTransformer2DModel


# Modules, not the functions of the same names.
_SCAN = importlib.import_module("..ops.selective_scan", __package__)
_CONV = importlib.import_module("..ops.causal_conv", __package__)

AUTOCAST_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOAT32_BYTES = 4
ADAM_BYTES = 2 * FLOAT32_BYTES  # two float32 moments a parameter
ADAM_8BIT_BYTES = 2 + 2 * FLOAT32_BYTES / 256  # two bytes, and bitsandbytes' float32 scale of each block of 256

# Floating point operations for each step of time, channel and state, an exponential counted as one.
# decay = exp(delta * A), h = decay * h + B * x, y += C * h
SCAN_FORWARD_FLOPS = 7
# decay and h again; the gradient of h from C and the next step; two each for C, B, x, delta * A, delta and A
SCAN_BACKWARD_FLOPS = 5 + 3 + 6 * 2

MEASURED_LAYERS = 2  # one of each half, of which the whole model has as many
TIMED_STEPS = 2
SAFE_SHARE_OF_FREE_MEMORY = 0.8


@dataclass(frozen=True)
class CostSettings:
    """
    What decides the cost of training besides the stages and the batch.

    Args:
        gradient_checkpointing (`bool`, defaults to `False`): Whether layers are recomputed in the backward pass.
        mixed_precision (`str`, defaults to `"no"`): `"no"`, `"fp16"` or `"bf16"`; weights are float32 in all of them.
        ema (`bool`, defaults to `True`): Whether a float32 average of the weights is kept on the device.
        use_8bit_adam (`bool`, defaults to `False`): Whether Adam's moments take a byte each instead of four.
        num_processes (`int`, defaults to 1): Processes, one a device.
        gradient_accumulation_steps (`int`, defaults to 1): Batches a process and optimizer step.
        device_type (`str`, defaults to `"cpu"`): Where training runs: what kernels keep depends on it.
        fused_scan (`bool`, *optional*):
            Whether the scan is one kernel, which keeps little for the backward pass; if not given, whether it is on
            this machine for `device_type`. On CUDA it is where `mamba_ssm` imports.

    Raises:
        ValueError: `mixed_precision` is unknown.
    """

    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    ema: bool = True
    use_8bit_adam: bool = False
    num_processes: int = 1
    gradient_accumulation_steps: int = 1
    device_type: str = "cpu"
    fused_scan: bool | None = None

    def __post_init__(self):
        if self.mixed_precision not in AUTOCAST_DTYPES:
            raise ValueError(
                f"`mixed_precision` must be one of {', '.join(AUTOCAST_DTYPES)}, got {self.mixed_precision}."
            )


@dataclass(frozen=True)
class StageCost:
    """
    The counted cost of one stage in one process.

    Args:
        sample_size (`int`): Height and width in pixels or latent pixels.
        num_layers (`int`): Mamba layers.
        batch_size (`int`): Images a forward pass.
        parameters (`int`): Trainable parameters.
        forward_flops (`int`): Floating point operations of the forward pass, an image.
        training_flops (`int`):
            Those of forward and backward, an image, recomputation by gradient checkpointing included.
        weight_bytes, gradient_bytes, optimizer_bytes, ema_bytes (`int`):
            By arithmetic: float32 weights, gradients (twice under DDP, which copies them into buckets) and average;
            Adam's moments in float32 or 8 bits.
        saved_bytes (`int`): Storages alive between forward and backward: what autograd keeps, and the outputs.
        working_bytes (`int`): What is alive beyond these at the worst moment of forward and backward.
    """

    sample_size: int
    num_layers: int
    batch_size: int
    parameters: int
    forward_flops: int
    training_flops: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    saved_bytes: int
    working_bytes: int

    @property
    def total_bytes(self) -> int:
        """Memory at the worst moment if this stage is trained alone."""
        return self.state_bytes + self.saved_bytes + self.working_bytes

    @property
    def state_bytes(self) -> int:
        """What does not depend on the batch."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.ema_bytes


@dataclass(frozen=True)
class StageSpeed:
    """
    How fast one stage trained when it was tried.

    Args:
        num_layers (`int`), batch_size (`int`): What was run; fewer layers than the stage has if these took too long.
        flops_per_second (`float`): Of forward and backward.
        updates_per_second (`float`): Parameters a second of AdamW and the average of the weights.
        seconds (`float`): How long trying it took, without compiling kernels.
    """

    num_layers: int
    batch_size: int
    flops_per_second: float
    updates_per_second: float
    seconds: float


def _register_flop_formulas() -> None:
    """Tells torch what this package's operators compute; its own counter, FlopCounterMode, then knows them too."""
    ops = torch.ops.diffusers_pisdm

    def scan(flops: int, sequence: int, rates: int, states_axis: int):  # positions among the operator's arguments
        return lambda *shapes, out_shape: flops * math.prod(shapes[sequence]) * shapes[rates][states_axis]

    register_flop_formula(ops.selective_scan_numba)(scan(SCAN_FORWARD_FLOPS, 0, 2, 1))
    register_flop_formula(ops.selective_scan_numba_backward)(scan(SCAN_BACKWARD_FLOPS, 2, 4, 1))
    register_flop_formula(ops.selective_scan_torch)(scan(SCAN_FORWARD_FLOPS, 0, 2, 0))
    register_flop_formula(ops.selective_scan_torch_backward)(scan(SCAN_BACKWARD_FLOPS, 1, 3, 0))

    @register_flop_formula(ops.causal_conv_numba)
    def conv(x, weight, bias, activation, out_shape):
        return 2 * math.prod(x) * weight[1]

    @register_flop_formula(ops.causal_conv_numba_backward)
    def conv_backward(grad, x, weight, bias, activation, out_shape):
        return 3 * 2 * math.prod(x) * weight[1]  # what lies before the activation again, x and the weight


_register_flop_formulas()


def _convolution_backward_flops(grad, x, weight, *options, out_val) -> int:
    # torch's formula takes a depthwise filter's gradient for that of a full one, as many times too much as channels.
    return sum(options[-1][:2]) * 2 * grad.numel() * weight[0].numel()  # the mask of wanted gradients: x, weight, bias


_FLOP_FORMULAS = flop_registry | {torch.ops.aten.convolution_backward: _convolution_backward_flops}


class _StepTrace(TorchDispatchMode):
    """FLOPs of the operators run in it, bytes of the storages they made that are alive, and the peak of these."""

    # FlopCounterMode would do for the FLOPs, but its hooks on every module keep tensors alive.
    def __init__(self):
        super().__init__()
        self.flops = self.live_bytes = self.peak_bytes = 0
        self._seen = WeakIdKeyDictionary()

    def ignore(self, tensor: torch.Tensor) -> None:
        self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in _FLOP_FORMULAS:
            self.flops += _FLOP_FORMULAS[func.overloadpacket](*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:  # a view, or in place
            return
        self._seen[storage] = True
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


def _make_stage(config: dict, num_classes: int, settings: CostSettings) -> PISDMTransformer2DModel:
    model = PISDMTransformer2DModel(num_classes=num_classes, **config).train()
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def _stage_loss(model: PISDMTransformer2DModel, batch_size: int, settings: CostSettings) -> torch.Tensor:
    """A forward pass as the cascade's objective makes it, up to a loss that reaches every parameter."""
    config, device = model.config, model.device
    noisy = torch.randn(batch_size, config.in_channels, config.sample_size, config.sample_size, device=device)
    zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
    low_res = noise_level = None
    if config.low_res_channels is not None:
        low_res = torch.randn(batch_size, config.low_res_channels, *noisy.shape[2:], device=device)
        noise_level = torch.zeros(batch_size, device=device)
    dtype = AUTOCAST_DTYPES[settings.mixed_precision]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        sample, features = model(noisy, zeros, zeros, low_res=low_res, noise_level=noise_level, return_dict=False)
    return sample.float().square().mean() + features.mean(dim=1).float().square().mean()


@contextlib.contextmanager
def _fake_training(settings: CostSettings) -> Iterator[None]:
    """Tensors made in here have shapes but no data, and `auto` chooses the kernels of `settings.device_type`."""
    dtypes = (torch.float32,)
    fused_scan = settings.fused_scan
    if fused_scan is None:
        fused_scan = _SCAN._choose_backend(settings.device_type, dtypes, False) != "torch"
    # Numba's kernel stands in for all fused ones, which do not run on fake tensors. They keep nearly the same: their
    # inputs, and either a state in 24 steps (Numba) or the output before the gate (mamba_ssm).
    scan = mock.patch.object(_SCAN, "_choose_backend", return_value="numba" if fused_scan else "torch")
    conv_backend = _CONV._choose_backend(settings.device_type, dtypes)
    conv = mock.patch.object(_CONV, "_choose_backend", return_value=conv_backend)
    with FakeTensorMode(), scan, conv:
        yield


def estimate_stage_cost(config: dict, num_classes: int, batch_size: int, settings: CostSettings) -> StageCost:
    """
    Counts the cost of training one stage, from a training step on fake tensors: nothing is allocated or computed.

    Mixed precision is that of the CPU; CUDA computes the norms in float32, and by reckoning saves 5% more for it.

    Args:
        config (`dict`): Arguments of [`PISDMTransformer2DModel`], without `num_classes`.
        num_classes (`int`): Classes of the data.
        batch_size (`int`): Images a forward pass of this stage.
        settings ([`CostSettings`]): How it is trained.

    Returns:
        [`StageCost`].
    """
    trace = _StepTrace()
    with _fake_training(settings):
        model = _make_stage(config, num_classes, settings)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # counted by arithmetic, not when it appears
            trace.ignore(parameter)
            trace.ignore(parameter.grad)
        with trace:
            loss = _stage_loss(model, batch_size, settings)
            forward_flops, saved_bytes = trace.flops, trace.live_bytes
            loss.backward()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return StageCost(
        sample_size=model.config.sample_size,
        num_layers=model.config.num_layers,
        batch_size=batch_size,
        parameters=parameters,
        forward_flops=forward_flops // batch_size,
        training_flops=trace.flops // batch_size,
        weight_bytes=parameters * FLOAT32_BYTES,
        gradient_bytes=parameters * FLOAT32_BYTES * (1 if settings.num_processes == 1 else 2),
        optimizer_bytes=round(parameters * (ADAM_8BIT_BYTES if settings.use_8bit_adam else ADAM_BYTES)),
        ema_bytes=parameters * FLOAT32_BYTES if settings.ema else 0,
        saved_bytes=saved_bytes,
        working_bytes=trace.peak_bytes - saved_bytes,
    )


def estimate_cascade_cost(
    stages: list[dict],
    num_classes: int,
    batch_size: int,
    settings: CostSettings,
    batch_shares: list[float] | None = None,
) -> list[StageCost]:
    """
    [`estimate_stage_cost`] of every stage of a cascade.

    Args:
        stages (`list[dict]`): Arguments of each stage's [`PISDMTransformer2DModel`], without `num_classes`.
        num_classes (`int`): Classes of the data.
        batch_size (`int`): Images a process and forward pass.
        settings ([`CostSettings`]): How they are trained.
        batch_shares (`list[float]`, *optional*): The share of the batch for each stage, all of it if not given.

    Returns:
        `list[StageCost]`: One a stage.
    """
    shares = batch_shares or [1.0] * len(stages)
    return [
        estimate_stage_cost(config, num_classes, max(1, round(share * batch_size)), settings)
        for config, share in zip(stages, shares, strict=True)
    ]


def free_memory(device: torch.device | str) -> int:
    """Bytes that are free on a device."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _time_stage(
    config: dict, num_classes: int, cost: StageCost, settings: CostSettings, device: torch.device
) -> StageSpeed:
    """Runs training steps on random images, one to warm up and [`TIMED_STEPS`] on the clock; the fastest counts."""

    def seconds_since(start: float) -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    model = _make_stage(config, num_classes, settings).to(device)
    # Of 32 bits also where 8 are asked for: that needs bitsandbytes, and the time is in moving the parameters.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    ema = EMAModel(model.parameters()) if settings.ema else None
    passes, updates = [], []
    for _ in range(1 + TIMED_STEPS):
        start = time.perf_counter()
        _stage_loss(model, cost.batch_size, settings).backward()
        passes.append(seconds_since(start))
        start = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(model.parameters())
        updates.append(seconds_since(start))
    seconds_of_passes, seconds_of_update = min(passes[1:]), min(updates[1:])
    return StageSpeed(
        num_layers=cost.num_layers,
        batch_size=cost.batch_size,
        flops_per_second=cost.training_flops * cost.batch_size / seconds_of_passes,
        updates_per_second=cost.parameters / seconds_of_update,
        seconds=(1 + TIMED_STEPS) * (seconds_of_passes + seconds_of_update),
    )


def measure_stage_speed(
    config: dict,
    num_classes: int,
    batch_size: int,
    settings: CostSettings,
    device: torch.device | str,
    seconds: float = 30.0,
) -> StageSpeed | None:
    """
    Trains one stage for a few steps. It begins with two layers and one image, takes more images up to `batch_size`
    and then all layers, as far as memory and time allow.

    Args:
        config, num_classes, batch_size, settings: As in [`estimate_stage_cost`].
        device (`torch.device` or `str`): Where it is run.
        seconds (`float`, defaults to 30.0): About how long it may take after the first try, which is always made.

    Returns:
        [`StageSpeed`] of the last try, or `None` if not even the first fits into the free memory.
    """
    device = torch.device(device)
    with torch.device("meta"):
        num_layers = _make_stage(config, num_classes, settings).config.num_layers
    short_config = config | {"num_layers": min(MEASURED_LAYERS, num_layers)}
    short_cost = estimate_stage_cost(short_config, num_classes, 1, settings)

    def fits(cost: StageCost) -> bool:
        return cost.total_bytes <= SAFE_SHARE_OF_FREE_MEMORY * free_memory(device)

    if not fits(short_cost):
        return None
    speed = _time_stage(short_config, num_classes, short_cost, settings, device)
    deadline = time.perf_counter() + seconds  # not from the beginning: the first try may have compiled kernels
    while speed.batch_size < batch_size:
        images = min(4 * speed.batch_size, batch_size)
        larger = estimate_stage_cost(short_config, num_classes, images, settings)
        # Four times as many images take one to four times as long: a small batch does not keep a device busy.
        if not fits(larger) or time.perf_counter() + 2 * speed.seconds > deadline:
            break
        speed = _time_stage(short_config, num_classes, larger, settings, device)
    expected = speed.seconds * num_layers / speed.num_layers
    if num_layers > speed.num_layers and time.perf_counter() + expected <= deadline:
        whole = estimate_stage_cost(config, num_classes, speed.batch_size, settings)
        if fits(whole):
            speed = _time_stage(config, num_classes, whole, settings, device)
    return speed


def seconds_per_step(cost: StageCost, speed: StageSpeed, gradient_accumulation_steps: int = 1) -> float:
    """The time of one optimizer step of a stage at the speed that was measured."""
    passes = gradient_accumulation_steps * cost.batch_size * cost.training_flops / speed.flops_per_second
    return passes + cost.parameters / speed.updates_per_second


def cost_report(
    costs: list[StageCost],
    settings: CostSettings,
    batch_size: int,
    max_train_steps: int,
    speeds: list[StageSpeed | None] | None = None,
) -> dict:
    """
    Puts counted and measured costs together.

    Args:
        costs (`list[StageCost]`): Of each stage that is trained.
        settings ([`CostSettings`]): What they were counted with.
        batch_size (`int`): Images a process and forward pass.
        max_train_steps (`int`): Optimizer steps of the run.
        speeds (`list[StageSpeed]`, *optional*): Of each stage, `None` for one that did not fit.

    Returns:
        `dict`: JSON-serialisable: `settings`, `stages` and `total`. Bytes and FLOPs are plain numbers. Times are there
        if all stages were measured.
    """
    accumulation = settings.gradient_accumulation_steps
    stages = []
    for cost, speed in zip(costs, speeds or [None] * len(costs), strict=True):
        stage = asdict(cost) | {
            "state_bytes": cost.state_bytes,
            "total_bytes": cost.total_bytes,
            "speed": None,
            "seconds_per_step": None,
        }
        if speed is not None:
            stage["speed"] = asdict(speed)
            stage["seconds_per_step"] = seconds_per_step(cost, speed, accumulation)
        stages.append(stage)

    images = batch_size * accumulation * settings.num_processes
    times = [stage["seconds_per_step"] for stage in stages]
    seconds = None if None in times else sum(times)
    total = {
        "parameters": sum(cost.parameters for cost in costs),
        "flops_per_step": accumulation * sum(cost.batch_size * cost.training_flops for cost in costs),
        "state_bytes": sum(cost.state_bytes for cost in costs),
        "saved_bytes": sum(cost.saved_bytes for cost in costs),  # all forward passes precede the first backward one
        # An upper bound. autocast keeps half-precision copies of the weights until all stages' forward is done.
        "working_bytes": sum(cost.working_bytes for cost in costs),
        "images_per_step": images,
        "max_train_steps": max_train_steps,
        "seconds_per_step": seconds,
        "images_per_second": None if seconds is None else images / seconds,
        "days": None if seconds is None else seconds * max_train_steps / 86400,
    }
    total["total_bytes"] = total["state_bytes"] + total["saved_bytes"] + total["working_bytes"]
    return {"settings": asdict(settings), "measured": speeds is not None, "stages": stages, "total": total}


def format_cost_report(report: dict) -> str:
    """
    The report of [`cost_report`] as plain text: a table with a line a stage, the total, and what the numbers are.

    Args:
        report (`dict`): From [`cost_report`], or read back from JSON.

    Returns:
        `str`: Several lines.
    """
    total, settings = report["total"], report["settings"]
    header = (
        *("stage", "size", "layers", "parameters", "images", "forward", "training"),
        *("state", "saved", "working", "s/step", "TFLOP/s", "measured on"),
    )
    units = (*("", "", "", "M", "a pass", "GFLOP/im.", "GFLOP/im."), *("GiB", "GiB", "GiB", "", "", ""))
    rows = [header, units]
    for index, stage in enumerate(report["stages"], start=1):
        speed = stage["speed"]
        if speed is not None:
            timing = (f"{stage['seconds_per_step']:.3g}", f"{speed['flops_per_second'] / 1e12:.3g}")
            layers = "all" if speed["num_layers"] == stage["num_layers"] else f"{speed['num_layers']}"
            timing = (*timing, f"{layers} layers, {speed['batch_size']} im.")
        else:
            timing = ("-", "-", "does not fit" if report["measured"] else "-")
        rows.append(
            (
                *(str(index), str(stage["sample_size"]), str(stage["num_layers"])),
                *(f"{stage['parameters'] / 1e6:.1f}", str(stage["batch_size"])),
                *(f"{stage['forward_flops'] / 1e9:.4g}", f"{stage['training_flops'] / 1e9:.4g}"),
                *(_gibibytes(stage[name]) for name in ("state_bytes", "saved_bytes", "working_bytes")),
                *timing,
            )
        )
    sums = [_gibibytes(total[name]) for name in ("state_bytes", "saved_bytes", "working_bytes")]
    seconds = "-" if total["seconds_per_step"] is None else f"{total['seconds_per_step']:.3g}"
    rows.append(("total", "", "", f"{total['parameters'] / 1e6:.1f}", "", "", "", *sums, seconds, "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]

    checkpointing = "gradient checkpointing" if settings["gradient_checkpointing"] else "no gradient checkpointing"
    lines += [
        "",
        f"Memory: {_gibibytes(total['total_bytes'])} GiB a process (mixed precision {settings['mixed_precision']},"
        f" {checkpointing}). Counted: float32 weights,",
        "gradients, Adam's moments and average (state), what forward keeps for backward (saved), and what is added to",
        "it at the worst moment (working).",
        f"Work: {total['flops_per_step'] / 1e12:.4g} TFLOP a process and step, counted.",
    ]
    if total["seconds_per_step"] is not None:
        lines += [
            f"Time: {total['images_per_second']:.3g} images/s in {settings['num_processes']} process(es),"
            f" {total['days']:.3g} days for {total['max_train_steps']:,} steps of {total['images_per_step']} images.",
            "TFLOP/s is measured on what the last column says. The times are extrapolated from it: by FLOPs to all",
            "layers and images, by parameters for the optimizer. Data loading, VAE and communication are left out.",
        ]
    elif report["measured"]:
        lines.append("Time: unknown, since a stage does not fit into the memory that is free here.")
    else:
        lines.append("Time: not measured.")
    return "\n".join(lines)


def _gibibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g}"
