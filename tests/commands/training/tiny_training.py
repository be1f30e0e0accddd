"""A training run of seconds."""

from pathlib import Path

import torch
from safetensors.torch import load_file


STAGE = {"patch_size": 2, "in_channels": 3, "num_layers": 2, "hidden_size": 16, "state_size": 4}
CASCADE = {
    "scheduler": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    "stages": [{"sample_size": 4, **STAGE}, {"sample_size": 8, "low_res_channels": 3, **STAGE}],
    "training": {
        "train_batch_size": 8,
        "lr_warmup_steps": 2,
        "logging_steps": 2,
        "validation_steps": 4,
        "validation_classes": 3,
        "validation_inference_steps": 2,
        "checkpointing_steps": 4,
    },
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, and their averages."""
    found = load_file(folder / "model.safetensors")
    return found | {f"ema.{name}": tensor for name, tensor in load_file(folder / "ema.safetensors").items()}
