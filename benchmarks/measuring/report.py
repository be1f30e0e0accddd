"""The conditions that every speed measurement reports, and how reports are written."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch

from diffusers_pisdm.ops.scan.dispatch import choose_backend
from diffusers_pisdm.utils.files import save_in_place
from diffusers_pisdm.utils.machine import describe_machine


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def describe_conditions(device_name: str, dtype_name: str) -> dict:
    """The machine, and whether something else is running on it."""
    device = torch.device(device_name)
    return {
        "device": describe_machine(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "dtype": dtype_name,
        "scan": choose_backend(device.type, (DTYPES[dtype_name],), compiling=False),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def is_loaded(load_average: float, cores: int) -> bool:
    """Whether other processes disturb a measurement: a load average over one minute of more than half the cores."""
    return load_average > 0.5 * cores


def print_conditions(conditions: dict) -> None:
    """Prints a line with the conditions, and a warning if something else is running."""
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    if is_loaded(conditions["load_average"], conditions["cores"]):
        print(
            f"This machine is loaded (load average {conditions['load_average']:.1f} on {conditions['cores']} cores):"
            " all times are pessimistic, and ratios are uncertain."
        )


def write_report(output_dir: Path, name: str, report: dict, draw: Callable[[Path], None] | None = None) -> None:
    """Writes `name`.json and, if there is something to draw, `name`.png; files are replaced only when complete."""

    def save(folder: Path) -> None:
        (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        if draw is not None:
            draw(folder / f"{name}.png")

    save_in_place(save, output_dir)


def parse_positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
