"""Exchanging the classes that a model knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn

from .transformer_pisdm import PISDMTransformer2DModel


def get_class_embedding(transformer: PISDMTransformer2DModel) -> torch.Tensor:
    """
    Returns:
        `torch.Tensor` of shape `(num_classes + 1, hidden_size)`: One row a class, the null label's last, whether the
        model has such rows or makes them of `class_factors`.
    """
    weight = transformer.class_embedding.weight
    if transformer.class_factor_ids is None:
        return weight
    rows = transformer.class_factor_ids + transformer.class_factor_starts  # (num_classes + 1, F)
    return weight[rows.to(weight.device)].sum(dim=1)


def set_class_embedding(
    transformer: PISDMTransformer2DModel,
    weight: torch.Tensor,
    class_factors: Sequence[Sequence[int]] | None = None,
) -> None:
    """
    Gives a model other classes, in place: the rows of its class embedding, `config.num_classes` and
    `config.class_factors`.

    Args:
        transformer ([`PISDMTransformer2DModel`]): The model.
        weight (`torch.Tensor` of shape `(num_classes + 1, hidden_size)`):
            One row a class, the null label's last; with `class_factors` one row an id of each factor, each factor's
            null label after its ids. It is copied, in the precision and onto the device of the present.
        class_factors (`Sequence[Sequence[int]]`, *optional*): The factors of each class.

    Raises:
        ValueError: The embedding is offloaded: its module holds no weights at present.
    """
    embedding = transformer.class_embedding
    if embedding.weight.is_meta:
        raise ValueError(
            "The class embedding cannot be exchanged while its weights are offloaded. Call the pipeline's"
            " `remove_all_hooks()` first, and `enable_sequential_cpu_offload()` again afterwards."
        )
    num_classes = len(weight) - 1 if class_factors is None else len(class_factors)
    weight = weight.detach().to(embedding.weight, copy=True)
    transformer.set_class_factors(class_factors, num_classes)
    for buffer in transformer.buffers(recurse=False):
        buffer.data = buffer.data.to(weight.device)
    # The module stays, and with it the hooks that offloading and casting have put on it.
    embedding.weight = nn.Parameter(weight, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = len(weight)
    transformer.register_to_config(num_classes=num_classes, class_factors=class_factors)


def class_factors_from_names(class_names: Sequence[str], separator: str) -> tuple[tuple[int, ...], ...]:
    """
    Reads factors off names like `"noto/animal-mammal"`: each part is an id of its place's factor, in order of their
    names.

    Args:
        class_names (`Sequence[str]`): The names, by class id.
        separator (`str`): What separates the parts.

    Returns:
        `tuple[tuple[int, ...], ...]`: `class_factors` of [`PISDMTransformer2DModel`].

    Raises:
        ValueError: A name has more or fewer parts than the first one.
    """
    parts = [name.split(separator) for name in class_names]
    for name, row in zip(class_names, parts):
        if len(row) != len(parts[0]):
            raise ValueError(
                f"Class {name!r} has {len(row)} parts between {separator!r}, but {class_names[0]!r} has"
                f" {len(parts[0])}: all names need the same number for their parts to be factors."
            )
    ids = [{part: i for i, part in enumerate(sorted(set(column)))} for column in zip(*parts)]
    return tuple(tuple(factor[part] for factor, part in zip(ids, row)) for row in parts)
