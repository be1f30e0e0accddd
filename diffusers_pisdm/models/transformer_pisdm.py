"""PIS-DM's Mamba diffusion backbone: one stage of the cascade."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from ..ops.cached_table import cached_table
from ..ops.conv.dispatch import causal_conv
from ..ops.modulation.dispatch import gated_residual, modulated_norm, moves_with_norm
from ..ops.scan.dispatch import selective_scan
from ..ops.scan_paths import SCAN_DIRECTIONS, TokenMove, check_scan_direction, move_tokens, scan_transitions
from .adapter_saving import AdapterSavingMixin
from .strict_loading import StrictLoadingMixin


# The paper's 0.9B model is DiM-Huge; S and L shrink it as DiM does. Keyword arguments of PISDMTransformer2DModel.
PISDM_SIZES = {
    "S": {"num_layers": 25, "hidden_size": 512},
    "L": {"num_layers": 49, "hidden_size": 1024},
    "H": {"num_layers": 49, "hidden_size": 1536},
}

# The least and the most of each size: more than any sensible model has, but too little to hang or fill the memory.
SIZE_RANGES = {
    "sample_size": (1, 16_384),
    "patch_size": (1, 256),
    "in_channels": (1, 4096),
    "out_channels": (1, 4096),
    "num_layers": (1, 1000),
    "hidden_size": (4, 8192),
    "state_size": (1, 256),
    "conv_kernel": (1, 64),
    "expand": (1, 8),
    "time_step_rank": (1, 8192),
    "num_classes": (1, 1_000_000),
    "low_res_channels": (1, 4096),
    "num_padding_tokens": (0, 1000),
    "pixel_head_channels": (1, 4096),
}
OPTIONAL_SIZES = ("out_channels", "time_step_rank", "low_res_channels", "pixel_head_channels")
FLAGS = ("snake", "local_enhancement", "long_skips", "overlapping_patches")

NUM_PREFIX_TOKENS = 2  # timestep and class
TIME_FREQUENCIES = 256  # width of the sinusoidal embedding, as in DDPM, DiT and DiM
NOISE_LEVEL_SCALE = 1000.0  # maps noise levels in [0, 1) to the range of the timesteps' sinusoids


def check_sizes(config: dict[str, Any]) -> None:
    """Raises a `ValueError` that names the first of a model's sizes and flags with a wrong type or out of range."""
    for name in SIZE_RANGES.keys() & config.keys():
        (least, most), size = SIZE_RANGES[name], config[name]
        is_integer = isinstance(size, Integral) and not isinstance(size, bool)
        if not (is_integer and least <= size <= most) and not (size is None and name in OPTIONAL_SIZES):
            optional = "None or " if name in OPTIONAL_SIZES else ""
            raise ValueError(f"`{name}` must be {optional}an integer from {least} to {most}, got {size!r}.")
    for name in FLAGS:
        if not isinstance(config.get(name, False), bool):
            raise ValueError(f"`{name}` must be True or False, got {config[name]!r}.")


def check_input(config: dict[str, Any], hidden_states: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of an input's grid of patches; raises a `ValueError` if it does not fit the model."""
    channels, height, width = hidden_states.shape[1:]
    patch_size = config["patch_size"]
    if channels != config["in_channels"]:
        raise ValueError(f"`hidden_states` has {channels} channels, but the model takes {config['in_channels']}.")
    if height % patch_size != 0 or width % patch_size != 0:
        raise ValueError(
            f"Height and width of `hidden_states` must be divisible by the model's `patch_size` ({patch_size}),"
            f" got {height} x {width}."
        )
    return height // patch_size, width // patch_size


def check_class_factors(class_factors: Sequence[Sequence[int]], num_classes: int) -> list[int]:
    """
    The number of ids of each factor; raises ValueError if there is not one row per class, rows differ in length, or an
    id is negative or not below the largest number of classes.
    """
    is_list = isinstance(class_factors, (list, tuple))
    if not is_list or not all(isinstance(row, (list, tuple)) for row in class_factors):
        raise ValueError(f"`class_factors` must be a list with one list of ids per class, got {class_factors!r:.200}.")
    if len(class_factors) != num_classes:
        raise ValueError(
            f"`class_factors` must have one row for each of the {num_classes} classes (`num_classes`), got"
            f" {len(class_factors)}."
        )
    lengths = {len(row) for row in class_factors}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"`class_factors` must give every class the same number of ids, got rows of {lengths}.")
    most = SIZE_RANGES["num_classes"][1]
    for index, row in enumerate(class_factors):
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < most for i in row):
            raise ValueError(f"`class_factors` must hold `int` ids from 0 to {most - 1}, but class {index} has {row}.")
    return [max(column) + 1 for column in zip(*class_factors)]


