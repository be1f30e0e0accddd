"""Measures how fast a stage trains here: a few real steps, with two layers if the whole stage would take too long."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch
from diffusers.training_utils import EMAModel

from ..optimization import make_optimizer, parameter_groups
from .stage_cost import CostSettings, StageCost, estimate_stage_cost, make_stage, stage_loss


MEASURED_LAYERS = 2  # one of each half, as the whole model has equally many of both
TIMED_STEPS = 2
SAFE_SHARE_OF_FREE_MEMORY = 0.8


@dataclass(frozen=True)
class StageSpeed:
    """
    The measured training speed of one stage.

    Args:
        num_layers (`int`), batch_size (`int`): What ran; fewer layers than the stage has if all took too long.
        flops_per_second (`float`): Floating point operations per second of forward and backward.
        updates_per_second (`float`): Parameters per second that the optimizer and the averaging update.
        seconds (`float`): How long the measurement took, without compiling kernels.
    """

    num_layers: int
    batch_size: int
    flops_per_second: float
    updates_per_second: float
    seconds: float


def free_memory(device: torch.device | str) -> int:
    """Free bytes on a device."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _time_stage(
    config: dict, num_classes: int, cost: StageCost, settings: CostSettings, device: torch.device
) -> StageSpeed:
    """Runs training steps on random images, one to warm up and [`TIMED_STEPS`] timed; the fastest counts."""

    def seconds_since(start: float) -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    model = make_stage(config, num_classes, settings).to(device)
    # 32-bit even if 8-bit is requested: that needs bitsandbytes, and moving the parameters takes the time.
    optimizer = make_optimizer(parameter_groups(model, 0.0, settings.optimizer), 0.0, (0.9, 0.999), 1e-8)
    ema = EMAModel(model.parameters()) if settings.ema else None
    passes, updates = [], []
    for _ in range(1 + TIMED_STEPS):
        start = time.perf_counter()
        stage_loss(model, cost.batch_size, settings).backward()
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
    Trains one stage for a few steps. It starts with two layers and one image, then takes more images up to
    `batch_size` and finally all layers, as far as memory and time allow.

    Args:
        config, num_classes, batch_size, settings: As in [`estimate_stage_cost`].
        device (`torch.device` or `str`): Where it runs.
        seconds (`float`, defaults to 30.0): About how long it may take after the first try, which always runs.

    Returns:
        [`StageSpeed`] of the last try, or `None` if not even the first fits into the free memory.
    """
    device = torch.device(device)
    with torch.device("meta"):
        num_layers = make_stage(config, num_classes, settings).config.num_layers
    short_config = config | {"num_layers": min(MEASURED_LAYERS, num_layers)}
    short_cost = estimate_stage_cost(short_config, num_classes, 1, settings)

    def fits(cost: StageCost) -> bool:
        return cost.total_bytes <= SAFE_SHARE_OF_FREE_MEMORY * free_memory(device)

    if not fits(short_cost):
        return None
    speed = _time_stage(short_config, num_classes, short_cost, settings, device)
    deadline = time.perf_counter() + seconds  # starts only now, as the first try may have compiled kernels
    while speed.batch_size < batch_size:
        images = min(4 * speed.batch_size, batch_size)
        larger = estimate_stage_cost(short_config, num_classes, images, settings)
        # Four times as many images take one to four times as long, as a small batch does not keep a device busy.
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
    """The time of one optimizer step of a stage at the measured speed."""
    passes = gradient_accumulation_steps * cost.batch_size * cost.training_flops / speed.flops_per_second
    return passes + cost.parameters / speed.updates_per_second
