"""Lets diffusers' own loaders (`DiffusionPipeline`, `AutoModel`) find this package's classes."""

from __future__ import annotations

import diffusers
from diffusers.pipelines import pipeline_loading_utils


def register_with_diffusers(*classes: type) -> None:
    """
    Registers pipelines and models in the two places where diffusers looks for classes.

    A saved pipeline names each component's library and class. diffusers loads components only from libraries in
    `LOADABLE_CLASSES`, and only if the library exposes the component's base class by name, which is why this package
    has `ModelMixin` in its top-level namespace. The class of a saved pipeline or model itself (`_class_name`) comes
    without a library: diffusers looks it up in its own namespace.
    """
    library = __name__.split(".")[0]
    pipeline_loading_utils.LOADABLE_CLASSES[library] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    for cls in classes:
        setattr(diffusers, cls.__name__, cls)
