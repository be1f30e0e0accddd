"""Finds the depth at which a peer has as many parameters as a PIS-DM model of the same width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from diffusers.models.modeling_utils import ModelMixin

from diffusers_pisdm import DiMTransformer2DModel, PISDMTransformer2DModel

from .dit import DiTPeer
from .uvit import UViT2DModel


PEERS: Mapping[str, type[ModelMixin]] = MappingProxyType(
    {"U-ViT": UViT2DModel, "DiT": DiTPeer, "DiM": DiMTransformer2DModel}
)
HEAD_SIZE = 64  # channels of an attention head in U-ViT-S, -M and -L and in DiT-S, -B and -L
MAX_DIFFERENCE = 0.05


@dataclass(frozen=True)
class EqualParameters:
    """A peer with as many parameters as PIS-DM."""

    config: dict  # the peer's arguments
    parameters: int
    pisdm_parameters: int

    @property
    def difference(self) -> float:
        """The peer's excess over PIS-DM as a share of PIS-DM's."""
        return self.parameters / self.pisdm_parameters - 1


def count_parameters(model_class: type[ModelMixin], config: dict) -> int:
    """The number of parameters of a model, without allocating it; shared ones count once."""
    with torch.device("meta"):
        return model_class(**config).num_parameters()


def equal_parameters(pisdm_config: dict, peer: str, head_size: int = HEAD_SIZE) -> EqualParameters:
    """
    Finds the depth at which a peer of PIS-DM's width comes closest to its number of parameters; raises ValueError if
    the width is not a multiple of `head_size` or the closest depth is more than 5% off.
    """
    with torch.device("meta"):
        pisdm = PISDMTransformer2DModel(**pisdm_config)
    wanted, options = pisdm.num_parameters(), pisdm.config
    has_heads = PEERS[peer] is not DiMTransformer2DModel
    if has_heads and options.hidden_size % head_size != 0:
        raise ValueError(f"`hidden_size` must be a multiple of `head_size` ({head_size}), got {options.hidden_size}.")
    config = {
        "sample_size": options.sample_size,
        "patch_size": options.patch_size,
        "in_channels": options.in_channels,
        "hidden_size": options.hidden_size,
        "num_classes": options.num_classes,
    }
    if has_heads:
        config["num_heads"] = options.hidden_size // head_size

    # Every two layers add the same number (U-ViT's skips join two), so four small models determine all counts.
    few = [count_parameters(PEERS[peer], {**config, "num_layers": num_layers}) for num_layers in (1, 2, 3, 4)]

    def count(num_layers: int) -> int:
        pairs, odd = divmod(num_layers - 1, 2)
        return few[odd] + pairs * (few[odd + 2] - few[odd])

    guess = 1 + round(2 * (wanted - few[0]) / (few[2] - few[0]))
    counts = {num_layers: count(num_layers) for num_layers in range(max(guess - 2, 1), max(guess, 1) + 3)}
    num_layers = min(counts, key=lambda depth: abs(counts[depth] - wanted))
    found = EqualParameters({**config, "num_layers": num_layers}, counts[num_layers], wanted)
    if abs(found.difference) > MAX_DIFFERENCE:
        raise ValueError(
            f"No depth of {peer} at width {options.hidden_size} comes within {MAX_DIFFERENCE:.0%} of PIS-DM's"
            f" {wanted:,} parameters; the closest, {num_layers} layers, has {found.parameters:,}. Compare deeper"
            " models."
        )
    return found
