"""Weights of DiM as its authors saved them (`nnet_ema.pth`), for [`DiMTransformer2DModel`]."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..utils.names import show_name
from .transformer_dim import PADDINGS, DiMTransformer2DModel


# Beginnings of our names and theirs, where these differ.
THEIR_NAMES = {
    "patch_embed.": "pos_embed.proj.",
    "position_embedding": "additional_embed",
    "first_smoother.": "a4m_adapter.first_smoother.",
    "last_smoother.": "a4m_adapter.last_smoother.",
    "padding_tokens": "a4m_adapter.pad_token",
    "prefix_padding_tokens": "a4m_adapter.pad_token_dec_split",
    "time_embedding.": "adaln_single.emb.timestep_embedder.",
    "class_embedding.": "adaln_single.emb.class_embedder.embedding_table.",
    "class_token_embedding.": "label_emb.",
    "modulation.": "adaln_single.linear.",
    "norm_out.": "norm_out.norm.",
    "modulation_out.": "proj_out_1.",
    "proj_out.": "proj_out_2.",
}
FIRST_WEIGHT = "pos_embed.proj.weight"
# The padding that each published grid was trained with, by the side of the latent: of images of 256 and 512 pixels.
PUBLISHED_PADDINGS = {32: "lateral", 64: "raster"}


def dim_config(state_dict: Mapping[str, torch.Tensor], padding: str | None = None) -> dict[str, Any]:
    """
    The arguments of [`DiMTransformer2DModel`] for a state dict with DiM's names, from the shapes of its tensors.

    Args:
        padding (`str`, *optional*): The padding rule, which has no weights; by default, that of the published grids.

    Raises:
        ValueError: These are not DiM's weights, or the padding rule is unknown or not that of the published weights.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}

    def shape(name: str, num_axes: int) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(f"These are not DiM's weights: `{name}` is missing.")
        if len(shapes[name]) != num_axes or 0 in shapes[name]:
            raise ValueError(f"`{name}` has shape {shapes[name]}, but DiM's has {num_axes} axes, none of them empty.")
        return shapes[name]

    mixer = "transformer_blocks.0.attn1."
    hidden_size, in_channels, patch_size, _ = shape(FIRST_WEIGHT, 4)
    num_patches = shape("additional_embed", 3)[1] - 2
    side = math.isqrt(max(num_patches, 0))
    if side**2 != num_patches or side == 0:
        raise ValueError(
            f"`additional_embed` has shape {shapes['additional_embed']}, but DiM's has 2 positions and those of a"
            " square, e.g. (1, 2 + 16 * 16, 1536)."
        )
    inner_size, state_size = shape(mixer + "A_log", 2)
    out_channels, rank = shape("proj_out_2.weight", 2)[0] // patch_size**2, shape(mixer + "dt_proj.weight", 2)[1]
    layers = {match[1] for name in shapes if (match := re.match(r"transformer_blocks\.(\d+)\.", name))}
    return {
        "sample_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": len(layers),
        "hidden_size": hidden_size,
        "state_size": state_size,
        "conv_kernel": shape(mixer + "conv1d.weight", 3)[2],
        "expand": inner_size // hidden_size,
        "time_step_rank": None if rank == math.ceil(hidden_size / 16) else rank,
        "num_classes": shape("label_emb.weight", 2)[0] - 1,
        "num_padding_tokens": shape("a4m_adapter.pad_token", 3)[2],
        "padding": _padding(padding, side * patch_size),
    }


def _padding(padding: str | None, sample_size: int) -> str:
    published = PUBLISHED_PADDINGS.get(sample_size)
    if padding not in (None, *PADDINGS):
        raise ValueError(f"`padding` must be one of {', '.join(PADDINGS)}, got {padding!r}.")
    if padding is None and published is None:
        raise ValueError(
            f"These weights are for latents of {sample_size} x {sample_size}, not of 32 or 64 like the published ones,"
            f" so their padding rule is unknown. Pass `padding`: {' or '.join(PADDINGS)}."
        )
    if padding is not None and padding != (published or padding):
        images = f"{8 * sample_size} x {8 * sample_size}"
        raise ValueError(
            f"These weights are for latents of {sample_size} x {sample_size} (images of {images}), which DiM pads by"
            f" the rule {published!r}, not {padding!r}. Leave out `padding`, or check that this is the file you meant."
        )
    return padding or published


def convert_dim_weights(state_dict: Mapping[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """
    The state dict of [`DiMTransformer2DModel`] that a state dict with DiM's names makes. Only tensors that are joined
    or transposed are copied.

    Args:
        config (`dict`): The model's arguments ([`dim_config`]).

    Raises:
        ValueError: A tensor is missing, surplus or of another shape; the message names it.
    """
    with torch.device("meta"):
        model = DiMTransformer2DModel(**config)
    theirs = dim_names(model)
    expected = {name: shape for shapes in theirs.values() for name, shape in shapes.items()}
    problems = [f"lacks {name}" for name in expected if name not in state_dict]
    problems += [f"also holds {show_name(name)}" for name in state_dict if name not in expected]
    problems += [
        f"holds {name} of shape {tuple(state_dict[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"These are not the weights of a DiM with {config['num_layers']} layers of width {config['hidden_size']}:"
            f" the file {', '.join(problems[:5])}{more}."
        )
    return {name: _join(name, [state_dict[part] for part in parts]) for name, parts in theirs.items()}


def dim_names(model: DiMTransformer2DModel) -> dict[str, dict[str, tuple[int, ...]]]:
    """By the names of a model's weights, DiM's names and shapes of the tensors that make each."""
    return {name: _their_shapes(name, tuple(w.shape), model.first_skip) for name, w in model.named_parameters()}


def _their_shapes(name: str, shape: tuple[int, ...], first_skip: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that make one of ours."""
    if match := re.fullmatch(r"skip_projections\.(\d+)\.(\w+)", name):
        layer = f"transformer_blocks.{first_skip + int(match[1])}.skip_linear"
        return {f"{layer}.{i}.{match[2]}": (shape[0],) * len(shape) for i in range(2)}
    if name == "padding_tokens":
        shape = (1, shape[1], shape[0])
    elif name == "prefix_padding_tokens":
        shape = (1, *shape)
    elif match := re.fullmatch(r"(transformer_blocks\.\d+\.)(.+)", name):
        part = match[2].replace("norm.", "norm1.norm.").replace("dt_bias", "dt_proj.bias").replace("mixer.", "attn1.")
        return {match[1] + part: shape}
    beginning = re.match(r"\w+\.?", name)[0]
    return {THEIR_NAMES[beginning] + name[len(beginning) :]: shape}


def _join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if name == "padding_tokens":
        return parts[0][0].T.contiguous()  # (P, D)
    if name == "prefix_padding_tokens":
        return parts[0][0]  # (P, D)
    if len(parts) == 1:
        return parts[0]
    # Two projections of the stream and the skip, added: one of both.
    return torch.cat(parts, dim=1) if name.endswith("weight") else parts[0] + parts[1]  # (D, 2D), (D,)
