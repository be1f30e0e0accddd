"""Where the package comes from, and what comes with it: inside it in a wheel, beside it in a clone."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


PACKAGE = Path(__file__).parents[1]


def shipped_folder(in_wheel: str, in_clone: str) -> Path:
    """A folder of package data; setup.py says where a wheel has it."""
    folder = PACKAGE / in_wheel
    return folder if folder.is_dir() else PACKAGE.parent / in_clone


CHECKPOINT = shipped_folder("checkpoints", "checkpoints") / "pisdm-emoji128"
RECIPES = shipped_folder("recipes", "examples/recipes")


def find_model(name: str) -> str:
    """A model's folder or Hub repository, as given; `pisdm-emoji128` is also the checkpoint that comes with us."""
    return str(CHECKPOINT) if name == CHECKPOINT.name and not Path(name).exists() else name


def model_name(model: str) -> str:
    """What [`find_model`] finds on any machine: a path in the package would name a folder of this one."""
    return CHECKPOINT.name if model == str(CHECKPOINT) else model


def install_command(extra: str | None = None) -> str:
    """
    How others install this package, which is on no package index: from the address that pip got it from (PEP 610), or
    else, as we know of none, from a clone or a wheel of theirs.
    """
    extras = f"[{extra}]" if extra else ""
    try:
        source = json.loads(distribution("diffusers-pisdm").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        source = {}
    address = source.get("url", "")
    if address.startswith(("https://", "http://")):
        vcs = f"{source['vcs_info']['vcs']}+" if "vcs_info" in source else ""
        return f'pip install "diffusers-pisdm{extras} @ {vcs}{address}"'
    return (
        f'pip install ".{extras}"  # in a clone of diffusers_pisdm, or with the path of its wheel in place of the dot'
    )


def find_recipe(name: str | Path) -> Path:
    """A recipe's file, as given, or one of ours by its name: `emoji64` is `emoji64.json`."""
    ours = RECIPES / f"{name}.json"
    return ours if not Path(name).is_file() and ours.is_file() else Path(name)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.json"))
