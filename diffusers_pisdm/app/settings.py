"""The page's settings, as a picture drawn by it carries them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.messages import one_line
from ..utils.png_recipe import read_recipe
from .drawing import Drawing, plan_drawing
from .models import Model


@dataclass(frozen=True)
class Settings:
    """What a recipe sets on the page, and what it says that the page has no place for."""

    label: str
    drawing: Drawing
    unmatched: list[str]
    remedy: str  # what draws it as it was


def read_settings(path: str | Path, model: Model) -> Settings:
    """Reads a picture's recipe; raises a ValueError that says why it cannot be used with this model."""
    recipe = read_recipe(path)
    absent = [key for key in ("class_label", "seed") if key not in recipe]
    if absent:
        raise ValueError(f"The picture's recipe has no `{absent[0]}`.")
    steps, scales = (recipe.get(name, model.default(name)) for name in ("num_inference_steps", "guidance_scale"))
    try:
        drawing = plan_drawing(model, [recipe["class_label"]], 1, recipe["seed"], steps, scales)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The page cannot be set as this picture was drawn: {error}") from error
    (ours,) = drawing.recipes(model)
    noise_level = recipe.get("noise_level", ours["noise_level"])
    # In another precision or with an adapter, the same weights have another fingerprint.
    is_ours = all(recipe.get(key, ours[key]) == ours[key] for key in ("model", "dtype")) and "lora" not in recipe
    wanted = {
        "model": recipe.get("model", ours["model"]),
        "weights": recipe.get("weights", ours["weights"]) if is_ours else ours["weights"],
        "scheduler": recipe.get("scheduler", ours["scheduler"]),
        "dtype": recipe.get("dtype", ours["dtype"]),
        "noise_level": noise_level if isinstance(noise_level, list) else [noise_level] * len(ours["noise_level"]),
    }
    unmatched = [f"{key}={_show(value)}" for key, value in wanted.items() if value != ours[key]]
    # Whatever else drew the picture has no place on the page.
    unmatched += [f"{key}={_show(value)}" for key, value in recipe.items() if key not in {*ours, "versions"}]
    is_lost = "image" in recipe or wanted["weights"] != ours["weights"]
    remedy = "" if is_lost else f"`pisdm generate --recipe {shlex.quote(Path(path).name)}` draws it as it was."
    return Settings(model.labels[drawing.class_ids[0]], drawing, unmatched, remedy)


def _show(value: Any) -> str:
    return one_line(str(value))[:80]
