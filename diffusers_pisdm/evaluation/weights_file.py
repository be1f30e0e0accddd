"""Reading a network's weights from a file without running what may be in it."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import nn


def read_weights(file: str | Path) -> dict[str, torch.Tensor]:
    """
    Reads a state dict that `torch.save` wrote. Objects other than tensors are refused: unpickling them could run
    anything.

    Args:
        file (`str` or `Path`): The file.

    Returns:
        `dict[str, torch.Tensor]`: On the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else, or is damaged.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no weights file {file}: check the path.")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file} cannot be read as a state dict of tensors: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{file} holds no state dict, a dict of names and tensors, but {type(weights).__name__}.")
    return weights


def fill_weights(network: nn.Module, file: str | Path) -> None:
    """
    Loads a file of weights into a network, all of it and nothing else.

    Args:
        network (`nn.Module`): Gets the weights.
        file (`str` or `Path`): See [`read_weights`].

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or is another network's.
    """
    weights = read_weights(file)
    wanted = network.state_dict()
    wrong = [name for name in wanted if name not in weights or weights[name].shape != wanted[name].shape]
    wrong += [name for name in weights if name not in wanted]
    if wrong:
        raise ValueError(
            f"{file} is not a file of {type(network).__name__}'s weights: {len(wrong)} of the names or shapes differ,"
            f" the first is {wrong[0]}."
        )
    network.load_state_dict(weights)
