"""The classes that a cascade's stages can have, as configurations name them: by `_class_name`, as diffusers does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .transformer_dim import DiMTransformer2DModel
from .transformer_pisdm import PISDMTransformer2DModel


StageModel = PISDMTransformer2DModel | DiMTransformer2DModel

CLASS_KEY = "_class_name"
STAGE_CLASSES = {cls.__name__: cls for cls in (PISDMTransformer2DModel, DiMTransformer2DModel)}
OF_THE_DATA = ("num_classes", "class_factors")  # arguments that a stage's configuration leaves to the data


def stage_class(config: Mapping[str, Any]) -> type[StageModel]:
    """The class of a stage's configuration, PIS-DM's if it names none; raises ValueError for an unknown one."""
    name = config.get(CLASS_KEY, PISDMTransformer2DModel.__name__)
    if name not in STAGE_CLASSES:
        raise ValueError(f"`{CLASS_KEY}` must be one of {', '.join(STAGE_CLASSES)}, got {name!r}.")
    return STAGE_CLASSES[name]


def make_stage(config: Mapping[str, Any], **classes) -> StageModel:
    """A stage with random weights, of a configuration and the arguments that concern its classes."""
    arguments = {name: value for name, value in config.items() if name != CLASS_KEY}
    return stage_class(config)(**arguments, **classes)


def class_of(stage: StageModel) -> type[StageModel]:
    """The class of a stage, whatever subclass a wrapper (FSDP) has made of it."""
    return next(cls for cls in STAGE_CLASSES.values() if isinstance(stage, cls))


def stage_config(stage: StageModel) -> dict[str, Any]:
    """The configuration from which [`make_stage`] makes a stage like this."""
    config = {
        name: value for name, value in stage.config.items() if not name.startswith("_") and name not in OF_THE_DATA
    }
    name = class_of(stage).__name__
    return config if name == PISDMTransformer2DModel.__name__ else {CLASS_KEY: name, **config}
