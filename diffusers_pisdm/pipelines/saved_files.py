"""The JSON files of a saved pipeline, checked where diffusers would fail with an obscure error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin


# In the configuration of a stage, and of adapters: who has rights in weights that came without a licence.
RIGHTS_KEY = "_rights"
# Schedulers compute a table of all their timesteps when they are made, and plans hold all steps of a run.
MAX_TIMESTEPS = 100_000
REMEDY = "Correct it, or copy or download the file again."


def check_saved_pipeline(folder: Path, config: Any) -> None:
    """
    Checks the configuration in `model_index.json` and those of the schedulers beside it.

    Args:
        folder (`Path`): The pipeline's folder.
        config (`Any`): The content of its `model_index.json`.

    Raises:
        ValueError: A file is damaged or asks for an absurd noise schedule; the message names it.
    """
    index = folder / "model_index.json"
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise ValueError(f"{index} does not name a pipeline class as `_class_name`. {REMEDY}")
    for name, value in config.items():
        if name.startswith(("transformer", "scheduler")) or name == "vae":
            is_component = isinstance(value, list) and len(value) == 2
            is_named = is_component and all(isinstance(part, str) for part in value)
            if not (is_named or value == [None, None]):
                raise ValueError(
                    f"`{name}` in {index} has to be a library and a class, but is {value!r:.100}. {REMEDY}"
                )
        elif name.startswith("default_"):
            numbers = value if isinstance(value, list) else [value]
            if not all(number is None or isinstance(number, (int, float)) for number in numbers):
                raise ValueError(f"`{name}` in {index} has to hold numbers, but is {value!r:.100}. {REMEDY}")
    labels = {} if config.get("id2label") is None else config["id2label"]
    if not isinstance(labels, (dict, list)):
        raise ValueError(f"`id2label` in {index} has to hold the names of classes, but is {labels!r:.100}. {REMEDY}")
    names = labels.values() if isinstance(labels, dict) else labels
    odd = [name for name in names if not isinstance(name, str)]
    if odd:
        raise ValueError(f"`id2label` in {index} has {odd[0]!r:.100} for the name of a class. {REMEDY}")
    for name, value in config.items():
        file = folder / name / "scheduler_config.json"
        if name.startswith("scheduler") and file.is_file():
            check_saved_scheduler(file, value[1])


def check_saved_scheduler(file: Path, class_name: str | None) -> None:
    """Makes the scheduler of a configuration with two timesteps; raises ValueError if that is not possible."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        num_timesteps = config.get("num_train_timesteps", 1)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not the configuration of a scheduler: {error}. {REMEDY}") from error
    if type(num_timesteps) is not int or not 1 <= num_timesteps <= MAX_TIMESTEPS:
        raise ValueError(
            f"`num_train_timesteps` in {file} has to be an integer from 1 to {MAX_TIMESTEPS} but is"
            f" {num_timesteps!r}. {REMEDY}"
        )
    scheduler = getattr(diffusers, str(class_name), None)
    if not isinstance(scheduler, type) or not issubclass(scheduler, SchedulerMixin):
        return  # of another library: diffusers tells, if it cannot be found
    try:
        scheduler.from_config(config).set_timesteps(2)
    except ImportError:  # of what only this scheduler needs: it is told when it is used
        return
    except Exception as error:  # whatever comes of values of the wrong kind
        raise ValueError(
            f"{file} does not make a {scheduler.__name__} ({type(error).__name__}: {error}). {REMEDY}"
        ) from error
