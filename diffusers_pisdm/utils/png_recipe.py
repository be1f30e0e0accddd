"""How a picture was drawn, kept in its PNG file."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .files import write_whole


KEY = "pisdm"  # of the PNG's text chunk
VALUES_PER_WEIGHT = 256  # that a fingerprint looks at
MAX_CHARACTERS = 100_000
MAX_BYTES = 100_000_000


def recipe_chunk(recipe: dict[str, Any]) -> PngInfo:
    """
    The text chunk that keeps a recipe, for `image.save(path, pnginfo=recipe_chunk(recipe))`.

    Args:
        recipe (`dict`):
            What drew the picture, as JSON holds it: `model` (a name or path), `weights` ([`fingerprint`]),
            `class_label` (a name or id), `seed`, `stage`, `dtype` and the arguments of the pipeline's call. Package
            versions are added.
    """
    package = __name__.partition(".")[0]
    versions = {package: sys.modules[package].__version__}  # a clone need not be installed
    versions |= {name: version(name) for name in ("diffusers", "torch")}
    chunk = PngInfo()
    chunk.add_itxt(KEY, json.dumps({**recipe, "versions": versions}))
    return chunk


def fingerprint(models: Iterable[nn.Module]) -> str:
    """
    Twelve hexadecimal digits that tell a pipeline's weights from those of another training, and from the same with an
    adapter or in another precision. They depend on values spread over every weight, so that large models take no time.
    """
    digest = hashlib.sha256()
    for model in models:
        for name, weight in sorted(model.named_parameters()):
            step = -(-weight.numel() // VALUES_PER_WEIGHT)
            values = weight.detach().flatten()[:: max(1, step)].float().cpu()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:12]


def dtype_name(dtype: torch.dtype) -> str:
    """A precision as recipes and commands have it: `float32`."""
    return str(dtype).removeprefix("torch.")


def save_image(image: Image.Image, path: Path, recipe: dict[str, Any] | None = None) -> None:
    """Write an image so that an interruption leaves either the old file or the new one, never a torn one."""
    options = {"pnginfo": recipe_chunk(recipe)} if recipe is not None and path.suffix.lower() == ".png" else {}
    with write_whole(path, f".unfinished{path.suffix}") as unfinished:  # Pillow goes by the suffix
        image.save(unfinished, **options)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """
    The recipe that a picture carries.

    Args:
        path (`str` or `Path`): A PNG written with [`recipe_chunk`].

    Returns:
        `dict`: The recipe, unchecked: whoever uses a value checks it.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a PNG, or carries no recipe of ours.
    """
    with Path(path).open("rb") as file:
        data = BytesIO(file.read(MAX_BYTES))
    try:
        with Image.open(data, formats=["PNG"]) as image:
            text = image.info.get(KEY)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{Path(path).name} is not a PNG picture.") from error
    if text is None:
        raise ValueError(
            f"{Path(path).name} carries no recipe: it was not drawn by this package, or another program saved it anew."
        )
    try:
        recipe = json.loads(text) if len(text) <= MAX_CHARACTERS else None
    except (ValueError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe that {Path(path).name} carries is damaged.")
    return recipe
