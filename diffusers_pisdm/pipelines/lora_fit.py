"""Whether a LoRA adapter fits a cascade. PEFT finds out when it is half loaded, or only warns."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..models.transformer_pisdm import PISDMTransformer2DModel


CLASS_EMBEDDING = "class_embedding.weight"
REMEDY = "Load it into the cascade that it was trained for, with all of its stages."


def check_adapter_fits(
    weights: dict[str, dict[str, torch.Tensor]], transformers: dict[str, PISDMTransformer2DModel]
) -> None:
    """
    Args:
        weights (`dict[str, dict[str, torch.Tensor]]`): The adapter's weights by key, of each stage by name.
        transformers (`dict[str, PISDMTransformer2DModel]`): The pipeline's stages by name.

    Raises:
        ValueError: The adapter has weights for a stage or layer that there is not, of another shape, of another kind
            than LoRA, or none; or it has class embeddings for some stages only.
    """
    absent = [name for name in weights if name not in transformers]
    if absent:
        raise ValueError(
            f"The adapter has weights for {quote(absent)}, but this pipeline's stages are {quote(transformers)}."
            f" {REMEDY}"
        )
    if not any(".lora_" in key for layers in weights.values() for key in layers):
        raise ValueError("The adapter holds no LoRA weights. Pass one that `save_lora_weights` wrote.")
    for name, layers in weights.items():
        for key, weight in layers.items():
            if key == CLASS_EMBEDDING:
                _check_embedding(name, transformers[name], weight)
            else:
                _check_layer(name, transformers[name], key, weight)
    with_classes = [name for name, layers in weights.items() if CLASS_EMBEDDING in layers]
    without = [name for name in transformers if name not in with_classes]
    if with_classes and without:
        raise ValueError(
            f"The adapter brings classes of its own, but not for {quote(without)}, and all stages need the same. Load"
            f" the pipeline without this stage (`{without[0]}=None`), or an adapter that was saved with it."
        )


def quote(names: Iterable[str]) -> str:
    """Names as an error shows them."""
    return ", ".join(f"`{name}`" for name in names)


def _check_embedding(name: str, transformer: PISDMTransformer2DModel, weight: torch.Tensor) -> None:
    width = transformer.config.hidden_size
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(
            f"The adapter's `{name}.{CLASS_EMBEDDING}` has shape {tuple(weight.shape)}, but `{name}` has rows of"
            f" {width} (`hidden_size`). {REMEDY}"
        )


def _check_layer(name: str, transformer: PISDMTransformer2DModel, key: str, weight: torch.Tensor) -> None:
    path, lora, matrix = key.partition(".lora_")
    if not lora:
        raise ValueError(
            f"`{name}.{key}` is no LoRA weight. Keys have to be like `{name}.<layer>.lora_A.weight`: convert other"
            " formats first."
        )
    try:
        layer = transformer.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"The adapter adapts `{path}` of `{name}`, which has no such layer. {REMEDY}") from error
    dim, size = {"A.weight": (1, "in_features"), "B.weight": (0, "out_features")}.get(matrix, (None, ""))
    expected = getattr(layer, size, None)  # layers other than linear ones are left to PEFT
    if expected is not None and weight.shape[dim] != expected:
        raise ValueError(
            f"The adapter's `{name}.{key}` has shape {tuple(weight.shape)}, but `{path}` has"
            f" {size}={expected}. {REMEDY}"
        )
