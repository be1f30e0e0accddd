"""What decides the cost of a training run, besides its stages and its batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


AUTOCAST_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


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
            this machine for `device_type`. On CUDA it is where `mamba_ssm` or Triton imports.

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
