"""A transformer small enough for a test, in which every input has an effect, and inputs for it."""

from __future__ import annotations

import torch
from diffusers import ModelMixin

from diffusers_pisdm import PISDMTransformer2DModel


NUM_CLASSES = 10
CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "num_layers": 4,
    "hidden_size": 32,
    "state_size": 4,
    "num_classes": NUM_CLASSES,
    "low_res_channels": 3,
}


def make_model(seed: int = 0, **config) -> PISDMTransformer2DModel:
    """A higher stage of four layers, in evaluation mode; `config` overrides [`CONFIG`]."""
    torch.manual_seed(seed)
    model = PISDMTransformer2DModel(**{**CONFIG, **config})
    for name, parameter in model.named_parameters():
        # These start at zero, where they hide what they depend on.
        if name.startswith(("modulation", "local_")) or name.endswith("scale_shift_table"):
            parameter.data += torch.randn_like(parameter) * 0.2
        if "skip_proj" in name or name == "padding_tokens" or name == "proj_out.weight":
            parameter.data += torch.randn_like(parameter) * 0.1
    return model.eval()


def make_inputs(
    model: ModelMixin,
    batch_size: int = 2,
    height: int = 8,
    width: int = 8,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """The same inputs at every call of equal arguments."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(batch_size, model.config.in_channels, height, width, generator=generator),
        "timestep": torch.randint(0, 1000, (batch_size,), generator=generator),
        "class_labels": torch.randint(0, model.config.num_classes, (batch_size,), generator=generator),
    }
    if model.config.get("low_res_channels") is not None:
        shape = (batch_size, model.config.low_res_channels, height, width)
        inputs["low_res"] = torch.randn(shape, generator=generator)
        inputs["noise_level"] = torch.rand(batch_size, generator=generator) * 0.5
    images = ("hidden_states", "low_res")
    return {name: value.to(dtype) if name in images else value for name, value in inputs.items()}


def mean_square_error_gradients(model: ModelMixin, **arguments) -> dict[str, torch.Tensor]:
    """The gradient of each parameter for a loss on the sample and the features."""
    model.zero_grad()
    inputs = make_inputs(model, **arguments)
    sample, features = model(**inputs, return_dict=False)
    target = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
    loss = ((sample.float() - target) ** 2).mean() + (features.float() ** 2).mean()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
