"""A clock that waits for the device."""

from __future__ import annotations

import time

import torch


def now(device: torch.device) -> float:
    """Seconds, when all that was given to the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
