"""Starts the command `pisdm` without importing its package, which takes seconds, before it is known what to run."""

import runpy
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    (package,) = find_spec("diffusers_pisdm").submodule_search_locations
    runpy.run_path(str(Path(package, "commands", "pisdm_cli.py")), run_name="__main__")