@dataclass
class PISDMTransformer2DModelOutput(BaseOutput):
    """
    The output of [`PISDMTransformer2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(B, out_channels, H, W)`): What the scheduler's `prediction_type` asks for.
        features (`torch.Tensor` of shape `(B, H/p * W/p, hidden_size)`):
            Image tokens after the last block, in raster order; the scale-invariant loss compares them.
    """

    sample: torch.Tensor
    features: torch.Tensor | None = None  # always set; accelerate's hooks need the default


@cached_table(maxsize=32)
def sincos_position_embedding(
    height: int, width: int, dim: int, base_size: int, *, device: torch.device | str | None = None
) -> torch.Tensor:
    """
    Fixed 2-D sine-cosine position embeddings (height * width, dim), float32. A grid of any size spans the range of the
    `base_size x base_size` grid the model is trained on, so positions interpolate.
    """
    arange = partial(torch.arange, dtype=torch.float32, device=device)  # whatever the default dtype
    frequencies = torch.exp(arange(dim // 4) * (-math.log(10000.0) / (dim // 4)))  # (D/4,)

    def along(length: int) -> torch.Tensor:
        centres = (arange(length) + 0.5) * (base_size / length) - 0.5  # (length,)
        angles = centres[:, None] * frequencies  # (length, D/4)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (length, D/2)

    rows = along(height)[:, None].expand(height, width, dim // 2)
    columns = along(width)[None].expand(height, width, dim // 2)
    return torch.cat([rows, columns], dim=-1).reshape(height * width, dim)  # (HW, D)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32; float64 stays, for tests that need its digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def look_up(
    embed: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor, no_class: int | torch.Tensor
) -> torch.Tensor:
    """
    The embeddings of class labels; raises a `ValueError` for unknown ones, on the CPU. To read them back from a GPU
    would hold up each step, and break CUDA graphs: there, the pipeline tells of them, before any step.
    """
    try:
        return embed(labels)
    except IndexError as error:
        low, high = labels.min().item(), labels.max().item()
        limit = no_class.tolist() if isinstance(no_class, torch.Tensor) else no_class
        raise ValueError(f"`class_labels` has to be in 0 to {limit} (no class) but holds {low} to {high}.") from error


def mix_embeddings(embeddings: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The embeddings `(B, D)` of images' classes, or of mixes `(B, K, D)` of K classes with weights `(B, K)`."""
    if weights is None:
        return embeddings
    return (weights.to(embeddings.dtype)[..., None] * embeddings).sum(dim=1)  # (B, D)


class PISDMCausalConv1d(nn.Conv1d):
    """Depthwise causal convolution along the sequence, followed by SiLU."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, groups=channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return causal_conv(hidden_states, self.weight[:, 0], self.bias, activation="silu")  # (B, D, L)


class PISDMLocalEnhancement(nn.Conv2d):
    """The paper's local structure enhancement (LSEM): a residual 3x3 depthwise convolution over the token grid."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=3, padding=1, groups=channels)

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        grid = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, D, h, w)
        return hidden_states + super().forward(grid).flatten(2).transpose(1, 2)  # (B, hw, D)


class PISDMPixelHead(nn.Module):
    """
    Local structure enhancement at pixel level: small convolutions that correct the prediction across patch borders,
    which tokens cannot see. The last convolution starts at zero, so the head initially changes nothing.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, hidden_size: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.modulation = nn.Linear(hidden_size, 2 * channels)
        self.conv_mid = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv_out = nn.Conv2d(channels, out_channels, kernel_size=3, padding=1)
        for layer in (self.modulation, self.conv_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, prediction: torch.Tensor, inputs: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(torch.cat([prediction, inputs], dim=1))  # (B, K, H, W)
        shift, scale = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)  # (B, K, 1, 1) each
        hidden_states = F.silu(torch.addcmul(shift, hidden_states, 1 + scale))  # (B, K, H, W)
        return prediction + self.conv_out(F.silu(self.conv_mid(hidden_states)))  # (B, C, H, W)


class PISDMMambaMixer(nn.Module):
    """
    Mamba's selective state space layer: gated, with a short causal convolution before the scan. It scans the sequence
    in the given order; [`PISDMTransformer2DModel`] orders the tokens.

    `A_log`, `D` and `dt_bias` stay in float32, as they feed exponentials.
    """

    def __init__(self, hidden_size: int, state_size: int, conv_kernel: int, expand: int, time_step_rank: int):
        super().__init__()
        inner_size = expand * hidden_size
        self.split_sizes = (time_step_rank, state_size, state_size)

        self.in_proj = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.conv1d = PISDMCausalConv1d(inner_size, conv_kernel)
        self.x_proj = nn.Linear(inner_size, time_step_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(time_step_rank, inner_size, bias=False)
        self.out_proj = nn.Linear(inner_size, hidden_size, bias=False)

        # S4D-real: state n decays n + 1 times as fast as the step.
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(inner_size, 1))  # (Di, N)
        self.D = nn.Parameter(torch.ones(inner_size))
        # Steps start log-uniform in [1e-3, 0.1] (Mamba, section 3.6); the bias is the inverse softplus of the step.
        step = torch.exp(torch.empty(inner_size).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        nn.init.uniform_(self.dt_proj.weight, -(time_step_rank**-0.5), time_step_rank**-0.5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, L, Di) each
        x = self.conv1d(x.transpose(1, 2))  # (B, Di, L)
        dt, B, C = self.x_proj(x.transpose(1, 2)).split(self.split_sizes, dim=-1)  # (B, L, R), (B, L, N), (B, L, N)
        delta = self.dt_proj(dt)  # (B, L, Di)
        y = selective_scan(
            x,
            delta.transpose(1, 2),
            at_least_float32(self.A_log),
            B.transpose(1, 2),
            C.transpose(1, 2),
            D=at_least_float32(self.D),
            z=z.transpose(1, 2),
            delta_bias=at_least_float32(self.dt_bias),
            delta_softplus=True,
            A_is_log=True,
        )  # (B, Di, L)
        return self.out_proj(y.transpose(1, 2))  # (B, L, D)


class PISDMBlock(nn.Module):
    """
    One layer: the tokens' move to its scan order, modulated norm, Mamba mixer, gated residual.

    All layers share the modulation; each shifts it by its own `scale_shift_table` (PixArt's adaLN-single). At width
    1536, a separate projection would add half as many parameters again to each layer.
    """

    def __init__(self, hidden_size: int, state_size: int, conv_kernel: int, expand: int, time_step_rank: int):
        super().__init__()
        self.mixer = PISDMMambaMixer(hidden_size, state_size, conv_kernel, expand, time_step_rank)
        table = torch.zeros(3, hidden_size)
        table[2] = 1.0  # shift 0, scale 0, gate 1: initially a plain pre-norm residual layer
        self.scale_shift_table = nn.Parameter(table)

    def forward(
        self, hidden_states: torch.Tensor, modulation: torch.Tensor, move: TokenMove | None = None
    ) -> torch.Tensor:
        table = self.scale_shift_table
        hidden_states, normed = modulated_norm(hidden_states, modulation, table, move)  # (B, L, D) each
        return gated_residual(hidden_states, self.mixer(normed), modulation, table)  # (B, L, D)


class PISDMSkipBlock(PISDMBlock):
    """
    A layer of the second half: it first merges in the output of its mirror image in the first half (U-ViT's long
    skip). As a separate class, each kind is compiled only once, whatever the number of layers.
    """

    def __init__(self, hidden_size: int, state_size: int, conv_kernel: int, expand: int, time_step_rank: int):
        super().__init__(hidden_size, state_size, conv_kernel, expand, time_step_rank)
        self.skip_proj = nn.Linear(2 * hidden_size, hidden_size)
        with torch.no_grad():  # the skip starts closed: [identity | 0]
            self.skip_proj.weight.copy_(torch.eye(hidden_size, 2 * hidden_size))
            self.skip_proj.bias.zero_()

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        skip: torch.Tensor,
        move: TokenMove | None = None,
    ) -> torch.Tensor:
        if move is not None:
            hidden_states = move_tokens(hidden_states, move)  # (B, L, D)
        hidden_states = self.skip_proj(torch.cat([hidden_states, skip], dim=-1))  # (B, L, D)
        return super().forward(hidden_states, modulation)  # (B, L, D)


class PISDMTransformer2DModel(StrictLoadingMixin, AdapterSavingMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    A Mamba backbone that predicts the noise (or velocity) of a class-conditional image: one stage of
    [`PISDMCascadePipeline`]. Each of the paper's components is one argument: cyclic scanning (CSM, `scan_directions`),
    padding tokens (PT, `num_padding_tokens`), local structure enhancement (LSEM, `local_enhancement`), and the
    cascade's condition (CN, `low_res_channels`). Turning one off removes its parameters and its cost.

    Args:
        sample_size (`int`, defaults to 32):
            Height and width in pixels (or latent pixels) the model is trained on. Inputs of any other size, rectangles
            included, also work; positions interpolate.
        patch_size (`int`, defaults to 2): Side in pixels of the square patch that becomes a token.
        in_channels (`int`, defaults to 4): Channels of the noisy input.
        out_channels (`int`, *optional*): Channels of the output, `in_channels` if not given.
        num_layers (`int`, defaults to 49): Mamba layers (DiM-Huge).
        hidden_size (`int`, defaults to 1536): Width of a token, divisible by 4.
        state_size (`int`, defaults to 16): States of the scan per channel.
        conv_kernel (`int`, defaults to 3): Length of the causal convolution (DiM).
        expand (`int`, defaults to 2): Inner width of a layer as a multiple of `hidden_size`.
        time_step_rank (`int`, *optional*): Rank of the step size projection; `ceil(hidden_size / 16)` if not given.
        num_classes (`int`, defaults to 1000):
            Labels are `0..num_classes - 1`; `num_classes` is the null label of classifier-free guidance.
        low_res_channels (`int`, *optional*):
            Channels of the low-resolution condition; `None` makes a first stage, which has no condition.
        scan_directions (`tuple[str, ...]`, defaults to all eight):
            Any non-empty subset of [`SCAN_DIRECTIONS`]. Layers cycle through them; the second half mirrors the first,
            so that a long skip joins layers with the same direction.
        snake (`bool`, defaults to `False`): Whether every second scanned line runs backwards.
        num_padding_tokens (`int`, defaults to 1): Learnable tokens at the end of every scanned line.
        local_enhancement (`bool`, defaults to `True`):
            Whether 3x3 depthwise convolutions follow the patch embedding and precede the output head.
        long_skips (`bool`, defaults to `True`): Whether long skips join the two halves of the layers, as in U-ViT.
        overlapping_patches (`bool`, defaults to `False`):
            Whether a token reads and writes a square of twice the patch's side instead of just the patch, so that
            neighbours overlap. `patch_size` must be even. Ours, not the paper's.
        pixel_head_channels (`int`, *optional*):
            Channels of the small convolutions over prediction, noisy input and condition at the end of the model
            ([`PISDMPixelHead`]); without them the tokens' prediction is the output. Ours, not the paper's.
        residual_scale (`float`, *optional*):
            Makes a higher stage diffuse what the upsampled lower image lacks, `(image - upsampled) / residual_scale`,
            instead of the image. It should be that difference's standard deviation over the data. The model itself is
            the same: objective and pipeline read it here. Ours, not the paper's.
        class_factors (`tuple[tuple[int, ...], ...]`, *optional*):
            Factors that classes share (a style and a subject, say): the ids of each of the `num_classes` classes, one
            per factor. A class is then embedded as the sum of its factors, each with its own null label, instead of by
            its own row. Ours, not the paper's.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    class_tables = ("class_embedding",)

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PISDMBlock", "PISDMSkipBlock"]
    _repeated_blocks = ["PISDMBlock", "PISDMSkipBlock"]
    _keep_in_fp32_modules = ["A_log", "D", "dt_bias"]
    _skip_layerwise_casting_patterns = [
        "patch_embed",
        "class_embedding",
        "norm",
        "modulation",
        "proj_out",
        "pixel_head",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 49,
        hidden_size: int = 1536,
        state_size: int = 16,
        conv_kernel: int = 3,
        expand: int = 2,
        time_step_rank: int | None = None,
        num_classes: int = 1000,
        low_res_channels: int | None = None,
        scan_directions: tuple[str, ...] = SCAN_DIRECTIONS,
        snake: bool = False,
        num_padding_tokens: int = 1,
        local_enhancement: bool = True,
        long_skips: bool = True,
        overlapping_patches: bool = False,
        pixel_head_channels: int | None = None,
        residual_scale: float | None = None,
        class_factors: tuple[tuple[int, ...], ...] | None = None,
    ):
        super().__init__()
        check_sizes(self.config)
        if hidden_size % 4 != 0:
            raise ValueError(f"`hidden_size` must be divisible by 4 for 2-D sine-cosine positions, got {hidden_size}.")
        if sample_size % patch_size != 0:
            raise ValueError(f"`sample_size` ({sample_size}) must be divisible by `patch_size` ({patch_size}).")
        if not isinstance(scan_directions, (list, tuple)):
            raise ValueError(f"`scan_directions` must be a tuple of names, got `{scan_directions}`.")
        if len(scan_directions) == 0:
            raise ValueError(f"`scan_directions` must name at least one of {', '.join(SCAN_DIRECTIONS)}.")
        for direction in scan_directions:
            check_scan_direction(direction)
        if overlapping_patches and patch_size % 2 != 0:
            raise ValueError(f"`overlapping_patches` needs an even `patch_size`, got {patch_size}.")
        if residual_scale is not None and low_res_channels is None:
            raise ValueError(
                "`residual_scale` makes a higher stage diffuse what its condition lacks, but this is a first stage"
                " (`low_res_channels` is None). Pass `residual_scale=None` or set `low_res_channels`."
            )
        if residual_scale is not None and not (isinstance(residual_scale, Real) and 0 < residual_scale < math.inf):
            raise ValueError(f"`residual_scale` must be None or a positive number, got {residual_scale!r}.")
        time_step_rank = time_step_rank or math.ceil(hidden_size / 16)
        num_outputs = out_channels or in_channels
        num_inputs = in_channels + (low_res_channels or 0)
        # Each layer of the second half scans like its mirror image in the first.
        self.layer_directions = tuple(
            scan_directions[min(i, num_layers - 1 - i) % len(scan_directions)] for i in range(num_layers)
        )

        # Twice the patch's side: half a patch more at each edge.
        patches = {"kernel_size": patch_size, "stride": patch_size}
        if overlapping_patches:
            patches = {"kernel_size": 2 * patch_size, "stride": patch_size, "padding": patch_size // 2}
        self.patch_embed = nn.Conv2d(num_inputs, hidden_size, **patches)
        self.local_in = PISDMLocalEnhancement(hidden_size) if local_enhancement else None
        self.padding_tokens = None
        if num_padding_tokens > 0:
            self.padding_tokens = nn.Parameter(torch.randn(num_padding_tokens, hidden_size) * 0.02)

        self.time_proj = Timesteps(TIME_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIME_FREQUENCIES, hidden_size)
        self.class_embedding = nn.Embedding(self.set_class_factors(class_factors, num_classes), hidden_size)
        self.noise_level_embedding = None
        if low_res_channels is not None:
            self.noise_level_embedding = TimestepEmbedding(TIME_FREQUENCIES, hidden_size)
        self.modulation = nn.Linear(hidden_size, 3 * hidden_size)

        num_skips = num_layers // 2 if long_skips else 0  # an odd depth has a middle layer without a skip
        self.transformer_blocks = nn.ModuleList(
            block_class(hidden_size, state_size, conv_kernel, expand, time_step_rank)
            for block_class in [PISDMBlock] * (num_layers - num_skips) + [PISDMSkipBlock] * num_skips
        )

        self.local_out = PISDMLocalEnhancement(hidden_size) if local_enhancement else None
        self.norm_out = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        if overlapping_patches:
            self.proj_out = nn.ConvTranspose2d(hidden_size, num_outputs, **patches)
        else:
            self.proj_out = nn.Linear(hidden_size, patch_size**2 * num_outputs)
        self.pixel_head = None
        if pixel_head_channels is not None:
            self.pixel_head = PISDMPixelHead(num_outputs + num_inputs, pixel_head_channels, num_outputs, hidden_size)

        self._initialize_weights()
        self.gradient_checkpointing = False

    def _initialize_weights(self) -> None:
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        # Small initial predictions. Zero, as in DiT, would let no gradient reach the layers in the first step.
        nn.init.normal_(self.proj_out.weight, std=0.02)
        nn.init.zeros_(self.proj_out.bias)
        # Modulation starts at zero: initially, timestep and class enter only through their tokens.
        for linear in (self.modulation, self.modulation_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for conv in (self.local_in, self.local_out):
            if conv is not None:
                nn.init.zeros_(conv.weight)
                nn.init.zeros_(conv.bias)
        # Residual branches add up over the layers: scaling them down preserves the variance (Mamba, GPT-2).
        with torch.no_grad():
            for block in self.transformer_blocks:
                block.mixer.out_proj.weight /= math.sqrt(len(self.transformer_blocks))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | int | float,
        class_labels: torch.Tensor,
        low_res: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
        return_dict: bool = True,
        class_weights: torch.Tensor | None = None,
    ) -> PISDMTransformer2DModelOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(B, in_channels, H, W)`):
                The noisy image or latent; `H` and `W` divisible by `patch_size`.
            timestep (`torch.Tensor` of shape `(B,)` or a scalar): Diffusion timestep, embedded in float32.
            class_labels (`torch.Tensor` of shape `(B,)` or `(B, F)`, int64):
                In `0..num_classes`; `num_classes` means no class. A model with `class_factors` also takes the ids of
                its F factors; each factor's null label follows its last id.
            low_res (`torch.Tensor` of shape `(B, low_res_channels, H, W)`, *optional*):
                A higher stage's condition, upsampled to the input's size and noised to `noise_level`
                ([`~ops.conditioning_augmentation.augment_low_res`]). Required if and only if the model has
                `low_res_channels`.
            noise_level (`torch.Tensor` of shape `(B,)` or a scalar, *optional*): In [0, 1); required with `low_res`.
            return_dict (`bool`, defaults to `True`): Whether to return a [`PISDMTransformer2DModelOutput`].
            class_weights (`torch.Tensor` of shape `(B, K)`, *optional*):
                Makes each image a mix of K classes: their shares, for `class_labels` of shape `(B, K)`.

        Returns:
            [`PISDMTransformer2DModelOutput`], or the tuple `(sample, features)`.

        Raises:
            ValueError: The size is not divisible by the patch size, a label is unknown, or the condition does not fit.
        """
        batch_size = hidden_states.shape[0]
        patch_size = self.config.patch_size
        rows, columns = check_input(self.config, hidden_states)
        self._check_condition(hidden_states, low_res, noise_level)
        dtype = hidden_states.dtype

        # 1. Conditioning
        time_token = self.time_embedding(self._sinusoids(timestep, hidden_states))  # (B, D)
        if low_res is not None:
            sinusoids = self._sinusoids(noise_level, hidden_states, scale=NOISE_LEVEL_SCALE)  # (B, TIME_FREQUENCIES)
            time_token = time_token + self.noise_level_embedding(sinusoids)  # (B, D)
        class_token = self._embed_classes(class_labels, class_weights).to(dtype)  # (B, D)
        condition = F.silu(time_token + class_token)  # (B, D)
        modulation = self.modulation(condition).unflatten(1, (3, -1))  # (B, 3, D)

        # 2. Tokens: prefix, image in raster order, padding tokens that are then copied to every line end
        inputs = hidden_states  # (B, in, H, W)
        if low_res is not None:
            inputs = torch.cat([hidden_states, low_res], dim=1)  # (B, in + low_res, H, W)
        tokens = self.patch_embed(inputs).flatten(2).transpose(1, 2)  # (B, hw, D)
        positions = sincos_position_embedding(
            rows, columns, tokens.shape[-1], self.config.sample_size // patch_size, device=tokens.device
        )
        tokens = tokens + positions.to(dtype)
        if self.local_in is not None:
            tokens = self.local_in(tokens, rows, columns)
        sequence = [time_token[:, None], class_token[:, None], tokens]
        if self.padding_tokens is not None:
            sequence.append(self.padding_tokens.to(dtype).expand(batch_size, -1, -1))
        hidden_states = torch.cat(sequence, dim=1)  # (B, 2 + hw + P, D)

        # 3. Layers, each in its own scan order; skips join layers with the same order
        *moves, to_raster = scan_transitions(
            rows,
            columns,
            self.layer_directions,
            snake=self.config.snake,
            num_padding_tokens=self.config.num_padding_tokens,
            num_prefix_tokens=NUM_PREFIX_TOKENS,
            device=hidden_states.device,
        )
        num_layers = len(self.transformer_blocks)
        skips = []
        moves_in_blocks = moves_with_norm(hidden_states, modulation)
        for i, (block, move) in enumerate(zip(self.transformer_blocks, moves)):
            # A compiled block would be compiled anew for each kind of move.
            moves_in_block = moves_in_blocks and block._compiled_call_impl is None
            if move is not None and not moves_in_block:
                hidden_states = move_tokens(hidden_states, move)  # (B, L, D)
            block_inputs = (hidden_states, modulation)
            if self.config.long_skips and i >= num_layers - num_layers // 2:
                block_inputs = (*block_inputs, skips.pop())
            if move is not None and moves_in_block:
                block_inputs = (*block_inputs, move)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *block_inputs)
            else:
                hidden_states = block(*block_inputs)  # (B, L, D)
            if self.config.long_skips and i < num_layers // 2:
                # A view: the middle layer gets this tensor twice, for which torch.compile would otherwise recompile.
                skips.append(hidden_states[:])

        # 4. Output
        if to_raster is None:
            features = hidden_states[:, NUM_PREFIX_TOKENS:]  # (B, hw, D)
        else:
            features = move_tokens(hidden_states, to_raster)  # (B, hw, D)
        hidden_states = features
        if self.local_out is not None:
            hidden_states = self.local_out(hidden_states, rows, columns)
        shift, scale = self.modulation_out(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        hidden_states = torch.addcmul(shift, self.norm_out(hidden_states), 1 + scale)  # (B, hw, D)
        hidden_states = hidden_states.unflatten(1, (rows, columns))  # (B, h, w, D)
        if self.config.overlapping_patches:
            sample = self.proj_out(hidden_states.permute(0, 3, 1, 2))  # (B, C, H, W)
        else:
            patches = self.proj_out(hidden_states).unflatten(3, (patch_size, patch_size, -1))  # (B, h, w, p, p, C)
            sample = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)
        if self.pixel_head is not None:
            sample = self.pixel_head(sample, inputs, condition)  # (B, C, H, W)

        if not return_dict:
            return (sample, features)
        return PISDMTransformer2DModelOutput(sample=sample, features=features)

    def set_class_factors(self, class_factors: Sequence[Sequence[int]] | None, num_classes: int) -> int:
        """Sets which rows of the class embedding make up a class, and returns how many rows it needs."""
        ids, starts, num_rows = None, None, num_classes + 1
        if class_factors is not None:
            sizes = check_class_factors(class_factors, num_classes)
            ids = torch.tensor([*class_factors, sizes], dtype=torch.int64)  # (num_classes + 1, F); last: no class
            # One embedding holds the tables of all factors one after another, each ending with its null label.
            starts = torch.tensor([0, *(size + 1 for size in sizes[:-1])]).cumsum(0)  # (F,)
            num_rows = sum(size + 1 for size in sizes)
        self.register_buffer("class_factor_ids", ids, persistent=False)
        self.register_buffer("class_factor_starts", starts, persistent=False)
        return num_rows

    def _embed_classes(self, class_labels: torch.Tensor, class_weights: torch.Tensor | None = None) -> torch.Tensor:
        if class_weights is not None:
            embeddings = self._embed_classes(class_labels.flatten()).unflatten(0, class_labels.shape)  # (B, K, D)
            return mix_embeddings(embeddings, class_weights)  # (B, D)
        if self.class_factor_ids is None:
            return look_up(self.class_embedding, class_labels, self.config.num_classes)  # (B, D)
        no_class = self.class_factor_ids[-1]  # (F,)

        def embed(factors: torch.Tensor) -> torch.Tensor:
            is_known = (factors >= 0) & (factors <= no_class)
            rows = torch.where(is_known, factors + self.class_factor_starts, -1)  # none, not another factor's
            return self.class_embedding(rows)  # (B, F, D)

        factors = class_labels
        if class_labels.ndim == 1:
            find_factors = partial(F.embedding, weight=self.class_factor_ids)
            factors = look_up(find_factors, class_labels, self.config.num_classes)  # (B, F)
        return look_up(embed, factors, no_class).sum(dim=1)  # (B, D)

    def _sinusoids(
        self, values: torch.Tensor | int | float, hidden_states: torch.Tensor, scale: float = 1.0
    ) -> torch.Tensor:
        # Half precision cannot resolve neighbouring timesteps, so the sinusoids are computed in float32.
        values = torch.as_tensor(values, device=hidden_states.device).float() * scale
        values = values.expand(hidden_states.shape[0])  # (B,)
        return self.time_proj(values).to(hidden_states.dtype)  # (B, TIME_FREQUENCIES)

    def _check_condition(
        self, hidden_states: torch.Tensor, low_res: torch.Tensor | None, noise_level: torch.Tensor | None
    ) -> None:
        channels = self.config.low_res_channels
        if channels is None:
            if low_res is not None or noise_level is not None:
                raise ValueError(
                    "This model is a first stage (`low_res_channels` is None): it takes neither `low_res` nor"
                    " `noise_level`."
                )
            return
        if low_res is None or noise_level is None:
            raise ValueError(
                f"This model is a higher stage (`low_res_channels={channels}`): pass `low_res`, the upsampled"
                " low-resolution image, and its `noise_level`."
            )
        expected = (hidden_states.shape[0], channels, *hidden_states.shape[2:])
        if low_res.shape != expected:
            raise ValueError(
                f"`low_res` must have shape {tuple(expected)}, upsampled to the size of `hidden_states`, got"
                f" {tuple(low_res.shape)}."
            )


def get_class_embedding(transformer: PISDMTransformer2DModel) -> torch.Tensor:
    """
    The embeddings (num_classes + 1, hidden_size) of all classes, the null label last, whether the model stores them or
    sums them from `class_factors`. Several tables (DiM's two) stand side by side.
    """
    weight = torch.cat([getattr(transformer, name).weight for name in transformer.class_tables], dim=1)
    if transformer.config.get("class_factors") is None:
        return weight
    rows = transformer.class_factor_ids + transformer.class_factor_starts  # (num_classes + 1, F)
    return weight[rows.to(weight.device)].sum(dim=1)


def set_class_embedding(
    transformer: PISDMTransformer2DModel,
    weight: torch.Tensor,
    class_factors: Sequence[Sequence[int]] | None = None,
) -> None:
    """
    Replaces a model's classes in place: the rows of its class embedding, `config.num_classes` and
    `config.class_factors`.

    `weight` (num_classes + 1, hidden_size) has one row per class, the null label last; with `class_factors`, one row
    per id of each factor, each factor's null label after its ids. Several tables stand side by side. The copy takes
    the dtype and device of the current weights; raises ValueError if these are offloaded.
    """
    embeddings = [getattr(transformer, name) for name in transformer.class_tables]
    if embeddings[0].weight.is_meta:
        raise ValueError(
            "The class embedding cannot be replaced while its weights are offloaded. Call the pipeline's"
            " `remove_all_hooks()` first, and `enable_sequential_cpu_offload()` again afterwards."
        )
    num_classes = len(weight) - 1 if class_factors is None else len(class_factors)
    for embedding, rows in zip(embeddings, weight.detach().chunk(len(embeddings), dim=1)):
        rows = rows.to(embedding.weight, copy=True).contiguous()
        # Keep the module, and with it the hooks that offloading and casting have attached.
        embedding.weight = nn.Parameter(rows, requires_grad=embedding.weight.requires_grad)
        embedding.num_embeddings = len(rows)
    transformer.register_to_config(num_classes=num_classes)
    if "class_factors" in transformer.config:
        transformer.set_class_factors(class_factors, num_classes)
        for buffer in transformer.buffers(recurse=False):
            buffer.data = buffer.data.to(embeddings[0].weight.device)
        transformer.register_to_config(class_factors=class_factors)


def class_factors_from_names(class_names: Sequence[str], separator: str) -> tuple[tuple[int, ...], ...]:
    """
    Derives `class_factors` from names like `"noto/animal-mammal"`: each position is a factor, whose ids number the
    parts there in sorted order. Raises ValueError if a name has more or fewer parts than the first, or the separator
    is empty.
    """
    if not separator:
        raise ValueError("The separator of class names' parts is empty: pass the text between them, such as '/'.")
    parts = [name.split(separator) for name in class_names]
    for name, row in zip(class_names, parts):
        if len(row) != len(parts[0]):
            raise ValueError(
                f"Class {name!r} has {len(row)} parts between {separator!r}, but {class_names[0]!r} has"
                f" {len(parts[0])}. To use parts as factors, give all names the same number of parts."
            )
    ids = [{part: i for i, part in enumerate(sorted(set(column)))} for column in zip(*parts)]
    return tuple(tuple(factor[part] for factor, part in zip(ids, row)) for row in parts)
