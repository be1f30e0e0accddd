"""The models that the page draws with: loaded once, shared by all who use the page."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models.latents import vae_scale_factor
from ..pipelines import PISDMCascadePipeline
from ..pipelines.class_names import for_each_label, get_class_id, ids_by_name
from ..utils.messages import cause_of
from ..utils.names import show_name
from ..utils.png_recipe import fingerprint
from ..utils.shipped_files import find_model, model_name
from .class_sheet import find_sheet


MOST_LOADED = 2
CLASS_LISTS = "The page's class box (for programs, `/classes`)"
LOADING_ERRORS = (OSError, ValueError, TypeError, ImportError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Model:
    """A pipeline, and what the page shows of it."""

    name: str  # as recipes have it
    pipe: PISDMCascadePipeline
    labels: list[str]  # by class id: its name, or its number where no other class may have the name
    sheet: Path | None  # thumbnails of the classes
    weights: str  # their fingerprint, as recipes have it

    @property
    def sizes(self) -> list[int]:
        """Width of each stage's images in pixels."""
        return [transformer.config.sample_size * vae_scale_factor(self.pipe.vae) for transformer in self.pipe.stages]

    def default(self, name: str) -> list:
        """The model's default of an argument, a value per stage."""
        value = self.pipe.config[f"default_{name}"]
        return list(value) if isinstance(value, (list, tuple)) else [value] * self.pipe.num_stages

    def find_classes(self, labels: list[str | int]) -> list[int]:
        """The ids of classes, by name or by number; raises a TypeError or ValueError naming all others."""
        return for_each_label(self._find_class, labels, self.pipe.config.id2label, len(self.labels))

    def _find_class(self, label: str | int, id2label: dict[int, str] | None, num_classes: int) -> int:
        known = self.labels.index(label) if label in self.labels else None
        is_number = isinstance(label, str) and label.isascii() and label.isdigit() and len(label) < 10
        label = int(label) if is_number else label
        return known if known is not None else get_class_id(label, id2label, num_classes, CLASS_LISTS)


class Models:
    """Loads models by folder or Hub repository and keeps those used last."""

    def __init__(self):
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, Model] = OrderedDict()

    def get(self, name: str) -> Model:
        """Returns a model, loaded if need be; raises a ValueError that says why it cannot be."""
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = _load(name)
            self._loaded.move_to_end(name)
            while len(self._loaded) > MOST_LOADED:
                self._loaded.popitem(last=False)
            return self._loaded[name]


def _load(name: str) -> Model:
    path = find_model(name)
    try:
        pipe = PISDMCascadePipeline.from_pretrained(path, use_safetensors=True)
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    except LOADING_ERRORS as error:
        raise ValueError(f"The model '{show_name(name)}' cannot be loaded: {cause_of(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    pipe(class_labels=0, num_inference_steps=2)  # compiles the kernels: nobody should wait for that
    names, ids = pipe.config.id2label or {}, ids_by_name(pipe.config.id2label)
    num_classes = pipe.transformer.config.num_classes
    labels = [names[i] if ids.get(names.get(i)) == [i] else str(i) for i in range(num_classes)]
    return Model(model_name(path), pipe, labels, find_sheet(path, num_classes), fingerprint(pipe.stages))
