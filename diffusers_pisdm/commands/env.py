"""Prints what a bug report should say about this machine and what is installed on it."""

from __future__ import annotations

import contextlib
import io
import os
from importlib.metadata import PackageNotFoundError, version

import torch
from diffusers.commands.env import EnvironmentCommand

from .. import __version__
from ..ops.conv import dispatch as conv
from ..ops.scan import dispatch as scan
from ..utils.arguments import CommandParser
from ..utils.machine import describe_machine
from ..utils.shipped_files import CHECKPOINT


# diffusers reports the others.
PACKAGES = ("numba", "triton", "mamba-ssm", "causal-conv1d", "kernels", "datasets", "gradio")
FOR_A_PERSON = "<fill in>"  # what diffusers leaves open


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def backends(device_type: str) -> str:
    """What `backend="auto"` takes for float32 on a device."""
    chosen = scan.choose_backend(device_type, (torch.float32,), False)
    return f"scan: {chosen}, convolution: {conv.choose_backend(device_type, (torch.float32,), 3, False)}"


def report() -> dict[str, str]:
    """What to report, by name."""
    with contextlib.redirect_stdout(io.StringIO()):  # diffusers prints it, for its own issues
        theirs = EnvironmentCommand().run()
    ours = {"diffusers_pisdm version": __version__}
    ours |= {name: str(value) for name, value in theirs.items() if value != FOR_A_PERSON}
    ours |= {f"{package} version": installed_version(package) for package in PACKAGES}
    ours["CPU"] = f"{describe_machine(torch.device('cpu'))} of {os.cpu_count()}"
    ours["CPU features"] = torch.backends.cpu.get_cpu_capability()
    ours |= {f"Backends on {kind}": backends(kind) for kind in ("cpu", *(["cuda"] * torch.cuda.is_available()))}
    ours[f"Checkpoint {CHECKPOINT.name}"] = "found" if (CHECKPOINT / "model_index.json").is_file() else "missing"
    return ours


def main(arguments: list[str] | None = None) -> None:
    CommandParser(description=__doc__).parse_args(arguments)
    print(EnvironmentCommand.format_dict(report()), end="")
