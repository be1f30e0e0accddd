"""Saving a model that has LoRA adapters."""

from __future__ import annotations

from functools import wraps

import torch
import torch.nn as nn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging


logger = logging.get_logger(__name__)


class AdapterSavingMixin:
    """Put it before `ModelMixin` in a class's bases: models are saved without adapters, by their layers' own names."""

    @wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, *args, **kwargs) -> None:
        names = sorted(getattr(self, "peft_config", {}))
        if names:
            logger.warning(
                f"The saved model is without its LoRA adapters ({', '.join(names)}), unless they are fused: save them"
                " with `save_lora_weights`, or call `fuse_lora` before."
            )
        hook = self.register_state_dict_post_hook(_drop_adapters)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            hook.remove()


def _drop_adapters(model: nn.Module, state_dict: dict[str, torch.Tensor], *args) -> None:
    # PEFT wraps a layer that it adapts, which changes the names of the layer's own weights.
    for name in list(state_dict):
        weight = state_dict.pop(name)
        if ".lora_" not in name:
            state_dict[name.replace(".base_layer.", ".")] = weight
