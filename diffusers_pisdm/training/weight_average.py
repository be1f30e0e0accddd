"""Keeping an exponential moving average of weights in safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor


def save_average(average: EMAModel, names: list[str], file: Path, is_main_process: bool = True) -> None:
    """
    Writes the averaged weights. With sharded parameters (FSDP2) all processes have to call it.

    Args:
        average (`EMAModel`): The averages.
        names (`list[str]`): The parameters' names, in the order they were given to `average`.
        file (`Path`): The safetensors file to write.
        is_main_process (`bool`, defaults to `True`): Whether this process writes; the others only take part.
    """
    whole = {name: _gather(tensor) for name, tensor in zip(names, average.shadow_params, strict=True)}
    if is_main_process:
        save_file(whole, file)


def load_average(average: EMAModel, names: list[str], file: Path, step: int) -> None:
    """
    Reads what [`save_average`] wrote.

    Args:
        average (`EMAModel`): Takes the averages; its present ones say how each is sharded and where it lies.
        names (`list[str]`): As there.
        file (`Path`): The safetensors file.
        step (`int`): How many updates the averages have seen.
    """
    whole = load_file(file)
    average.shadow_params = [
        _shard_like(whole[name], present) for name, present in zip(names, average.shadow_params, strict=True)
    ]
    average.optimization_step = step


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def _shard_like(tensor: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    tensor = tensor.to(present.device)
    if isinstance(present, DTensor):
        return distribute_tensor(tensor, present.device_mesh, present.placements)
    return tensor
