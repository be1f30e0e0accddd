"""Attention backbones to compare PIS-DM with: called like its first stage, with equally many parameters."""

from .dit import DiTPeer
from .equal_parameters import HEAD_SIZE, PEERS, EqualParameters, equal_parameters
from .uvit import UViT2DModel


__all__ = ["DiTPeer", "EqualParameters", "HEAD_SIZE", "PEERS", "UViT2DModel", "equal_parameters"]
