"""Counts the parameters, arithmetic and memory of training each stage before training starts.

The counts come from one training step on fake tensors, which have shapes but no data, so they are exact for models of
any size.

Not counted: the scale-invariant loss's heads, the VAE, data loading, communication between processes, and what an
operator needs while it runs (a CUDA context, workspaces, the CPU kernels' float32 copies of half-precision inputs).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...models import stage_models
from ...ops.common.backends import force_backends
from ...ops.scan.dispatch import choose_backend
from ..cascade_objective import stage_batch_size
from ..optimization import parameter_groups
from .flops import StepTrace


FLOAT32_BYTES = 4
ADAM_BYTES = 2 * FLOAT32_BYTES  # two float32 moments per parameter
ADAM_8BIT_BYTES = 2 + 2 * FLOAT32_BYTES / 256  # two bytes, plus bitsandbytes' float32 scale per block of 256


@dataclass(frozen=True)
class StageCost:
    """
    The counted cost of one stage in one process.

    Args:
        sample_size (`int`): Height and width in pixels or latent pixels.
        num_layers (`int`): Mamba layers.
        batch_size (`int`): Images per forward pass.
        parameters (`int`): Trainable parameters.
        forward_flops (`int`): Floating point operations of the forward pass, per image.
        training_flops (`int`):
            Floating point operations of forward and backward, per image, including recomputation by gradient
            checkpointing.
        weight_bytes, gradient_bytes, optimizer_bytes, ema_bytes (`int`):
            Calculated: float32 weights, gradients (twice under DDP, which copies them into buckets) and averaged
            weights; the optimizer's moments in float32 or 8 bits.
        saved_bytes (`int`): Storages alive between forward and backward: what autograd keeps, and the outputs.
        working_bytes (`int`): What is alive beyond these at the peak of forward and backward.
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
        """Peak memory if only this stage is trained."""
        return self.state_bytes + self.saved_bytes + self.working_bytes

    @property
    def state_bytes(self) -> int:
        """The memory that does not depend on the batch."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.ema_bytes


@contextlib.contextmanager
def _fake_training(settings: CostSettings) -> Iterator[None]:
    """Inside this context, tensors have shapes but no data, and `auto` chooses kernels for `settings.device_type`."""
    fused_scan = settings.fused_scan
    if fused_scan is None:
        fused_scan = choose_backend(settings.device_type, (torch.float32,), compiling=False) != "torch"
    # On GPUs, our Triton kernels stand in for mamba_ssm's, which does not run on fake tensors. The latter keeps less:
    # its inputs and the output before the gate, where ours keep one state in 8 steps.
    kernels = "numba" if settings.device_type == "cpu" else "triton"
    backend = kernels if fused_scan else "torch"
    with FakeTensorMode(), force_backends(selective_scan=backend, causal_conv=backend):
        yield


def estimate_stage_cost(config: dict, num_classes: int, batch_size: int, settings: CostSettings) -> StageCost:
    """
    Counts the cost of training one stage, from a training step on fake tensors: nothing is allocated or computed.

    Mixed precision follows the CPU's rules; CUDA computes norms in float32, for which it saves an estimated 5% more.

    Args:
        config (`dict`): A recipe's arguments of the stage, without `num_classes`.
        num_classes (`int`): Classes of the data.
        batch_size (`int`): Images per forward pass of this stage.
        settings ([`CostSettings`]): How it is trained.

    Returns:
        [`StageCost`].
    """
    trace = StepTrace()
    with _fake_training(settings):
        model = make_stage(config, num_classes, settings)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # calculated, not counted when it appears
            trace.ignore(parameter)
            trace.ignore(parameter.grad)
        with trace:
            loss = stage_loss(model, batch_size, settings)
            forward_flops, saved_bytes = trace.flops, trace.live_bytes
            loss.backward()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        moments = parameters * (ADAM_8BIT_BYTES if settings.use_8bit_adam else ADAM_BYTES)
        if settings.optimizer == "muon":  # one instead of two
            matrices = parameter_groups(model, 0.0, "muon")[-1]["params"]
            moments -= FLOAT32_BYTES * sum(matrix.numel() for matrix in matrices)
    return StageCost(
        sample_size=model.config.sample_size,
        num_layers=model.config.num_layers,
        batch_size=batch_size,
        parameters=parameters,
        forward_flops=forward_flops // batch_size,
        training_flops=trace.flops // batch_size,
        weight_bytes=parameters * FLOAT32_BYTES,
        gradient_bytes=parameters * FLOAT32_BYTES * (1 if settings.num_processes == 1 else 2),
        optimizer_bytes=round(moments),
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
    Calls [`estimate_stage_cost`] for every stage of a cascade.

    Args:
        stages (`list[dict]`): A recipe's arguments of each stage, without `num_classes`.
        num_classes (`int`): Classes of the data.
        batch_size (`int`): Images per process and forward pass.
        settings ([`CostSettings`]): How they are trained.
        batch_shares (`list[float]`, *optional*): Each stage's share of the batch, all of it if not given.

    Returns:
        `list[StageCost]`: One per stage.
    """
    shares = batch_shares or [1.0] * len(stages)
    return [
        estimate_stage_cost(config, num_classes, stage_batch_size(share, batch_size), settings)
        for config, share in zip(stages, shares, strict=True)
    ]


AUTOCAST_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CostSettings:
    """
    What determines the cost of training besides the stages and the batch.

    Args:
        gradient_checkpointing (`bool`, defaults to `False`): Whether layers are recomputed in the backward pass.
        mixed_precision (`str`, defaults to `"no"`): `"no"`, `"fp16"` or `"bf16"`; weights are always float32.
        ema (`bool`, defaults to `True`): Whether a float32 average of the weights is kept on the device.
        optimizer (`str`, defaults to `"adamw"`): With `"muon"`, the layers' matrices have one moment instead of two.
        use_8bit_adam (`bool`, defaults to `False`): Whether Adam's moments take one byte each instead of four.
        num_processes (`int`, defaults to 1): Processes, one per device.
        gradient_accumulation_steps (`int`, defaults to 1): Batches per process and optimizer step.
        device_type (`str`, defaults to `"cpu"`): Where training runs, which determines what kernels keep.
        fused_scan (`bool`, *optional*):
            Whether the scan is one kernel, which keeps little for the backward pass; if not given, whether it is on
            this machine for `device_type`. On CUDA, it is if `mamba_ssm` or Triton can be imported.

    Raises:
        ValueError: `mixed_precision` is unknown.
    """

    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    ema: bool = True
    optimizer: str = "adamw"
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


def make_stage(config: dict, num_classes: int, settings: CostSettings) -> stage_models.StageModel:
    """A stage as at the start of training; `config` lacks `num_classes`."""
    model = stage_models.make_stage(config, num_classes=num_classes).train()
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def stage_loss(model: stage_models.StageModel, batch_size: int, settings: CostSettings) -> torch.Tensor:
    """The objective's forward pass, on noise, up to a loss that reaches every parameter."""
    config, device = model.config, model.device
    noisy = torch.randn(batch_size, config.in_channels, config.sample_size, config.sample_size, device=device)
    zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
    low_res = noise_level = None
    if config.get("low_res_channels") is not None:
        low_res = torch.randn(batch_size, config.low_res_channels, *noisy.shape[2:], device=device)
        noise_level = torch.zeros(batch_size, device=device)
    dtype = AUTOCAST_DTYPES[settings.mixed_precision]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        sample, features = model(noisy, zeros, zeros, low_res=low_res, noise_level=noise_level, return_dict=False)
    return sample.float().square().mean() + features.mean(dim=1).float().square().mean()
