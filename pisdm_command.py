"""Starts the command `pisdm` without importing its package, which takes seconds, before it is known what to run."""

import os
import runpy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


def let_threads_sleep() -> None:
    """
    Lets PyTorch's threads sleep while they wait for each other. By default they keep their cores busy meanwhile: on
    cores that other programs use too, two threads then take longer than one. Only works before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    let_threads_sleep()
    (package,) = find_spec("diffusers_pisdm").submodule_search_locations
    runpy.run_path(str(Path(package, "commands", "pisdm_cli.py")), run_name="__main__")


def run_script(command: str) -> None:
    """Runs a command, given its module's name, as a script of another name."""
    let_threads_sleep()
    import_module(f"diffusers_pisdm.commands.{command}").main()
