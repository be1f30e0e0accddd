"""Recipes: what a published model is made of and how it was trained, as one JSON file."""

from __future__ import annotations

import argparse
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Recipe:
    """
    Args:
        scheduler (`dict`): Arguments of `DDPMScheduler`: the noise schedule.
        stages (`list[dict]`):
            Arguments of [`PISDMTransformer2DModel`] for each stage, low resolution first, but for `num_classes`.
        vae (`str`, *optional*): The autoencoder whose latents are modelled; pixels if there is none.
        training (`dict`): Arguments of the training script that differ from its defaults.
    """

    scheduler: dict[str, Any]
    stages: list[dict[str, Any]]
    vae: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


def read_recipe(file: str | Path) -> Recipe:
    """
    Reads a recipe.

    Args:
        file (`str` or `Path`): The JSON file.

    Returns:
        [`Recipe`].

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON, or has unknown or missing parts.
    """
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("a recipe is a JSON object with `scheduler` and `stages`")
    known = list(Recipe.__dataclass_fields__)
    unknown = [name for name in content if name not in known]
    if unknown:
        raise ValueError(f"unknown part {unknown[0]!r}; a recipe has {', '.join(known)}")
    missing = [name for name in ("scheduler", "stages") if name not in content]
    if missing:
        raise ValueError(f"`{missing[0]}` is missing")
    return Recipe(**content)


def apply_recipe(recipe: Recipe, parser: argparse.ArgumentParser) -> None:
    """
    Makes a recipe's training arguments, and its VAE, the defaults of a command line.

    Args:
        recipe ([`Recipe`]): Whose `training` holds names of arguments without dashes.
        parser (`argparse.ArgumentParser`): The command line.

    Raises:
        ValueError: An argument is unknown, or its value is not one that the command line would take.
    """
    actions = {action.dest: action for action in parser._actions}  # argparse offers no other list of its arguments
    values = dict(recipe.training)
    if recipe.vae is not None:
        values["pretrained_vae_model_name_or_path"] = recipe.vae
    for name, value in values.items():
        if name not in actions:
            close = difflib.get_close_matches(name, actions, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown training argument {name!r}{hint}")
        parser.set_defaults(**{name: _convert(actions[name], value)})


def _convert(action: argparse.Action, value: Any) -> Any:
    if isinstance(action.const, bool):  # a switch
        if not isinstance(value, bool):
            raise ValueError(f"training argument {action.dest!r} is a switch: true or false, not {value!r}")
        return value
    if action.nargs is not None:
        # As on the command line, one value is a list of one.
        return [_convert_one(action, item) for item in (value if isinstance(value, list) else [value])]
    return _convert_one(action, value)


def _convert_one(action: argparse.Action, value: Any) -> Any:
    kind = action.type or str
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = isinstance(value, str) if kind is str else is_number and kind(value) == value
    if not fits or (action.choices is not None and value not in action.choices):
        wanted = f"one of {', '.join(action.choices)}" if action.choices is not None else f"of type {kind.__name__}"
        raise ValueError(f"training argument {action.dest!r} must be {wanted}, not {value!r}")
    return kind(value)
