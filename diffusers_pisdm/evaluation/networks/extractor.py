"""The base class of feature extractors, whose features all metrics are computed from, and their registry."""

from __future__ import annotations

import hashlib
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn


class Features(NamedTuple):
    """
    Args:
        pooled (`torch.Tensor` of shape `(B, D)`, float32):
            One vector per image, for the Fréchet distance, precision and recall.
        spatial (`torch.Tensor` of shape `(B, S)`, float32, *optional*):
            A flattened feature map of a middle layer, which keeps positions, for the spatial Fréchet distance.
        logits (`torch.Tensor` of shape `(B, C)`, float32, *optional*): Class logits, for the inception score.
    """

    pooled: torch.Tensor
    spatial: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class FeatureExtractor(nn.Module, ABC):
    """
    Base class of the networks. It takes images of any height and width, resizes them, and treats each independently:
    an image's features depend neither on its batch nor on earlier ones.

    Args:
        name (`str`): The name the network is loaded by, which statistics files record.
        weights_file (`str` or `Path`, *optional*): Where its weights came from.
    """

    is_adm_inception = False  # whether its scores are comparable with published FID, sFID, IS, precision and recall

    def __init__(self, name: str, weights_file: str | Path | None = None):
        super().__init__()
        self.name = name
        self.weights_file = weights_file

    @property
    def title(self) -> str:
        """The network's name in scores."""
        return self.name

    @property
    def distance_name(self) -> str:
        """The name of its Fréchet distance: "FID" only for ADM's Inception v3."""
        return self.score_name("FID", "Fréchet distance")

    def score_name(self, published: str, plain: str) -> str:
        """A score's name: `published` for ADM's Inception v3, otherwise `plain` with the network's name."""
        return published if self.is_adm_inception else f"{plain} ({self.title})"

    def weights_hash(self) -> str | None:
        """SHA-256 of the weights file, in hexadecimal; `None` if there is no single file."""
        if self.weights_file is None or not Path(self.weights_file).is_file():
            return None
        digest = hashlib.sha256()
        with open(self.weights_file, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def forward(self, images: torch.Tensor) -> Features:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): uint8, RGB.

        Returns:
            [`Features`].
        """


FeatureExtractorFactory = Callable[[str | None], FeatureExtractor]
_factories: dict[str, FeatureExtractorFactory] = {}


def register_feature_extractor(name: str, factory: FeatureExtractorFactory) -> None:
    """
    Registers a network under a name, for [`load_feature_extractor`] and `pisdm evaluate --features`.

    Args:
        name (`str`): The name, without a colon.
        factory (`Callable`):
            Makes the network from `weights`: a file, folder or Hub id, or `None` for its default weights.

    Raises:
        ValueError: The name has a colon, or is taken.
    """
    if ":" in name:
        raise ValueError(f"{name!r} has a colon, which separates a name from its weights: choose another name.")
    if name in _factories:
        raise ValueError(f"A feature extractor {name!r} is already registered: choose another name.")
    _factories[name] = factory


def feature_extractor_names() -> list[str]:
    """The registered names."""
    return sorted(_factories)


def load_feature_extractor(
    name: str, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """
    Loads a network by name.

    Args:
        name (`str`):
            A registered name: `"efficientnet_lite0"`, `"inception_v3"`, `"transformers"`; weights may follow after a
            colon, as in `"transformers:facebook/dinov2-base"`.
        weights (`str` or `Path`, *optional*): A file, folder or Hub id, whichever the network takes.
        device (`str` or `torch.device`, defaults to `"cpu"`): The device to run on.

    Returns:
        [`FeatureExtractor`] in evaluation mode, without gradients.

    Raises:
        ValueError: There is no network of that name, or weights are given twice.
        ImportError: A package it needs is missing.
    """
    name, _, after_colon = name.partition(":")
    if name not in _factories:
        raise ValueError(f"There is no feature extractor {name!r}, only {', '.join(feature_extractor_names())}.")
    if after_colon and weights is not None:
        raise ValueError(f"Weights for {name} are given twice, as {after_colon} and as {weights}: drop one.")
    extractor = _factories[name](after_colon or (None if weights is None else str(weights)))
    return extractor.to(device).eval().requires_grad_(False)


def check_images(images: torch.Tensor) -> None:
    """Raises a `ValueError` unless `images` is a uint8 tensor of shape `(B, 3, H, W)`."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"Images must be uint8 of shape (B, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}."
        )


def read_weights(file: str | Path) -> dict[str, torch.Tensor]:
    """
    Reads a state dict saved by `torch.save` to the CPU. Raises ValueError for objects other than tensors: unpickling
    them could run arbitrary code.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no weights file {file}: check the path.")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file} cannot be read as a state dict of tensors: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{file} must hold a state dict of names and tensors, but holds {type(weights).__name__}.")
    return weights


def fill_weights(network: nn.Module, file: str | Path) -> None:
    """
    Loads a weights file into a network; raises ValueError if its names or shapes differ from the network's.
    """
    weights = read_weights(file)
    wanted = network.state_dict()
    wrong = [name for name in wanted if name not in weights or weights[name].shape != wanted[name].shape]
    wrong += [name for name in weights if name not in wanted]
    if wrong:
        raise ValueError(
            f"{file} does not hold {type(network).__name__}'s weights: {len(wrong)} names or shapes differ, the first"
            f" is {wrong[0]}."
        )
    network.load_state_dict(weights)
