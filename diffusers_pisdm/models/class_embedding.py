"""Exchanging the classes that a model knows."""

from __future__ import annotations

import torch
import torch.nn as nn

from .transformer_pisdm import PISDMTransformer2DModel


def set_class_embedding(transformer: PISDMTransformer2DModel, weight: torch.Tensor) -> None:
    """
    Gives a model other classes, in place: the rows of its class embedding, and `config.num_classes`.

    Args:
        transformer ([`PISDMTransformer2DModel`]): The model.
        weight (`torch.Tensor` of shape `(num_classes + 1, hidden_size)`):
            One row a class, the null label's last. It is copied, in the precision and onto the device of the present.

    Raises:
        ValueError: The embedding is offloaded: its module holds no weights at present.
    """
    embedding = transformer.class_embedding
    if embedding.weight.is_meta:
        raise ValueError(
            "The class embedding cannot be exchanged while its weights are offloaded. Call the pipeline's"
            " `remove_all_hooks()` first, and `enable_sequential_cpu_offload()` again afterwards."
        )
    weight = weight.detach().to(embedding.weight, copy=True)
    # The module stays, and with it the hooks that offloading and casting have put on it.
    embedding.weight = nn.Parameter(weight, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = len(weight)
    transformer.register_to_config(num_classes=len(weight) - 1)
