"""Makes diffusers' own loaders (`DiffusionPipeline`, `AutoModel`) find this package's classes."""

from __future__ import annotations

import diffusers
from diffusers.pipelines import pipeline_loading_utils


def register_with_diffusers(*classes: type) -> None:
    """
    Registers pipelines and models with diffusers, which looks for third-party classes nowhere else.

    A saved pipeline names each component's library and class. diffusers takes components from the libraries in
    `LOADABLE_CLASSES` only, and there from classes whose base class the library exposes by name, so that this package
    has `ModelMixin` in its top-level namespace. A saved pipeline's or model's own class (`_class_name`) carries no
    library: diffusers takes it from its own namespace.
    """
    library = __name__.split(".")[0]
    pipeline_loading_utils.LOADABLE_CLASSES[library] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    for cls in classes:
        setattr(diffusers, cls.__name__, cls)
