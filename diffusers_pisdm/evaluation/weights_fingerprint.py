"""Telling models apart by what they are, not by where they lie."""

from __future__ import annotations

import hashlib
import json

import torch
from diffusers import DiffusionPipeline


def weights_fingerprint(pipe: DiffusionPipeline) -> str:
    """
    A SHA-256 of the configurations and weights of all of a pipeline's models, loaded adapters included. A pipeline
    that was moved or compiled keeps it, one that was trained on or cast does not.

    Args:
        pipe ([`DiffusionPipeline`]): Its weights have to be in memory.

    Returns:
        `str`: 64 hexadecimal digits.

    Raises:
        ValueError: Weights are not in memory, as with sequential offloading.
    """
    digest = hashlib.sha256()
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    for component, model in sorted(models.items()):
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        digest.update(f"{component} {json.dumps(config, sort_keys=True, default=str)}".encode())
        # `torch.compile` renames the weights of a model that it wraps.
        weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
        for name, tensor in sorted(weights.items()):
            if tensor.is_meta:
                raise ValueError(
                    f"`{component}.{name}` is not in memory. Sample without sequential offloading; where memory is"
                    " short, use `enable_model_cpu_offload`."
                )
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
